"""Adaptive pooling: as many windows as the result is to have, which share out the image.

Windows of several lengths are copied to tiles of the longest length, and ordinary pooling takes those. For a
maximum a short window repeats its last pixel, which never comes before itself; for an average it has zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import AdaptivePlacement, DataFormat, Divisor
from jax_mps.lowering import rule
from jax_mps.ops import avg_pooling, max_pooling, operands, tiling
from jax_mps.ops.operands import FLOATS, INTEGERS

Array = Any


def adaptive_avg_pool(
    x: ArrayLike,
    output_size: int | Sequence[int | None],
    *,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The averages of windows that share out an image, whatever its size.

    Along a spatial axis of n pixels and o outputs, window `i` covers the pixels

        floor(i * n / o) <= t < ceil((i + 1) * n / o),

    and y[..., i, c] is the average of x[..., t, c] over them. Windows overlap where o does not divide n.
    Sums are formed in float32 (float64 for float64) and rounded once. Linear; differentiable to any order.
    An output size of 1 is global pooling: `adaptive_avg_pool(x, 1)`.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16 or bfloat16. Spatial sizes must be known at trace time; others may be symbolic.
      output_size: windows along each spatial axis, also more than pixels. An int applies to every spatial
        axis, and `x` has exactly one batch axis; otherwise the length of a tuple is the number of spatial
        axes. None in a tuple keeps the size of that axis.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with `output_size` as its spatial sizes.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, a spatial axis is empty or symbolic, or
        `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 3., 5., 7., 9.]).reshape(1, 5, 1)
      >>> jax_mps.adaptive_avg_pool(x, 2).ravel()
      Array([3., 7.], dtype=float32)
      >>> jax_mps.adaptive_avg_pool(x, 1).ravel()
      Array([5.], dtype=float32)

    Source: PyTorch's `adaptive_avg_pool2d`.
    """
    image = operands.array("x", x, FLOATS)
    placement = geometry.place_adaptive(image.shape, output_size, data_format)
    axes, start = placement
    rule.check_implementation(implementation, static=True)
    window = _window(placement)
    pool = functools.partial(avg_pooling.pool, implementation=implementation)
    if placement.regular:
        return pool(image, window, start, Divisor(window.taps, ()))
    tiles = tiling.tile(tiling.widened(image), start, [axis.pixels(fill=True) for axis in axes])
    total = pool(tiles, window, start, Divisor(1, ()))
    lengths = [tiling.along(axis.lengths, dim, total.ndim) for dim, axis in enumerate(axes, start)]
    mean = total / math.prod(lengths).astype(total.dtype)  # one quotient, so that it is rounded once
    return lax.convert_element_type(mean, image.dtype)


@overload
def adaptive_max_pool(
    x: ArrayLike,
    output_size: int | Sequence[int | None],
    *,
    return_indices: Literal[False] = ...,
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> jax.Array: ...
@overload
def adaptive_max_pool(
    x: ArrayLike,
    output_size: int | Sequence[int | None],
    *,
    return_indices: Literal[True],
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
def adaptive_max_pool(
    x: ArrayLike,
    output_size: int | Sequence[int | None],
    *,
    return_indices: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The maxima of windows that share out an image, whatever its size.

    With the windows of `adaptive_avg_pool`,

        y[..., i, c] = max over the pixels t of window i of x[..., t, c].

    NaN propagates. The gradient of a window goes to its first maximum in row-major order, or to its first
    NaN. Differentiable to any order.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; the dtypes of `max_pool`. Spatial sizes must be known at trace
        time; others may be symbolic.
      output_size: windows along each spatial axis, as for `adaptive_avg_pool`.
      return_indices: also return where the maxima are.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with `output_size` as its spatial sizes. With `return_indices`
      a pair of it and of int32 flat positions in the spatial plane, which `max_unpool` takes.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, a spatial axis is empty or symbolic, a plane is too large for
        int32 positions, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 3., 9., 7., 5.]).reshape(1, 5, 1)
      >>> y, at = jax_mps.adaptive_max_pool(x, 2, return_indices=True)
      >>> y.ravel(), at.ravel()
      (Array([9., 9.], dtype=float32), Array([2, 2], dtype=int32))
      >>> jax_mps.adaptive_max_pool(x.reshape(1, 1, 5, 1), (None, 3)).ravel()
      Array([3., 9., 7.], dtype=float32)

    Source: PyTorch's `adaptive_max_pool2d`.
    """
    image = operands.array("x", x, FLOATS + INTEGERS)
    geometry.flag("return_indices", return_indices)
    placement = geometry.place_adaptive(image.shape, output_size, data_format)
    axes, start = placement
    rule.check_implementation(implementation, static=True)
    sizes = tuple(axis.size for axis in axes)
    if return_indices and math.prod(sizes) > 2**31 - 1:
        raise ValueError(f"return_indices=True needs spatial planes below 2**31 pixels, got {sizes}")
    window = _window(placement)
    wide = image if placement.regular else tiling.widened(image)
    tiles = tiling.tile(wide, start, [axis.pixels(fill=False) for axis in axes])
    if not return_indices:
        y = max_pooling.pool(tiles, window, start, implementation=implementation)
        return lax.convert_element_type(y, image.dtype)
    y, tap_index = max_pooling.max_pool_with_tap_index_p.bind(
        tiles, window=window, start=start, implementation=implementation
    )
    firsts = [
        tiling.along(axis.firsts.astype(np.int32), dim, image.ndim) for dim, axis in enumerate(axes, start)
    ]
    at = tiling.positions(tap_index, window, start, sizes, firsts)
    return lax.convert_element_type(y, image.dtype), at


def _window(placement: AdaptivePlacement) -> geometry.Window:
    axes = placement.axes
    return tiling.window_of_tiles([axis.windows for axis in axes], [axis.taps for axis in axes])
