"""What all primitives share: definition, types of results, `vmap`, rules of multilinear ones.

Operands look like `(outer..., spatial..., inner...)`, where `start` numbers the first spatial axis. With
channels last the channel axis is inner, with channels first it is outer; nothing else tells the two
layouts apart. A `vmap` adds one more outer or inner axis, so it moves data only when it maps over a
spatial axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching, xla

from jax_mps import _compat
from jax_mps.geometry import Dim, Window
from jax_mps.lowering import partition, rule

Array = Any
Params = dict[str, Any]


def define(
    name: str,
    abstract: Callable[..., Any],
    *,
    xla_fun: Callable[..., Any],
    native: Callable[..., tuple[str, Params]] | None,
    native_is_slower: Callable[..., bool] = lambda *_, **__: False,
    factors: Callable[..., partition.Factors] | None = None,
    multiple_results: bool = False,
    batch: Callable[..., tuple[Any, Any]] | None = None,
) -> Any:
    """A primitive with everything but its derivative rules.

    Args:
      name: what jaxprs show.
      abstract: the types of the results, from the types of the operands and the parameters.
      xla_fun: the StableHLO lowering, see `lowering.rule.register`.
      native: the FFI lowering, see `lowering.rule.register`.
      native_is_slower: where the StableHLO is preferred, see `lowering.rule.register`.
      factors: what devices can share, see `lowering.rule.register`.
      multiple_results: whether `abstract` gives a list.
      batch: the rule of `vmap`, a function of (primitive, arrays, dimensions, **params); by default the
        one for operands that all look like `(outer..., spatial..., inner...)`.
    """
    primitive = _compat.Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = functools.partial(batch or _batch, primitive)
    rule.register(primitive, xla=xla_fun, native=native, native_is_slower=native_is_slower, factors=factors)
    return primitive


def window_attributes(window: Window, start: int) -> Params:
    """The native kernels' description of a window; sizes come with the buffers."""
    columns = {
        "window_shape": window.shape,
        "strides": [a.stride for a in window.axes],
        "window_dilation": [a.dilation for a in window.axes],
        "low": [a.low for a in window.axes],
    }
    return {"start": np.int64(start)} | {k: np.array(v, np.int64) for k, v in columns.items()}


def pooling_factors(operands: str, results: str) -> Callable[..., partition.Factors]:
    """What devices share of a pooling whose arrays are images, "i", or pooled arrays, "p"."""

    def factors(x: Any, *_: Any, window: Window, start: int, **__: Any) -> partition.Factors:
        kinds = {"i": partition.IMAGE, "p": partition.POOLED}
        arrays = {k: partition.of_images(x.ndim, start, window.rank, kind) for k, kind in kinds.items()}
        return partition.Factors(tuple(arrays[k] for k in operands), tuple(arrays[k] for k in results))

    return factors


# --- types --------------------------------------------------------------------------------------------


def image_to_pooled(aval: Any, window: Window, start: int, dtype: Any = None) -> Any:
    """The type of a pooled array; whatever else the type of the image says (sharding) stays."""
    return resized(aval, start, window.sizes, window.counts, dtype)


def pooled_to_image(aval: Any, window: Window, start: int, dtype: Any = None) -> Any:
    return resized(aval, start, window.counts, window.sizes, dtype)


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
        **params) that gives the tangent of the result. The rule of `jet` does not know of it.
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

    def jet(primals: Sequence[Array], series: Sequence[Any], **params: Any) -> tuple[Array, list[Array]]:
        def bind(*arrays: Array) -> Array:
            chosen = dict(zip(transposes, arrays, strict=True))
            return primitive.bind(*(chosen.get(i, x) for i, x in enumerate(primals)), **params)

        terms = [[primals[i], *series[i]] for i in transposes]
        out, *more = map(bind, *terms) if len(terms) == 1 else product_terms(bind, *terms)
        return out, more

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    _compat.define_jet(primitive, jet)


def product_terms(
    product: Callable[[Array, Array], Array], a: Sequence[Array], b: Sequence[Array]
) -> list[Array]:
    """The Taylor coefficients of a bilinear function of two series, from those of order 0 on."""
    return [
        functools.reduce(ad.add_jaxvals, (product(a[j], b[k - j]) for j in range(k + 1)))
        for k in range(len(a))
    ]
