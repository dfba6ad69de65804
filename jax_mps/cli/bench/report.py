"""What the benchmarks found: as a table in the terminal, as JSON, and as Markdown made from that JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from jax_mps.cli.bench.runner import YARDSTICK, Result, Timing

__all__ = ["Report", "markdown", "print_table"]

_TITLES = {
    "native": "jax_mps",
    "xla": "jax_mps\nStableHLO",
    "lax": "stock JAX",
    "torch": "PyTorch",
    "torch_channels_last": "PyTorch\nchannels last",
}
_FORMAT = 2


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
    """

    machine: str
    versions: Mapping[str, str]
    date: str
    contenders: Sequence[str]
    copy_gbs: float
    results: list[Result]
    pages_kept: bool = False

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        fields = json.loads(path.read_text())
        if fields.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not a report of format {_FORMAT}")
        results = [
            Result(**{**r, "timings": {name: Timing(**t) for name, t in r["timings"].items()}})
            for r in fields.pop("results")
        ]
        return cls(**fields, results=results)


def print_table(report: Report) -> None:
    """Prints one table for each type and layout, and the geometric means of the ratios."""
    from rich.console import Console
    from rich.table import Table

    # A file or a pipe is as wide as it has to be.
    console = Console(width=None if sys.stdout.isatty() else 120)
    ours, *peers = report.contenders
    for (dtype, layout, _), results in _grouped(report.results):
        table = Table(title=f"{dtype}, {layout}: milliseconds, and how many times ours", title_justify="left")
        table.add_column("shape", no_wrap=True)
        table.add_column("operation", no_wrap=True)
        for title in _titles(report, results):
            table.add_column(title, justify="right")
        for result in results:
            table.add_row(*_row(result, ours, peers, report.copy_gbs))
        console.print(table)
    means = Table(title="geometric mean of their time over ours", title_justify="left")
    means.add_column("operation")
    for title in _mean_titles(peers):
        means.add_column(title, justify="right")
    for row in _means(report.results, ours, peers):
        means.add_row(*row)
    console.print(means)
    pages = "freed memory is kept; " if report.pages_kept else ""
    console.print(f"reading and writing back moves {report.copy_gbs:.1f} GB/s; {pages}{report.machine}")


def markdown(report: Report) -> str:
    """The tables of `print_table` as Markdown."""
    ours, *peers = report.contenders
    used = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    head = (
        f"{report.machine}; {used}; {report.date[:10]}. Medians in milliseconds, in brackets how many times "
        f"ours. The limit is, for GB/s, the {report.copy_gbs:.1f} at which a large array is read and written "
        "back, and for GFLOP/s `jnp.dot` of the same M, N and K in the same rounds."
        + (" Freed memory was kept." if report.pages_kept else "")
    )
    lines = [head, ""]
    for (dtype, layout, _), results in _grouped(report.results):
        titles = ["shape", "operation", *_titles(report, results)]
        lines += [f"**{dtype}, {layout.replace('_', ' ')}**", "", *_markdown_head(titles, left=2)]
        lines += [_markdown_row(_row(result, ours, peers, report.copy_gbs)) for result in results]
        lines.append("")
    lines += ["**Geometric mean of their time over ours**", ""]
    lines += _markdown_head(["operation", *_mean_titles(peers)], left=1)
    lines += [_markdown_row(row) for row in _means(report.results, ours, peers)]
    return "\n".join(lines)


def _markdown_head(titles: Sequence[str], left: int) -> list[str]:
    return [_markdown_row(titles), _markdown_row(["---"] * left + ["---:"] * (len(titles) - left))]


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("\n", ", ")


def _titles(report: Report, results: Sequence[Result]) -> list[str]:
    """Titles of the columns after the name of a shape and an operation."""
    timed = [_TITLES[name] for name in report.contenders]
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


def _mean_titles(peers: Sequence[str]) -> list[str]:
    titles = [_TITLES[name] for name in peers]
    return [*titles, "PyTorch,\nbetter layout"] if len(_torch(peers)) > 1 else titles


def _torch(peers: Sequence[str]) -> list[str]:
    return [name for name in peers if name.startswith("torch")]


def _means(results: Sequence[Result], ours: str, peers: Sequence[str]) -> list[list[str]]:
    """A row for each operation and for all; a column for each peer and for the better PyTorch of a case."""
    ops = list(dict.fromkeys(result.op for result in results))
    columns = [[name] for name in peers] + [_torch(peers)] * (len(_torch(peers)) > 1)
    rows = []
    for op in (*ops, "all"):
        row = [op]
        for names in columns:
            ratios = [
                min(theirs) / result.timings[ours].median
                for result in results
                if op in (result.op, "all")
                and ours in result.timings
                and (theirs := [result.timings[name].median for name in names if name in result.timings])
            ]
            row.append(f"{statistics.geometric_mean(ratios):.2f}" if ratios else "-")
        rows.append(row)
    return rows


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _grouped(results: Sequence[Result]) -> list[tuple[tuple[str, str, bool], list[Result]]]:
    """A table for each type and layout; those with first calls have other columns."""
    groups: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dtype, result.layout, bool(result.first_calls)), []).append(result)
    return list(groups.items())
