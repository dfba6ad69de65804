"""Commands that are interrupted at random moments or have no room for their files, and damaged libraries.

A case is one of
    {"command": name in `COMMANDS`, "seconds": after its first line, when Ctrl-C comes}
    {"command": name in `COMMANDS`, "blocks": of 512 bytes, the longest that a file may be}
    {"library": how it is damaged, "seed": n}
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from command_line import JSON, start, wait
from damaged_libraries import DAMAGES, outcome
from jax_mps.cli.bench.report import Report
from soak.record import Case

COMMANDS = {
    "bench": (("bench", *JSON), 6.0),
    "demo": (("demo", "--output", "picture.png"), 60.0),
    "run": (("run", "-m", "jax_mps", "bench", *JSON), 6.0),
}
"""The arguments, of which the last one names the file; and the seconds that the command may take."""


def step(seed: int, number: int, check: Callable[[Case], None]) -> None:
    """Each command once, and each damage."""
    rng = np.random.default_rng([seed, number])
    for name, (_, seconds) in COMMANDS.items():
        check({"command": name, "seconds": float(rng.uniform(0, seconds))})
    check({"command": "bench", "blocks": int(rng.integers(4))})
    if number % 5 == 0:
        check({"command": "demo", "blocks": int(rng.integers(500))})
    for damage in DAMAGES:
        check({"library": damage, "seed": int(rng.integers(2**31))})


def check(case: Case) -> None:
    """An end at once or one clear line, and no file but whole ones."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if "library" in case:
            said = outcome(case["library"], case["seed"], folder)
            assert "native library" in said or said.startswith("used"), said
        elif "blocks" in case:
            without_room(COMMANDS[case["command"]][0], case["blocks"], folder)
        else:
            interrupted(COMMANDS[case["command"]][0], case["seconds"], folder)


def interrupted(command: tuple[str, ...], seconds: float, folder: Path) -> None:
    """Ctrl-C so long after the first line of the command."""
    process = start(*command, folder=folder)
    assert process.stdout
    assert process.stderr
    (process.stdout if "demo" in command else process.stderr).readline()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    ended = wait(process)
    # The signal itself, which a shell calls 130, too, ends a Python that has given up its handlers.
    assert ended.status in (0, 130, -signal.SIGINT), ended
    assert "Traceback" not in ended.output, ended
    check_files(folder, command[-1])


def without_room(command: tuple[str, ...], blocks: int, folder: Path) -> None:
    """A disk that is full after some bytes of the file."""
    ended = wait(start(*command, folder=folder, blocks=blocks), timeout=600)
    assert "Traceback" not in ended.output, ended
    complaints = [line for line in ended.output.splitlines() if line.startswith("jax_mps: cannot write")]
    assert (ended.status, len(complaints)) in ((0, 0), (1, 1)), ended
    check_files(folder, command[-1], missing=ended.status == 1)


def check_files(folder: Path, name: str, *, missing: bool | None = None) -> None:
    """Nothing lies in the folder but the file, which is whole; whether it may and must be missing."""
    found = [path.name for path in folder.iterdir()]
    assert found == [name] * len(found), found
    if missing is not None:
        assert bool(found) != missing
    if found and name.endswith(".json"):
        assert Report.load(folder / name).results
    elif found:
        from matplotlib import image

        assert image.imread(folder / name).ndim == 3
