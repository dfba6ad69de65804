"""What a run comes to: geometric means against the others, the worst rows, and ratios of our own times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jax_mps.cli.bench.runner import Result
from jax_mps.cli.bench.table import TITLES, Table

__all__ = ["tables"]

_Ratios = list[tuple[float, Result]]


def tables(results: Sequence[Result], contenders: Sequence[str]) -> list[Table]:
    """The tables; those that would have no rows are left out.

    Args:
      results: all that were timed.
      contenders: who was timed, ours first.
    """
    ours, *peers = contenders
    made = [_means(results, ours, peers), _worst(results, ours, peers), _own(results, ours)]
    return [table for table in made if table.rows]


def _means(results: Sequence[Result], ours: str, peers: Sequence[str]) -> Table:
    """A row for each operation and for all; a column for each peer and for the better PyTorch of a case."""
    columns = {TITLES[name]: [name] for name in peers}
    if len(_torch(peers)) > 1:
        columns["PyTorch\nbetter layout"] = _torch(peers)
    parts = [*((_label(op, dtype), part) for op, dtype, part in _parts(results)), ("all", results)]
    rows = [
        [label, *(_mean(_ratios(part, ours, names)) for names in columns.values())] for label, part in parts
    ]
    return Table("geometric mean of their time over ours", ["operation", *columns], rows, names=1)


def _worst(results: Sequence[Result], ours: str, peers: Sequence[str]) -> Table:
    """The case of each operation where our lead over stock JAX, and over the better PyTorch, is least."""
    others = {"stock JAX": ["lax"] if "lax" in peers else [], "PyTorch": _torch(peers)}
    rows = []
    for op, dtype, part in _parts(results):
        for title, names in others.items():
            if ratios := _ratios(part, ours, names):
                ratio, result = min(ratios, key=_ratio)
                rows.append([_label(op, dtype), title, result.shape, result.layout, f"{ratio:.2f}"])
    heads = ["operation", "beside", "shape", "layout", "times ours"]
    return Table("the worst rows: the least of their time over ours", heads, rows, names=4)


def _own(results: Sequence[Result], ours: str) -> Table:
    """What it costs us to keep what the gradient needs, and what other types cost beside float32."""
    times = {(r.op, r.dtype, r.layout, r.shape): r.timings[ours].median for r in results if ours in r.timings}
    rows = []
    for op, dtype, part in _parts(results):
        bases = [("forward", dtype)] * (op == "keep") + [(op, "float32")] * (dtype != "float32")
        for base in bases:
            ratios = [
                (times[op, dtype, r.layout, r.shape] / times[*base, r.layout, r.shape], r)
                for r in part
                if {(op, dtype, r.layout, r.shape), (*base, r.layout, r.shape)} <= times.keys()
            ]
            if ratios:
                ratio, result = max(ratios, key=_ratio)
                cells = [_label(op, dtype), _label(*base), result.shape, result.layout]
                rows.append([*cells, f"{ratio:.2f}", _mean(ratios)])
    heads = ["our time of", "over that of", "the greatest: shape", "layout", "ratio", "geometric mean"]
    return Table("ratios of our own times", heads, rows, names=4)


def _parts(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
    """The results of each operation and type."""
    parts: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        parts.setdefault((result.op, result.dtype), []).append(result)
    return [(*key, part) for key, part in parts.items()]


def _label(op: str, dtype: str) -> str:
    return op if dtype == "float32" else f"{op}, {dtype}"


def _ratios(results: Sequence[Result], ours: str, names: Sequence[str]) -> _Ratios:
    """The time of the fastest of these contenders over ours, where both were timed."""
    return [
        (min(theirs) / result.timings[ours].median, result)
        for result in results
        if ours in result.timings
        and (theirs := [result.timings[name].median for name in names if name in result.timings])
    ]


def _ratio(pair: tuple[float, Result]) -> float:
    return pair[0]


def _mean(ratios: _Ratios) -> str:
    return f"{statistics.geometric_mean(ratio for ratio, _ in ratios):.2f}" if ratios else "-"


def _torch(peers: Sequence[str]) -> list[str]:
    return [name for name in peers if name.startswith("torch")]
