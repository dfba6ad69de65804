"""Flax layers: import `linen` or `nnx` from here instead of from Flax."""
