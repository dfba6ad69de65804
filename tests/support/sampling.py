"""Which cases of large grids run by default: a sample that a seed chooses; `pytest -m full` runs all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

MOST_CASES = 6
"""The sample holds about as many cases of one test, and those that its parameters need."""

MOST_VALUES = 12
"""Of a parameter that has no more values, each is in the sample."""


def mark_sample(items: Sequence[pytest.Item], seed: int) -> None:
    """Marks every test as `full`, and the sample as `sample`, where no test is that marked itself `full`."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("full") is None:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in tests.items():
        parameters = [case.callspec.params if hasattr(case, "callspec") else {} for case in cases]
        for i in sample(parameters, random.Random(f"{seed} {name}")):
            cases[i].add_marker("sample")
    for item in items:
        item.add_marker("full")


def sample(cases: Sequence[Mapping[str, Any]], rng: random.Random) -> list[int]:
    """Indices of cases, given by their parameters.

    Every value of a parameter that has few is among them, and every pair of values where pairs are few.
    Other cases fill the sample up.
    """
    if len(cases) <= MOST_CASES:
        return list(range(len(cases)))
    values = [{name: repr(value) for name, value in case.items()} for case in cases]
    counts = {name: len({value[name] for value in values}) for name in values[0]}
    groups = [
        group
        for n, most in ((1, MOST_VALUES), (2, MOST_CASES))
        for group in itertools.combinations(counts, n)
        if math.prod(counts[name] for name in group) <= most
    ]
    features = [{(group, *(value[name] for name in group)) for group in groups} for value in values]
    others = rng.sample(range(len(cases)), len(cases))
    chosen = []
    missing = set().union(*features)
    while missing:
        best = max(others, key=lambda i: len(features[i] & missing))
        missing -= features[best]
        others.remove(best)
        chosen.append(best)
    return chosen + others[: max(0, MOST_CASES - len(chosen))]
