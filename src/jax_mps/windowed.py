"""What the primitives of all pooling families share: making them, batching them, typing their results.

Operands look like `(outer..., spatial..., inner...)`, where `start` numbers the first spatial axis. With
channels last the channel axis is inner, with channels first it is outer; nothing else tells the two
layouts apart. A `vmap` adds one more outer or inner axis, so it moves data only when it maps over a
spatial axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching, xla

from jax_mps import _compat, lowering
from jax_mps.geometry import Dim, Edge, Placement, Window, surely_below

Array = Any
Params = dict[str, Any]

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")


def define(
    name: str,
    abstract: Callable[..., Any],
    *,
    xla_fun: Callable[..., Any],
    native: Callable[..., tuple[str, Params]] | None,
    multiple_results: bool = False,
    batch: Callable[..., tuple[Any, Any]] | None = None,
) -> Any:
    """A primitive with everything but its derivative rules.

    Args:
      name: what jaxprs show.
      abstract: the types of the results, from the types of the operands and the parameters.
      xla_fun: the StableHLO lowering, see `lowering.register`.
      native: the FFI lowering, see `lowering.register`.
      multiple_results: whether `abstract` gives a list.
      batch: the rule of `vmap`, a function of (primitive, operands, dimensions, **params); by default the
        one for operands that all look like `(outer..., spatial..., inner...)`.
    """
    primitive = _compat.Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = functools.partial(batch or _batch, primitive)
    lowering.register(primitive, xla=xla_fun, native=native)
    return primitive


def window_attributes(window: Window, start: int) -> Params:
    """The native kernels' description of a window; sizes come with the buffers."""
    columns = {
        "kernel": window.kernel,
        "stride": [a.stride for a in window.axes],
        "dilation": [a.dilation for a in window.axes],
        "lo": [a.lo for a in window.axes],
    }
    return {"start": np.int64(start)} | {k: np.array(v, np.int64) for k, v in columns.items()}


# --- types --------------------------------------------------------------------------------------------


def image_to_pooled(aval: Any, window: Window, start: int, dtype: Any = None) -> Any:
    """The type of a pooled array; whatever else the type of the image says (sharding) stays."""
    return resized(aval, start, window.sizes, window.outs, dtype)


def pooled_to_image(aval: Any, window: Window, start: int, dtype: Any = None) -> Any:
    return resized(aval, start, window.outs, window.sizes, dtype)


def resized(aval: Any, start: int, before: Sequence[Dim], after: Sequence[Dim], dtype: Any = None) -> Any:
    rank = len(before)
    assert aval.shape[start : start + rank] == tuple(before), (aval, start, before)
    shape = (*aval.shape[:start], *after, *aval.shape[start + rank :])
    return _compat.retyped(aval, shape, np.dtype(dtype or aval.dtype))


# --- vmap ---------------------------------------------------------------------------------------------


def _batch(
    primitive: Any, args: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Any, Any]:
    rank = len(params["window"].axes) if "window" in params else len(params["sizes"])
    start = params["start"]
    mapped = {d for d in dims if d is not None}
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    at = min(mapped)
    if len(mapped) > 1 or start < at < start + rank:
        at = 0
    args = [
        jnp.moveaxis(a, d, at) if d is not None else _repeat(a, at, size)
        for a, d in zip(args, dims, strict=True)
    ]
    if at <= start:
        params["start"] = start + 1
    out = primitive.bind(*args, **params)
    return out, [at] * len(out) if primitive.multiple_results else at


def _repeat(x: Array, at: int, size: int) -> Array:
    shape = (*x.shape[:at], size, *x.shape[at:])
    return lax.broadcast_in_dim(x, shape, [i for i in range(len(shape)) if i != at])


# --- differentiation ----------------------------------------------------------------------------------


def define_multilinear(
    primitive: Any,
    transposes: dict[int, Callable[..., Array]],
    others: dict[int, Callable[..., Array]] | None = None,
) -> None:
    """Derivative rules of a primitive that is linear in each of some operands.

    Args:
      primitive: it has one result.
      transposes: for each operand it is linear in, the function of (cotangent, *operands, **params) that
        gives the cotangent of that operand.
      others: for each other differentiable operand, the function of (tangent, result, *operands,
        **params) that gives the tangent of the result.
    """
    others = others or {}

    def jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Array, Any]:
        out = primitive.bind(*primals, **params)
        total = None
        for i, tangent in enumerate(tangents):
            if type(tangent) is ad.Zero or (i not in transposes and i not in others):
                continue
            if i in transposes:
                term = primitive.bind(*primals[:i], tangent, *primals[i + 1 :], **params)
            else:
                term = others[i](tangent, out, *primals, **params)
            total = term if total is None else ad.add_jaxvals(total, term)
        return out, _compat.zero_tangent(out) if total is None else total

    def transpose(ct: Any, *operands: Any, **params: Any) -> list[Any]:
        (i,) = (i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
        result: list[Any] = [None] * len(operands)
        if type(ct) is ad.Zero:
            result[i] = ad.Zero(operands[i].aval)
        else:
            ct_in = transposes[i](ct, *operands, **params)
            result[i] = _compat.sharded_like(operands[i].aval, ct_in)
        return result

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


# --- operands of the public functions -----------------------------------------------------------------


def array(name: str, value: Any, dtypes: Sequence[str]) -> Array:
    """`value` as an array of one of the dtypes."""
    x = value if hasattr(value, "aval") else jnp.asarray(value)
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must have a dtype of {', '.join(dtypes)}, got {x.dtype.name}")
    return x


def check_shape(name: str, x: Array, expected: Sequence[Dim], rule: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({rule}), got {tuple(x.shape)}")


def check_same_dtype(name: str, x: Array, other: str, y: Array) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {y.dtype.name}, got {x.dtype.name}")


def pooled_shape(shape: Sequence[Dim], window: Window, start: int) -> tuple[Dim, ...]:
    """The shape of the pooled array of an image array of that shape."""
    return (*shape[:start], *window.outs, *shape[start + window.rank :])


def crop(x: Array, placement: Placement) -> Array:
    """Cuts off what negative padding takes away."""
    return _cut(x, placement.start, placement.crop)


def uncrop(x: Array, placement: Placement) -> Array:
    """The transpose of `crop`: zeros where pixels were cut off."""
    return _grow(x, placement.start, placement.crop)


# The transpose of JAX's own `slice` is a `pad`, whose transpose is a `pad` by a negative width, which Apple's
# plugins may not have. `margins` are the pixels before and after, for every axis of the array.

_Margins = Sequence[tuple[Dim, Dim]]


def _with_margins(name: str, sign: int, xla_fun: Callable[..., Array]) -> Any:
    def abstract(x: Any, *, margins: _Margins) -> Any:
        shape = (n + sign * (before + after) for n, (before, after) in zip(x.shape, margins, strict=True))
        return _compat.retyped(x, tuple(shape), x.dtype)

    def batch(primitive: Any, args: Sequence[Array], dims: Sequence[int], *, margins: _Margins) -> Any:
        (x,), (dim,) = args, dims
        return primitive.bind(x, margins=(*margins[:dim], (0, 0), *margins[dim:])), dim

    return define(name, abstract, xla_fun=xla_fun, native=None, batch=batch)


def _sliced(x: Array, *, margins: _Margins, platform: lowering.Platform) -> Array:
    limits = [n - after for n, (_, after) in zip(x.shape, margins, strict=True)]
    return lax.slice(x, [before for before, _ in margins], limits)


def _padded(x: Array, *, margins: _Margins, platform: lowering.Platform) -> Array:
    return lax.pad(x, np.zeros((), x.dtype), [(before, after, 0) for before, after in margins])


cut_p = _with_margins("cut", -1, _sliced)
grow_p = _with_margins("grow", 1, _padded)
define_multilinear(cut_p, {0: lambda ct, _, margins: grow_p.bind(ct, margins=margins)})
define_multilinear(grow_p, {0: lambda ct, _, margins: cut_p.bind(ct, margins=margins)})


def _cut(x: Array, start: int, margins: _Margins) -> Array:
    """Cuts pixels off the spatial axes."""
    return _bind_margins(cut_p, x, start, margins)


def _grow(x: Array, start: int, margins: _Margins) -> Array:
    """Puts zeros around the spatial axes."""
    return _bind_margins(grow_p, x, start, margins)


def _bind_margins(primitive: Any, x: Array, start: int, margins: _Margins) -> Array:
    if all(before == after == 0 for before, after in margins):
        return x
    rest = x.ndim - start - len(margins)
    return primitive.bind(x, margins=(*[(0, 0)] * start, *margins, *[(0, 0)] * rest))


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
        if surely_below(axis.lo, 0):
            x = _cut(x, dim, [(-axis.lo, 0)])
            axis = axis.cropped(-axis.lo, 0)
        axes.append(axis)
    return x, Window(tuple(axes))


def expose(dx: Array, x: Array, window: Window, start: int, edge: Edge) -> Array:
    """The transpose of `enclose`: from the gradient of the image it returned to that of `x`."""
    if dx.shape == x.shape and edge == "exclude":
        return dx
    like = jax.ShapeDtypeStruct(x.shape, dx.dtype)
    return jax.linear_transpose(lambda x: enclose(x, window, start, edge)[0], like)(dx)[0]
