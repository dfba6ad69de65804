"""Functions of this library in stock JAX, channels first: what `accelerate()` recognises in a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

import oracle
from jax_mps import conventions

Array = Any


def max_pool(x: Array, window: Sequence[int], *, ceil_mode: bool = False, **call: Any) -> Array:
    first = np.asarray(jnp.iinfo(x.dtype).min if jnp.issubdtype(x.dtype, jnp.integer) else -np.inf, x.dtype)
    return _reduce(x, _lines(x, window, ceil_mode, **call), first, lax.max)


def avg_pool(
    x: Array,
    window: Sequence[int],
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    **call: Any,
) -> Array:
    axes = _lines(x, window, ceil_mode, **call)
    sums = _reduce(x, axes, np.zeros((), x.dtype), lax.add)
    divisors = np.asarray(divisor_override)
    if divisor_override is None:
        bands = [a.band if count_include_pad else (0, 0) for a in axes]
        pairs = zip(axes, bands, strict=True)
        counts = [np.array([a.counted(i, band) for i in range(a.windows)]) for a, band in pairs]
        divisors = functools.reduce(np.multiply.outer, counts)
    return sums / np.broadcast_to(divisors, sums.shape).astype(x.dtype)


def conv(x: Array, kernel: Array, bias: Array | None = None, **call: Any) -> Array:
    """`jax_mps.conv`, whose paddings are strings or pairs here."""
    names = {"strides": "window_strides", "kernel_dilation": "rhs_dilation", "groups": "feature_group_count"}
    return _convolve(x, kernel, bias, {names.get(k, k): v for k, v in call.items()})


def conv_transpose(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    output_padding: Sequence[int],
    kernel_dilation: Sequence[int],
    groups: int,
) -> Array:
    window = kernel.shape[:-2]
    around = conventions.padding_to_flax(
        padding, window, strides=strides, output_padding=output_padding, kernel_dilation=kernel_dilation
    )
    options = {
        "window_strides": (1,) * len(window),
        "padding": around,
        "lhs_dilation": strides,
        "rhs_dilation": kernel_dilation,
        "feature_group_count": groups,
    }
    return _convolve(x, kernel, bias, options)


def _lines(
    x: Array,
    window: Sequence[int],
    ceil_mode: bool,
    *,
    strides: Sequence[int],
    padding: Any,
    window_dilation: Sequence[int],
) -> Sequence[oracle.Line]:
    sizes = x.shape[x.ndim - len(window) :]
    if isinstance(padding, str):
        extents = [(k - 1) * d + 1 for k, d in zip(window, window_dilation, strict=True)]
        padding = lax.padtype_to_pads(sizes, extents, strides, padding)
    return oracle.lines(sizes, window, strides, padding, window_dilation, ceil_mode)


def _reduce(x: Array, axes: Sequence[oracle.Line], first: Any, combine: Callable[..., Any]) -> Array:
    ones = (1,) * (x.ndim - len(axes))
    highs = [a.tap(a.windows - 1, a.taps - 1) + 1 - a.size for a in axes]
    return lax.reduce_window(
        x,
        first,
        combine,
        (*ones, *(a.taps for a in axes)),
        (*ones, *(a.stride for a in axes)),
        (*((0, 0) for _ in ones), *((a.low, high) for a, high in zip(axes, highs, strict=True))),
        window_dilation=(*ones, *(a.dilation for a in axes)),
    )


def _convolve(x: Array, kernel: Array, bias: Array | None, options: dict[str, Any]) -> Array:
    rank = kernel.ndim - 2
    letters = "DHW"[:rank]
    specs = (f"NC{letters}", f"{letters}IO", f"NC{letters}")
    batched = x if x.ndim == rank + 2 else x[None]
    y = lax.conv_general_dilated(batched, kernel, dimension_numbers=specs, **options)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.reshape(-1, *(1,) * rank), y.shape)
    return y.reshape(y.shape[batched.ndim - x.ndim :])
