"""What `accelerate()` has lowered: each stock operation, by whose code, and why."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Report", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A stock operation that was lowered.

    Attributes:
      operation: the name of the stock primitive.
      operands: the types of its operands, such as `float32[8,32,32,3]`.
      result: the type of its result.
      ours: whether it became an operation of this library.
      why: which one; or the reason why it stayed stock.
    """

    operation: str
    operands: tuple[str, ...]
    result: str
    ours: bool
    why: str


class Report:
    """Rows in the order in which programs were lowered; printed, a table of them.

    A program that JAX had compiled before, for the same switch, is not lowered again and adds no row.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._lock = threading.Lock()

    def add(self, row: Row) -> None:
        """Adds a row."""
        with self._lock:
            self._rows.append(row)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows so far."""
        with self._lock:
            return tuple(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        rows = self.rows
        if not rows:
            return "nothing that accelerate() knows was lowered"
        table = [("times", "operation", "operands", "result", "code", "why")]
        for row, times in collections.Counter(rows).items():
            code = "jax_mps" if row.ours else "stock"
            table.append((str(times), row.operation, " ".join(row.operands), row.result, code, row.why))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
            for line in table
        ]
        ours = sum(row.ours for row in rows)
        return "\n".join([*lines, f"{ours} of {len(rows)} by jax_mps"])

    __repr__ = __str__


def type_name(aval: Any) -> str:
    """A type as jaxprs show it, with the whole name of the dtype."""
    return f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"
