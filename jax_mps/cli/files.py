"""One clear line, instead of a traceback, where a file cannot be written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from jax_mps import _files

__all__ = ["writable", "written"]


def writable(path: Path) -> bool:
    """Whether a file can be made at a path; if not, says so on standard error."""
    return written(path, _files.check)


def written(path: Path, write: Callable[[Path], None]) -> bool:
    """Whether `write` could write the file; if not, says so on standard error."""
    try:
        write(path)
    except OSError as error:
        print(f"jax_mps: cannot write {path}: {error.strerror}", file=sys.stderr)
        return False
    return True
