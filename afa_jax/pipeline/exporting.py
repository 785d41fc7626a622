"""Models and files made of an ensemble, for other tools."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from afa_jax.cli.arguments import COUNT, SEED, check_run, checked, license_name
from afa_jax.config.method_options import check_entry, check_values
from afa_jax.config.schema import require
from afa_jax.errors import InputError
from afa_jax.exporting.outputs import Wanted, check_model
from afa_jax.logs import printed
from afa_jax.methods.specs import parse_method
from afa_jax.names import DISTILLED, LEARNED, MERGES
from afa_jax.pipeline.base import Opened, Place, check_dtype
from afa_jax.program_cache import keep_programs

if TYPE_CHECKING:
    from afa_jax.exporting.merge import MergedModel


MERGE_KINDS = (*MERGES, LEARNED, DISTILLED)


class Exporting(Opened):
    """What writes models: ``merge`` and ``export``."""

    def merge(self, method: str | Mapping[str, Any], *, dtype: str | None = None) -> Merge:
        """Return the experts merged into one ordinary model, which is computed when it is saved.

            ens.merge("ties,density=0.2").save("merged.safetensors")

        Args:
            method: a kind and its options, as ``--method`` of ``afa_jax.merge``, or a dict with ``kind``.
            dtype: the dtype of the weights; by default that in which they are stored.

        Raises:
            InputError: the kind or an option is unknown, or a value is invalid.
        """
        entry = parse_method(method) if isinstance(method, str) else dict(method)
        if entry.get("kind") not in MERGE_KINDS:
            text = method if isinstance(method, str) else entry.get("kind")
            raise InputError(f"--method {text}: no merge {entry.get('kind')!r}; there are {', '.join(MERGE_KINDS)}")
        check_values(check_entry(entry), self.experts)
        check_dtype(dtype)
        return Merge(self.config, entry, dtype)

    def export(
        self,
        *,
        pair: Place | None = None,
        snapshot: Place | None = None,
        bake: tuple[str, Place] | None = None,
        license: str | None = None,
        report: Place | None = None,
        pictures: Sequence[Place] = (),
        with_config: bool = False,
        pairs: int = 64,
        draws: int = 4,
        seed: int = 0,
        dtype: str | None = None,
        overwrite: bool = False,
        quiet: bool = True,
    ) -> None:
        """Write the ensemble for other tools: its trained pair, one static model, or one expert with its LoRAs.

            ens.export(pair="published", license="mit", with_config=True)
            ens.export(snapshot="static.safetensors", bake=("photo", "photo.safetensors"))

        Args:
            pair: the folder for the trained pair, with its model card.
            snapshot: the file or folder for one static model.
            bake: the name of an expert, and the file or folder for it.
            pictures: PNGs for the card, instead of the run's samples.
            quiet: do not print what is written.

        The other arguments are those of ``afa_jax.exporting.outputs.Wanted``.

        Raises:
            InputError: no output is requested, arguments exclude each other, or an output exists.
        """
        checked("pairs", pairs, COUNT)
        checked("draws", draws, COUNT)
        checked("seed", seed, SEED)
        check_dtype(dtype)
        if license is not None:
            _check_license(license)
        if snapshot:
            require(self.config, "data")
        wanted = Wanted(
            pair=None if pair is None else Path(pair), snapshot=None if snapshot is None else Path(snapshot),
            bake=None if bake is None else (bake[0], Path(bake[1])), workdir=self.workdir, license=license,
            report=None if report is None else Path(report), picture=[Path(picture) for picture in pictures],
            with_config=with_config, pairs=pairs, draws=draws, seed=seed, dtype=dtype, overwrite=overwrite,
        )  # fmt: skip
        wanted.check()
        check_run(self.workdir)
        self._heavy()

        from afa_jax.exporting.export import export

        with printed(not quiet):
            export(self.config, wanted)


class Merge:
    """Experts merged into one ordinary model, which is computed when it is first saved or read."""

    def __init__(self, config: ConfigDict, method: Mapping[str, Any], dtype: str | None):
        self._config, self.method, self.dtype = config, dict(method), dtype
        self._made: MergedModel | None = None

    @property
    def checkpoint(self) -> Any:
        """Return the model as a Checkpoint (afa_jax/weights/checkpoint.py): configs, and tensors merged when read."""
        return self._merged().checkpoint

    def save(self, path: Place, *, overwrite: bool = False, quiet: bool = True) -> Path:
        """Write the model and return its path.

        Args:
            path: NAME.safetensors for a single file, else a diffusers folder.
            overwrite: replace an existing model.
            quiet: do not print what is written.

        Raises:
            InputError: the experts cannot be merged like this, or the output exists or cannot be written.
        """
        out = Path(path)
        check_model(out, overwrite)
        keep_programs()

        from afa_jax.exporting.written import check_out

        check_out(out, overwrite)
        with printed(not quiet):
            self._merged().write(out, overwrite=overwrite)
        return out

    def _merged(self) -> MergedModel:
        from afa_jax.exporting.merge import merge_experts

        if self._made is None:
            self._made = merge_experts(self._config, self.method, dtype=self.dtype)
        return self._made


def _check_license(name: str) -> None:
    """Raise InputError unless a text is the name of a licence as the hub spells it."""
    try:
        license_name(name)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"license: {error}") from None
