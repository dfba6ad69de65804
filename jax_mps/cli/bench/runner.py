"""Checks that every way to compute a case agrees, then times them in turn.

Nothing here knows an operation or a library. A *family* (`bench.pooling`) turns a named shape into
*cases*; a case has *contenders*, the ways to compute it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

__all__ = [
    "YARDSTICK",
    "Case",
    "Contender",
    "Disagreement",
    "Family",
    "Result",
    "Timing",
    "compiled",
    "measure",
    "run",
]

YARDSTICK = "yardstick"
_WARM_UP_CALLS = 2
_TURN_SECONDS = 2e-3
_MOST_CALLS_A_TURN = 50
_FEWEST_ROUNDS = 3
_SETTLE_SECONDS = 0.05
_COPIES = 8


class Disagreement(AssertionError):
    """Two contenders computed different values, so their times compare nothing."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
      call: starts the computation and returns its outputs.
      wait: blocks until such outputs are there.
      fetch: such outputs as float64 arrays that look the same for every contender.
      copies: how often a call computes the same.
      first_call: milliseconds to trace, lower and compile, where that was measured; else 0.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    fetch: Callable[[Any], Sequence[np.ndarray]]
    copies: int = 1
    first_call: float = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on one shape, type and layout.

    Attributes:
      bytes_moved: what must cross the memory bus at least: every input once, every output once; 0 where
        that says nothing.
      tolerances: for each output, the greatest error allowed beside the output's greatest magnitude.
      contenders: how to make each contender; `NotImplementedError` says that it has no such operation.
        The first is what the others are compared with.
      flops: additions and multiplications, where their rate is what matters; else 0.
      yardstick: makes something that takes as many of them and computes something else, to compare with.
    """

    shape: str
    description: str
    op: str
    dtype: str
    layout: str
    bytes_moved: int
    tolerances: Sequence[float]
    contenders: Mapping[str, Callable[[], Contender]]
    flops: int = 0
    yardstick: Callable[[], Contender] | None = None


def compiled(
    function: Callable[..., Any], operands: Sequence[Any], fetch: Callable[[Any], Sequence[np.ndarray]]
) -> Contender:
    """The contender that calls a JAX function.

    An accelerator finishes a small program sooner than the host starts the next: there a program computes
    the same several times, from operands that the compiler cannot know to be the same.
    """
    copies = 1 if jax.devices()[0].platform == "cpu" else _COPIES
    if copies == 1:
        once = jax.jit(function)
        return Contender(lambda: once(*operands), jax.block_until_ready, fetch)

    @jax.jit
    def repeated(*sets: Sequence[Any]) -> Any:
        return [function(*s) for s in sets]

    return Contender(
        lambda: repeated(*[operands] * copies), jax.block_until_ready, lambda out: fetch(out[0]), copies
    )


class Family(Protocol):
    """A group of operations that share their shapes."""

    @property
    def ops(self) -> Sequence[str]:
        """The operations that can be timed."""

    @property
    def shapes(self) -> Sequence[str]:
        """The names of the shapes."""

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names, with its own batch or another."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The distribution of the time of a call, in milliseconds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Result:
    """The timings of a case, why some contenders have none, and the first calls that were measured."""

    shape: str
    description: str
    op: str
    dtype: str
    layout: str
    bytes_moved: int
    timings: Mapping[str, Timing]
    absent: Mapping[str, str]
    flops: int = 0
    first_calls: Mapping[str, float] = dataclasses.field(default_factory=dict)


def run(case: Case, *, rounds: int, seconds: float, queued: bool) -> Result:
    """Checks that the contenders of a case agree and times them; see `measure` for the arguments."""
    contenders, absent = _present(case)
    _check_agreement(case, contenders)
    if case.yardstick:
        contenders[YARDSTICK] = case.yardstick()
    timings = measure(contenders, rounds=rounds, seconds=seconds, queued=queued)
    return Result(
        case.shape,
        case.description,
        case.op,
        case.dtype,
        case.layout,
        case.bytes_moved,
        timings,
        absent,
        case.flops,
        {name: contender.first_call for name, contender in contenders.items() if contender.first_call},
    )


def measure(
    contenders: Mapping[str, Contender], *, rounds: int, seconds: float, queued: bool
) -> dict[str, Timing]:
    """Times the contenders in turn, round after round, so that a slow spell of the machine hits all.

    Args:
      contenders: what to time.
      rounds: how often everyone has a turn.
      seconds: the time to spend; there are fewer rounds, but never less than three, if it is short.
      queued: whether the device runs calls in the order of their start while the host goes on; then
        a turn waits once, at its end, and does not time the host's part of each call.
    """
    calls = {}
    round_seconds, settle = 0.0, 0.0 if queued else _SETTLE_SECONDS
    for name, contender in contenders.items():
        for _ in range(_WARM_UP_CALLS):
            contender.wait(contender.call())
        once = _turn(contender, calls=1, settle=0, queued=queued) * contender.copies
        calls[name] = min(max(1, math.ceil(_TURN_SECONDS / once)), _MOST_CALLS_A_TURN)
        round_seconds += (calls[name] + 1) * once + settle
    rounds = max(_FEWEST_ROUNDS, min(rounds, int(seconds / round_seconds)))

    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            samples[name].append(1e3 * _turn(contender, calls=calls[name], settle=settle, queued=queued))
    return {name: _summary(s) for name, s in samples.items()}


def _turn(contender: Contender, *, calls: int, settle: float, queued: bool) -> float:
    """The seconds that a call takes, averaged over some, after `settle` seconds of calls that do not count.

    Those bring the operands back into the caches, wake the threads that slept, and wait out those of GNU
    OpenMP, which PyTorch uses and which spin for tens of milliseconds after their work: until then the
    next in turn has one core less.
    """
    settled = time.perf_counter() + settle
    while True:
        contender.wait(contender.call())
        if time.perf_counter() >= settled:
            break
    start = time.perf_counter()
    for i in range(calls):
        outputs = contender.call()
        if not queued or i == calls - 1:
            contender.wait(outputs)
        # Before the next call, as `timeit` does. Where two outputs live at once, a C library may find a new
        # place for one of them, and new pages, whenever small blocks were cut off the room between.
        del outputs
    return (time.perf_counter() - start) / (calls * contender.copies)


def _summary(samples: Sequence[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples))


def _present(case: Case) -> tuple[dict[str, Contender], dict[str, str]]:
    contenders, absent = {}, {}
    for name, make in case.contenders.items():
        try:
            contender = make()
            contender.wait(contender.call())
        except NotImplementedError as error:
            absent[name] = str(error).partition("\n")[0]
        else:
            contenders[name] = contender
    return contenders, absent


def _check_agreement(case: Case, contenders: Mapping[str, Contender]) -> None:
    outputs = {name: contender.fetch(contender.call()) for name, contender in contenders.items()}
    reference, *others = outputs
    for name in others:
        pairs = zip(outputs[name], outputs[reference], case.tolerances, strict=True)
        for position, (actual, expected, tolerance) in enumerate(pairs):
            error = np.max(np.abs(actual - expected)) / np.max(np.abs(expected))
            if not error <= tolerance:
                raise Disagreement(
                    f"{case.shape} {case.op} {case.dtype} {case.layout}: output {position} of {name} is off "
                    f"that of {reference} by {error:.2g} of the greatest value; {tolerance:.2g} is allowed"
                )
