"""Random stock operations: convolutions and windowed reductions with every kind of parameter, from a seed.

They are compared, accelerated and not. Stock convolutions are computed in float64: in float32 XLA's CPU
compiler reads beside the array where padding is negative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_mps

Array = Any

DTYPES = (*["float32"] * 4, "float64", "float16", "bfloat16")
"""Types of operations, in turn."""

ROUNDING = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}

REFUSED_CONVOLUTIONS = ("no array can be the image", "0.85")
"""Why some of them stay stock."""

REFUSED_WINDOWS = ("no axis is windowed", "windows over 4 axes", "windows over 5 axes", "windows over 6 axes")


class Case(NamedTuple):
    """A stock operation and operands for it."""

    function: Callable[..., Array]
    operands: tuple[np.ndarray, ...]
    note: str
    """What it is, for a failing test to print."""
    differentiable: bool = True
    """Whether stock JAX has its gradients: it has none of dilated maxima."""


def convolution(seed: int, dtype: str = "float32") -> Case:
    """A `conv_general_dilated` that has a result."""
    rng = np.random.default_rng((seed, 1))

    def draw(low: int, high: int, rank: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high, rank))

    def shuffled(letters: str) -> str:
        return "".join(rng.permutation(list(letters)))

    while True:
        rank = int(rng.integers(1, 4))
        groups = int(rng.choice([1, 1, 2, 3, 5]))
        features, batches = (groups, 1) if rng.random() < 0.7 else (1, groups)
        per_group, outputs, batch = draw(1, 5, 3)
        if rng.random() < 0.3:  # depthwise, with a multiplier
            per_group, outputs = 1, int(rng.integers(1, 3))
        ones = (1,) * rank
        role = rng.choice(["ordinary", "dilated", "transposed", "weights", "both", "any"])
        strides = draw(1, 4, rank) if role in ("ordinary", "weights", "any") else ones
        lhs_dilation = draw(1, 4, rank) if role in ("transposed", "both", "any") else ones
        rhs_dilation = draw(1, 4, rank) if role in ("dilated", "weights", "both", "any") else ones
        # In groups, XLA's CPU backend ends the process where padding is negative.
        padding = [draw(-2 if groups == 1 else 0, 5, 2) for _ in range(rank)]
        letters = "DHW"[:rank]
        specs = (shuffled("NC" + letters), shuffled("OI" + letters), shuffled("NC" + letters))
        if rng.random() < 0.5:
            specs = ("N" + letters + "C", letters + "IO", "N" + letters + "C")
        elif rng.random() < 0.5:
            specs = ("NC" + letters, "OI" + letters, "NC" + letters)
        channels = {"N": batch * batches, "C": per_group * features, "I": per_group, "O": outputs * groups}
        image = channels | dict(zip(letters, draw(1, 10, rank), strict=True))
        kernel = channels | dict(zip(letters, draw(1, 6, rank), strict=True))
        # Stock: XLA's simplifier ends the process over some convolutions with an axis like these.
        axes = zip(letters, strides, padding, lhs_dilation, rhs_dilation, strict=True)
        if any(
            (e > 1 and ((pads == (0, 0) and e >= kernel[a]) or (groups > 1 and 0 in pads)))
            or (1 < s >= kernel[a] and _pads_of_gradient(image[a], kernel[a], s, pads, e, d) == (0, 0))
            for a, s, pads, e, d in axes
        ):
            continue
        call: dict[str, Any] = {
            "window_strides": strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": specs,
            "feature_group_count": features,
            "batch_group_count": batches,
        }
        shapes = [[image[c] for c in specs[0]], [kernel[c] for c in specs[1]]]
        types = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]

        def function(x: Array, k: Array, call: Any = call) -> Array:
            return lax.conv_general_dilated(x, k, **call)

        try:
            out = jax.eval_shape(function, *types)
        except (TypeError, ValueError):  # JAX refuses it
            continue
        if 0 < out.size < 20000:
            x, k = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
            return Case(function, (x, k), f"{call} of {shapes}")


def _pads_of_gradient(
    size: int, taps: int, stride: int, pads: tuple[int, ...], expansion: int, dilation: int
) -> tuple[int, int]:
    """The padding along an axis of the convolution that is the gradient to the image."""
    between, reach = (size - 1) * expansion, (taps - 1) * dilation
    results = (between + sum(pads) - reach) // stride
    return reach - pads[0], between - results * stride + pads[0]


def _reduce(x: Array, *, kind: str, **call: Any) -> Array:
    first, combine = {"max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0, lax.add)}[kind]
    return lax.reduce_window(x, np.array(first, x.dtype), combine, **call)


def reduction(seed: int, kind: str, dtype: str = "float32", *, special: bool = False) -> Case:
    """A `reduce_window` of a kind "max", "min" or "sum"; `special` has ties, NaN and infinities."""
    rng = np.random.default_rng((seed, 2))

    def draw(low: int, high: int, count: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high, count))

    while True:
        ndim = int(rng.integers(1, 6))
        covered = rng.random(ndim) < 0.5
        dims = tuple(int(n) if c else 1 for n, c in zip(rng.integers(1, 5, ndim), covered, strict=True))
        strides = tuple(int(n) if c else 1 for n, c in zip(rng.integers(1, 4, ndim), covered, strict=True))
        dilation = tuple(int(n) if c else 1 for n, c in zip(rng.integers(1, 3, ndim), covered, strict=True))
        # A gradient of max pooling with dilated windows is what stock JAX does not have.
        dilation = dilation if kind == "sum" or rng.random() < 0.2 else (1,) * ndim
        padding = tuple((draw(0, 3, 2)) if c and rng.random() < 0.6 else (0, 0) for c in covered)
        shape = draw(1, 9 if ndim < 4 else 6, ndim)
        function = functools.partial(
            _reduce,
            kind=kind,
            window_dimensions=dims,
            window_strides=strides,
            padding=padding,
            window_dilation=dilation,
        )

        x = rng.standard_normal(shape)
        if special:
            x = np.round(x)
            x[rng.random(shape) < 0.15] = -np.inf
            x[rng.random(shape) < 0.05] = np.inf
            if kind != "sum":
                x[rng.random(shape) < 0.15] = np.nan
        out = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        # Where one dilated window steps over all pixels of an axis, XLA's CPU compiler makes a gradient of
        # the sum that is not 0 (without `jit` it is 0).
        steps_over = any(n == 1 < d for n, d in zip(out.shape, dilation, strict=True))
        if 0 < out.size < 20000 and not steps_over:
            note = f"{kind} of {shape}: {dims}, strides {strides}, padding {padding}, dilation {dilation}"
            differentiable = kind == "sum" or all(d == 1 for d in dilation)
            return Case(function, (x.astype(jnp.dtype(dtype)),), note, differentiable)


def derivatives(
    f: Callable[..., Any], operands: Sequence[np.ndarray], seed: int, *, jit: bool = True
) -> dict[str, Any]:
    """What is compared, from one program."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(f, *operands)
    tangents = tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in operands)
    cotangent = rng.standard_normal(like.shape).astype(like.dtype)

    def everything(operands: Any, tangents: Any, cotangent: Any) -> dict[str, Any]:
        def gradient(*operands: Any) -> Any:
            return jax.vjp(f, *operands)[1](cotangent)

        value, tangent = jax.jvp(f, operands, tangents)
        gradients, second = jax.jvp(gradient, operands, tangents)
        return {"value": value, "tangent": tangent, "gradient": gradients, "second": second}

    found = (jax.jit(everything) if jit else everything)(tuple(operands), tangents, cotangent)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def compare(
    case: Case, seed: int, reference: Any = np.float64, skip: Sequence[str] = (), *, jit: bool = True
) -> tuple[Any, ...]:
    """Stock and accelerated, compared; returns what was lowered."""
    wanted = derivatives(case.function, [x.astype(reference) for x in case.operands], seed)
    with jax_mps.accelerate() as handle:
        found = derivatives(case.function, case.operands, seed, jit=jit)
    rounding = ROUNDING[case.operands[0].dtype.name]
    for name, expected in wanted.items():
        if name in skip:
            continue
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found[name]), strict=True):
            size = np.abs(a[np.isfinite(a)]).max(initial=1e-3)
            note = f"{name}: {case.note}"
            np.testing.assert_allclose(b, a, rtol=rounding, atol=rounding * size, err_msg=note)
    return handle.report().rows


def compare_windows(case: Case, seed: int, kind: str, special: bool, *, jit: bool = True) -> tuple[Any, ...]:
    """The same for a windowed reduction that is differentiable."""
    # In which order XLA compares equal maxima for a tangent depends on the shape.
    skip = ("tangent", "second") if special and kind != "sum" else ()
    wide = kind == "sum" or case.operands[0].dtype == np.float64
    return compare(case, seed, np.float64 if wide else np.float32, skip, jit=jit)
