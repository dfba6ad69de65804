"""Hostile bytes: mutated files for `from_bytes`, files that coverage leads to, wrong calls of the handlers.

A case is one of
    {"class": name, "mutated": "bytes" or "header" or "document", "seed": n}
    {"class": name, "file": the bytes in hexadecimal}
    {"class": name, "text": a document, whose digest is made to fit}
    {"guided": seconds, "seed": n}
    what `hostile_calls.draw` gives
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import hostile_bytes
import hostile_calls
from soak.record import Case

MUTANTS, CALLS, GUIDED_SECONDS = 250, 150, 60


def step(seed: int, number: int, check: Callable[[Case], None]) -> None:
    """A class's mutants, calls of handlers, and a while of guided search."""
    names = list(hostile_bytes.KERNELS)
    for i in range(MUTANTS):
        for kind in hostile_bytes.KINDS:
            name = names[(number + i) % len(names)]
            check({"class": name, "mutated": kind, "seed": (seed << 40) + number * MUTANTS + i})
    for i in range(CALLS):
        check(hostile_calls.draw((seed << 40) + number * CALLS + i))
    if importlib.util.find_spec("atheris") is not None:  # it is for Linux alone
        check({"guided": GUIDED_SECONDS, "seed": (seed << 20) + number})
    jax.clear_caches()  # every call was a program of its own


def check(case: Case) -> None:
    """An error or a right answer, whatever the case."""
    if "guided" in case:
        guided(case["guided"], case["seed"])
    elif "handler" in case:
        jax.config.update("jax_enable_x64", True)
        hostile_calls.check(case)
    else:
        hostile_bytes.check(contents(case), case["class"])


def contents(case: Case) -> bytes:
    """The file of a case."""
    if "mutated" in case:
        return hostile_bytes.mutant(case["class"], case["mutated"], case["seed"])
    if "file" in case:
        return bytes.fromhex(case["file"])
    return hostile_bytes.with_text(case["class"], case["text"])


def guided(seconds: int, seed: int) -> None:
    """A process of `soak.guided`, whose corpus stays for the next one."""
    with corpus() as folder:
        options = [
            f"-max_total_time={seconds}",
            f"-seed={seed % 2**32 or 1}",
            "-timeout=60",
            "-print_final_stats=1",
        ]
        options.append(f"-artifact_prefix={folder.parent}/")
        run = subprocess.run(
            [sys.executable, "-m", "soak.guided", str(folder), *options],
            capture_output=True, text=True, errors="replace", timeout=seconds + 300, check=False,
        )  # fmt: skip
    print(*re.findall(r"stat::(\w+: +\d+)", run.stderr)[:2], flush=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@contextlib.contextmanager
def corpus() -> Iterator[Path]:
    """A folder for inputs that reach something new: beside the records of a soak, else for one case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(os.environ.get("JAX_MPS_SOAK_STATE", scratch)) / "hostile" / "corpus"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
