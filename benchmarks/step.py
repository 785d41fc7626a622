"""The training step on this machine: time and memory by rematerialisation policy, with and without the cache.

    taskset -c 1 python benchmarks/step.py [--config configs/emoji.py]

Compiles each step, prints the memory it will need beside its arguments, and lets the steps take turns: CPU times, and
the medians of their ratios to the first policy's. The policies are compared without the cache; the cache with the
config's policy. On a CPU the memory is that of XLA's usual order of operations: its concurrency-optimised scheduler
starts recomputation early, which undoes what a policy saves.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_concurrency_optimized_scheduler=false"

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Task, ratio, seconds, take_turns

from afa_jax.cli.commands import load_config
from afa_jax.data.loader import loading, make_loader
from afa_jax.data.sources import make_source
from afa_jax.experts.frozen import frozen, load_experts
from afa_jax.fusion.afa import REMATS, SABWConfig
from afa_jax.fusion.registry import init_fusion
from afa_jax.models.conditioning import encode_prompts
from afa_jax.models.vae import to_images
from afa_jax.training.optimizer import make_optimizer
from afa_jax.training.step import init_state, make_train_step
from afa_jax.trees import flatten, shapes_of


def main() -> None:
    """Print a line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--remat", nargs="*", choices=REMATS, default=REMATS)
    options = parser.parse_args()
    config = load_config(options.config)
    train = config.train
    experts = load_experts(config, dtype=config.dtype, param_dtype=config.dtype)
    loader = make_loader(
        make_source(config.data), experts.tokenizer, batch=train.batch, seed=train.seed, **loading(config.data)
    )
    batch = loader.at(0)
    batch.pop("bad", None)
    optimizer = make_optimizer(train.optimizer, train.steps)
    aggregators = init_fusion(SABWConfig(**config.sabw), experts.unet, len(experts.names), train.seed)
    parts, no_caption = frozen(experts), jnp.asarray(experts.tokenizer([""])[0])

    tasks: dict[str, Task] = {}

    def compiled(name: str, parts: dict[str, Any], batch: Any, no_caption: Any, remat: Any) -> None:
        step = make_train_step(
            aggregators,
            parts,
            optimizer,
            experts.schedule,
            caption_dropout=train.caption_dropout,
            no_caption=no_caption,
            accumulate=train.accumulate,
            remat=remat,
            vae=shapes_of(experts.vae),
        )
        arguments = (init_state(aggregators, optimizer), batch, flatten(parts), jax.random.key(0))
        started = time.process_time()
        program = step.lower(*arguments).compile()  # type: ignore[attr-defined]
        compiling, memory = time.process_time() - started, program.memory_analysis()
        print(
            f"{name:16} compiled in {compiling:4.0f} s CPU, temporary {memory.temp_size_in_bytes / 2**20:7.0f} MiB, "
            f"arguments {memory.argument_size_in_bytes / 2**20:5.0f} MiB, "
            f"outputs {memory.output_size_in_bytes / 2**20:4.0f} MiB",
            flush=True,
        )

        def run() -> tuple[float, float]:
            started, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            return time.process_time() - cpu, time.perf_counter() - started

        tasks[name] = run

    for remat in options.remat:
        compiled(f"remat {remat}", parts, batch, no_caption, remat)
    mean, std = jax.jit(lambda vae, x: vae.posterior(to_images(x)))(experts.vae, batch["image"])
    ids = np.vstack([batch["ids"], np.asarray(no_caption)])
    states = jnp.moveaxis(jax.jit(encode_prompts)(experts.text_encoder, ids).text, 1, 0)
    rest = dict(mean=mean, std=std, states=states[:-1], position=batch["position"], index=batch["index"])
    compiled("from the cache", dict(unet=parts["unet"]), rest, states[-1], train.remat)
    times = take_turns(tasks, options.rounds)
    first = next(iter(times.values()))
    for name, rows in times.items():
        print(f"{name:16} a step {1000 * seconds(rows):8.1f} ms, {ratio(rows, first):5.2f} of the first's", flush=True)


if __name__ == "__main__":
    main()
