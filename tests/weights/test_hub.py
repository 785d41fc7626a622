"""The hub: what is asked of it, what it answers, and the cache without it. No test leaves this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from afa_jax.errors import InputError
from afa_jax.weights.formats.folders import FolderCheckpoint, save_folder
from afa_jax.weights.formats.hub import described, fetch_lora, fetch_model, fetch_run, needed
from afa_jax.weights.load import load_unet, load_vae
from tests import tiny
from tests.weights.test_folders import assert_same

COMMIT = "c0ffee" + 34 * "0"
COMPONENTS = ("unet", "text_encoder", "scheduler")
# The files of SD1.4's repository, shortened.
NAMES = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_flax_model.msgpack",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/readme.bin.txt",
    "v1-4.ckpt",
    "v1-4.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "unet/config.json"]


def test_only_what_is_read_is_wanted():
    wanted = [*CONFIGS, "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    assert needed(NAMES, COMPONENTS, None, "o/n") == sorted([*wanted, "unet/readme.bin.txt"])
    assert needed(NAMES, ("vae", "tokenizer"), None, "o/n") == [
        "model_index.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_the_variant_that_is_asked_for_is_wanted_where_there_is_one():
    wanted = needed(NAMES, ("unet", "text_encoder", "vae"), "fp16", "o/n")
    assert [name for name in wanted if name.endswith(".safetensors")] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(InputError, match=r"^o/n/unet: no variant 'bf16'; there is one without a variant, fp16, non_"):
        needed(NAMES, COMPONENTS, "bf16", "o/n")


def test_flax_weights_are_wanted_where_there_are_no_others_and_pickles_never():
    flax = [name for name in NAMES if not name.startswith("unet/diffusion_pytorch")]
    assert "unet/diffusion_flax_model.msgpack" in needed(flax, ("unet",), None, "o/n")
    pickles = [name for name in NAMES if not name.endswith((".safetensors", ".msgpack"))]
    with pytest.raises(InputError, match=r"^o/n: unet is there as a pickle only \(unet/diffusion_pytorch_model\.bin\)"):
        needed(pickles, COMPONENTS, None, "o/n")


def test_a_repository_of_single_files_says_how_to_name_one():
    with pytest.raises(
        InputError, match=r"^o/n: no vae/diff.* it has 1 single \(v1-4\.safetensors\), to be called owner"
    ):
        needed([name for name in NAMES if "vae" not in name], ("vae",), None, "o/n")
    with pytest.raises(InputError, match=r"^o/n: no vae/diff.*so it is not a diffusers repository$"):
        needed(["README.md"], ("vae",), None, "o/n")


@pytest.mark.parametrize(
    ("variant", "index", "shards"),
    [
        (None, "model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
        ("fp16", "model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("fp16", "model.safetensors.fp16.index.json", "model-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_are_wanted_with_their_index(variant, index, shards):
    mine = [index, shards.format(1), shards.format(2)]
    others = ["model.other-00001-of-00002.safetensors", "model.safetensors.index.other.json"]
    names = [f"text_encoder/{name}" for name in ("config.json", *mine, *others)]
    wanted = needed(names, ("text_encoder",), variant, "o/n")
    # Configs cost nothing, and every index is one.
    assert {name for name in wanted if name.endswith("safetensors")} == {f"text_encoder/{name}" for name in mine[1:]}
    assert f"text_encoder/{index}" in wanted


def test_a_tokenizer_may_be_in_the_root():
    """As in openai/clip-vit-large-patch14."""
    texts = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pytorch_model.bin", *texts]
    assert needed(names, ("tokenizer",), None, "o/n") == sorted(["config.json", *texts])
    assert needed([*NAMES, *texts], ("tokenizer",), None, "o/n") == needed(NAMES, ("tokenizer",), None, "o/n")
    assert not set(texts) & set(needed([*NAMES, *texts], COMPONENTS, None, "o/n"))


# What is asked of the library


@pytest.fixture
def contents():
    """What the files of the hub fixture's repository say, by name; the others are not there after a download."""
    return dict.fromkeys(NAMES)


@pytest.fixture
def hub(monkeypatch, tmp_path, contents):
    """A hub with one repository; a list of what was asked of it."""
    asked: list[tuple] = []

    def model_info(self, repo, *, revision=None):
        asked.append(("list", repo, revision))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in contents])

    def snapshot_download(repo, *, revision=None, allow_patterns=None):
        asked.append(("snapshot", repo, revision, allow_patterns))
        for name in allow_patterns:
            if contents.get(name) is not None:
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(json.dumps(contents[name]))
        return str(tmp_path)

    def hf_hub_download(repo, file, *, revision=None):
        asked.append(("file", repo, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


@pytest.mark.parametrize(
    ("path", "keyword"), [("o/n@refs/pr/1", None), ("o/n", "refs/pr/1"), ("o/n@refs/pr/1", "refs/pr/1")]
)
def test_a_repository_is_downloaded_at_its_revision(hub, tmp_path, path, keyword):
    assert fetch_model(path, COMPONENTS, revision=keyword) == tmp_path
    revision = "refs/pr/1"
    assert hub == [
        ("list", "o/n", revision),
        ("snapshot", "o/n", revision, described(NAMES, COMPONENTS)),
        ("snapshot", "o/n", revision, needed(NAMES, COMPONENTS, None, "")),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "model_index.json",
            dict(_class_name="StableDiffusionXLPipeline"),
            r"'StableDiffusionXLPipeline' is not of the",
        ),
        ("unet/config.json", dict(_class_name="UNet2DConditionModel", addition_embed_type="text_time"), "addition_emb"),
    ],
)
def test_of_another_family_no_weights_are_downloaded(hub, contents, name, text, message):
    contents[name] = text
    with pytest.raises(InputError, match=rf"^o/n: .*{name}: .*{message}"):
        fetch_model("o/n", COMPONENTS)
    assert hub == [("list", "o/n", None), ("snapshot", "o/n", None, described(NAMES, COMPONENTS))]


@pytest.mark.parametrize(("kind", "component"), [("AutoencoderKL", "vae"), ("UNet2DConditionModel", "unet")])
def test_a_repository_may_be_one_network(hub, contents, tmp_path, kind, component):
    """As stabilityai/sd-vae-ft-mse."""
    weights = "diffusion_pytorch_model.safetensors"
    own = dict(_class_name=kind, block_out_channels=[32], down_block_types=["DownBlock2D"])
    contents.clear()
    contents |= {"README.md": None, weights: None, "diffusion_pytorch_model.bin": None}
    contents["config.json"] = own | dict(up_block_types=["UpBlock2D"], cross_attention_dim=8)
    for components in ((component,), ("unet", "vae", "tokenizer", "scheduler")):
        hub.clear()
        assert fetch_model("o/n", components) == tmp_path
        assert hub[1:] == [("snapshot", "o/n", None, names) for names in (["config.json"], ["config.json", weights])]
    with pytest.raises(InputError, match=f"^o/n: it is a {component} alone, and has no text_encoder$"):
        fetch_model("o/n", ("text_encoder",))
    contents.pop(weights)
    with pytest.raises(InputError, match=f"^o/n: {component} is there as a pickle only"):
        fetch_model("o/n", (component,))


def test_a_repository_may_lack_a_network(hub, contents, tmp_path):
    for name in [name for name in contents if name.startswith("text_encoder/")]:
        contents.pop(name)
    assert fetch_model("o/n", COMPONENTS) == tmp_path
    assert hub[-1][-1] == needed(list(contents), [part for part in COMPONENTS if part != "text_encoder"], None, "")
    with pytest.raises(InputError, match=r"^o/n: no text_encoder/model\.safetensors there"):
        fetch_model("o/n", ("text_encoder",))


# LoRAs


@pytest.mark.parametrize("weights", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_of_a_loras_repository_the_lora_is_downloaded(hub, contents, tmp_path, weights):
    contents.clear()
    contents |= dict.fromkeys(["README.md", "model.safetensors", "sub/adapter_config.json", "x.bin", weights])
    assert fetch_lora("o/n@v2") == tmp_path
    contents["adapter_config.json"] = None
    assert fetch_lora("o/n", revision="v2") == tmp_path
    listing = ("list", "o/n", "v2")
    assert hub == [
        listing,
        ("snapshot", "o/n", "v2", [weights]),
        listing,
        ("snapshot", "o/n", "v2", [weights, "adapter_config.json"]),
    ]


def test_one_lora_is_downloaded_with_the_config_beside_it(hub, contents, tmp_path):
    contents |= dict.fromkeys(["a.safetensors", "sub/b.safetensors", "sub/adapter_config.json"])
    assert fetch_lora("o/n/a.safetensors") == tmp_path / "a.safetensors"
    assert fetch_lora("o/n/sub/b.safetensors@v2") == tmp_path / "sub/b.safetensors"
    assert [asked[2:] for asked in hub if asked[0] == "snapshot"] == [
        (None, ["a.safetensors"]),
        ("v2", ["sub/b.safetensors", "sub/adapter_config.json"]),
    ]


@pytest.mark.parametrize(
    ("path", "names", "message"),
    [
        ("o/n", ["pytorch_lora_weights.bin"], "its LoRA is there as a pickle only (pytorch_lora_weights.bin)"),
        ("o/n", ["a.bin", "a.safetensors"], "of its 1 others (a.safetensors) name one, owner/name/file.safetensors"),
        ("o/n", ["README.md"], "neither pytorch_lora_weights.safetensors nor adapter_model.safetensors is there"),
        ("o/n/b.safetensors", ["a.safetensors"], "the repository o/n has no such file"),
        ("o/n/a.bin", ["a.bin"], "pickles are not downloaded"),
        ("model", [], "not a hub id"),
    ],
)
def test_what_is_no_lora_is_said_in_one_line(hub, contents, path, names, message):
    contents.clear()
    contents |= dict.fromkeys(names)
    with pytest.raises(InputError) as error:
        fetch_lora(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert all(asked[0] == "list" for asked in hub)


def test_one_file_is_downloaded_alone(hub, tmp_path):
    assert fetch_model("o/n/v1-4.safetensors", COMPONENTS) == tmp_path / "v1-4.safetensors"
    assert fetch_model("o/n/old/v1.safetensors@beta", COMPONENTS) == tmp_path / "old/v1.safetensors"
    asked = [("v1-4.safetensors", None), ("v1-4.yaml", None), ("old/v1.safetensors", "beta"), ("old/v1.yaml", "beta")]
    assert hub == [("file", "o/n", *one) for one in asked]  # the .yaml may say what the model predicts


def test_a_run_is_two_files(hub, tmp_path):
    assert fetch_run("o/n@v2") == tmp_path
    assert fetch_run(Path("o/n"), revision="v2") == tmp_path
    assert hub == 2 * [("snapshot", "o/n", "v2", ["aggregators.safetensors", "ensemble.json"])]
    with pytest.raises(InputError, match="a trained run on the hub is called owner/name"):
        fetch_run("o/n/aggregators.safetensors")


def test_local_paths_come_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n@v2").mkdir(parents=True)
    (tmp_path / "o" / "n" / "sub").mkdir(parents=True)
    (tmp_path / "o" / "n.safetensors").touch()
    for path in ("o/n", "o/n@v2", "o/n.safetensors", str(tmp_path / "o")):
        assert fetch_model(path, COMPONENTS) == Path(path)
        assert fetch_lora(path) == Path(path)
    assert fetch_run("o/n") == Path("o/n")
    for get in (lambda path, **revision: fetch_model(path, COMPONENTS, **revision), fetch_lora, fetch_run):
        with pytest.raises(
            InputError, match=r"^o/n: revision='v2' is for the hub, and this path is here; leave it out$"
        ):
            get("o/n", revision="v2")
    assert hub == []


def test_a_file_on_the_hub_has_no_variant(hub):
    with pytest.raises(InputError, match=r"^o/n/v1-4\.safetensors: variant='fp16' is for diffusers repositories"):
        fetch_model("o/n/v1-4.safetensors", COMPONENTS, variant="fp16")
    assert hub == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../o/n", "not a hub id"),
        ("./o/n", "not a hub id"),
        ("/o/n", "not a hub id"),
        ("model", "not a hub id"),
        ("o/../n", "not a hub id"),
        ("models/mine.safetensors", "not a hub id"),
        ("models/mine.ckpt", "not a hub id"),
        ("o/n@a@b", "not a hub id"),
        ("o/n/sub", "not a file on the hub like owner/name/file.safetensors"),
        ("o/n/v1-4.ckpt", "pickles are not downloaded"),
        ("o/n@v1", "two revisions, 'v1' and 'v2'"),
        ("o/n\0", "not a hub id"),
    ],
)
def test_what_is_no_hub_id_is_said_without_asking(hub, path, message):
    with pytest.raises(InputError, match=message) as error:
        fetch_model(path, COMPONENTS, revision="v2")
    assert str(error.value).startswith(f"{path}: ".replace("\0", "\\x00")) and "\n" not in str(error.value)
    assert hub == []


# What the library answers


def answer(kind: type[Exception]) -> Exception:
    """An error as the library raises it: with the whole of the server's answer, several lines."""
    text = "401 Client Error. (Request ID: Root=1-2;3)\n\nRepository Not Found for url: x.\nPlease make sure"
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "it is gated: accept its terms"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.RevisionNotFoundError, "it has no revision 'v2'"),
        (errors.RemoteEntryNotFoundError, "it has no such file"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and it is not in the cache"),
        (errors.HfHubHTTPError, r"401 Client Error\. \(Request ID: Root=1-2;3\) Repository Not Found"),
        (errors.HTTPError, "401 Client Error"),
        (OSError, "401 Client Error"),
    ],
)
@pytest.mark.parametrize("path", ["o/n", "o/n/v1.safetensors"])
def test_errors_of_the_hub_are_one_line(hub, monkeypatch, kind, message, path):
    def fail(*args, **kwargs):
        raise answer(kind)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    with pytest.raises(InputError, match=rf"^{path}: .*not to be had from the hub \({message}.*\)$") as error:
        fetch_model(path, COMPONENTS, revision="v2")
    assert "\n" not in str(error.value)


# The cache, by the library itself


def cached(cache: Path, model: Path, commit: str, ref: str) -> Path:
    """Lay a folder out as the library does: blobs by hash, and links to them in the snapshot of a commit."""
    repo = cache / "models--owner--name"
    for file in [file for file in model.rglob("*") if file.is_file()]:
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link = repo / "snapshots" / commit / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of one repository with a U-Net at two revisions: the folder, the U-Nets, the snapshots."""
    base = tmp_path_factory.mktemp("cache")
    unets = [tiny.unet(seed, tiny.MICRO_UNET) for seed in (0, 1)]
    snapshots = []
    for unet, commit, ref in zip(unets, (COMMIT, COMMIT[::-1]), ("main", "beta"), strict=True):
        save_folder(base / ref, unet=unet)
        (base / ref / "single.safetensors").write_bytes(b"")
        snapshots.append(cached(base / "home" / "hub", base / ref, commit, ref))
    return base, unets, snapshots


@pytest.fixture
def offline(cache, monkeypatch):
    """The U-Nets and snapshots of the cache, and no network."""
    base, unets, snapshots = cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(base / "home" / "hub"))
    return unets, snapshots


def test_a_cached_repository_is_read_offline(offline):
    unets, (main, beta) = offline
    revisions = ((None, main), ("main", main), (COMMIT, main), ("beta", beta), (COMMIT[::-1], beta))
    for revision, expected in revisions:
        assert fetch_model("owner/name", ("unet", "scheduler"), revision=revision) == expected
    assert fetch_model("owner/name@beta", ("unet",)) == beta
    assert fetch_model("owner/name/single.safetensors", ("unet",)) == main / "single.safetensors"
    for snapshot, unet in zip((main, beta), unets, strict=True):
        assert_same(load_unet(FolderCheckpoint(snapshot)), unet)


@pytest.mark.parametrize(
    ("path", "components", "message"),
    [
        ("owner/other", ("unet",), r"\(HF_HUB_OFFLINE is set, and it is not in the cache\)$"),
        ("owner/name@gamma", ("unet",), r"\(HF_HUB_OFFLINE is set, and it is not in the cache\)$"),
        ("owner/name/other.safetensors", ("unet",), r"\(HF_HUB_OFFLINE is set, and it is not in the cache\)$"),
        ("owner/name", ("unet", "vae"), r"^owner/name: HF_HUB_OFFLINE is set, and the cache has no weights of its vae"),
        ("owner/na--me", ("unet",), r"not to be had from the hub \(Cannot have -- or \.\. in repo_id"),
    ],
)
def test_what_is_not_cached_is_said_offline(offline, path, components, message):
    with pytest.raises(InputError, match=message) as error:
        fetch_model(path, components)
    assert "\n" not in str(error.value)


CODE = """
import sys
from afa_jax.weights.formats.hub import fetch_model
fetch_model(sys.argv[1], ("unet",))
assert "huggingface_hub" not in sys.modules
print(fetch_model("owner/name", ("unet",)))
"""


def test_the_library_is_imported_for_hub_ids_only_and_obeys_the_environment(cache):
    """The whole way, as a user has it: nothing patched."""
    base, _, (main, _) = cache
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= dict(HF_HOME=str(base / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", CODE, str(base)]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == f"{main}\n"


def test_the_cache_serves_when_the_hub_does_not(offline, monkeypatch):
    _, (main, _) = offline

    def fail(*args, **kwargs):
        raise answer(errors.HfHubHTTPError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch_model("owner/name", ("unet",)) == main
    with pytest.raises(InputError, match="401 Client Error"):
        fetch_model("owner/other", ("unet",))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(errors.GatedRepoError, "it is gated"), (errors.RepositoryNotFoundError, "no such repository")],
)
def test_the_cache_does_not_hide_that_a_repository_is_closed(offline, monkeypatch, kind, message):
    def fail(*args, **kwargs):
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for get in (lambda path: fetch_model(path, ("unet",)), fetch_lora):
        with pytest.raises(InputError, match=message):
            get("owner/name")


def test_cached_loras_and_networks_alone_are_read_offline(tmp_path, monkeypatch):
    save_folder(tmp_path / "model", vae=tiny.vae(0))
    repository = tmp_path / "model" / "vae"
    (repository / "adapter_model.safetensors").touch()
    snapshot = cached(tmp_path / "hub", repository, COMMIT, "main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch_lora("owner/name") == snapshot
    assert fetch_lora("owner/name/adapter_model.safetensors") == snapshot / "adapter_model.safetensors"
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and the cache has no LoRA of it"):
        fetch_lora("owner/name/other.safetensors")
    assert fetch_model("owner/name", ("vae",)) == snapshot
    assert_same(load_vae(FolderCheckpoint(snapshot)), tiny.vae(0))
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and the cache has no weights of its vae"):
        fetch_model("owner/name", ("vae",))


# A hub, asked by the library itself

FILES = {name: name.encode() * 3 for name in [*NAMES, "vae/[odd].json"]}
FILES["v1-4.yaml"] = b"model: {}"
FILES["model_index.json"] = b'{"_class_name": "StableDiffusionPipeline"}'


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as the library asks for: one repository, o/n, and one that is gated."""

    def do_GET(self):
        path, code, body, headers = unquote(self.path.partition("?")[0]), 200, b"{}", {}
        _, _, _, *rest = path.removeprefix("/api/models").split("/")
        if path.startswith("/api/models/gated/"):
            code, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif not path.startswith(("/api/models/o/n", "/o/n/resolve/")):
            code, headers = 404, {"X-Error-Code": "RepoNotFound"}
        elif "beta" in rest:
            code, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        elif "/tree/" in path:
            files = [dict(type="file", path=name, size=len(data), oid=name) for name, data in FILES.items()]
            body = json.dumps(files).encode()
        elif path.startswith("/api/"):
            siblings = [dict(rfilename=name) for name in FILES]
            about = dict(_id="1", id="o/n", modelId="o/n", private=False, tags=[], downloads=0, likes=0)
            body = json.dumps(about | dict(sha=COMMIT, siblings=siblings)).encode()
        elif (name := path.split("/", 5)[5]) in FILES:
            body, headers = FILES[name], {"ETag": hashlib.sha1(FILES[name]).hexdigest(), "X-Repo-Commit": COMMIT}
        else:
            code, headers = 404, {"X-Error-Code": "EntryNotFound"}
        self.send_response(code)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, format, *args):
        pass


ASK = """
import json, sys
from afa_jax.errors import InputError
from afa_jax.weights.formats.hub import fetch_model
for path, components, variant in json.loads(sys.argv[1]):
    try:
        print(fetch_model(path, components, variant=variant))
    except InputError as error:
        print("error:", error)
"""


def ask(home, endpoint, *requests):
    """The answers to fetch's arguments, each on its line, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= dict(HF_HOME=str(home), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_PROGRESS_BARS="1", no_proxy="127.0.0.1")
    command = [sys.executable, "-c", ASK, json.dumps(requests)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_library_downloads_what_is_wanted_and_the_cache_outlives_the_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    snapshot = tmp_path / "hub" / "models--o--n" / "snapshots" / COMMIT
    try:
        answers = ask(
            tmp_path,
            endpoint,
            ("o/n", ("vae", "tokenizer"), None),
            ("o/n@main", ("text_encoder",), "fp16"),
            ("o/n/v1-4.safetensors", (), None),
            ("o/n/v2.safetensors", (), None),
            ("o/n@beta", ("vae",), None),
            ("o/other", ("vae",), None),
            ("gated/n", ("vae",), None),
        )
    finally:
        server.shutdown()
        server.server_close()
    assert answers[:3] == [str(snapshot), str(snapshot), str(snapshot / "v1-4.safetensors")]
    for answer, reason in zip(answers[3:], ("no such file", "no revision 'beta'", "private", "gated"), strict=True):
        assert answer.startswith("error: ") and reason in answer.partition("from the hub (")[2]
    wanted = [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "v1-4.safetensors",
        "v1-4.yaml",
        "vae/[odd].json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    found = sorted(file for file in snapshot.rglob("*") if file.is_file())
    assert [file.relative_to(snapshot).as_posix() for file in found] == wanted
    assert all(file.read_bytes() == FILES[file.relative_to(snapshot).as_posix()] for file in found)
    assert ask(tmp_path, endpoint, ("o/n", ("vae",), None), ("o/n", ("unet",), None), ("o/other", ("vae",), None)) == [
        str(snapshot),
        f"error: o/n: the hub cannot be reached, and the cache has no weights of its unet ({snapshot})",
        "error: o/other: no such file or folder, and not to be had from the hub ([Errno 111] Connection refused)",
    ]
