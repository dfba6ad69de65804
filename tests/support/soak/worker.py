"""One process of a part: `python -m soak.worker PART FILE SEED SECONDS` runs steps until its time is over."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from soak.record import Case, Record

LONGEST = 900
"""A case that takes more seconds hangs: the stacks of all threads are printed, and the process ends."""


def work(part: str, path: Path, seed: int, seconds: float) -> None:
    """Runs steps, and keeps the record of the part in a file."""
    module = importlib.import_module(f"soak.{part}")
    record = Record.read(path, seed)
    began, before = time.monotonic(), record.seconds
    failing: Case = None

    def check(case: Case) -> None:
        nonlocal failing
        record.running = case
        record.write(path)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            counts = module.check(case) or {}
        except Exception:
            failing = case  # the last one that Hypothesis tries is the smallest
            raise
        record.cases += 1
        for name, count in counts.items():
            record.counts[name] = record.counts.get(name, 0) + count

    while time.monotonic() - began < seconds:
        try:
            module.step(seed, record.next_step, check)
        except Exception:
            print(traceback.format_exc(), file=sys.stderr)
            record.fail(failing, traceback.format_exc(limit=-3))
        else:
            record.running = None
            record.next_step += 1
        record.seconds = before + time.monotonic() - began
        record.write(path)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    faulthandler.enable()
    part, path, seed, seconds = sys.argv[1:]
    os.environ["JAX_MPS_SOAK_STATE"] = str(Path(path).parent.absolute())  # for what a part keeps
    work(part, Path(path), int(seed), float(seconds))
