"""One training step of the run of record at full size, with random weights: its memory and its time.

    python benchmarks/sd15.py --size 256 --batch 1 [--by_site]

Compiles first and prints what the program will need, then runs: VAE and text encoders forward, N U-Nets and the
aggregators forward and backward, AdamW. Weights in configs/sd15.py's dtype unless told otherwise.

On a CPU, XLA spends time that grows with the square of a program's length after LLVM is done. With --by_site every site
is a program of its own, forward and backward, and the same step is put together from them in Python.

What a TPU would need for it, python -m afa_jax.aot says without one.
"""

import argparse
import dataclasses
import resource
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from afa_jax.cli.commands import load_config
from afa_jax.diffusion.schedule import NoiseSchedule
from afa_jax.fusion.afa import REMATS, FusedUNets, SABWConfig
from afa_jax.fusion.registry import init_fusion
from afa_jax.models.clip import TextEncoder
from afa_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from afa_jax.models.unet import UNet
from afa_jax.models.vae import VAE
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import dotted, flatten, parameter_count


def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Random weights of about the right size: kernels keep the variance, scales are 1."""
    name = dotted(path)
    if name.endswith("scale"):
        return jnp.ones(leaf.shape, leaf.dtype)
    key = jax.random.key(zlib.crc32(name.encode()))
    fan_in = np.prod(leaf.shape[-4:-1]) if name.endswith("kernel") else 2500
    return jax.random.normal(key, leaf.shape, leaf.dtype) * jnp.asarray(fan_in**-0.5, leaf.dtype)


_site = jax.jit(FusedUNets._site, static_argnums=(1, 2))


def by_site(ensemble: FusedUNets, *args: Any) -> Any:
    """FusedUNets._site as a program of its own."""
    return _site(dataclasses.replace(ensemble, experts=None, aggregators=None), *args)


def compiled(lowered: Any) -> Any:
    """Compile, and print what it took and what the program will take."""
    started, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile()
    memory = program.memory_analysis()
    print(
        f"compiled in {time.perf_counter() - started:.0f} s ({time.process_time() - cpu:.0f} s CPU); arguments "
        f"{memory.argument_size_in_bytes / 2**30:.2f} GiB, temporary {memory.temp_size_in_bytes / 2**30:.2f} GiB, "
        f"outputs {memory.output_size_in_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    return program


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--remat", choices=REMATS, default="none")
    parser.add_argument("--compile_only", action="store_true")
    parser.add_argument("--by_site", action="store_true")
    options = parser.parse_args()
    config = load_config("configs/sd15.py")
    count, dtype = len(config.experts), jnp.dtype(options.dtype or config.dtype)
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=dtype)

    def stacked(create: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), jax.eval_shape(lambda: create(nnx.Rngs(0)))
        )

    frozen = dict(
        unet=stacked(lambda rngs: UNet(UNetConfig(), rngs=rngs, **kwargs)),
        text_encoder=stacked(lambda rngs: TextEncoder(TextConfig(), rngs=rngs, **kwargs)),
        vae=jax.eval_shape(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0), **kwargs)),
    )
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    sabw = SABWConfig(**config.sabw)
    aggregators = jax.eval_shape(lambda: init_fusion(sabw, frozen["unet"], count, 0))
    state = jax.eval_shape(lambda aggregators: init_state(aggregators, optimizer), aggregators)
    step = make_train_step(
        aggregators,
        frozen,
        optimizer,
        NoiseSchedule(),
        caption_dropout=config.train.caption_dropout,
        no_caption=jnp.zeros(77, jnp.int32),
        remat=options.remat,
    )
    size, batch = options.size, options.batch
    inputs = dict(
        image=jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
        ids=jax.ShapeDtypeStruct((batch, 77), jnp.int32),
        position=jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    print(
        f"N = {count}, batch {batch}, {size} px, {dtype}, {jax.devices()[0].device_kind}; "
        f"{parameter_count(frozen['unet']):,} frozen U-Net and {parameter_count(state['params']):,} trained parameters"
    )
    program: Any = step
    if options.by_site:
        FusedUNets._site = by_site  # type: ignore[method-assign]
        program = step.__wrapped__  # type: ignore[attr-defined]
    else:
        program = compiled(step.lower(state, inputs, flatten(frozen), jax.random.key(0)))  # type: ignore[attr-defined]
    if options.compile_only:
        return
    arrays = flatten(jax.tree_util.tree_map_with_path(fill, frozen))
    state = init_state(init_fusion(sabw, frozen["unet"], count, 0), optimizer)
    data = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), inputs) | dict(position=np.arange(batch))
    for number in range(2):
        started, cpu = time.perf_counter(), time.process_time()
        state, metrics = jax.block_until_ready(program(state, data, arrays, jax.random.key(number)))
        print(
            f"step {number}: {time.perf_counter() - started:.1f} s ({time.process_time() - cpu:.1f} s CPU), "
            f"loss {float(metrics['loss']):.4f}, gradient norm {float(metrics['gradient_norm']):.4f}; "
            f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
