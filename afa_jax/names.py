"""Names that a user may choose from, so that arguments can be checked before JAX is imported."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes in which weights are loaded or written."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""The prediction types of a U-Net."""
MERGES = ("average", "add_difference", "mbw", "task_arithmetic", "ties", "dare", "slerp", "model_stock")
"""Ways to merge experts into one checkpoint."""
LEARNED = "learned_mbw"
"""The merge ``mbw`` with block weights that a run has trained."""
DISTILLED = "distilled"
"""One U-Net that ``afa_jax.distil`` has taught to predict as a method of many does."""
METHODS = (
    *("expert", "inside", "uniform", "base", "checkpoint", *MERGES, "autombw", LEARNED, DISTILLED),
    *("noise_average", "magicfusion", "superdiff", "router", "ladder", "maxfusion", "time", "gate", "afa"),
)
"""Ways to make a picture from several experts."""
SAMPLING = ("eta", "steps", "guidance", "guidance_interval")
"""Sampling options that a single method may override."""
BASE = "base"
"""The base model's name where an expert can be named."""
PAIR = ("aggregators.safetensors", "ensemble.json")
"""The files of a trained fusion: its weights, and the record of what they belong to."""
SPACES = ("blocks", "experts", "curve")
"""The search spaces of a search for merge weights."""
SEARCHERS = ("tpe", "cmaes")
"""The optimizers of a search for merge weights."""
ARCHITECTURES = ("sd15",)
"""Architectures whose shapes are known without files."""
FEWEST_PAIRS = 8
"""The fewest pairs of a screen; with fewer, the bootstrap's intervals are too narrow."""
