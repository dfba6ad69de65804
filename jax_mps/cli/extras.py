"""One clear line, instead of a traceback, where an optional dependency is missing."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["missing"]


def missing(extra: str, *modules: str) -> bool:
    """Whether some module is not installed; if so, says on standard error what to install."""
    absent = [name for name in modules if not _installed(name)]
    if absent:
        print(
            f"jax_mps: {', '.join(absent)} not installed; get it with: "
            f"pip install '.[{extra}]' in a clone, or pip install 'jax-mps-primitives[{extra}]'",
            file=sys.stderr,
        )
    return bool(absent)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in is missing
        return False
