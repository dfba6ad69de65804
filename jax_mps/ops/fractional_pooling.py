"""Fractional max pooling: windows of one size whose distances vary with a random number.

The windows differ from channel to channel, and may be known only when the program runs. So they are gathered
into tiles, which ordinary pooling takes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import _compat, geometry
from jax_mps.geometry import DataFormat, Ints
from jax_mps.lowering import rule
from jax_mps.ops import max_pooling, operands, tiling
from jax_mps.ops.operands import FLOATS, INTEGERS

Array = Any


@overload
def fractional_max_pool(
    x: ArrayLike,
    window_shape: Ints,
    output_size: Ints,
    samples: ArrayLike,
    *,
    return_indices: Literal[False] = ...,
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> jax.Array: ...
@overload
def fractional_max_pool(
    x: ArrayLike,
    window_shape: Ints,
    output_size: Ints,
    samples: ArrayLike,
    *,
    return_indices: Literal[True],
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
def fractional_max_pool(
    x: ArrayLike,
    window_shape: Ints,
    output_size: Ints,
    samples: ArrayLike,
    *,
    return_indices: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The maxima of windows at pseudo-random distances, for given random numbers.

    Along a spatial axis of n pixels with windows of k taps and o outputs, and for the sample u of the
    channel and the axis, window `i` starts at the pixel

        floor((i + u) * a) - floor(u * a),        a = (n - k) / (o - 1),

    the last one at n - k, and y[..., i, c] is the maximum of its k pixels. NaN propagates. The gradient of a
    window goes to its first maximum in row-major order, or to its first NaN. Differentiable to any order
    with respect to `x`; the derivative with respect to `samples` is 0. Windows are gathered, so Apple's
    plugins cannot run this, and on an explicit mesh the spatial axes must not be sharded.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; the dtypes of `max_pool`. Spatial sizes must be known at trace time.
      window_shape: taps of a window along each spatial axis, an int for all.
      output_size: windows along each spatial axis, an int for all.
      samples: array of shape `(*batch, channels, rank)` in both formats, of numbers in [0, 1), for 1 to 3
        spatial axes; PyTorch's `_random_samples`. With 2 spatial axes the first number is that of the
        *last* axis, with 3 that of the first axis, as in PyTorch. Starts are computed in its dtype, one of
        float32, float64, float16 or bfloat16. It may be traced.
      return_indices: also return where the maxima are.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with `output_size` as its spatial sizes. With `return_indices`
      a pair of it and of int32 flat positions in the spatial plane, which `max_unpool` takes.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, lengths disagree, `samples` has another shape, an axis has fewer
        than `output_size + window_shape - 1` pixels, a plane is too large for int32 positions, a spatial
        axis is symbolic, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 3., 2., 7., 5., 6., 0., 4.]).reshape(1, 8, 1)
      >>> jax_mps.fractional_max_pool(x, 2, 4, jnp.array([[[0.]]])).ravel()
      Array([3., 7., 6., 4.], dtype=float32)
      >>> jax_mps.fractional_max_pool(x, 2, 3, jnp.array([[[0.5]]]), return_indices=True)[1].ravel()
      Array([1, 3, 7], dtype=int32)

    Source: PyTorch's `fractional_max_pool2d` and `fractional_max_pool3d`; Graham, "Fractional Max-Pooling".
    """
    image = operands.array("x", x, FLOATS + INTEGERS)
    numbers = operands.array("samples", samples, FLOATS)
    geometry.flag("return_indices", return_indices)
    rank = numbers.shape[-1] if numbers.ndim else 0
    if not 1 <= rank <= 3 or image.ndim < rank + 1:
        raise ValueError(
            "samples must have shape (*batch, channels, rank) for the 1 to 3 spatial axes of x, "
            f"got {numbers.shape} for x of shape {image.shape}"
        )
    start = geometry.spatial_start(image.ndim, rank, data_format)
    outer = (*image.shape[:start], *image.shape[start + rank :])
    operands.check_shape("samples", numbers, (*outer, rank), "batch and channels of x, spatial axes")
    sizes = geometry.static_sizes(image.shape, start, rank)
    taps, counts = (
        geometry.per_axis(name, geometry.freeze(name, value), rank)
        for name, value in (("window_shape", window_shape), ("output_size", output_size))
    )
    for i, (n, k, o) in enumerate(zip(sizes, taps, counts, strict=True)):
        if o + k - 1 > n:
            raise ValueError(
                f"output_size={o} and window_shape={k} need at least {o + k - 1} pixels along spatial axis "
                f"{i}, got {n}"
            )
    if return_indices and math.prod(sizes) > 2**31 - 1:
        raise ValueError(f"return_indices=True needs spatial planes below 2**31 pixels, got {sizes}")
    rule.check_implementation(implementation, static=True)

    firsts, tiles = [], tiling.widened(image)
    for i, (n, k, o) in enumerate(zip(sizes, taps, counts, strict=True)):
        sample = numbers[..., rank - 1 - i if rank == 2 else i]  # PyTorch's order
        first = _starts(sample, n, k, o)
        if geometry.channels_last(data_format, rank):
            first = jnp.moveaxis(first, -1, -2)
        first = jnp.expand_dims(first, [start + j for j in range(rank) if j != i])
        within = tiling.along(np.tile(np.arange(k, dtype=np.int32), o), start + i, image.ndim)
        pixels = jnp.repeat(first, k, axis=start + i) + within
        tiles = _compat.take_along_axis(tiles, pixels, axis=start + i)
        firsts.append(first)
    window = tiling.window_of_tiles(counts, taps)
    if not return_indices:
        y = max_pooling.pool(tiles, window, start, implementation=implementation)
        return lax.convert_element_type(y, image.dtype)
    y, tap_index = max_pooling.max_pool_with_tap_index_p.bind(
        tiles, window=window, start=start, implementation=implementation
    )
    at = tiling.positions(tap_index, window, start, sizes, firsts)
    return lax.convert_element_type(y, image.dtype), at


def _starts(sample: Array, size: int, taps: int, count: int) -> Array:
    """The first pixels of the windows of an axis, for every sample: `(*sample.shape, count)`."""
    last = jnp.full((*sample.shape, 1), size - taps, np.int32)
    if count == 1:
        return last
    dtype = sample.dtype
    kind = jnp.finfo(dtype)

    def rounded(x: Array) -> Array:  # XLA may compute half precision in float32; PyTorch rounds every step
        return lax.reduce_precision(x, kind.nexp, kind.nmant)

    alpha = (np.array(size - taps, dtype) / np.array(count - 1, dtype)).astype(rule.accumulator(dtype))
    numbers = np.arange(count - 1).astype(dtype).astype(alpha.dtype)
    u = lax.convert_element_type(sample, alpha.dtype)[..., None]
    up, zero = (
        lax.convert_element_type(rounded(v * alpha), np.int32)
        for v in (rounded(u + tiling.along(numbers, u.ndim - 1, u.ndim)), u)
    )
    starts = lax.clamp(np.int32(0), up - zero, np.int32(size - taps))  # samples outside [0, 1) stay inside
    return jnp.concatenate([starts, last], axis=-1)
