"""Names that a user may give whose things need JAX: an argument can be checked against them before it is imported."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16")
"""Of weights that are loaded or written."""
PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a U-Net predicts."""
MERGES = ("average", "add_difference", "mbw", "task_arithmetic", "ties", "dare", "slerp", "model_stock")
"""Ways to merge experts into one checkpoint."""
LEARNED = "learned_mbw"
"""The merge mbw with block weights that a run learnt."""
METHODS = (
    *("expert", "inside", "uniform", "base", "checkpoint", *MERGES, "autombw", LEARNED),
    *("noise_average", "magicfusion", "superdiff", "router", "maxfusion", "time", "gate", "afa"),
)
"""Ways to make a picture of several experts."""
SAMPLING = ("eta", "steps", "guidance")
"""Of sampling, what a method can have of its own."""
BASE = "base"
"""What the base model is called among the experts of a method."""
PAIR = ("aggregators.safetensors", "ensemble.json")
"""The files of a trained fusion: its weights, and the record of what they belong to."""
SPACES = ("blocks", "experts", "curve")
"""What has weights of its own in a search for merge weights."""
SEARCHERS = ("tpe", "cmaes")
"""What suggests the next weights of a search."""
ARCHITECTURES = ("sd15",)
"""Whose shapes are known without their files."""
FEWEST_PAIRS = 8
"""Of a screen; the bootstrap's intervals are too narrow for fewer."""
