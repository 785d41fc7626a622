"""A config for a user's own models: short, complete, and with the commands that it is for."""

from afa_jax import convert, new_config
from afa_jax.cli.commands import load_config, run


def test_models_and_prompts_are_enough_to_sample_and_to_compare(root, tmp_path, capsys):
    out, prompts = tmp_path / "mine.py", tmp_path / "prompts.txt"
    prompts.write_text("octopus and pizza\nowl\n")
    models = [f"--base={root}/base", f"--expert=a={root}/a", f"--expert=b={root}/b", f"--prompts={prompts}"]
    assert run(new_config.main, ["mine", *models, f"--out={out}"]) == 0
    config = load_config(str(out))
    assert [expert["name"] for expert in config.experts] == ["a", "b"] and config.base == f"{root}/base"
    assert config.evaluation.prompts.path == str(prompts)
    for text in (capsys.readouterr().out, out.read_text()):
        assert "afa_jax.sample --config" in text
        assert f"afa_jax.evaluate --config {out} --out runs/mine/evaluation" in text
    before = out.read_bytes()
    assert run(new_config.main, ["mine", *models, f"--out={out}"]) == 2
    assert str(out) in capsys.readouterr().err and out.read_bytes() == before


def test_all_that_a_base_lacks_is_said_at_once(root, tmp_path, capsys):
    bare = tmp_path / "bare.safetensors"
    assert run(convert.main, [f"{root}/a/unet", "--out", str(bare)]) == 0
    arguments = ["mine", f"--base={bare}", f"--expert=a={root}/a", f"--out={tmp_path}/mine.py"]
    assert run(new_config.main, arguments) == 2
    error = capsys.readouterr().err
    assert "no VAE and no tokenizer" in error and "take a base model" in error and "--tokenizer" in error
