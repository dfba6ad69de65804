"""What the benchmarks found: as a table in the terminal, as JSON, and as Markdown made from that JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from jax_mps import _files
from jax_mps.cli.bench import summary
from jax_mps.cli.bench.runner import YARDSTICK, Result, Timing
from jax_mps.cli.bench.table import TITLES, Table

__all__ = ["Report", "markdown", "print_table"]

_FORMAT = 3
# What format 2 called the operations; its `step` was of half the sum of the result's squares.
_RENAMED = {"gradient": "pull_back", "step": "loss_step"}


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a run found.

    Attributes:
      machine: the processor or accelerator, in words.
      versions: of Python and of every library that was timed.
      date: when, in ISO form.
      contenders: who was timed; the first is the one that ratios are against.
      copy_gbs: the bandwidth of memory, in GB/s: a large array read and written back.
      results: one a case.
      pages_kept: whether the C library kept what was freed.
      seed: that of random shapes, if the shapes were random.
    """

    machine: str
    versions: Mapping[str, str]
    date: str
    contenders: Sequence[str]
    copy_gbs: float
    results: list[Result]
    pages_kept: bool = False
    seed: int | None = None

    def save(self, path: Path) -> None:
        """Writes JSON; the file is never half written."""
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"
        _files.replace(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote, of this format or the one before; another file is a `ValueError`."""
        fields = json.loads(path.read_text())
        written = fields.pop("format", None) if isinstance(fields, dict) else None
        if written not in (_FORMAT - 1, _FORMAT):
            raise ValueError(f"it is not a report of format {_FORMAT - 1} or {_FORMAT}")
        try:
            results = fields.pop("results")
            for result in results:
                result["timings"] = {name: Timing(**t) for name, t in result["timings"].items()}
                if written < _FORMAT:
                    result["op"] = _RENAMED.get(result["op"], result["op"])
            return cls(**fields, results=[Result(**result) for result in results])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the report lacks something, or has too much: {error!r}") from error


def print_table(report: Report) -> None:
    """Prints one table for each type and layout, and those of `summary`."""
    from rich.console import Console

    # A file or a pipe is as wide as it has to be.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in _tables(report):
        console.print(table.rich())
    notes = [f"reading and writing back moves {report.copy_gbs:.1f} GB/s"]
    notes += ["freed memory is kept"] * report.pages_kept
    notes += [] if report.seed is None else [f"random shapes of seed {report.seed}"]
    console.print("; ".join([*notes, report.machine]))


def markdown(report: Report) -> str:
    """The tables of `print_table` as Markdown."""
    used = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    head = (
        f"{report.machine}; {used}; {report.date[:10]}. Medians in milliseconds, in brackets how many times "
        f"ours. The limit is, for GB/s, the {report.copy_gbs:.1f} at which a large array is read and written "
        "back, and for GFLOP/s `jnp.dot` of the same M, N and K in the same rounds."
        + (" Freed memory was kept." if report.pages_kept else "")
        + ("" if report.seed is None else f" The shapes are the random ones of seed {report.seed}.")
    )
    return "\n\n".join([head, *(table.markdown() for table in _tables(report))])


def _tables(report: Report) -> list[Table]:
    ours, *peers = report.contenders
    made = []
    for (dtype, layout, _), results in _grouped(report.results):
        title = f"{dtype}, {layout.replace('_', ' ')}: milliseconds, and how many times ours"
        rows = [_row(result, ours, peers, report.copy_gbs) for result in results]
        made.append(Table(title, ["shape", "operation", *_titles(report, results)], rows, names=2))
    return made + summary.tables(report.results, report.contenders)


def _titles(report: Report, results: Sequence[Result]) -> list[str]:
    """Titles of the columns after the name of a shape and an operation."""
    timed = [TITLES[name] for name in report.contenders]
    return [*timed, *(["first call, s\nours (stock)"] if results[0].first_calls else ["rate", "of limit"])]


def _row(result: Result, ours: str, peers: Sequence[str], copy_gbs: float) -> list[str]:
    own = result.timings.get(ours)
    row = [result.shape, result.op, _milliseconds(own.median) if own else "-"]
    for name in peers:
        timing = result.timings.get(name)
        cell = _milliseconds(timing.median) if timing else "-"
        row.append(f"{cell} ({timing.median / own.median:.1f})" if timing and own else cell)
    if result.first_calls:
        seconds = {name: f"{result.first_calls[name] / 1e3:.1f}" for name in result.first_calls}
        return [*row, f"{seconds.get(ours, '-')} ({seconds.get('lax', '-')})"]
    if not own or not (result.flops or result.bytes_moved):
        return [*row, "-", "-"]
    if not result.flops:
        gbs = result.bytes_moved / own.median / 1e6
        return [*row, f"{gbs:.1f} GB/s", f"{gbs / copy_gbs:.0%}"]
    limit = result.timings.get(YARDSTICK)
    rate = f"{result.flops / own.median / 1e6:.0f} GFLOP/s"
    return [*row, rate, f"{limit.median / own.median:.0%}" if limit else "-"]


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _grouped(results: Sequence[Result]) -> list[tuple[tuple[str, str, bool], list[Result]]]:
    """A table for each type and layout; those with first calls have other columns."""
    groups: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dtype, result.layout, bool(result.first_calls)), []).append(result)
    return list(groups.items())
