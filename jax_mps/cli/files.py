"""One clear line, instead of a traceback, where a file or the output cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jax_mps import _files

__all__ = ["printed", "writable", "written"]


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


def printed(command: Callable[[], int]) -> int:
    """The status of a command; 1 where its output cannot be written, which is said on standard error."""
    try:
        status = command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at its end
        if error.errno != errno.EPIPE:  # who closes a pipe, as `head` does, has enough
            print(f"jax_mps: cannot write standard output: {error.strerror}", file=sys.stderr)
        return 1
    return status
