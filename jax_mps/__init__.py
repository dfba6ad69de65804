"""Pooling and transposed convolution for JAX with the exact meaning of Apple's MPS CNN kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_mps import conventions
from jax_mps._version import __version__
from jax_mps.conventions import kernel_from_torch, kernel_to_torch
from jax_mps.lowering import library
from jax_mps.lowering.library import native_available
from jax_mps.ops.adaptive_pooling import adaptive_avg_pool, adaptive_max_pool
from jax_mps.ops.avg_pooling import avg_pool, avg_pool_gradient
from jax_mps.ops.convolution import (
    conv,
    conv_transpose,
    conv_transpose_gradient_data,
    conv_transpose_gradient_weights,
)
from jax_mps.ops.fractional_pooling import fractional_max_pool
from jax_mps.ops.l2_pooling import l2_pool, l2_pool_gradient
from jax_mps.ops.lp_pooling import lp_pool
from jax_mps.ops.max_pooling import max_pool, max_pool_gradient
from jax_mps.ops.max_unpooling import max_unpool
from jax_mps.stock.switch import Acceleration, accelerate

if TYPE_CHECKING:
    from jax_mps import mps

__all__ = [
    "Acceleration",
    "__version__",
    "accelerate",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "avg_pool_gradient",
    "conv",
    "conv_transpose",
    "conv_transpose_gradient_data",
    "conv_transpose_gradient_weights",
    "conventions",
    "fractional_max_pool",
    "kernel_from_torch",
    "kernel_to_torch",
    "l2_pool",
    "l2_pool_gradient",
    "lp_pool",
    "max_pool",
    "max_pool_gradient",
    "max_unpool",
    "mps",
    "native_available",
]


library.register()


def __getattr__(name: str) -> Any:
    """The classes of `mps`, on first use: most programs that import this package need none of them."""
    if name == "mps":
        return importlib.import_module("jax_mps.mps")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
