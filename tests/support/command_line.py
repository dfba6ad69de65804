"""Commands of `python -m jax_mps` in processes of their own, to be interrupted and short of room."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax_mps

JSON = ("--shapes", "global", "--ops", "forward", "--rounds", "3", "--seconds", "0.01", "--peers", "--json",
        "bench.json")  # fmt: skip
"""Options of a `bench` that takes a second, and writes a file that the last one names."""


class Ended(NamedTuple):
    """The exit status, or the negative number of the signal; and what was written on both outputs."""

    status: int
    output: str


def start(*command: str, folder: Path, blocks: int | None = None) -> subprocess.Popen[str]:
    """Starts a command in a folder, where no file may become longer than so many blocks of 512 bytes."""
    python = [sys.executable, "-m", "jax_mps", *command]
    limit = [] if blocks is None else ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONSAFEPATH")}
    places = [str(Path(jax_mps.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with interruptible():
        return subprocess.Popen(
            [*limit, *python],
            cwd=folder,
            env=inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, places))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What is started here takes Ctrl-C, also where this process, as in the background, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def wait(process: subprocess.Popen[str], timeout: float = 240) -> Ended:
    """The end of a command, which has to come."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Ended(process.returncode, output + errors)
