"""A table of the benchmarks, for the terminal and as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["TITLES", "Table"]

TITLES = {
    "native": "jax_mps",
    "xla": "jax_mps\nStableHLO",
    "lax": "stock JAX",
    "torch": "PyTorch",
    "torch_channels_last": "PyTorch\nchannels last",
}
"""What tables call the contenders."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, the heads of the columns, and rows whose first `names` cells are names, the others numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int

    def rich(self) -> Any:
        """The table for a terminal."""
        from rich.table import Table as Rich

        made = Rich(title=self.title, title_justify="left")
        for place, head in enumerate(self.heads):
            named = place < self.names
            made.add_column(head, justify="left" if named else "right", no_wrap=named)
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        """The table as Markdown, under its title."""
        rule = ["---"] * self.names + ["---:"] * (len(self.heads) - self.names)
        return "\n".join([f"**{self.title}**", "", *map(_markdown_row, (self.heads, rule, *self.rows))])


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("\n", ", ")
