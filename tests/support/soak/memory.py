"""Memory in the long run: flat while a network trains and while shapes come; errors where it runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memory import FRESH
from processes import finish, start

CALLS = (
    "max",
    "average, few channels",
    "norm, planes in lanes",
    "unpooling",
    "convolution",
    "convolution, channels first",
)


def step(seed: int, number: int, check: Callable[[Any], None]) -> None:
    """Training, shapes, and calls that run out of memory; the first step has the numbers of a release."""
    share = 1 if number == 0 else 5
    check({"do": "train", "arguments": [100_000 // share, 1000 * seed + number]})
    check({"do": "trace_many", "arguments": [10_000 // share, 1000 * seed + number]})
    for name in CALLS:
        check({"do": "run_out", "arguments": [name, 40, 1000 * seed + number]})


def check(case: Any) -> None:
    """Runs the case in a process of its own."""
    finish(start(f"import endurance; endurance.{case['do']}(*{case['arguments']!r})", **FRESH), timeout=850)
