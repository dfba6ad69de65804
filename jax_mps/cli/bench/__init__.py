"""Named shapes, and their timing beside other libraries: `python -m jax_mps bench`."""
