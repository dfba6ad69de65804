"""`rev` and `pad` for Apple's plugins, which do not all have them, or not all of them.

`jax.grad` reverses the kernel of every convolution, crops with negative padding, and puts zeros between the
elements of gradients. Here these are slices, joined and padded at the edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import lax

from jax_mps.lowering.apple import MAX_OPERANDS

Array = Any

_MOST_AXES = 8


@dataclasses.dataclass(frozen=True)
class Reading:
    """A stock operation in others.

    Attributes:
      name: for the report.
      function: of its operands.
    """

    name: str
    function: Callable[..., Array]

    def __call__(self, *operands: Array) -> Array:
        """The stock result."""
        return self.function(*operands)


def recognise_rev(x: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `rev`, from the types of its operand and its result and its parameters."""
    del out
    axes = tuple(axis for axis in params["dimensions"] if x.shape[axis] > 1)
    if any(x.shape[axis] > MAX_OPERANDS for axis in axes):
        return f"more than {MAX_OPERANDS} elements along an axis"

    def reverse(x: Array) -> Array:
        for axis in axes:
            parts = [lax.slice_in_dim(x, i, i + 1, axis=axis) for i in reversed(range(x.shape[axis]))]
            x = lax.concatenate(parts, axis)
        return x

    return Reading("reversal", reverse)


def recognise_pad(x: Any, fill: Any, out: Any, params: dict[str, Any]) -> Reading | str:
    """Reads a `pad`, from the types of its operands and its result and its parameters."""
    del fill
    config = params["padding_config"]
    if all(low >= 0 and high >= 0 and between == 0 for low, high, between in config):
        return "padding at the edges, which all plugins have"
    if 0 in (*x.shape, *out.shape):
        return "an empty array"
    if x.ndim >= _MOST_AXES and any(between for _, _, between in config):
        return f"{x.ndim} axes, with one more than the plugins have"

    def pad(x: Array, fill: Array) -> Array:
        for axis, (_, _, between) in enumerate(config):
            x = _spread(x, fill, axis, between)
        edges = [(max(low, 0), max(high, 0), 0) for low, high, _ in config]
        x = lax.pad(x, fill, edges)
        starts = [max(-low, 0) for low, _, _ in config]
        ends = [n - max(-high, 0) for n, (_, high, _) in zip(x.shape, config, strict=True)]
        return lax.slice(x, starts, ends)

    return Reading("padding", pad)


def _spread(x: Array, fill: Array, axis: int, between: int) -> Array:
    """Puts that many numbers between the elements of an axis."""
    if not between:
        return x
    after = [(0, 0, 0)] * (x.ndim + 1)
    after[axis + 1] = (0, between, 0)
    pairs = lax.pad(lax.expand_dims(x, [axis + 1]), fill, after)
    joined = lax.reshape(pairs, (*x.shape[:axis], x.shape[axis] * (between + 1), *x.shape[axis + 1 :]))
    return lax.slice_in_dim(joined, 0, joined.shape[axis] - between, axis=axis)
