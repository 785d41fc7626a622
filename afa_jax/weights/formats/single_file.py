"""LDM single files: U-Net, VAE and text encoder in one safetensors file, as most shared checkpoints are.

Files are read and written in LDM's layout (``ldm_keys.py``). The tensors of an unpublished architecture do not
determine its heads, norm groups and schedule. Files written here therefore have them in their metadata:
``afa_jax.configs`` is JSON, with the fields of each component's config.json, or of scheduler_config.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afa_jax.errors import InputError
from afa_jax.files import check_new, writing
from afa_jax.models.configs import TextConfig, VAEConfig
from afa_jax.weights.checkpoint import (
    NETWORK_CONFIGS,
    NETWORKS,
    Checkpoint,
    hash_tensors,
    network_config,
    prediction_type,
    rounded,
)
from afa_jax.weights.expected import NetworkConfig, check_tensors, expected_shapes
from afa_jax.weights.formats.families import family_of
from afa_jax.weights.formats.ldm_configs import found_config
from afa_jax.weights.formats.ldm_keys import UNET, VAE, common_spelling, ema_key, is_unused, ldm_shape, ldm_table
from afa_jax.weights.predictions import agreed, check_prediction, said_beside, said_inside
from afa_jax.weights.tensors import (
    Tensor,
    TensorFile,
    Tensors,
    WeightsError,
    check_names,
    checked,
    listed,
    open_tensors,
    result_dtype,
    write_tensors,
)

if TYPE_CHECKING:
    from jax.typing import DTypeLike

CONFIGS = "afa_jax.configs"
_PREFIXES = dict(unet=UNET, vae=VAE, text_encoder="cond_stage_model.")
_SCHEDULER = dict(
    _class_name="DDIMScheduler",
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=False,
)
# The prediction type by global_step, for the published 2.0-base and 2.1.
_STEPS: Mapping[float | None, str] = {875000: "epsilon", 110000: "v_prediction"}
_EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
_REMOVE = "take them out with the safetensors library (load_file, save_file)"
_INCOMPLETE = "fetch the file again, or convert the model from a diffusers folder"


class UnknownPrediction(WeightsError):
    """The file does not say what its U-Net predicts: a Stable Diffusion 2.x model without metadata."""


@dataclasses.dataclass(frozen=True)
class SingleFileCheckpoint:
    """An LDM single file as a Checkpoint.

    Its components are those of which it has tensors, and ``scheduler`` if it has a U-Net. A network's hash is of its
    own tensors, not of the file. Experts are recorded by U-Net and text encoder, so they stay the same experts when the
    file is written again with another VAE or more metadata, or into a MemoryCheckpoint.

    Attributes:
        path: a .safetensors file.
        prediction_type: ``epsilon`` or ``v_prediction``, whatever the file says.
        ema: take the moving average of the U-Net (``model_ema.*``) that training files carry.

    Raises:
        WeightsError: the file cannot be read, is of another family of models, or has keys of no network.
    """

    path: Path
    prediction_type: str | None = None
    ema: bool = False

    def __post_init__(self) -> None:
        check_prediction(self.prediction_type)
        family_of({key: tensor.shape for key, tensor in self._stored.items()}).check(self.path)
        prefixes = tuple(_PREFIXES.values())
        if surplus := sorted(key for key in self._stored if not key.startswith(prefixes) and not is_unused(key)):
            raise WeightsError(
                f"{self.path}: {listed('surplus', surplus)}, of no network of Stable Diffusion; {_REMOVE}"
            )

    @functools.cached_property
    def _file(self) -> TensorFile:
        return open_tensors(self.path)

    @functools.cached_property
    def _stored(self) -> Tensors:
        """Return all tensors by LDM's key."""
        tensors = {common_spelling(key): tensor for key, tensor in self._file.tensors.items()}
        spelled = Counter(map(common_spelling, self._file.tensors))
        used = (key for key in spelled if not is_unused(key) or key.startswith("model_ema."))
        if twice := sorted(key for key in used if spelled[key] > 1):
            raise WeightsError(f"{self.path}: {listed('tensors', twice)} twice, in two spellings; of one {_REMOVE}")
        alone = "decoder.conv_in.weight" in tensors
        return {VAE + key: tensor for key, tensor in tensors.items()} if alone else tensors

    @functools.cached_property
    def _own_configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the configs that this project writes into its own files' metadata; empty for other files."""
        try:
            configs = json.loads(self.metadata.get(CONFIGS, "{}"))
        except (ValueError, RecursionError):
            configs = None
        if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
            raise WeightsError(f"{self.path}: its metadata {CONFIGS} is damaged; write the file again")
        return configs

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._file.metadata

    @functools.cached_property
    def components(self) -> tuple[str, ...]:
        used = [key for key in self._stored if not is_unused(key)]
        found = [name for name in NETWORKS if any(key.startswith(_PREFIXES[name]) for key in used)]
        return (*found, "scheduler") if "unet" in found else tuple(found)

    @property
    def tokenizer(self) -> Path | None:
        return None

    @property
    def has_ema(self) -> bool:
        """Return whether the file carries the moving average of its U-Net as well."""
        return any(key.startswith("model_ema.") and key not in _EMA_COUNTERS for key in self._stored)

    @property
    def unused(self) -> int:
        """Count the file's tensors that no component uses: moving averages, training state, spare layers."""
        networks = [name for name in self.components if name in NETWORKS]
        return len(self._stored) - sum(len(ldm_table(self._architecture(n, self.config(n)))) for n in networks)

    def config(self, component: str) -> dict[str, Any]:
        self._check_has(component)
        if component == "scheduler":
            return self._scheduler()
        if component in self._own_configs:
            self._architecture(component, self._own_configs[component])
            return dict(self._own_configs[component])
        fields = found_config(component, {key: tensor.shape for key, tensor in self._stored.items()}, str(self.path))
        scale = self._number("scale_factor")
        return fields | (dict(scaling_factor=scale) if component == "vae" and scale is not None else {})

    def tensors(self, component: str) -> Tensors:
        self._check_has(component)
        config = self._architecture(component, self.config(component))
        table, shapes = ldm_table(config), expected_shapes(config)
        ema = self.ema and component == "unet"
        if ema and not self.has_ema:
            raise WeightsError(f"{self.path}: has no moving average of its U-Net (model_ema.*); leave out ema")
        prefix, place = ("model_ema.", ema_key) if ema else (_PREFIXES[component], str)
        layers = config.num_hidden_layers if isinstance(config, TextConfig) else None
        unused = _EMA_COUNTERS.__contains__ if ema else functools.partial(is_unused, layers=layers)
        stored = {key: tensor for key, tensor in self._stored.items() if key.startswith(prefix)}
        wanted = {place(key): keys for key, keys in table.items()}
        assert len(wanted) == len(table), "two keys with one name"
        surplus = [key for key in stored.keys() - wanted.keys() if not unused(key)]
        missing = wanted.keys() - stored.keys()
        check_names(missing, surplus, str(self.path), _INCOMPLETE if missing else _REMOVE)
        result: dict[str, Tensor] = {}
        for key, keys in wanted.items():
            tensor = stored[key]
            if len(keys) == 1:
                result[keys[0]] = _without_pixels(tensor, shapes[keys[0]]) if component == "vae" else tensor
                continue
            rows, *rest = shapes[keys[0]]
            if tensor.shape != (rows * len(keys), *rest):
                raise WeightsError(f"{self.path}: 1 misshapen ({key} is {tensor.shape}); {_INCOMPLETE}")
            for place_of, name in enumerate(keys):
                result[name] = tensor.apply(_rows(place_of * rows, rows), (rows, *rest))
        return result

    def what(self, component: str, config: bool = False) -> str:
        own = config and component in self._own_configs
        return f"{self.path} ({component}{f', by its metadata {CONFIGS}' if own else ''})"

    def sha256(self, component: str) -> str:
        return hash_tensors(self.tensors(component))

    def _check_has(self, component: str) -> None:
        if component not in self.components:
            raise WeightsError(
                f"{self.path}: has no {component}; it holds {', '.join(self.components)}; take it from another"
            )

    def _architecture(self, component: str, fields: Mapping[str, Any]) -> NetworkConfig:
        """Return the architecture of these config fields; raise InputError if they make none."""
        what = self.what(component, config=True)
        try:
            config = NETWORK_CONFIGS[component].from_json(fields, what)
            if _layers(config) > len(self._stored):  # checked before anything of that length is made
                raise ValueError("it has more layers than the file has tensors")
            ldm_table(config)
        except InputError:
            raise
        except Exception as error:  # any error of building a network from such numbers
            raise WeightsError(f"{what}: not the architecture of a network ({error})".replace("\n", " ")) from error
        return config

    def _number(self, key: str) -> float | None:
        """Return the value of a tensor of one number; None if there is no such tensor."""
        tensor = self._stored.get(key)
        return None if tensor is None or np.prod(tensor.shape) != 1 else float(np.asarray(tensor).reshape(()))

    def _scheduler(self) -> dict[str, Any]:
        if "scheduler" in self._own_configs:
            own = dict(self._own_configs["scheduler"])
            said = {f"its metadata {CONFIGS}": own.get("prediction_type") or "epsilon"} | said_beside(self.path)
            return own | dict(prediction_type=self.prediction_type or agreed(self.path, said))
        prediction = self.prediction_type or self._prediction
        if prediction is None:
            raise UnknownPrediction(
                f"{self.path}: a Stable Diffusion 2.x file that does not say what it predicts; "
                "pass prediction_type='epsilon' (2.0-base, 2.1-base) or 'v_prediction' (the 768 pixel models)"
            )
        zero_snr = dict(rescale_betas_zero_snr=True) if "ztsnr" in self._stored else {}
        return _SCHEDULER | dict(prediction_type=prediction) | zero_snr

    @functools.cached_property
    def _prediction(self) -> str | None:
        """Return the prediction type that the file or a file beside it gives, else that of the published model.

        For Stable Diffusion 1.x the latter is a guess, and a warning says so.

        Raises:
            WeightsError: two of the places contradict each other, or a file beside this one cannot be read.
        """
        said = said_inside(self.path, self.metadata, self._stored.keys()) | said_beside(self.path)
        if said:
            return agreed(self.path, said)
        unet = self.config("unet")
        if unet["in_channels"] > unet["out_channels"]:
            return "epsilon"  # inpainting was published with epsilon only
        if not unet.get("use_linear_projection"):
            warnings.warn(
                f"{self.path}: nothing says what it predicts; it is taken for epsilon, as Stable Diffusion 1.x; if it "
                "is not, give prediction_type=v_prediction",
                stacklevel=2,
            )
            return "epsilon"
        return _STEPS.get(self._number("global_step"))


def write_single_file(
    path: Path | str,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint's networks as one LDM file, at once or not at all, one tensor in memory at a time.

    The same checkpoint gives the same bytes. A Stable Diffusion 2 text encoder is written with the 23 layers that are
    used. Tokenizers have no place in a single file.

    Args:
        path: a .safetensors file.
        dtype: the dtype to store weights in; by default each tensor keeps its own.
        metadata: over the checkpoint's own; ``afa_jax.configs`` and ``modelspec.prediction_type`` come on top.
        overwrite: replace a file that is there.

    Raises:
        InputError: another suffix; the file exists, or its place cannot be written.
        WeightsError: as the checkpoint's readers; a tensor that is not finite, or does not fit into ``dtype``.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: a single file's name ends in .safetensors")
    with writing(path):
        check_new(path, overwrite)
    if dtype is not None:
        checkpoint = rounded(checkpoint, dtype)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, Any]] = {}
    for component in checkpoint.components:
        if component in NETWORKS:
            configs[component] = checkpoint.config(component)
            tensors |= _as_ldm(checkpoint, component)
    if not tensors:
        raise WeightsError(f"{checkpoint.path}: it has no U-Net, VAE or text encoder, so there is nothing to write")
    header = {**checkpoint.metadata, **(metadata or {}), "format": "pt"}
    header.pop("modelspec.hash_sha256", None)  # the hash of the file that was read
    if "scheduler" in checkpoint.components:
        try:
            configs["scheduler"] = checkpoint.config("scheduler")
        except UnknownPrediction:
            pass  # the new file does not give it either
        else:
            predicted = prediction_type(checkpoint)
            header["modelspec.prediction_type"] = "v" if predicted == "v_prediction" else predicted
    public = {
        component: {field: value for field, value in config.items() if field != "_name_or_path"}
        for component, config in configs.items()
    }
    header[CONFIGS] = json.dumps(public, sort_keys=True, separators=(",", ":"))
    with writing(path):
        write_tensors(path, tensors, header, overwrite=overwrite, reread=True)


def _as_ldm(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """Return a network's tensors in LDM's layout; raise WeightsError if keys or shapes do not fit its config."""
    config, what = network_config(checkpoint, component), checkpoint.what(component)
    source = checkpoint.tensors(component)
    check_tensors(expected_shapes(config), source, what=what)
    result = {}
    for key, keys in ldm_table(config).items():
        parts = [checked(source[name], name, what) for name in keys]
        if len(parts) == 1:
            shape = ldm_shape(key, parts[0].shape)
            result[key] = parts[0].apply(_reshaped(shape), shape)
        else:
            rows, *rest = parts[0].shape
            kinds = {np.dtype(part.dtype) for part in parts}
            kind = kinds.pop() if len(kinds) == 1 else result_dtype(kinds)
            parts = [part.astype(kind) for part in parts]
            result[key] = Tensor((rows * len(parts), *rest), kind, functools.partial(np.concatenate, parts))
    return result


def _layers(config: NetworkConfig) -> int:
    """Return about how many layers the architecture has."""
    if isinstance(config, TextConfig):
        return config.num_hidden_layers
    if isinstance(config, VAEConfig):
        return config.layers_per_block * len(config.block_out_channels)
    return sum(config.layers_per_level) * max(config.transformer_layers)


def _without_pixels(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Turn a 1x1 convolution of LDM into a linear layer; return any other tensor unchanged."""
    pixels = len(shape) == 2 and tensor.shape[:2] == shape and set(tensor.shape[2:]) == {1}
    return tensor.apply(_reshaped(shape), shape) if pixels else tensor


def _reshaped(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.reshape(shape)


def _rows(start: int, count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array[start : start + count]
