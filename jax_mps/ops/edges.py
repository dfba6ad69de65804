"""Pixels cut off an image or put around it, so that the primitives see windows that start inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps import _compat
from jax_mps.geometry import (
    ConvPlacement,
    Dim,
    Edge,
    Placement,
    TransposedPlacement,
    Window,
    surely_below,
)
from jax_mps.lowering.rule import Platform
from jax_mps.ops import primitive

Array = Any
_Trimmed = Placement | ConvPlacement | TransposedPlacement


def crop(x: Array, placement: Placement) -> Array:
    """Adds pixels that a symbolic size may lack, then cuts off what negative padding takes away."""
    return _cut(grow(x, placement), placement.start, placement.crop)


def uncrop(x: Array, placement: Placement) -> Array:
    """The transpose of `crop`: zeros where pixels were cut off."""
    return _cut(_grow(x, placement.start, placement.crop), placement.start, placement.grow)


def grow(x: Array, placement: Placement | ConvPlacement) -> Array:
    """Adds the pixels that an image of symbolic size may lack for one window."""
    return _grow(x, placement.start, placement.grow)


def trim(y: Array, placement: _Trimmed) -> Array:
    """Cuts off a result what the pixels that `grow` adds, or those of windows there, have brought."""
    return _cut(y, placement.start, placement.spare)


def untrim(g: Array, placement: _Trimmed) -> Array:
    """The transpose of `trim`."""
    return _grow(g, placement.start, placement.spare)


# The transpose of JAX's own `slice` is a `pad`, whose transpose is a `pad` by a negative width, which Apple's
# plugins may not have. `margins` are the pixels before and after, for every axis of the array.

_Margins = Sequence[tuple[Dim, Dim]]


def _with_margins(name: str, sign: int, xla_fun: Callable[..., Array]) -> Any:
    def abstract(x: Any, *, margins: _Margins) -> Any:
        shape = (n + sign * (before + after) for n, (before, after) in zip(x.shape, margins, strict=True))
        return _compat.retyped(x, tuple(shape), x.dtype)

    def batch(prim: Any, args: Sequence[Array], dims: Sequence[int], *, margins: _Margins) -> Any:
        (x,), (dim,) = args, dims
        return prim.bind(x, margins=(*margins[:dim], (0, 0), *margins[dim:])), dim

    return primitive.define(name, abstract, xla_fun=xla_fun, native=None, batch=batch)


def _sliced(x: Array, *, margins: _Margins, platform: Platform) -> Array:
    if not all(isinstance(n, int) for pair in margins for n in pair):
        # A slice would have to know that it ends inside the array.
        return lax.pad(x, np.zeros((), x.dtype), [(-before, -after, 0) for before, after in margins])
    limits = [n - after for n, (_, after) in zip(x.shape, margins, strict=True)]
    return lax.slice(x, [before for before, _ in margins], limits)


def _padded(x: Array, *, margins: _Margins, platform: Platform) -> Array:
    return lax.pad(x, np.zeros((), x.dtype), [(before, after, 0) for before, after in margins])


cut_p = _with_margins("cut", -1, _sliced)
grow_p = _with_margins("grow", 1, _padded)
primitive.define_multilinear(cut_p, {0: lambda ct, _, margins: grow_p.bind(ct, margins=margins)})
primitive.define_multilinear(grow_p, {0: lambda ct, _, margins: cut_p.bind(ct, margins=margins)})


def _cut(x: Array, start: int, margins: _Margins) -> Array:
    """Cuts pixels off the spatial axes."""
    return _bind_margins(cut_p, x, start, margins)


def _grow(x: Array, start: int, margins: _Margins) -> Array:
    """Puts zeros around the spatial axes."""
    return _bind_margins(grow_p, x, start, margins)


def _bind_margins(prim: Any, x: Array, start: int, margins: _Margins) -> Array:
    if all(before == after == 0 for before, after in margins):
        return x
    rest = x.ndim - start - len(margins)
    return prim.bind(x, margins=(*[(0, 0)] * start, *margins, *[(0, 0)] * rest))


def enclose(x: Array, window: Window, start: int, edge: Edge) -> tuple[Array, Window]:
    """The image that the primitives are to see, for windows anywhere and any edge mode.

    Args:
      x: the image.
      window: its windows.
      start: its first spatial axis.
      edge: "zero" pads with zeros, "clamp" repeats the nearest pixel, until every tap lies in the image;
        "exclude" leaves taps in the padding.

    Returns:
      The image, cut where the first window begins after its first pixel, and the same windows on it.
    """
    axes = []
    for dim, axis in enumerate(window.axes, start):
        if edge != "exclude":
            axis, before, after = axis.enclosed()
            if edge == "zero":
                x = _grow(x, dim, [(before, after)])
            else:
                pads = [(before, after) if i == dim else (0, 0) for i in range(x.ndim)]
                x = jnp.pad(x, pads, mode="edge")
        if surely_below(axis.low, 0):
            x = _cut(x, dim, [(-axis.low, 0)])
            axis = axis.cropped(-axis.low, 0)
        axes.append(axis)
    return x, Window(tuple(axes))


def expose(dx: Array, x: Array, window: Window, start: int, edge: Edge) -> Array:
    """The transpose of `enclose`: from the gradient of the image it returned to that of `x`."""
    if dx.shape == x.shape and edge == "exclude":
        return dx
    like = jax.ShapeDtypeStruct(x.shape, dx.dtype)
    return jax.linear_transpose(lambda x: enclose(x, window, start, edge)[0], like)(dx)[0]
