"""64-bit types for a while, on every version of JAX."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax


def enable_x64() -> AbstractContextManager[None]:
    """A context in which JAX has 64-bit types."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as enable  # older versions

    return enable(True)
