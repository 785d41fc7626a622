"""Checkpoints through orbax: flat dictionaries of arrays, written in the background, resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from afa_jax.errors import InputError
from afa_jax.weights.keys import flatten, unflatten


class Checkpoints:
    """The checkpoints of one run, in ``workdir/checkpoints``.

    Args:
        keep: how many of the last ones stay.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        self.folder = workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def save(self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Save pytrees by name and JSON facts; returns as soon as the arrays are copied."""
        flat = {name: flatten(tree) for name, tree in trees.items()}
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(flat), facts=ocp.args.JsonSave(dict(facts)))
        )

    def restore(self, trees: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The last checkpoint: its step, pytrees like ``trees`` placed where those are, and its facts.

        Raises:
            InputError: there is none, or it has other arrays than ``trees``.
        """
        step = self._manager.latest_step()
        if step is None:
            raise InputError(f"{self.folder} holds no checkpoint to resume from; start again with --overwrite")
        shapes = {
            name: {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for key, leaf in flatten(tree).items()
            }
            for name, tree in trees.items()
        }
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes), facts=ocp.args.JsonRestore())
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.folder / str(step)} cannot be restored into this config: {reason}") from error
        filled = {name: unflatten(tree, restored["arrays"][name]) for name, tree in trees.items()}
        return step, filled, restored["facts"]

    def close(self) -> None:
        """Wait for the last save to be on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
