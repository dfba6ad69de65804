"""What the parts of the demonstration share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["Outcome", "median_milliseconds"]


class Outcome(NamedTuple):
    """What a part of the demonstration leaves behind."""

    passed: bool
    draw: Callable[[SubFigure], None]


def median_milliseconds(functions: Sequence[Callable[..., Any]], operands: Any, rounds: int) -> list[float]:
    """The median time of each compiled function, called in turn."""
    operands = jax.device_put(operands)
    samples: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, times in zip(functions, samples, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            if round_ > 0:  # the first compiles
                times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in samples]
