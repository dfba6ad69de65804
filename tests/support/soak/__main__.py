"""The command `.ci/soak`."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax_mps
from soak import PARTS
from soak.record import Record, command

SLICE = 240
"""Seconds of one process: what JAX compiled is given back when it ends."""


def main() -> int:
    """Runs what the arguments say; the exit status."""
    options = arguments().parse_args()
    if options.case is not None:
        (part,) = options.part
        importlib.import_module(f"soak.{part}").check(json.loads(options.case))
        return 0
    folder: Path = options.state
    folder.mkdir(parents=True, exist_ok=True)
    soak(options.part or list(PARTS), folder, options.seed, options.hours * 3600, options.processes)
    return report(folder, options.seed)


def arguments() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog=".ci/soak", description="Random tests for hours. A second run goes on where the first one ended."
    )
    parser.add_argument("--hours", type=float, default=0.5, help="of all parts together; 0.5 by default")
    parser.add_argument("--seed", type=int, default=0, help="another seed starts anew")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; again for several")
    parser.add_argument("--case", metavar="JSON", help="only this case of the part, as a failure printed it")
    parser.add_argument("--processes", type=int, default=2, help="side by side; 2 by default")
    parser.add_argument("--state", type=Path, default=Path(".soak"), help="folder of records and logs")
    return parser


def soak(parts: list[str], folder: Path, seed: int, seconds: float, processes: int) -> None:
    """Runs the parts, each for its share of the time, several side by side."""
    end = time.monotonic() + seconds
    spent = dict.fromkeys(parts, 0.0)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while True:
            for part, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[part]
                    spent[part] += time.monotonic() - began
                    if not collect(part, folder, seed, process.returncode):
                        del spent[part]
            left = end - time.monotonic()
            waiting = sorted(spent.keys() - running.keys(), key=lambda part: spent[part] / PARTS[part])
            for part in waiting[: processes - len(running)]:
                if left > 1:
                    # Short slices at first: every part has its turn even in a short run.
                    slice_seconds = min(SLICE, left, seconds * PARTS[part] / sum(map(PARTS.get, parts)))  # type: ignore[arg-type]
                    running[part] = launch(part, folder, seed, slice_seconds), time.monotonic()
            if not running:
                return
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.kill()


def launch(part: str, folder: Path, seed: int, seconds: float) -> subprocess.Popen[bytes]:
    """A process of a part, whose output goes to a file of its own."""
    with (folder / f"{part}.log").open("ab") as log:
        arguments = [sys.executable, "-m", "soak.worker", part, record_of(folder, part), seed, seconds]
        return subprocess.Popen([*map(str, arguments)], stdout=log, stderr=log)


def collect(part: str, folder: Path, seed: int, status: int) -> bool:
    """Notes a crash, and says how far a part is; False where it ended without a case, as it would again."""
    path = record_of(folder, part)
    record = Record.read(path, seed)
    goes_on = not status or record.running is not None
    if status:
        record.fail(record.running, f"the process ended with status {status}: see {folder / part}.log")
        record.write(path)
    print(line(part, record), flush=True)
    return goes_on


def report(folder: Path, seed: int) -> int:
    """Prints versions and what all parts have done in all runs; 1 where something failed."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    python = f"Python {platform.python_version()} on {platform.machine()}"
    print(f"\n{time.strftime('%Y-%m-%d')}, jax_mps {jax_mps.__version__}, {versions}, {python}")
    failed = False
    for part in PARTS:
        path = record_of(folder, part)
        if path.exists():
            record = Record.read(path, seed)
            print(line(part, record))
            for failure in record.failures:
                failed = True
                print(f"FAILED {command(part, failure['case'])}\n{failure['error']}")
    return int(failed)


def line(part: str, record: Record) -> str:
    """One line of result."""
    total = sum(record.counts.values())
    counts = "".join(f", {n:,} {name} ({n / total:.1%})" for name, n in record.counts.items())
    done = f"{record.cases:9,} cases {record.seconds:8,.0f} s {len(record.failures):4} failed"
    return f"{part:14}{done}{counts}"


def record_of(folder: Path, part: str) -> Path:
    """The file of a part's record."""
    return folder / f"{part}.json"


if __name__ == "__main__":
    sys.exit(main())
