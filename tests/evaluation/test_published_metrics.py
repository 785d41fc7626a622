"""The metrics of full-scale comparisons against their authors' code and their libraries, on small random networks.

tests/goldens/metrics.json holds what the authors' code gives (tests/reference/make_metrics.py).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afa_jax.evaluation.distances import frechet_distance, inception_score, kernel_distance
from afa_jax.evaluation.metrics.inception import find_weights
from afa_jax.evaluation.metrics.table import (
    MetricUnavailable,
    PictureMetric,
    SetMetric,
    load_metrics,
    read_state,
)
from afa_jax.weights.tensors import WeightsError
from tests.reference.weights import random_input, random_state_dict

torch = pytest.importorskip("torch", reason="needs torch: pip install -r requirements-metrics.txt")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "metrics.json").read_text())
PROMPTS: list[str] = GOLDEN["prompts"]
TOKENIZER = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji" / "tokenizer"


def picture(key: str, rows: int, columns: int) -> np.ndarray:
    values = (random_input(key, (6, 6, 3)) * 60 + 128).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(values).resize((columns, rows), Image.Resampling.BICUBIC))


PICTURES = [picture(f"metrics/{i}", *size) for i, size in enumerate(GOLDEN["sizes"])]


def weights(case: str) -> dict:
    state = {
        key: torch.from_numpy(np.asarray(x)) for key, x in random_state_dict(case, GOLDEN[case]["parameters"]).items()
    }
    return state | {key: 0.5 + x.abs() for key, x in state.items() if key.endswith("running_var")}


def scores(
    name: str,
    paths: Mapping[str, Path],
    pictures: Sequence[np.ndarray] = PICTURES,
    prompts: Sequence[str] = PROMPTS,
    references: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    (metric,), _ = load_metrics([name], {key: str(path) for key, path in paths.items()}, device="cpu")
    assert isinstance(metric, PictureMetric) and not isinstance(metric, SetMetric)
    result = metric(pictures, prompts, references)
    assert set(result) == {name} and result[name].dtype == np.float64
    return result[name]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP model and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes
            | dict(vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id),
            vision_config=sizes | dict(image_size=24, patch_size=8),
            projection_dim=12,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def through_transformers(
    folder: Path, pictures: Sequence[np.ndarray], prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits of each picture and prompt, and the picture's embedding, by transformers' own preprocessing."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        seen = processor([Image.fromarray(x) for x in pictures], return_tensors="pt")
        out = model(pixel_values=seen["pixel_values"], **tokens)
    return out.logits_per_image.diag().numpy(), out.image_embeds.numpy(), model.logit_scale.exp().item()


def test_clip_scores_are_transformers_and_pickscore_is_scaled(clip):
    logits, seen, scale = through_transformers(clip, PICTURES, PROMPTS)
    np.testing.assert_allclose(scores("clip_t", {"clip": clip}), 100 * logits / scale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores("pickscore", dict(pickscore=clip, pickscore_tokenizer=clip)), logits, rtol=1e-4)
    _, real, _ = through_transformers(clip, PICTURES[::-1], PROMPTS)
    np.testing.assert_allclose(
        scores("clip_i", {"clip": clip}, references=PICTURES[::-1]), 100 * (seen * real).sum(1), rtol=1e-4
    )
    np.testing.assert_allclose(scores("clip_i", {"clip": clip}, references=PICTURES), 100, rtol=1e-6)


def test_a_picture_s_score_does_not_depend_on_the_others(clip):
    many, prompts = [PICTURES[i % 2] for i in range(37)], [PROMPTS[i % 2] for i in range(37)]
    together = scores("clip_t", {"clip": clip}, many, prompts)
    np.testing.assert_allclose(together, np.resize(scores("clip_t", {"clip": clip}), 37), rtol=1e-5)
    with pytest.raises(ValueError, match="1 prompts for 2 pictures"):
        scores("clip_t", {"clip": clip}, prompts=PROMPTS[:1])


def test_aesthetic_head_on_unit_embeddings(clip, tmp_path):
    head = torch.nn.Sequential(
        *(torch.nn.Linear(12, 10), torch.nn.Dropout(0.2), torch.nn.Linear(10, 5), torch.nn.Dropout(0.2)),
        *(torch.nn.Linear(5, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)),
    ).eval()
    torch.save({f"layers.{key}": x for key, x in head.state_dict().items()}, tmp_path / "head.pth")
    _, seen, _ = through_transformers(clip, PICTURES, PROMPTS)
    with torch.no_grad():
        expected = head(torch.from_numpy(seen))[:, 0].numpy()
    np.testing.assert_allclose(
        scores("aesthetic", {"clip": clip, "aesthetic": tmp_path / "head.pth"}), expected, rtol=1e-4
    )


def test_metrics_of_one_network_share_it_and_an_absent_one_costs_no_other(clip, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(clip / "empty"))
    metrics, absent = load_metrics(["clip_t", "aesthetic", "clip_i"], {"clip": str(clip)}, "cpu")
    assert [[info.name for info in metric.infos] for metric in metrics] == [["clip_t", "clip_i"]]
    assert list(absent) == ["aesthetic"] and absent["aesthetic"].startswith("trl-lib/ddpo-aesthetic-predictor is not")
    assert isinstance(metrics[0], PictureMetric)
    # clip_i is left out where there are no real pictures.
    assert set(metrics[0](PICTURES, PROMPTS)) == {"clip_t"}


def test_image_reward_is_the_authors(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(GOLDEN["image_reward"]["vocabulary"]))
    torch.save(weights("image_reward"), tmp_path / "ImageReward.pt")
    found = scores("image_reward", {"image_reward": tmp_path / "ImageReward.pt", "bert_tokenizer": tmp_path})
    np.testing.assert_allclose(found, GOLDEN["image_reward"]["scores"], rtol=2e-4, atol=2e-4)
    assert abs(found[0] - found[1]) > 0.01


def test_hpsv2_is_the_authors(tmp_path):
    pytest.importorskip("open_clip", reason="needs open_clip: pip install -r requirements-metrics.txt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": GOLDEN["hpsv2"]["config"]}))
    torch.save(weights("hpsv2"), tmp_path / "open_clip_pytorch_model.bin")
    found = scores("hpsv2", {"hpsv2": tmp_path})
    np.testing.assert_allclose(found, GOLDEN["hpsv2"]["scores"], rtol=2e-4, atol=1e-5)
    assert abs(found[0] - found[1]) > 0.01


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception weights by name, under torch-fidelity's keys."""
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity: pip install -r requirements-metrics.txt")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    state = weights("inception")
    counts = {k.replace("running_var", "num_batches_tracked"): torch.tensor(0) for k in state if "running_var" in k}
    torch.save(state | counts, path)
    return path


def test_inception_features_are_pytorch_fid_s_and_clean_fid_s(inception):
    metrics, absent = load_metrics(["fid", "fid_clean", "kid", "is"], {"inception": str(inception)}, "cpu")
    assert not absent
    assert [[info.name for info in metric.infos] for metric in metrics] == [["fid", "kid", "is"], ["fid_clean"]]
    for metric, key in zip(metrics, ("features", "clean_features"), strict=True):
        assert isinstance(metric, SetMetric) and not isinstance(metric, PictureMetric)
        features = metric.features(PICTURES)
        assert features.shape == (2, 2048) and features.dtype == np.float32
        expected = np.array(GOLDEN["inception"][key])
        np.testing.assert_allclose(features[:, ::256], expected, atol=1e-3 * np.abs(expected).max())


def test_figures_of_sets_are_those_of_their_features(inception):
    from torch_fidelity.metric_isc import isc_features_to_metric

    (metric,), _ = load_metrics(["is", "kid", "fid"], {"inception": str(inception)}, "cpu")
    assert isinstance(metric, SetMetric)
    one, two = (np.abs(np.random.default_rng(seed).standard_normal((40, 2048))).astype(np.float32) for seed in (0, 1))
    figures = metric.distance(one, two)
    logits = one @ metric.classes.T  # type: ignore[attr-defined]
    expected = dict(
        fid=frechet_distance(one, two), kid=kernel_distance(one, two).value, **{"is": inception_score(logits).value}
    )
    assert figures == expected
    shuffled = torch.from_numpy(logits[np.random.default_rng(0).permutation(40)])
    theirs = isc_features_to_metric(shuffled, splits=10, shuffle=False)
    np.testing.assert_allclose(inception_score(logits), tuple(theirs.values()), rtol=1e-6)


def test_inception_weights_are_looked_for_where_torch_fidelity_does(inception, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        MetricUnavailable, match=r"^the Inception weights are not in torch's cache \(HF_HUB_OFFLINE is set"
    ):
        find_weights()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"weights")
    assert find_weights() == path


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"layers.0.weight": Code()}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth: not to be read as weights"):
        read_state(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "key"),
    [("fid", "inception"), ("hpsv2", "hpsv2"), ("image_reward", "image_reward"), ("aesthetic", "aesthetic")],
)
def test_weights_of_something_else_are_an_error_of_one_line(name, key, clip, tmp_path):
    pytest.importorskip({"fid": "torch_fidelity", "hpsv2": "open_clip"}.get(name, "transformers"))
    if name == "hpsv2":
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": GOLDEN["hpsv2"]["config"]}))
        torch.save({"a": torch.zeros(2)}, tmp_path / "open_clip_pytorch_model.bin")
        path = tmp_path
    else:
        path = tmp_path / "other.pth"
        torch.save({"a": torch.zeros(2)}, path)
    key = "inception" if name == "fid" else name
    others = {"clip": clip} if name == "aesthetic" else {"bert_tokenizer": tmp_path} if name == "image_reward" else {}
    with pytest.raises(WeightsError) as caught:
        load_metrics([name], {key: str(path)} | {other: str(folder) for other, folder in others.items()}, "cpu")
    assert "\n" not in str(caught.value)
