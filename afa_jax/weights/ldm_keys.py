"""The former place of formats/ldm_keys.py, for scripts that were written before the rooms."""

from afa_jax.weights.formats.ldm_keys import ldm_shape as ldm_shape
from afa_jax.weights.formats.ldm_keys import ldm_table as ldm_table
