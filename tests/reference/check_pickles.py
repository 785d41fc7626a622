"""Run the line that afa_jax prints for pickles on a trainer's checkpoint, where torch is installed.

PYTHONPATH=. DIR/torch/bin/python tests/reference/check_pickles.py
"""

import collections
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from afa_jax.weights.formats.foreign_files import pickle_command

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


def main() -> None:
    # As Stable Diffusion 1.4's: a class of Lightning, numpy's scalars and an optimizer beside the weights.
    names = CALLBACK.split(".")
    for end in range(1, len(names) + 1):
        sys.modules[".".join(names[:end])] = types.ModuleType(".".join(names[:end]))
    callback = type("ModelCheckpoint", (), dict(__module__=CALLBACK))
    sys.modules[CALLBACK].ModelCheckpoint = callback
    weight = torch.arange(6.0).reshape(2, 3)
    state = collections.OrderedDict(a=weight, shared=weight, turned=weight.t(), half=weight.half(), b=weight.bfloat16())
    whole = dict(
        epoch=3,
        global_step=np.int64(875000),
        state_dict=state,
        callbacks={callback: dict(best_model_score=torch.tensor(1.0), best=np.float64(1))},
        optimizer_states=[dict(state={0: dict(step=1, exp_avg=weight)}, param_groups=[dict(lr=1e-4)])],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        for name, content in {"whole 1.ckpt": whole, "plain.pt": dict(state), "named.safetensors": whole}.items():
            file = Path(folder) / name
            torch.save(content, file)
            before = file.read_bytes()
            subprocess.run(pickle_command(file), shell=True, check=True, env=path)
            [out] = set(Path(folder).glob("*.safetensors")) - {file}
            found = load_file(out)
            assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state), name
            assert file.read_bytes() == before
            out.unlink()
    print("the line for pickles does what it says")


if __name__ == "__main__":
    main()
