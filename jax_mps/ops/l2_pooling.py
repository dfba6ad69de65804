"""L2 pooling and its documented gradient.

Three primitives carry the family. `y` is the norm of every window; the other two are linear in each of
their first two operands and transposes of each other in either:

    tangent(t, x; y)  = (sum over taps of t * x) / y              pooled
    gradient(g, x; y) = x * (sum over windows of g / y)           an image

A window whose norm is 0 contributes 0 to both, which is the smallest subgradient there. Their derivative
in `y` replaces 1 / y by -1 / y**2, which is the same primitive times -(1 / y), so all orders close. `y`
stays in the accumulator's type (float32 for half precision), so that nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.interpreters import ad
from jax.typing import ArrayLike

from jax_mps import _compat, geometry
from jax_mps.geometry import DataFormat, Edge, Ints, Padding, Window, place
from jax_mps.lowering import pooling, rule
from jax_mps.lowering.pooling import slow_windows
from jax_mps.ops import edges, operands, primitive
from jax_mps.ops.operands import FLOATS

Array = Any

# --- public functions ---------------------------------------------------------------------------------


def l2_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The Euclidean norm of every window of an image.

    With the windows of `max_pool` and taps outside the image reading 0,

        y[..., i, c] = sqrt(sum over the taps of x[..., t, c] ** 2),

    not divided by the number of taps. Squares neither overflow nor underflow: windows of 1e20 or 1e-30
    in float32 have the right norm. Half precision accumulates in float32. Differentiable to any order;
    a window of zeros has the gradient 0.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16 or bfloat16.
      window_shape: taps of a window along each spatial axis; ints and tuples as for `max_pool`.
      strides: pixels from one window to the next. Libraries disagree about a default, so there is none.
      padding: "VALID", "SAME", "SAME_LOWER", an int, or a `(low, high)` pair for each spatial axis;
        negative crops.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does. Not with a string for `padding`.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with as many windows as `max_pool` has.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, lengths disagree, a window would have no tap in the image, the
        output would be empty, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax, jax.numpy as jnp, jax_mps
      >>> x = jnp.array([3., 4., 0., 0., 5., 12.]).reshape(1, 6, 1)
      >>> jax_mps.l2_pool(x, 2, strides=2).ravel()
      Array([ 5.,  0., 13.], dtype=float32)
      >>> jax.grad(lambda x: jax_mps.l2_pool(10 * x, 2, strides=2)[0, 1, 0])(x).ravel()
      Array([0., 0., 0., 0., 0., 0.], dtype=float32)

    Source: `MPSCNNPoolingL2Norm` in MPSCNNPooling.h; PyTorch's `lp_pool2d` with `norm_type=2`.
    """
    image = operands.array("x", x, FLOATS)
    placement = place(image.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    y = pool(edges.crop(image, placement), window, start, implementation=implementation)
    return edges.trim(y, placement)


def l2_pool_gradient(
    source_gradient: ArrayLike,
    source: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The gradient kernel of `l2_pool`.

        dx[..., t, c] = x[..., t, c] * sum over the windows i that have the tap t of
                        source_gradient[..., i, c] / y[..., i, c]

    where y is the norm of the window, found again from `source`; windows with y = 0 contribute 0.

    Args:
      source_gradient: gradient of the pooled array: its shape, the dtype of `source`.
      source: the image that was pooled; float32, float64, float16 or bfloat16.
      window_shape: as for `l2_pool`, and so are the arguments that follow.
      strides: pixels from one window to the next.
      padding: as for `l2_pool`.
      window_dilation: pixels from one tap to the next.
      ceil_mode: as for `l2_pool`.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array like `source`.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: as for `l2_pool`, or the shape of `source_gradient` is not that of the pooled array.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([3., 4., 0., 0., -5., 12.]).reshape(1, 6, 1)
      >>> g = jnp.array([10., 20., 26.]).reshape(1, 3, 1)
      >>> jax_mps.l2_pool_gradient(g, x, 2, strides=2).ravel()
      Array([  6.,   8.,   0.,   0., -10.,  24.], dtype=float32)

    Source: `MPSCNNPoolingL2NormGradient`; the value at 0 is that of PyTorch's `lp_pool2d`.
    """
    x = operands.array("source", source, FLOATS)
    g = operands.array("source_gradient", source_gradient, FLOATS)
    operands.check_same_dtype("source_gradient", g, "source", x)
    placement = place(x.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    expected = operands.pooled_shape(x.shape, placement)
    operands.check_shape("source_gradient", g, expected, "that of the pooled source")
    g = edges.untrim(g, placement)
    dx = gradient(g, edges.crop(x, placement), window, start, implementation=implementation)
    return edges.uncrop(dx, placement)


# --- on windows that are placed already ---------------------------------------------------------------


def pool(
    x: Array, window: Window, start: int, *, edge: Edge = "exclude", implementation: str | None = None
) -> Array:
    """`l2_pool` over the given windows, which may lie anywhere, in any edge mode."""
    x, window = edges.enclose(x, window, start, _edge(window, edge))
    return l2_pool_p.bind(x, window=window, start=start, out_dtype=x.dtype, implementation=implementation)


def gradient(
    g: Array,
    x: Array,
    window: Window,
    start: int,
    *,
    edge: Edge = "exclude",
    implementation: str | None = None,
) -> Array:
    """`l2_pool_gradient` over the given windows, which may lie anywhere, in any edge mode."""
    edge = _edge(window, edge)
    image, inside = edges.enclose(x, window, start, edge)
    params = {"window": inside, "start": start, "implementation": implementation}
    accumulator = rule.accumulator(x.dtype)
    if edge == "clamp":
        image = lax.convert_element_type(image, accumulator)  # repeated pixels are added up, then rounded
    y = l2_pool_p.bind(image, out_dtype=accumulator, **params)
    if g.dtype != image.dtype:
        g = lax.convert_element_type(g, accumulator)
    dx = _gradient(g, image, y, **params)
    return lax.convert_element_type(edges.expose(dx, x, window, start, edge), x.dtype)


def _edge(window: Window, edge: Edge) -> Edge:
    """Zeros add nothing to a norm, so windows that begin behind the padding may as well see them."""
    beyond = any(geometry.surely_below(axis.low, 0) for axis in window.axes)
    return "zero" if beyond and edge == "exclude" else edge


# --- primitives ---------------------------------------------------------------------------------------


def _native(name: str) -> Any:
    return lambda *, window, start, **_: (name, primitive.window_attributes(window, start))


l2_pool_p = primitive.define(
    "l2_pool",
    lambda x, *, window, start, out_dtype, implementation: primitive.image_to_pooled(
        x, window, start, out_dtype
    ),
    xla_fun=pooling.l2_pool,
    native=_native("l2_pool"),
    factors=primitive.pooling_factors("i", "p"),
)
l2_pool_tangent_p = primitive.define(
    "l2_pool_tangent",
    lambda t, x, y, *, window, start, out_dtype, implementation: primitive.image_to_pooled(
        t, window, start, out_dtype
    ),
    xla_fun=pooling.l2_pool_tangent,
    native=_native("l2_pool_tangent"),
    factors=primitive.pooling_factors("iip", "p"),
)
l2_pool_gradient_p = primitive.define(
    "l2_pool_gradient",
    lambda g, x, y, *, window, start, implementation: primitive.pooled_to_image(g, window, start, x.dtype),
    xla_fun=pooling.l2_pool_gradient,
    native=_native("l2_pool_gradient"),
    native_is_slower=slow_windows.of_gradients_of_norms,
    factors=primitive.pooling_factors("pip", "i"),
)


def _tangent(t: Array, x: Array, y: Array, **params: Any) -> Array:
    return l2_pool_tangent_p.bind(*_compat.vary_alike(t, x, y), **params)


def _gradient(g: Array, x: Array, y: Array, **params: Any) -> Array:
    return l2_pool_gradient_p.bind(*_compat.vary_alike(g, x, y), **params)


def _l2_jvp(
    primals: Sequence[Array], tangents: Sequence[Array], *, out_dtype: Any, **params: Any
) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    y = l2_pool_p.bind(x, out_dtype=rule.accumulator(x.dtype), **params)
    return lax.convert_element_type(y, out_dtype), _tangent(t, x, y, out_dtype=out_dtype, **params)


def _per_norm(a: Array, dy: Array, y: Array) -> Array:
    """`-a * dy / y`, which the derivative in `y` brings; 0 where `y` is 0."""
    return lax.convert_element_type(_wide_per_norm(a, dy, y), a.dtype)


def _wide_per_norm(a: Array, dy: Array, y: Array) -> Array:
    """The same in the type of `y`: half precision may not hold it, though it holds what comes of it."""
    nowhere = y == 0
    factor = lax.select(nowhere, lax.full_like(y, 0), -dy / lax.select(nowhere, lax.full_like(y, 1), y))
    return lax.convert_element_type(a, y.dtype) * factor


ad.primitive_jvps[l2_pool_p] = _l2_jvp
primitive.define_multilinear(
    l2_pool_tangent_p,
    transposes={
        0: lambda ct, t, x, y, *, out_dtype, **params: _gradient(ct, x, y, **params),
        1: lambda ct, t, x, y, *, out_dtype, **params: _gradient(ct, t, y, **params),
    },
    others={2: lambda dy, out, t, x, y, **params: _per_norm(out, dy, y)},
)
primitive.define_multilinear(
    l2_pool_gradient_p,
    transposes={
        0: lambda ct, g, x, y, **params: _tangent(ct, x, y, out_dtype=g.aval.dtype, **params),
        1: lambda ct, g, x, y, **params: _gradient(g, ct, y, **params),
    },
    others={2: lambda dy, out, g, x, y, **params: _gradient(_wide_per_norm(g, dy, y), x, y, **params)},
)

# --- Taylor series ------------------------------------------------------------------------------------
#
# Terms are coefficients, from that of order 0 on. They follow from y * y = sum of x * x, and from
# y * tangent = sum of t * x. `tangent` and `gradient` of the constant norm are bilinear.


def _over_norm(a: Sequence[Array], y: Sequence[Array]) -> list[Array]:
    """The terms of `a * y[0] / y`, where a division by `y[0]` is still to come."""
    terms: list[Array] = []
    for k, term in enumerate(a):
        for j in range(k):
            term = term + _per_norm(terms[j], y[k - j], y[0])
        terms.append(term)
    return terms


def _l2_jet(primals: Any, series: Any, *, out_dtype: Any, **params: Any) -> tuple[Array, list[Array]]:
    x, wide = [primals[0], *series[0]], rule.accumulator(primals[0].dtype)
    y = [l2_pool_p.bind(x[0], out_dtype=wide, **params)]
    squares = primitive.product_terms(lambda a, b: _tangent(a, b, y[0], out_dtype=wide, **params), x, x)
    for k in range(1, len(x)):
        term = squares[k]
        for j in range(1, k):
            term = term + _per_norm(y[j], y[k - j], y[0])
        y.append(term / 2)
    out, *terms = (lax.convert_element_type(term, out_dtype) for term in y)
    return out, terms


def _tangent_jet(primals: Any, series: Any, **params: Any) -> tuple[Array, list[Array]]:
    t, x, y = ([primal, *terms] for primal, terms in zip(primals, series, strict=True))
    sums = primitive.product_terms(lambda a, b: _tangent(a, b, y[0], **params), t, x)
    out, *terms = _over_norm(sums, y)
    return out, terms


def _gradient_jet(primals: Any, series: Any, **params: Any) -> tuple[Array, list[Array]]:
    g, x, y = ([primal, *terms] for primal, terms in zip(primals, series, strict=True))
    quotients = _over_norm(g, y)
    out, *terms = primitive.product_terms(lambda a, b: _gradient(a, b, y[0], **params), quotients, x)
    return out, terms


_compat.define_jet(l2_pool_p, _l2_jet)
_compat.define_jet(l2_pool_tangent_p, _tangent_jet)
_compat.define_jet(l2_pool_gradient_p, _gradient_jet)
