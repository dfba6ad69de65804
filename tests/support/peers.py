"""The functions of this library as those of other libraries are called: channels first, on one path."""

from __future__ import annotations

import functools
import types

import jax_mps

NAMES = (
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "conv",
    "conv_transpose",
    "fractional_max_pool",
    "lp_pool",
    "max_pool",
    "max_pool_gradient",
    "max_unpool",
)


def ours(implementation: str, data_format: str = "channels_first") -> types.SimpleNamespace:
    """Those that take images, with these options."""
    options = {"data_format": data_format, "implementation": implementation}
    return types.SimpleNamespace(**{n: functools.partial(getattr(jax_mps, n), **options) for n in NAMES})
