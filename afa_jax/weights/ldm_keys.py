"""The former place of formats/ldm_keys.py, kept for older scripts."""

from afa_jax.weights.formats.ldm_keys import ldm_shape as ldm_shape
from afa_jax.weights.formats.ldm_keys import ldm_table as ldm_table
