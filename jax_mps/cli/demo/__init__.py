"""Small networks that show the library at work: `python -m jax_mps demo`."""
