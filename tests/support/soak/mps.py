"""The MPS classes on random parameters, beside loops that follow Apple's documents."""

from __future__ import annotations

from collections.abc import Callable

import mps_random
from mps_comparison import CHUNK, compare
from soak.record import Case
from wide_types import enable_x64

IMPLEMENTATIONS = ("native", "xla")


def step(seed: int, number: int, check: Callable[[Case], None]) -> None:
    """Every class, on the one and the other path."""
    # Numbers that the tests do not have, other ones for every seed.
    first = 10_000 + 10_000_000 * seed + number * CHUNK
    for name in mps_random.CLASSES:
        check({"name": name, "first": first, "count": CHUNK, "implementation": IMPLEMENTATIONS[number % 2]})


def check(case: Case) -> None:
    """Compares some cases of a class."""
    with enable_x64():
        compare(case["name"], range(case["first"], case["first"] + case["count"]), case["implementation"])
