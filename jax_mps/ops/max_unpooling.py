"""Unpooling: values put where maxima came from.

Two linear primitives, each the transpose of the other: one puts values to positions of a plane, the other
takes them from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import _compat, geometry
from jax_mps.geometry import DataFormat
from jax_mps.lowering import partition, pooling, rule
from jax_mps.ops import operands, primitive
from jax_mps.ops.operands import FLOATS, INTEGERS, WIDE_INTEGERS

Array = Any
_INDICES = tuple(name for name in INTEGERS + WIDE_INTEGERS if name != "bool")


def max_unpool(
    y: ArrayLike,
    indices: ArrayLike,
    output_shape: Sequence[int],
    *,
    indices_shape: Sequence[int] | None = None,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """Puts pooled values back to where they came from, and zeros everywhere else.

    In every spatial plane, `x.flat[indices[...]] = y[...]`. Where several entries name the same position
    the last one in row-major order stays (after `max_pool` they are equal), and the gradient goes to
    that one alone. An index outside the plane is dropped.

    On Apple's GPUs, whose plugins have no scatter to rely on, every entry is compared with every pixel of its
    plane, and large planes are refused when the program is lowered.

    Args:
      y: values, `(*batch, *spatial, channels)` or channels first, of any dtype that `max_pool` takes.
      indices: flat positions in the plane, integers of any width in the shape of `y`, as `max_pool(...,
        return_indices=True)` gives them.
      output_shape: the spatial sizes of the result; its length is the number of spatial axes.
      indices_shape: the spatial sizes of the plane that `indices` are positions of, by default
        `output_shape`. Of another plane, rows and columns stay, and what lies outside `output_shape` is
        dropped.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array with the dtype, batch and channels of `y` and the spatial sizes `output_shape`.

    Raises:
      TypeError: an unsupported dtype, `indices` not integers, `output_shape` not a sequence of ints.
      ValueError: the shapes of `y` and `indices` differ, `output_shape` is not 1 to 3 sizes of at least
        1 with a plane below 2**31 pixels, or `y` has too few axes.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 5., 2., 4.]).reshape(1, 4, 1)
      >>> y, at = jax_mps.max_pool(x, 2, strides=2, return_indices=True)
      >>> jax_mps.max_unpool(y, at, (4,)).ravel()
      Array([0., 5., 0., 4.], dtype=float32)
      >>> plane = jnp.array([[1., 2.], [3., 4.]]).reshape(1, 2, 2, 1)
      >>> y, at = jax_mps.max_pool(plane, 2, strides=2, return_indices=True)
      >>> jax_mps.max_unpool(y, at, (2, 3), indices_shape=(2, 2))[0, ..., 0]
      Array([[0., 0., 0.],
             [0., 4., 0.]], dtype=float32)

    Source: PyTorch's `max_unpool2d`, with a fixed rule for duplicates.
    """
    values = operands.array("y", y, FLOATS + INTEGERS + WIDE_INTEGERS)
    positions = _as_int32(operands.array("indices", indices, _INDICES))
    sizes = geometry.shape("output_shape", output_shape)
    static = all(isinstance(n, int) for n in sizes)
    if not 1 <= len(sizes) <= 3 or (static and not 0 < math.prod(sizes) < 2**31):
        raise ValueError(
            "output_shape must be 1 to 3 spatial sizes of at least 1 with fewer than 2**31 pixels in all, "
            f"got {sizes}"
        )
    if values.ndim < len(sizes) + 1:
        raise ValueError(
            f"y must have {len(sizes)} spatial axes and a channel axis, got shape {values.shape}"
        )
    operands.check_shape("indices", positions, values.shape, "that of y")
    if indices_shape is not None:
        positions = _in_plane(positions, geometry.shape("indices_shape", indices_shape), sizes)
    start = geometry.spatial_start(values.ndim, len(sizes), data_format)
    source = tuple(values.shape[start : start + len(sizes)])
    rule.check_implementation(implementation, static=static and all(isinstance(n, int) for n in source))
    return max_unpool_p.bind(
        *_compat.vary_alike(values, positions),
        sizes=sizes,
        source=source,
        start=start,
        implementation=implementation,
    )


def _in_plane(positions: Array, plane: tuple[Any, ...], sizes: tuple[Any, ...]) -> Array:
    """Positions in a plane as positions in one of other sizes; -1 where that has no such pixel."""
    if len(plane) != len(sizes) or not all(isinstance(n, int) and n > 0 for n in plane):
        raise ValueError(
            f"indices_shape must be {len(sizes)} sizes of at least 1, as output_shape, got {plane}"
        )
    if plane == sizes:
        return positions
    inside = (positions >= 0) & (positions < math.prod(plane))
    rest, moved, step = positions, jnp.zeros_like(positions), 1
    for n, size in zip(reversed(plane), reversed(sizes), strict=True):
        rest, pixel = lax.div(rest, np.int32(n)), lax.rem(rest, np.int32(n))
        inside &= pixel < size
        moved, step = moved + pixel * step, step * size
    return jnp.where(inside, moved, np.int32(-1))


def _as_int32(indices: Array) -> Array:
    """The positions in int32, in which those of every plane have a number; -1 for any other."""
    if indices.dtype == np.int32:
        return indices
    narrow = lax.convert_element_type(indices, np.int32)
    if indices.dtype.itemsize < 4:
        return narrow
    most = lax.full_like(indices, np.iinfo(np.int32).max)
    known = lax.bitwise_and(lax.ge(indices, lax.full_like(indices, 0)), lax.le(indices, most))
    return lax.select(known, narrow, lax.full_like(narrow, -1))


# --- primitives ---------------------------------------------------------------------------------------
#
# `sizes` are those of the plane, `source` those of the pooled array.


def _native(name: str) -> Any:
    return lambda *, sizes, source, start: (
        name,
        {"start": np.int64(start), "rank": np.int64(len(sizes))},
    )


def _factors(operands: str, results: str) -> Callable[..., partition.Factors]:
    """What devices share: images and channels. Positions are data, so each device has whole planes."""

    def factors(x: Any, *_: Any, sizes: tuple[int, ...], start: int, **__: Any) -> partition.Factors:
        kinds = {"i": partition.PLANE, "p": f"{partition.PLANE}_source"}
        arrays = {k: partition.of_images(x.ndim, start, len(sizes), kind) for k, kind in kinds.items()}
        return partition.Factors(tuple(arrays[k] for k in operands), tuple(arrays[k] for k in results))

    return factors


max_unpool_p = primitive.define(
    "max_unpool",
    lambda y, indices, *, sizes, source, start, implementation: primitive.resized(y, start, source, sizes),
    xla_fun=pooling.max_unpool,
    native=_native("max_unpool"),
    factors=_factors("pp", "i"),
)
max_unpool_take_p = primitive.define(
    "max_unpool_take",
    lambda c, indices, *, sizes, source, start, implementation: primitive.resized(c, start, sizes, source),
    xla_fun=pooling.max_unpool_take,
    native=_native("max_unpool_take"),
    factors=_factors("ip", "p"),
)
primitive.define_multilinear(
    max_unpool_p, {0: lambda ct, _, indices, **params: max_unpool_take_p.bind(ct, indices, **params)}
)
primitive.define_multilinear(
    max_unpool_take_p, {0: lambda ct, _, indices, **params: max_unpool_p.bind(ct, indices, **params)}
)
