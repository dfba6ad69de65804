"""Where ours is used: one table, read from the top; the first row that fits decides.

Each row has a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_mps.stock import convolution, windows

Reading = convolution.Reading | windows.Reading


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row of the table.

    Attributes:
      operation: what the row is about: a map of convolution, or the name of a pooling.
      condition: when it holds.
      ours: whether ours is used then.
      why: the measurement.
    """

    operation: str
    condition: Callable[[Any], bool]
    ours: bool
    why: str


CHOICES: tuple[Choice, ...] = ()


def choose(reading: Reading) -> tuple[bool, str]:
    """Whether ours is used for a reading, and why."""
    return True, ""
