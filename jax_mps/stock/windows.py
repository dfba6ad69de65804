"""`reduce_window` and `select_and_scatter`, read as poolings.

| stock primitive | ours |
|---|---|
| `reduce_window_max`, `reduce_window_min` | the maximum of every window; of negated numbers for a minimum |
| `reduce_window_sum` | an average with the divisor 1 |
| the same, of an array with zeros between its elements | the gradient of that, as `jax.grad` makes it |
| `select_and_scatter_add` | the gradient of the maximum: its tap is found, then the cotangent is put there |
| `select_and_gather_add` | the tangent of the maximum: its tap is found, then the tangent is read there |

A window may cover any axes. Ours cover up to three adjacent ones, so axes between them that are not covered
are joined.

Which tap a stock gradient selects is told by its comparison: a tap stays while it is `>=` the next one. So
the first of equal maxima wins; after a NaN the search begins anew; padding is -inf and can be selected, and
what is selected there is lost. A stock tangent leaves padding out, and begins at -inf before the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_mps.geometry import Axis, Divisor, Window
from jax_mps.ops import avg_pooling, max_pooling
from jax_mps.ops.operands import FLOATS, INTEGERS

Array = Any

_ONE = Divisor(1, ())


@dataclasses.dataclass(frozen=True)
class Reading:
    """A stock operation as a pooling.

    Attributes:
      name: what it computes, for the table of choices.
      window: its windows.
      start: the first axis that they cover.
      operands: the shapes of our operands.
      result: the shape of the stock result.
      dtype: its type.
      function: our operation, of the operands, the windows and `start`.
    """

    name: str
    window: Window
    start: int
    operands: tuple[tuple[int, ...], ...]
    result: tuple[int, ...]
    dtype: Any
    function: Callable[..., Array]

    def __call__(self, *operands: Array) -> Array:
        """The stock result."""
        ours = (lax.reshape(x, shape) for x, shape in zip(operands, self.operands, strict=True))
        return lax.reshape(self.function(*ours, self.window, self.start), self.result)


# --- the stock primitives -----------------------------------------------------------------------------


def recognise_max(x: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `reduce_window_max`, from the types of its operand and its result and its parameters."""
    return _reduction("maximum", x, out, params, FLOATS + INTEGERS, max_pooling.pool)


def recognise_min(x: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `reduce_window_min`."""

    def minimum(x: Array, window: Window, start: int) -> Array:
        return _negated(max_pooling.pool(_negated(x), window, start))

    return _reduction("minimum", x, out, params, FLOATS + INTEGERS, minimum)


def recognise_sum(
    x: Any,
    out: Any,
    params: dict[str, Any],
    dilated: tuple[Any, Sequence[tuple[int, int, int]]] | None = None,
) -> Reading | str:
    """Reads a `reduce_window_sum`.

    Args:
      x: the type of its operand. out: the type of its result. params: its parameters. dilated: where the
      operand is another array, padded with zeros around and between its elements: the type of that
        array, and `(low, high, interior)` for each axis. It is to be the operand of the reading then.

    Returns:
      The reading, or the reason why there is none.
    """
    if x.dtype.name not in FLOATS:
        return f"dtype {x.dtype.name}, ours are {', '.join(FLOATS)}"
    base, padding = params["base_dilation"], params["padding"]
    if dilated is not None:
        x, config = dilated
        base = tuple(interior + 1 for _, _, interior in config)
        padding = tuple((low, high) for low, high, _ in config)
    if all(b == 1 for b in base):
        return _reduction("sum", x, out, params | {"padding": padding}, FLOATS, _sum)
    if any(s != 1 for s in params["window_strides"]):
        return "both base_dilation and window_strides above 1"
    # y[i] = sum over k of x[j] where base * j = i + dilation * k - low: the same windows from the other side.
    dims, dilation = params["window_dimensions"], params["window_dilation"]
    lows = [d * (k - 1) - low for k, d, (low, _) in zip(dims, dilation, padding, strict=True)]
    columns = (out.shape, dims, base, dilation, lows, x.shape)
    return _reading("spread sum", columns, out, _spread, image_first=False)


def recognise_scatter(source: Any, operand: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `select_and_scatter_add` of a source into the windows of an operand."""
    return _selection("scatter", operand, source, out, params, max_pooling.scatter)


def recognise_gather(tangents: Any, operand: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `select_and_gather_add` of tangents from the windows of an operand."""
    if any(b != 1 for b in params["base_dilation"]):
        return "base_dilation above 1"
    return _selection("gather", operand, out, out, params, max_pooling.gather)


# --- what they share ----------------------------------------------------------------------------------


def _sum(x: Array, window: Window, start: int) -> Array:
    return avg_pooling.pool(x, window, start, _ONE)


def _spread(g: Array, window: Window, start: int) -> Array:
    return avg_pooling.gradient(g, window, start, _ONE)


def _negated(x: Array) -> Array:
    """Numbers in the opposite order; of integers the complement, which overflows nowhere."""
    return -x if jnp.issubdtype(x.dtype, jnp.floating) else lax.bitwise_not(x)


def _reduction(
    name: str, x: Any, out: Any, params: dict[str, Any], dtypes: Sequence[str], function: Callable[..., Array]
) -> Reading | str:
    if x.dtype.name not in dtypes:
        return f"dtype {x.dtype.name}, ours are {', '.join(dtypes)}"
    if any(b != 1 for b in params["base_dilation"]):
        return "base_dilation above 1"
    return _reading(name, _columns(x.shape, out.shape, params), out, function)


def _selection(
    name: str, operand: Any, pooled: Any, out: Any, params: dict[str, Any], function: Callable[..., Array]
) -> Reading | str:
    if operand.dtype.name not in FLOATS or pooled.dtype != operand.dtype:
        return f"dtypes {operand.dtype.name} and {pooled.dtype.name}, ours are one of {', '.join(FLOATS)}"
    if params["select_prim"] not in (lax.ge_p, lax.le_p):
        return f"it selects by {params['select_prim']}"
    if any(low < 0 for low, _ in params["padding"]):
        return "negative padding"
    minimum = params["select_prim"] is lax.le_p

    def select(moved: Array, operand: Array, window: Window, start: int) -> Array:
        return function(moved, _negated(operand) if minimum else operand, window, start)

    reading = _reading(name, _columns(operand.shape, pooled.shape, params), out, select)
    if isinstance(reading, str):
        return reading
    (image,) = reading.operands
    moved = image if name == "gather" else _pooled_shape(image, reading.window, reading.start)
    return dataclasses.replace(reading, operands=(moved, image))


def _columns(
    image: Sequence[int], pooled: Sequence[int], params: dict[str, Any]
) -> tuple[Sequence[int], ...]:
    dims, strides = params["window_dimensions"], params["window_strides"]
    dilation = params.get("window_dilation", (1,) * len(dims))
    return image, dims, strides, dilation, [low for low, _ in params["padding"]], pooled


def _pooled_shape(image: Sequence[int], window: Window, start: int) -> tuple[int, ...]:
    return (*image[:start], *window.counts, *image[start + window.rank :])


def _reading(
    name: str,
    columns: tuple[Sequence[int], ...],
    out: Any,
    function: Callable[..., Array],
    *,
    image_first: bool = True,
) -> Reading | str:
    """The reading of windows given by a column for each field of `Axis`, over all axes of the arrays."""
    axes = [Axis(*fields) for fields in zip(*columns, strict=True)]
    if any(n == 0 for axis in axes for n in (axis.size, axis.windows)):
        return "an empty array"
    numbers = [abs(n) for axis in axes for n in dataclasses.astuple(axis)]
    if max(numbers, default=0) >= 2**31:
        return "a number of 2**31 or more"
    covered = [i for i, axis in enumerate(axes) if not _is_plain(axis)]
    if not covered:
        return "no axis is windowed"
    start, end = covered[0], covered[-1] + 1
    inside = _joined(axes[start:end])
    if len(inside) > 3:
        return f"windows over {len(inside)} axes, ours have 1 to 3"
    window = Window(tuple(inside))
    image = tuple(a.size for a in (*axes[:start], *inside, *axes[end:]))
    operand = image if image_first else _pooled_shape(image, window, start)
    return Reading(name, window, start, (operand,), tuple(out.shape), out.dtype, function)


def _is_plain(axis: Axis) -> bool:
    """Whether the windows of an axis are its elements."""
    return axis.taps == axis.stride == 1 and axis.low == 0 and axis.size == axis.windows


def _joined(axes: Sequence[Axis]) -> list[Axis]:
    """Neighbours that are not windowed become one axis."""
    joined: list[Axis] = []
    for axis in axes:
        if joined and _is_plain(axis) and _is_plain(joined[-1]):
            size = joined[-1].size * axis.size
            joined[-1] = Axis(size, 1, 1, 1, 0, size)
        else:
            joined.append(axis)
    return joined
