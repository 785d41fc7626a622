"""Reading and writing a full-size Stable Diffusion 1.5 single file on this machine: time and memory.

    python benchmarks/single_file.py DIR

Writes a file of random float16 weights (U-Net, VAE, text encoder; 2.1 GB) into DIR, then in a fresh process each: reads
it into modules of a dtype and writes those back, or converts it from file to file. Memory is the process's above what
importing and starting jax takes, beside the model's bytes in the target dtype. Of resident memory, the pages of a file
that is mapped count as well, though the kernel may take them away; anonymous memory is what must be there (sampled
every 2 ms). DIR is left as it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.weights.checkpoint import MemoryCheckpoint
from afa_jax.weights.expected import expected_shapes
from afa_jax.weights.formats.single_file import write_single_file
from afa_jax.weights.load import load_text_encoder, load_unet, load_vae
from afa_jax.weights.opened import open_checkpoint
from afa_jax.weights.tensors import Tensor

CLASSES: dict[str, Any] = dict(unet=UNetConfig, vae=VAEConfig, text_encoder=TextConfig)
CONFIGS: dict[str, dict[str, Any]] = dict(
    unet=dict(block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768),
    vae=dict(block_out_channels=[128, 256, 512, 512]),
    text_encoder=dict(vocab_size=49408, hidden_size=768),
)
TASKS = ("import", "read float32", "read bfloat16", "read float16", "convert bfloat16")
MIB = 2**20


def random_model() -> MemoryCheckpoint:
    """SD1.5's networks, each tensor drawn when it is read."""
    states = {}
    for component, fields in CONFIGS.items():
        shapes = expected_shapes(CLASSES[component].from_json(fields))
        tensors = {
            key: Tensor(shape, np.dtype(np.float16), functools.partial(_draw, key, shape))
            for key, shape in shapes.items()
        }
        states[component] = fields, tensors
    return MemoryCheckpoint(states, dict(prediction_type="epsilon"))


def _draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, np.float32)
    return (0.02 * values).astype(np.float16)


class Watch:
    """Wall and CPU seconds and peaks of resident and anonymous memory between ``with`` and its end."""

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5")  # the resident peak starts anew
        self.before, self.anonymous, self.running = memory(), 0, True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.running = False
        self.thread.join()
        self.resident = memory()["VmHWM"] - self.before["VmRSS"]
        self.anonymous -= self.before["RssAnon"]

    def _sample(self) -> None:
        while self.running:
            self.anonymous = max(self.anonymous, memory()["RssAnon"])
            time.sleep(0.002)

    def row(self, name: str) -> dict[str, Any]:
        """The measurements as data."""
        return dict(name=name, wall=self.wall, cpu=self.cpu, resident=self.resident, anonymous=self.anonymous)


def memory() -> dict[str, int]:
    """The process's memory in bytes, by the names of /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in pairs}


def run(task: str, path: Path) -> list[dict[str, Any]]:
    """One task in this process."""
    jnp.zeros(1).block_until_ready()
    if task == "import":
        now = memory()
        return [dict(name=task, wall=0, cpu=time.process_time(), resident=now["VmHWM"], anonymous=now["RssAnon"])]
    what, dtype = task.split()
    copy = path.with_name("copy.safetensors")
    with Watch() as first:
        if what == "convert":
            write_single_file(copy, open_checkpoint(path), dtype=jnp.dtype(dtype))
        else:
            kwargs: dict[str, Any] = dict(param_dtype=jnp.dtype(dtype))
            parts = dict(unet=load_unet(path, **kwargs), vae=load_vae(path, **kwargs))
            parts["text_encoder"] = load_text_encoder(path, **kwargs)
            jax.block_until_ready(jax.tree.leaves(parts))
    if what == "convert":
        copy.unlink()
        return [first.row(f"file to file, {dtype}")]
    with Watch() as second:
        write_single_file(copy, MemoryCheckpoint.of(**parts))
    copy.unlink()
    # What the modules hold already counts for writing them, too.
    held = second.before["RssAnon"] - first.before["RssAnon"]
    second.resident, second.anonymous = second.resident + held, second.anonymous + held
    return [first.row(f"file to modules, {dtype}"), second.row(f"modules to file, {dtype}")]


def main() -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, help="one task on the file in FOLDER, as JSON")
    options = parser.parse_args()
    if options.task:
        print(json.dumps(run(options.task, options.folder / "model.safetensors")))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, model = Path(folder) / "model.safetensors", random_model()
        with Watch() as watch:
            write_single_file(path, model)
        parameters = sum(np.prod(tensor.shape) for _, tensors in model.states.values() for tensor in tensors.values())
        print(
            f"{parameters:,} parameters, {path.stat().st_size:,} bytes written in {watch.wall:.0f} s (mostly drawing)"
        )
        print(f"{'':32}{'wall s':>8}{'CPU s':>8}{'model MiB':>11}{'resident':>10}{'x':>6}{'anonymous':>11}{'x':>6}")
        for task in TASKS:
            done = subprocess.run(
                [sys.executable, __file__, folder, "--task", task], stdout=subprocess.PIPE, text=True, check=True
            )
            for row in json.loads(done.stdout):
                itemsize = jnp.dtype(task.split()[1]).itemsize if task != "import" else 0
                size = parameters * itemsize / MIB
                sizes = [row[kind] / MIB for kind in ("resident", "anonymous")]
                ratios = [f"{used / size:6.2f}" if size else "" for used in sizes]
                print(
                    f"{row['name']:32}{row['wall']:8.1f}{row['cpu']:8.1f}{size:11.0f}"
                    f"{sizes[0]:10.0f}{ratios[0]:>6}{sizes[1]:11.0f}{ratios[1]:>6}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
