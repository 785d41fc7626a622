"""FID, KID and the inception score, by the Inception network of the original FID (2015-12-05).

torch-fidelity has the network and its weights, converted from TensorFlow's (Apache-2.0). Its own resizing is
TensorFlow 1's; here are those of the two libraries whose FID papers report:

pytorch-fid: colours in 0..1, torch's bilinear filter to 299 x 299 without smoothing, then 2 x - 1.
clean-fid: Pillow's bicubic filter to 299 x 299, which smooths, on each colour in float32, clipped to 0..255, then
    (x - 128) / 128 (Parmar et al. 2022, arXiv 2104.11222).
"""

from __future__ import annotations

import dataclasses
import http.client
import io
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa_jax.evaluation.distances import frechet_distance, inception_score, kernel_distance
from afa_jax.evaluation.metrics.clip_pixels import resize_colours
from afa_jax.evaluation.metrics.table import MetricInfo, MetricUnavailable, in_batches, on_device, read_state
from afa_jax.files import replace_bytes
from afa_jax.weights.tensors import WeightsError

SIZE = 299
_TIMEOUT = 30  # seconds within which a download must start, and continue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """The network up to its pooled features ``[k, 2048]``, and the metrics computed from them.

    ``prepare`` turns a uint8 picture into float32 ``[3, 299, 299]``. ``classes`` ``[1008, 2048]`` gives the logits of
    the inception score, without biases, as in its authors' code.
    """

    infos: tuple[MetricInfo, ...]
    network: Any
    classes: np.ndarray
    prepare: Callable[[np.ndarray], np.ndarray]
    device: str

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        import torch

        def compute(batch: Sequence[np.ndarray]) -> np.ndarray:
            images = torch.from_numpy(np.stack([self.prepare(picture) for picture in batch]))
            with torch.inference_mode():
                return self.network(images.to(self.device)).cpu().numpy()

        with on_device(self.device, self.network):
            return in_batches(pictures, compute)

    def distance(self, features: np.ndarray, real: np.ndarray) -> dict[str, float]:
        values: dict[str, Callable[[], float]] = {
            "fid": lambda: frechet_distance(features, real),
            "fid_clean": lambda: frechet_distance(features, real),
            "kid": lambda: kernel_distance(features, real).value,
            "is": lambda: inception_score(features @ self.classes.T).value,
        }
        return {info.name: values[info.name]() for info in self.infos}


def load_inception(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> Inception:
    """Load Inception with pytorch-fid's resizing, from ``inception``, torch-fidelity's state dict."""
    return _load(infos, paths["inception"], device, bilinear)


def load_clean_inception(infos: tuple[MetricInfo, ...], paths: Mapping[str, Path], device: str) -> Inception:
    """Load Inception with clean-fid's resizing, from ``inception``, torch-fidelity's state dict."""
    return _load(infos, paths["inception"], device, clean)


def _load(
    infos: tuple[MetricInfo, ...], path: Path, device: str, prepare: Callable[[np.ndarray], np.ndarray]
) -> Inception:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity would run the code of a pickle. It gets one made here, from tensors alone.
    own = io.BytesIO()
    torch.save(read_state(path), own)
    own.seek(0)
    try:
        whole = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=own)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not torch-fidelity's Inception weights; evaluation.weights.inception") from error
    *layers, classifier = whole.children()
    network = torch.nn.Sequential(*layers, torch.nn.Flatten()).eval()
    return Inception(
        infos=infos, network=network, classes=classifier.weight.cpu().numpy(), prepare=prepare, device=device
    )


def find_weights() -> Path:
    """Return the path of torch-fidelity's Inception weights in torch's cache; download them if they are missing.

    Raises:
        MetricUnavailable: they are missing and cannot be downloaded.
    """
    import torch
    from huggingface_hub import constants
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if path.is_file():
        return path
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            with urllib.request.urlopen(URL_INCEPTION_V3, timeout=_TIMEOUT) as answer:
                data = answer.read()
            os.makedirs(path.parent, exist_ok=True)
            replace_bytes(path, data)
            return path
        except (OSError, http.client.HTTPException) as error:
            reason = f"the download failed: {' '.join(str(error).split())[:200]}"
    raise MetricUnavailable(
        f"the Inception weights are not in torch's cache ({reason}); "
        f"download {path.name} from torch-fidelity's release 0.2.0, and evaluation.weights.inception=FILE"
    )


def bilinear(picture: np.ndarray) -> np.ndarray:
    """Return the network's input as pytorch-fid makes it from a picture."""
    import torch

    image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].float() / 255
    resized = torch.nn.functional.interpolate(image, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (2 * resized - 1)[0].numpy()


def clean(picture: np.ndarray) -> np.ndarray:
    """Return the network's input as clean-fid makes it from a picture."""
    return (resize_colours(picture, SIZE, SIZE).transpose(2, 0, 1).clip(0, 255) - 128) / 128
