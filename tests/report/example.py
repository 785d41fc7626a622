"""A report.json as afa_jax.evaluate writes it, with figures made up, some of them null or absent."""

import copy
from typing import Any

import numpy as np

PROMPTS = ["octopus and pizza, noto style", "guitar <and> owl, noto style", "tiger and penguin, noto style"]


def _figure(value: float, half: float) -> dict[str, float]:
    return dict(value=value, low=round(value - half, 4), high=round(value + half, 4))


def _against(difference: float, half: float, wins: int, losses: int) -> dict[str, float | int]:
    low, high = round(difference - half, 4), round(difference + half, 4)
    return dict(difference=difference, low=low, high=high, wins=wins, losses=losses, ties=200 - wins - losses)


def _method(
    name: str, family: str, subject: float, kid: float, evaluations: int, seconds: float, **more: Any
) -> dict[str, Any]:
    from_best, from_afa = round(subject - 0.33, 3), round(subject - 0.531, 3)
    groups = {
        "two topics": dict(subject=_figure(round(subject * 0.9, 3), 0.05)),
        "unseen pairs": dict(subject=_figure(round(subject * 0.7, 3), 0.08)),
    }
    against: dict[str, Any] = dict(
        best=dict(subject=_against(from_best, 0.03, 90, 20), kid=dict(difference=kid - 0.46, low=None, high=None)),
        afa=dict(subject=_against(from_afa, 0.03, 30, 80)),
    )
    method: dict[str, Any] = dict(
        name=name,
        kind=name.partition(":")[0],
        family=family,
        what=f"what {name} does",
        options={},
        steps=10,
        evaluations=evaluations,
        seconds_per_image=seconds,
        time_ratio=round(seconds / 0.07, 2),
        memory_bytes=123456789,
        pictures=600,
        metrics=dict(subject=_figure(subject, 0.03), style=_figure(0.6, 0.02), kid=_figure(kid, 0.04)),
        groups=groups,
        against=against,
        noise_mse=dict(mean=0.11, buckets=[0.2, 0.12, 0.06, 0.04]),
        recipe=None,
    )
    return method | more


REPORT: dict[str, Any] = dict(
    version=1,
    afa_jax="0.5",
    device="cpu",
    config=dict(name="emoji"),
    protocol=dict(
        prompts=200,
        seeds=[0, 1, 2],
        steps=10,
        guidance=3.0,
        eta=0.0,
        sampler="ddim",
        size=[32, 64],
        groups={"two topics": 104, "unseen pairs": 96},
        resamples=2000,
    ),
    metrics=[
        dict(
            name="subject",
            better="higher",
            what="share of places where the judge sees the subject asked for",
            level="picture",
            digits=3,
            main=True,
        ),
        dict(name="style", better="higher", what="the same of the style", level="picture", digits=3, main=False),
        dict(name="kid", better="lower", what="kernel distance to real scenes", level="set", digits=3, main=True),
    ],
    absent_metrics=dict(pickscore="its weights are not here; pip install <them>"),
    absent_methods=dict(router="not trained; python -m afa_jax.train --method router"),
    references=dict(best="expert:things", afa="afa"),
    bounds={
        "real scenes (ceiling)": dict(subject=0.89, style=0.94, kid=0.0),
        "other captions (floor)": dict(subject=0.01, style=0.29),
        "reconstructions": dict(subject=0.81, style=None),
    },
    methods=[
        _method("afa", "AFA", 0.531, 0.28, 60, 0.31, options=dict(workdir="runs/emoji"), recipe="make <demo>"),
        _method("expert:animals", "control", 0.302, 0.44, 20, 0.07),
        _method("expert:things", "control", 0.330, 0.46, 20, 0.071),
        _method("uniform", "control", 0.417, 0.31, 60, 0.24, noise_mse=None, time_ratio_low=3.1, time_ratio_high=3.9),
        _method("merge", "parameter space", 0.388, 0.35, 20, 0.07),
        _method("ties", "parameter space", 0.379, 0.36, 20, 0.07, against={}, groups=None, memory_bytes=None),
        _method("average", "output space", 0.419, 0.30, 60, 0.29),
        _method("magicfusion", "output space", 0.361, 0.41, 60, 0.3, metrics=dict(subject=_figure(0.361, 0.03))),
        _method("maxfusion", "feature space", 0.351, 0.55, 60, 0.28),
        _method("alternate", "time axis", 0.342, 0.4, 20, 0.07, seconds_per_image=None, time_ratio=None),
        _method("afa:last", "ablation", 0.491, 0.3, 60, 0.3, metrics=dict(subject=None, kid=_figure(0.3, 0.04))),
    ],
    curves=[
        dict(
            method="afa",
            points=[
                dict(steps=steps, seconds_per_image=0.031 * steps, metrics=dict(subject=_figure(value, 0.03)))
                for steps, value in ((5, 0.44), (10, 0.531), (20, 0.55), (50, 0.554))
            ],
        ),
        dict(
            method="expert:things",
            points=[
                dict(steps=steps, seconds_per_image=0.007 * steps, metrics=dict(subject=_figure(value, 0.03)))
                for steps, value in ((5, 0.29), (10, 0.33), (20, 0.338), (50, 0.341))
            ]
            + [dict(steps=100, seconds_per_image=None, metrics=None)],
        ),
    ],
    examples=dict(prompts=PROMPTS, seed=0, methods=["expert:animals", "uniform", "afa", "ties"]),
)


def report() -> dict[str, Any]:
    """One of its own for each test."""
    return copy.deepcopy(REPORT)


def pictures(method: str, prompt: str) -> np.ndarray | None:
    """Pictures of one colour; none of "ties" for the first prompt."""
    if method == "ties" and prompt == PROMPTS[0]:
        return None
    rng = np.random.default_rng([len(method), len(prompt)])
    return np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (32, 64, 3))


def maps(method: str, prompt: str) -> np.ndarray | None:
    """Maps of the ensembles alone."""
    if method not in ("afa", "uniform"):
        return None
    return np.random.default_rng(0).dirichlet(np.ones(3), (8, 16)).transpose(2, 0, 1)
