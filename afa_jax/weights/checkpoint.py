"""The Checkpoint protocol of every container: components, each with a config and a state dict.

The reader of a container (a diffusers folder, a single file, ...) is a Checkpoint, and so is a model in memory or one
with LoRAs baked in. Code that loads, compares, inspects or writes models uses nothing else. Configs are those of
diffusers' and transformers' config.json; state dicts have their keys and PyTorch's layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# Before Python 3.12, typing's own isinstance check reads every property, and some of them open files.
from typing_extensions import Protocol, runtime_checkable

from afa_jax.errors import InputError
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.expected import NetworkConfig
from afa_jax.weights.expected import expected_shapes as expected_shapes  # its former place
from afa_jax.weights.keys import pytorch_name, text_key
from afa_jax.weights.tensors import Tensor, Tensors, WeightsError, cast, is_floating

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from afa_jax.models.clip import TextEncoder
    from afa_jax.models.unet import UNet
    from afa_jax.models.vae import VAE

NETWORK_CONFIGS: Mapping[str, type[UNetConfig] | type[VAEConfig] | type[TextConfig]] = dict(
    unet=UNetConfig, vae=VAEConfig, text_encoder=TextConfig
)
NETWORKS = tuple(NETWORK_CONFIGS)  # the components that have weights


@runtime_checkable
class Checkpoint(Protocol):
    """A stored model.

    Attributes:
        path: its folder or file, for messages.
        metadata: the metadata of its weights file; for a folder, of the first network's file.
    """

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def components(self) -> tuple[str, ...]:
        """Return the names of its networks in NETWORKS, and ``scheduler`` and ``tokenizer`` if it has them."""
        ...

    @property
    def tokenizer(self) -> Path | None:
        """Return the folder of the tokenizer's files (``vocab.json``, ``merges.txt``)."""
        ...

    def config(self, component: str) -> dict[str, Any]:
        """Return the fields of a network's ``config.json``, or of ``scheduler_config.json``.

        Raises:
            WeightsError: there is no such component; the error names the missing file.
        """
        ...

    def tensors(self, component: str) -> Tensors:
        """Return the state dict of a network, in PyTorch's layout.

        The keys are those of today's diffusers (``down_blocks.0...``) or of transformers before version 5
        (``text_model.encoder...``), one spelling for each, without ``position_ids``.

        Raises:
            WeightsError: there is no such component, or its file cannot be used.
        """
        ...

    def what(self, component: str, config: bool = False) -> str:
        """Return, for messages, the name of the file that has a component's weights, or its config."""
        ...

    def sha256(self, component: str) -> str:
        """Return a hash that changes whenever the network's weights do."""
        ...


@dataclasses.dataclass(frozen=True)
class MemoryCheckpoint:
    """A model in memory, to be written or compared like one on disk.

    Attributes:
        states: each network's fields of config.json and its state dict.
        scheduler: fields of scheduler_config.json.
        tokenizer: a folder of tokenizer files.
        path: its name in messages.
    """

    states: Mapping[str, tuple[Mapping[str, Any], Tensors]]
    scheduler: Mapping[str, Any] | None = None
    tokenizer: Path | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    path: Path = Path("a model in memory")

    @classmethod
    def of(
        cls,
        *,
        unet: UNet | None = None,
        vae: VAE | None = None,
        text_encoder: TextEncoder | None = None,
        scheduler: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> MemoryCheckpoint:
        """Make a checkpoint of the given modules; it lacks those that are not given."""
        from afa_jax.weights.networks import unet_keys
        from afa_jax.weights.state_dicts import state_dict

        states: dict[str, tuple[dict[str, Any], Tensors]] = {}
        if unet is not None:
            fields = dict(_class_name="UNet2DConditionModel") | dataclasses.asdict(unet.config)
            states["unet"] = fields, state_dict(unet, unet_keys(unet))
        if vae is not None:
            levels = len(vae.config.block_out_channels)
            types = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
            fields = dict(_class_name="AutoencoderKL") | dataclasses.asdict(vae.config) | types
            states["vae"] = fields, state_dict(vae, pytorch_name)
        if text_encoder is not None:
            names = dict(model_type="clip_text_model", architectures=["CLIPTextModel"])
            states["text_encoder"] = (
                dataclasses.asdict(text_encoder.config) | names,
                state_dict(text_encoder, text_key),
            )
        return cls(states, scheduler, tokenizer, dict(metadata or {}))

    @property
    def components(self) -> tuple[str, ...]:
        others = dict(scheduler=self.scheduler, tokenizer=self.tokenizer)
        return (*self.states, *(name for name, value in others.items() if value is not None))

    def config(self, component: str) -> dict[str, Any]:
        if component == "scheduler" and self.scheduler is not None:
            return dict(self.scheduler)
        return dict(self.states[component][0])

    def tensors(self, component: str) -> Tensors:
        return self.states[component][1]

    def what(self, component: str, config: bool = False) -> str:
        return f"{self.path} ({component})"

    def sha256(self, component: str) -> str:
        return hash_tensors(self.tensors(component))


def hash_tensors(tensors: Tensors) -> str:
    """Return the sha256 of a state dict: its names, dtypes, shapes and bytes, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
        digest.update(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class DerivedCheckpoint:
    """A checkpoint that equals ``base`` except where a subclass overrides it."""

    base: Checkpoint

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.base.metadata

    @property
    def components(self) -> tuple[str, ...]:
        return self.base.components

    @property
    def tokenizer(self) -> Path | None:
        return self.base.tokenizer

    def config(self, component: str) -> dict[str, Any]:
        return self.base.config(component)

    def tensors(self, component: str) -> Tensors:
        return self.base.tensors(component)

    def what(self, component: str, config: bool = False) -> str:
        return self.base.what(component, config)

    def sha256(self, component: str) -> str:
        return self.base.sha256(component)


@dataclasses.dataclass(frozen=True)
class _Rounded(DerivedCheckpoint):
    dtype: Any

    def tensors(self, component: str) -> Tensors:
        what = self.base.what(component)
        return {name: self._rounded(tensor, name, what) for name, tensor in self.base.tensors(component).items()}

    def sha256(self, component: str) -> str:
        own = self.base.sha256(component)
        kept = all(tensor is self._rounded(tensor, "", "") for tensor in self.base.tensors(component).values())
        return own if kept else hashlib.sha256(f"{own} as {self.dtype}".encode()).hexdigest()

    def _rounded(self, tensor: Tensor, name: str, what: str) -> Tensor:
        if tensor.dtype == self.dtype or not is_floating(tensor.dtype):
            return tensor
        return Tensor(tensor.shape, self.dtype, lambda: cast(tensor.read(), self.dtype, name, what))


def rounded(checkpoint: Checkpoint, dtype: DTypeLike) -> Checkpoint:
    """Return a checkpoint whose weights are rounded to a dtype when they are read.

    A component keeps its sha256 if all its weights have this dtype already. A single weight of another dtype changes
    it, even if the rounding changes no value.

    Args:
        dtype: float16, bfloat16 or float32.

    Raises:
        InputError: another dtype.
        WeightsError: a weight that is read is finite, but too large for the dtype.
    """
    if str(np.dtype(dtype)) not in ("float16", "bfloat16", "float32"):
        raise InputError(f"dtype {np.dtype(dtype)}: weights are float16, bfloat16 or float32")
    return _Rounded(checkpoint, np.dtype(dtype))


def hash_components(checkpoint: Checkpoint, components: Sequence[str]) -> str:
    """Return one sha256 for several networks of a checkpoint."""
    return hashlib.sha256(b"".join(bytes.fromhex(checkpoint.sha256(name)) for name in components)).hexdigest()


def network_config(checkpoint: Checkpoint, component: str) -> NetworkConfig:
    """Return the architecture of one of a checkpoint's networks.

    Raises:
        WeightsError: as the checkpoint's config.
        ConfigError: an architecture that is not of the Stable Diffusion 1.x/2.x families.
    """
    return NETWORK_CONFIGS[component].from_json(checkpoint.config(component), checkpoint.what(component, config=True))


def prediction_type(checkpoint: Checkpoint) -> str:
    """Return the prediction type that the scheduler's config gives; epsilon if it gives none, as in diffusers.

    Raises:
        WeightsError: as the checkpoint's config; or the prediction type is not text.
    """
    found = checkpoint.config("scheduler").get("prediction_type") or "epsilon"
    if not isinstance(found, str):
        raise WeightsError(
            f"{checkpoint.path}: its scheduler's prediction_type is {found!r}; make it 'epsilon' or 'v_prediction'"
        )
    return found
