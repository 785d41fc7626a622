"""What is fuzzed: a valid input of each kind, the files of it that are damaged, and the code that reads them all."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from afa_jax.cli.commands import load_config
from afa_jax.data.folder import CaptionedFolder
from afa_jax.data.parquet import ParquetSource
from afa_jax.data.sources import PictureSource
from afa_jax.data.tar import TarSource
from afa_jax.errors import InputError
from afa_jax.evaluation.comparison.prompts import load_items
from afa_jax.experts.sources import parse_base, parse_expert
from afa_jax.fusion.files import check_aggregators, recorded_fusion
from afa_jax.report.figures import read_report
from afa_jax.sampling.prompt_files import read_prompts
from afa_jax.training.cache.shards import Shards
from afa_jax.training.validation import read_validation
from afa_jax.training.workdir import read_metrics
from afa_jax.weights.description import describe, describe_file
from afa_jax.weights.formats.folders import FolderCheckpoint, save_folder, write_folder
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.lora.baked import with_loras
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import write_tensors
from afa_jax.weights.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.data import formats

TOKENIZER = Path(__file__).parents[2] / "afa_jax" / "data" / "emoji" / "tokenizer"
REPORT = Path(__file__).parents[2] / "docs" / "emoji" / "topics.json"
SCHEDULE = dict(
    _class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    set_alpha_to_one=False, num_train_timesteps=1000,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        make: writes a valid one into an empty folder.
        files: those that are damaged, one at a time, as patterns below the folder.
        read: reads all of it as the commands do; an InputError is a right answer.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def _model(folder: Path) -> None:
    """A diffusers folder of tiny networks."""
    save_folder(
        folder / "model",
        unet=tiny.unet(0, tiny.MICRO_UNET),
        vae=tiny.vae(0),
        text_encoder=tiny.text_encoder(0),
        tokenizer=TOKENIZER,
        scheduler=SCHEDULE,
    )


def _single(folder: Path) -> None:
    _model(folder)
    write_single_file(folder / "model.safetensors", FolderCheckpoint(folder / "model"), metadata={"a": "b"})
    shutil.rmtree(folder / "model")
    (folder / "model.yaml").write_text('model:\n  params:\n    parameterization: "eps"\n    timesteps: 1000\n')


def _read_single(folder: Path) -> None:
    path = folder / "model.safetensors"
    try:
        describe(open_checkpoint(path))
    except InputError as error:
        describe_file(path, error)


def _read_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "model")
    describe(checkpoint)
    write_folder(folder / "copy", checkpoint)
    shutil.rmtree(folder / "copy")


def _lora(folder: Path) -> None:
    _model(folder)
    module, random = "lora_te_text_model_encoder_layers_0_mlp_fc1", np.random.default_rng(0)
    tensors = {
        f"{module}.lora_down.weight": random.normal(size=(2, 8)),
        f"{module}.lora_up.weight": random.normal(size=(16, 2)),
    }
    write_tensors(
        folder / "lora.safetensors",
        {name: array.astype(np.float32) for name, array in tensors.items()} | {f"{module}.alpha": np.float32(2)},
        {"ss_network_dim": "2"},
    )


def _read_lora(folder: Path) -> None:
    checkpoint = with_loras(open_checkpoint(folder / "model"), [(folder / "lora.safetensors", 0.7)])
    for tensor in checkpoint.tensors("text_encoder").values():
        tensor.read()
    dict(checkpoint.metadata)


def _tokenizer(folder: Path) -> None:
    shutil.copytree(TOKENIZER, folder / "tokenizer")


def _tokenizer_json(folder: Path) -> None:
    """As transformers 5 saves it: one file and its settings."""
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "tokenizer")


def _read_tokenizer(folder: Path) -> None:
    Tokenizer(folder)(["octopus and pizza, noto style", ""])


def _folder(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for index in range(3):
            Image.new("RGB", (24, 24), (80 * index, 10, 10)).save(folder / f"{index}.png")
            if kind == "txt":
                (folder / f"{index}.txt").write_text(f"{formats.WORDS[index]}, noto style\n")
        rows = [(f"{index}.png", formats.WORDS[index] + ", noto style") for index in range(3)]
        if kind.endswith("jsonl"):
            lines = [json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in rows]
            (folder / kind).write_text("".join(lines))
        elif kind.endswith("csv"):
            (folder / kind).write_text("file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows))

    return make


def _read_source(source: PictureSource) -> None:
    """Every example as the loader takes it; what it calls bad is right."""
    str(source.fingerprint)
    for index in range(min(len(source), 100)):
        try:
            source[index]
        except InputError as error:
            _check_line(error)


def _check_line(error: InputError) -> None:
    """A message is one line of printable characters of bounded length."""
    text = str(error)
    if not text.isprintable() or len(text) > 3000:
        raise AssertionError(f"a message that is no line: {text[:300]!r}")


def _pictures(folder: Path) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8))
    for index, ending in enumerate(("png", "jpg", "webp", "gif", "bmp", "tif", "avif")):
        exif = Image.Exif()
        exif[0x0112] = 6
        options: dict[str, Any] = dict(exif=exif) if ending in ("png", "jpg", "webp", "tif") else {}
        picture.save(folder / f"{index}.{ending}", **options)
        (folder / f"{index}.txt").write_text("fox, noto style")


def _tar(folder: Path) -> None:
    with tarfile.open(folder / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for index in range(3):
            buffer = io.BytesIO()
            Image.new("RGB", (24, 24)).save(buffer, "PNG")
            for name, data in ((f"{index}.png", buffer.getvalue()), (f"{index}.txt", b"fox, noto style")):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), 1.5
                tar.addfile(member, io.BytesIO(data))
    TarSource(str(folder / "0.tar"), index=True)  # writes the index


def _read_tar(folder: Path) -> None:
    _read_source(TarSource(str(folder / "0.tar"), index=True))


def _run(folder: Path) -> None:
    """The records of a run, of AFA's aggregators for three experts."""
    record = dict(
        format=1, fusion=dict(kind="afa"),
        sabw=dict(hidden=8, transformer_layers=0, heads=2, norm_num_groups=4, sites="last", shared=False),
        experts=[dict(name=name, sha256="0" * 64) for name in "abc"], base="models/base",
        schedule=dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, prediction_type="epsilon"),
        training=dict(steps=16, batch=2, arguments=["--config", "config.py"], config=dict(train=dict(steps=16))),
    )  # fmt: skip
    write_tensors(
        folder / "aggregators.safetensors", {"aggregators.0.conv_out.weight": np.zeros((3, 8, 1, 1), np.float32)}
    )
    (folder / "ensemble.json").write_text(json.dumps(record))
    lines = [dict(step=step, loss=1.0, weights=[0.3, 0.3, 0.4]) for step in range(4)]
    for name in ("metrics.jsonl", "validation.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_run(folder: Path) -> None:
    recorded_fusion(folder)
    check_aggregators(folder)


def _read_logs(folder: Path) -> None:
    read_metrics(folder)
    read_validation(folder)


def _cache(folder: Path) -> None:
    def make(examples: range) -> Any:
        mean = np.ones((len(examples), 1, 2, 2, 1), np.float32)
        return dict(mean=mean, std=mean, states=mean[:, 0]), {}

    Shards(folder, "key", 4, 2).fill(make)


def _read_cache(folder: Path) -> None:
    shards = Shards(folder, "key", 4, 2)
    shards.missing()
    for index in range(4):
        shards.read(index, 0)


def _prompts(name: str, text: str) -> Target:
    def read(folder: Path) -> None:
        read_prompts(folder / name)

    return Target(lambda folder: _write(folder / name, text), (name,), read)


def _items(name: str, text: str) -> Target:
    def read(folder: Path) -> None:
        load_items(ConfigDict(dict(kind="file", path=str(folder / name))))

    return Target(lambda folder: _write(folder / name, text), (name,), read)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _override(folder: Path) -> None:
    _write(folder / "overrides.txt", "train.steps=100\ntrain.optimizer.lr=1e-3\nsample.size=(32, 64)\ndtype=float32\n")


def _read_overrides(folder: Path) -> None:
    text = (folder / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape")
    load_config(str(Path(__file__).parents[2] / "configs" / "emoji.py"), text.splitlines()[:8])


def _sources(folder: Path) -> None:
    _write(
        folder / "sources.json",
        json.dumps(dict(name="a", path="x.safetensors", loras=[["l.safetensors", 0.5]], dtype="float16")),
    )


def _read_sources(folder: Path) -> None:
    try:  # what is fuzzed here is what a config may hold, not JSON
        entry = json.loads((folder / "sources.json").read_text(errors="replace"))
    except (ValueError, RecursionError):
        return
    for parse in (parse_expert, parse_base):
        try:
            parse(entry)
        except InputError as error:
            _check_line(error)


def _report(folder: Path) -> None:
    shutil.copy(REPORT, folder / "report.json")


def _read_report(folder: Path) -> None:
    read_report(folder / "report.json")


def _parquet(folder: Path) -> None:
    formats.write_parquet(folder / "0.parquet", range(3))


def _read_parquet(folder: Path) -> None:
    _read_source(ParquetSource(str(folder / "0.parquet")))


def _read_folder(folder: Path) -> None:
    _read_source(CaptionedFolder(str(folder), verify=False))


def _read_verified(folder: Path) -> None:
    _read_source(CaptionedFolder(str(folder)))


_PICTURES = tuple(f"*.{ending}" for ending in ("png", "jpg", "webp", "gif", "bmp", "tif", "avif"))
_LINES = '{"prompt": "octopus", "negative_prompt": "pizza"}\n{"prompt": "dog"}\n'
_ITEMS = '{"prompt": "octopus", "group": "a", "reference": "x.png"}\n{"prompt": "dog"}\n'

TARGETS: dict[str, Target] = {
    "single file": Target(_single, ("model.safetensors", "model.yaml"), _read_single),
    "diffusers folder": Target(_model, ("model/*/*.json", "model/*/*.safetensors", "model/*.json"), _read_model),
    "LoRA": Target(_lora, ("lora.safetensors",), _read_lora),
    "tokenizer": Target(_tokenizer, ("tokenizer/*",), _read_tokenizer),
    "tokenizer.json": Target(_tokenizer_json, ("tokenizer/*",), _read_tokenizer),
    "captions.jsonl": Target(_folder("captions.jsonl"), ("captions.jsonl",), _read_verified),
    "captions.csv": Target(_folder("captions.csv"), ("captions.csv",), _read_verified),
    "metadata.jsonl": Target(_folder("metadata.jsonl"), ("metadata.jsonl",), _read_verified),
    "captions beside": Target(_folder("txt"), ("*.txt",), _read_folder),
    "pictures": Target(_pictures, _PICTURES, _read_folder),
    "tar": Target(_tar, ("0.tar",), _read_tar),
    "tar's index": Target(_tar, ("*.index.json",), _read_tar),
    "parquet": Target(_parquet, ("0.parquet",), _read_parquet),
    "ensemble.json": Target(_run, ("ensemble.json", "aggregators.safetensors"), _read_run),
    "logs of a run": Target(_run, ("metrics.jsonl", "validation.jsonl"), _read_logs),
    "cache": Target(_cache, ("*.safetensors",), _read_cache),
    "prompts.txt": _prompts("prompts.txt", "octopus, noto style\npizza\na cat and a dog\n"),
    "prompts.jsonl": _prompts("prompts.jsonl", _LINES),
    "evaluation prompts.csv": _items("prompts.csv", 'Prompts,Category\n"octopus, noto style",a\npizza,b\n'),
    "evaluation prompts.jsonl": _items("prompts.jsonl", _ITEMS),
    "evaluation prompts.txt": _items("prompts.txt", "octopus, noto style\npizza\n"),
    "report.json": Target(_report, ("report.json",), _read_report),
    "overrides": Target(_override, ("overrides.txt",), _read_overrides),
    "sources": Target(_sources, ("sources.json",), _read_sources),
}
