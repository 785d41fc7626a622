"""The ensemble here and in PyTorch: the same weights and inputs, the same answers, turns on the same CPU.

    taskset -c 1 python benchmarks/pytorch.py --torch OTHER_PYTHON [--config configs/emoji.py]
    taskset -c 1 python benchmarks/pytorch.py --torch OTHER_PYTHON --width 160 --latents 16 16 --batch 2

OTHER_PYTHON is of an environment with tests/reference/requirements-torch.txt; benchmarks/torch_ensemble.py runs there,
one process a variant: diffusers' modules in eager mode, the same with channels-last features, and torch.compile. The
processes take turns with this one, and each measures its own CPU time; pinned to one CPU, all use one thread. Figures
are medians over the rounds of (ours / theirs in the same round): below 1 we are faster.

The experts are the config's, or with --width random ones of SD1.5's architecture (whose own width is 320). The largest
difference of the answers is printed, over the root mean square of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import Case, add_arguments, make_case
from timing import Program, Task, ratio, seconds, take_turns

from afa_jax.diffusion.guidance import guided
from afa_jax.diffusion.samplers.ddim import DDIM
from afa_jax.fusion.afa import FusedUNets
from afa_jax.fusion.files import save_fusion
from afa_jax.models.unet import UNet
from afa_jax.trees import axis_size, flatten, take, unflatten
from afa_jax.weights.formats.folders import save_folder

STEPS, STEP, GUIDANCE = 25, 10, 3.0  # the DDIM step that is measured
VARIANTS = ("eager", "channels_last", "compile")


def our_tasks(case: Case) -> dict[str, Any]:
    """By name: (function, arguments); torch_ensemble.py has tasks of the same names."""
    ddim = DDIM(schedule=case.schedule)
    constants = jax.tree.map(lambda values: values[STEP], ddim.constants(STEPS))
    optimizer = optax.adamw(1e-4, weight_decay=0.01)

    def expert(unet: UNet, x: jax.Array, t: jax.Array, text: Any) -> dict[str, jax.Array]:
        return dict(prediction=unet(x, t, take(text, 0)))

    def forward(ensemble: FusedUNets, x: jax.Array, t: jax.Array, text: Any) -> dict[str, jax.Array]:
        return dict(prediction=ensemble(x, t, text))

    def guided_step(ensemble: FusedUNets, x: jax.Array, text: Any) -> dict[str, jax.Array]:
        prediction = guided(ensemble, text, jax.tree.map(lambda own: own[:, ::-1], text), GUIDANCE)(
            x, jnp.broadcast_to(constants.t, len(x))
        )
        return dict(x=ddim.step(constants, x, prediction, (), None)[0])

    def training_step(params: Any, state: Any, experts: Any, *inputs: Any) -> dict[str, Any]:
        def loss_of(params: Any) -> jax.Array:
            aggregators = unflatten(case.aggregators, params)
            return jnp.square(FusedUNets(experts=experts, aggregators=aggregators)(x, t, text) - target).mean()

        x, t, text, target = inputs
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        new = optax.apply_updates(params, updates)
        return dict(gradient_norm=optax.tree.norm(gradient), loss=loss, new=(new, state))

    params, inputs = flatten(case.aggregators), (case.latents, case.t, case.conditioning)
    return {
        "one expert": (expert, (take(case.experts, 0), *inputs)),
        "forward": (forward, (case.ensemble, *inputs)),
        "guided step": (guided_step, (case.ensemble, case.latents, case.conditioning)),
        "training step": (training_step, (params, optimizer.init(params), case.experts, *inputs, case.target)),
    }


class Worker:
    """A process of torch_ensemble.py."""

    def __init__(self, python: str, folder: Path, variant: str):
        script = Path(__file__).with_name("torch_ensemble.py")
        threads = str(len(os.sched_getaffinity(0)))
        self.process = subprocess.Popen(
            [python, str(script), str(folder), "--variant", variant, "--threads", threads],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS=threads),
        )  # fmt: skip
        self.version = self._answer()["version"]

    def task(self, name: str) -> Task:
        """The task of this name in that process."""

        def run() -> tuple[float, float]:
            assert self.process.stdin is not None
            print(name, file=self.process.stdin, flush=True)
            answer = self._answer()
            return answer["cpu"], answer["wall"]

        return run

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the PyTorch process ended with status {self.process.wait()}")
        return json.loads(line)


def difference(ours: list[jax.Array], theirs: Path) -> float:
    """The largest difference over the root mean square of theirs, of what both answered (in the names' order)."""
    worst = 0.0
    for own, (_, reference) in zip(ours, sorted(np.load(theirs).items()), strict=False):  # ours also has the new state
        own = np.asarray(own)
        own = np.moveaxis(own, -1, 1) if own.ndim == 4 else own
        worst = max(worst, float(np.abs(own - reference).max() / np.sqrt(np.square(reference).mean())))
    return worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="Python of an environment with torch and diffusers")
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--tasks", nargs="*", default=("one expert", "forward", "guided step", "training step"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Everything, with a folder for what the processes tell each other."""
    case = make_case(options)
    count = axis_size(case.experts)
    if options.width:
        paths = [folder / f"{i}" for i in range(count)]
        for i, path in enumerate(paths):
            save_folder(path, unet=take(case.experts, i))
    else:
        paths = [Path(expert["path"]) for expert in case.config.experts]
    inputs = dict(x=case.latents, target=case.target, text=case.conditioning.text, t=case.t)
    np.savez(folder / "inputs.npz", **{name: np.asarray(array) for name, array in inputs.items()})
    save_fusion(folder, case.aggregators, {})
    facts = dict(
        unets=[str(path / "unet") for path in paths],
        channels=[stage.channels for stage in case.experts.stages],
        sabw=dict(case.config.sabw),
        scheduler=case.schedule.to_json(),
    )
    (folder / "facts.json").write_text(json.dumps(facts | dict(steps=STEPS, step=STEP, guidance=GUIDANCE)))
    ours = our_tasks(case)
    workers = {variant: Worker(options.torch, folder, variant) for variant in options.variants}
    versions = ", ".join({worker.version for worker in workers.values()})
    print(f"{case}; torch {versions}; {len(os.sched_getaffinity(0))} thread(s)")
    print(f"{'':14}{'':14}{'CPU ms':>9}{'ours / it':>11}{'difference':>12}{'first run, CPU s':>18}")
    for name in options.tasks:
        function, arguments = ours[name]
        program = Program(function, *arguments)
        tasks: dict[str, Task] = {"jax": program.task}
        tasks |= {variant: worker.task(name) for variant, worker in workers.items()}
        first = {variant: task()[0] for variant, task in tasks.items()}
        times = take_turns(tasks, options.rounds)
        answer, first["jax"] = program(), program.seconds
        for variant, rows in times.items():
            cells = f"{1000 * seconds(rows):9.1f}"
            if variant != "jax":
                cells += (
                    f"{ratio(times['jax'], rows):11.2f}{difference(answer, folder / f'{variant} {name}.npz'):12.1e}"
                )
            else:
                cells += " " * 23
            print(f"{name:14}{variant:14}{cells}{first[variant]:18.1f}", flush=True)


if __name__ == "__main__":
    main()
