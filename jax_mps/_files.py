"""Files that are whole at any moment: written beside, and renamed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

__all__ = ["check", "replace"]


def replace(path: str | Path, content: bytes) -> None:
    """Makes `content` the content of a file, which is the old one until it is the new one.

    A device or a pipe is written as it is.

    Raises:
      OSError: there is no room, no such folder or no permission. The old file is still there.
    """
    path = Path(path)
    if _is_special(path):
        path.write_bytes(content)
        return
    target = path.resolve()  # a link stays a link
    beside = _create_beside(target)
    try:
        beside.write_bytes(content)
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o777)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check(path: str | Path) -> None:
    """Raises what `replace` would where it could not even begin, so that no work is done for nothing."""
    if not _is_special(Path(path)):
        _create_beside(Path(path).resolve()).unlink()


def _create_beside(target: Path) -> Path:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not os.access(target, os.W_OK):  # the folder's permission would do to replace it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    beside = target.with_name(f".{secrets.token_hex(8)}.jax_mps")
    beside.touch(exist_ok=False)
    return beside


def _is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, or a name of an open file, such as /dev/stdout."""
    named = path.parent in (Path("/dev"), Path("/dev/fd")) or path.is_relative_to("/proc")
    return path.exists() and not path.is_dir() and (named or not path.is_file())
