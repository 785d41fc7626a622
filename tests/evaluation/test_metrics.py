"""The metrics of full-scale comparisons: what is said of absent ones, pictures for the networks, and scores.

The networks are small ones with random weights, made here in the formats of the published ones; where torch is not
installed (requirements-metrics.txt), those tests are skipped.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from afa_jax.errors import InputError
from afa_jax.evaluation.metrics.clip_pixels import MEAN, STD, cropped, padded, to_pixels
from afa_jax.evaluation.metrics.inception import clean
from afa_jax.evaluation.metrics.table import METRICS, WEIGHTS, MetricUnavailable, load_metrics, on_device

NAMES = {"fid", "fid_clean", "kid", "is", "clip_t", "clip_i", "aesthetic", "pickscore", "hpsv2", "image_reward"}


def pictures(count: int, seed: int = 0, rows: int = 20, columns: int = 20) -> list[np.ndarray]:
    values = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(x).resize((columns, rows), Image.Resampling.BICUBIC)) for x in values]


def test_every_metric_of_the_papers_has_its_facts():
    assert set(METRICS) == NAMES
    for name, known in METRICS.items():
        assert known.info.name == name and known.info.level == (
            "set" if name in ("fid", "fid_clean", "kid", "is") else "picture"
        )
        assert (known.info.better == "lower") == (name in ("fid", "fid_clean", "kid"))
    assert {weights.key for known in METRICS.values() for weights in known.weights} == set(WEIGHTS)


def test_without_torch_every_metric_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    metrics, absent = load_metrics(sorted(NAMES))
    assert metrics == []
    assert set(absent) == NAMES
    assert set(absent.values()) == {"torch is not installed; pip install -r requirements-metrics.txt"}


def test_a_library_that_does_not_fit_is_named(monkeypatch, tmp_path):
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('wants another torch')")
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    _, absent = load_metrics(["hpsv2"])
    assert absent == {
        "hpsv2": "open_clip cannot be imported (wants another torch); pip install -r requirements-metrics.txt"
    }


def test_networks_are_on_the_device_only_while_they_compute(monkeypatch):
    emptied = []
    torch = SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: emptied.append(places())))
    monkeypatch.setitem(sys.modules, "torch", torch)

    class Network:
        place = "cpu"

        def parameters(self):
            return iter([SimpleNamespace(device=self.place)])

        def to(self, place):
            self.place = f"{place}:0" if place == "cuda" else place

    networks = Network(), Network()

    def places():
        return [network.place for network in networks]

    with on_device("cuda", *networks):
        with on_device("cuda", networks[0]):
            assert places() == ["cuda:0", "cuda:0"]
        assert places() == ["cuda:0", "cuda:0"] and not emptied  # the outer block needs it still
    assert places() == ["cpu", "cpu"] and emptied == [["cpu", "cpu"]]
    with on_device("cpu", *networks):
        assert places() == ["cpu", "cpu"]
    assert len(emptied) == 1


@pytest.mark.parametrize("name", sorted(NAMES - {"fid", "fid_clean", "kid", "is"}))
def test_without_weights_and_offline_it_says_what_brings_them(name, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    weights = METRICS[name].weights[-1]
    with pytest.raises(
        MetricUnavailable,
        match=rf"^\S+/\S+ is not in the hub's cache \(HF_HUB_OFFLINE is set\); hf download \S+/\S+ \S.*, "
        rf"or evaluation\.weights\.{weights.key}=PATH$",
    ):
        weights.find()


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    from huggingface_hub import HfApi, constants

    asked = []

    def fail(self, repository):
        asked.append(repository)
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(
        MetricUnavailable, match=r"is not in the hub's cache \(the hub cannot be reached\); hf download "
    ):
        METRICS["clip_t"].weights[0].find()
    assert asked == ["openai/clip-vit-large-patch14"]


def test_downloaded_weights_need_no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--xswu--HPSv2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "HPS_v2_compressed.pt").write_bytes(b"weights")
    assert METRICS["hpsv2"].weights[0].find().read_bytes() == b"weights"


def test_what_a_user_writes_wrong_is_an_error_and_no_absent_metric(tmp_path):
    for message, name, weights in (
        (r"^metric 'fidd' is not known; take one of fid, ", "fidd", {}),
        (r"^evaluation\.weights 'clip_x' is not known; take one of inception, clip, ", "clip_t", {"clip_x": "a"}),
        (r"^evaluation\.weights\.clip: .*absent is not there; ", "clip_t", {"clip": str(tmp_path / "absent")}),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_metrics([name], weights)
        assert not isinstance(caught.value, MetricUnavailable)


@pytest.mark.parametrize(
    ("rows", "columns", "box"), [(40, 30, (5, 0, 35, 30)), (30, 45, (0, 8, 30, 38)), (30, 30, (0, 0, 30, 30))]
)
def test_cropping_keeps_the_middle_and_does_not_resample_what_fits(rows, columns, box):
    (picture,) = pictures(1, rows=rows, columns=columns)
    top, left, bottom, right = box
    np.testing.assert_array_equal(cropped(picture, 30), picture[top:bottom, left:right])
    left = left - 1 if columns == 45 else left  # 7.5, not rounded but cut
    np.testing.assert_array_equal(cropped(picture, 30, math.floor), picture[top:bottom, left : left + 30])


def test_padding_puts_black_around_the_whole_picture():
    (picture,) = pictures(1, rows=20, columns=41)
    square = padded(picture, 30)
    inner = np.asarray(Image.fromarray(picture).resize((30, 15), Image.Resampling.BICUBIC))
    assert square.shape == (30, 30, 3)
    np.testing.assert_allclose(square[7:22].clip(0, 255), inner, atol=1.001)  # Pillow rounds after each direction
    assert np.abs(square[7:22] - np.round(square[7:22])).max() > 0.4
    assert not square[:7].any() and not square[22:].any()


def test_pixels_are_normalised_by_colour():
    squares = pictures(2)
    pixels = to_pixels(squares)
    assert pixels.shape == (2, 3, 20, 20) and pixels.dtype == np.float32
    for b in range(2):
        for c in range(3):
            expected = (squares[b][:, :, c].astype(np.float64) / 255 - float(MEAN[c])) / float(STD[c])
            np.testing.assert_allclose(pixels[b, c], expected, atol=1e-6)


def test_clean_resizing_is_of_each_colour_without_rounding():
    (picture,) = pictures(1, rows=310, columns=400)
    image = clean(picture)
    assert image.shape == (3, 299, 299) and image.dtype == np.float32
    assert np.abs(image * 128 + 128 - np.round(image * 128 + 128)).max() > 0.4  # not rounded to 0..255
    flat = clean(np.full((40, 60, 3), (0, 128, 255), np.uint8))
    np.testing.assert_allclose(
        flat.reshape(3, -1), np.broadcast_to([[-1], [0], [127 / 128]], (3, 299 * 299)), atol=1e-6
    )
