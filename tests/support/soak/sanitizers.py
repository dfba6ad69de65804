"""The native library under AddressSanitizer, UndefinedBehaviourSanitizer, ThreadSanitizer and Valgrind.

Builds stay in `.soak/builds`; the first step of each takes minutes. The cases are the program that tests the
kernels alone, and tests of the suite in a Python process that loads the library.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BUILDS = ROOT / ".soak" / "builds"
INSTRUCTION_SET = "x86_64_v3" if platform.machine() in ("x86_64", "AMD64") else "baseline"
EVERY = 100
"""One of so many tests is in a case: about fifty, half a minute."""
# What is checked at every access takes a compiler a quarter of an hour. Continuous integration checks it too,
# in the kernels' own program.
UNCHECKED = "null,alignment,pointer-overflow,vptr"


@dataclasses.dataclass(frozen=True)
class Tool:
    """A way to watch the library."""

    flags: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    """What a Python process has to load first."""
    command: tuple[str, ...] = ()
    """What runs the program that tests the kernels."""
    problems: int = 40


TOOLS = {
    "address": Tool(
        f"-fsanitize=address,undefined -fno-sanitize={UNCHECKED} -fno-sanitize-recover=all",
        {
            # Python and JAX free little when they end: leaks are looked for in the kernels' own program.
            # What cannot be allocated is null, as without it.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        # jaxlib throws exceptions: AddressSanitizer wants to find what it takes the place of.
        ("libasan.so", "libstdc++.so"),
    ),
    "thread": Tool(
        "-fsanitize=thread",
        # JAX and Python are not compiled with it: what they do to memory is not seen as ordered.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        ("libtsan.so", "libstdc++.so"),
    ),
    # The program has operators of its own for memory, some of which are compiled into their callers.
    "valgrind": Tool(
        "",
        command=("valgrind", "--quiet", "--error-exitcode=1", "--show-mismatched-frees=no"),
        problems=10,
    ),
}

UNFIT = (
    # They limit or fill memory, and the sanitizers have an allocator of their own.
    "test_memory",
    "what_is_in_memory",
    # It is about the headers of the oldest jaxlib, and the builds have those of this one.
    "oldest_api",
    # StableHLO does not use the library.
    "xla",
)


def step(seed: int, number: int, check: Callable[[Any], None]) -> None:
    """Every tool: the kernels' program, tests of the suite, and chains of calls by many threads."""
    tools = list(TOOLS)
    for tool in tools:
        build(tool)
    for tool in tools:
        check({"tool": tool, "seed": 1000 * seed + number})
        if TOOLS[tool].libraries:
            check({"tool": tool, "first": (seed * 37 + number * 11) % EVERY})
            form = ("plain", "vmap", "scan", "callback", "sharded")[number % 5]
            check({"tool": tool, "form": form, "seed": 1000 * seed + number})


def check(case: Any) -> None:
    """Runs what the case says, and raises where the tool complains, or the program."""
    tool = TOOLS[case["tool"]]
    folder = build(case["tool"])
    if "form" in case:
        code = f"import chains; chains.run({case['form']!r}, 3, {case['seed']})"
        devices = {"NPROC": "4", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        python(tool, folder, "-c", code, **devices)
    elif "seed" in case:
        program = folder / f"kernels_test_{INSTRUCTION_SET}"
        run([*tool.command, program, tool.problems, case["seed"]])
    else:
        tests = [
            "tests/ops",
            "tests/native",
            "tests/stock",
            "-k",
            " and ".join(f"not {name}" for name in UNFIT),
        ]
        sample = ["-m", "full", "--every", EVERY, "--first", case["first"]]
        python(tool, folder, "-m", "pytest", "-n", 0, "-q", "-s", "--timeout", 600, *tests, *sample)


@functools.cache
def build(name: str) -> Path:
    """The folder of the library and of the program, of the sources as they are now."""
    folder, tool = BUILDS / name, TOOLS[name]
    # -O1: the optimiser takes most of the time, and hides reads of what is not used.
    flags = f"-O1 -g1 -fno-omit-frame-pointer {tool.flags}"
    run(
        [
            *("cmake", "-S", ROOT / "jax_mps" / "native", "-B", folder, "-DJAX_MPS_TESTS=ON"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DJAX_MPS_ISAS={INSTRUCTION_SET}"),
            *("-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"),
        ]
    )
    run(["cmake", "--build", folder])
    if tool.libraries:
        loaded = "from jax_mps.lowering import library; print(library.status().path)"
        path = python(tool, folder, "-c", loaded).strip()
        if folder not in Path(path).parents:
            raise RuntimeError(f"not the library in {folder} is loaded, but {path}")
    return folder


def python(tool: Tool, folder: Path, *arguments: Any, **environment: str) -> str:
    """What Python prints with the library of that folder."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    loaded = " ".join(map(compiler_file, tool.libraries))
    environment |= {"PYTHONPATH": path, "LD_PRELOAD": loaded, "JAX_MPS_NATIVE": "required"}
    return run([sys.executable, *arguments], environment | tool.environment)


def compiler_file(name: str) -> str:
    """Where the compiler has a library."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(command: list[Any], environment: dict[str, str] | None = None) -> str:
    """What a command prints; an error with the end of that if it fails."""
    process = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode} of {command}\n{process.stdout[-10000:]}")
    return process.stdout
