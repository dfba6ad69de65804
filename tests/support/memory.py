"""The memory of this process, in bytes, as Linux tells it."""

from __future__ import annotations

import resource
from pathlib import Path

FRESH = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""An environment in which glibc has no addresses in advance: every large array meets the limit."""


def size() -> int:
    """All addresses, what `RLIMIT_AS` limits."""
    return _pages(0)


def resident() -> int:
    """What is in memory."""
    return _pages(1)


def _pages(column: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()
