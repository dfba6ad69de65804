"""Mutants: one operator, number or condition of the package is changed at a time, and tests have to notice.

A mutant that survives is no failure: it may mean the same as the original. Its diff goes to the log of the
part, and a person looks at it.
"""

from __future__ import annotations

import difflib
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

import jax_mps

PACKAGE = Path(jax_mps.__file__).parent
TESTS = Path(__file__).parents[2]
LONGEST = 400
"""A mutant whose tests take more seconds loops, and is killed by that."""

POOLING = (
    "ops/test_pooling_values.py",
    "ops/test_pooling_gradients.py",
    "ops/test_pooling_arguments.py",
    "ops/test_pooling_transformations.py",
    "ops/test_dtypes.py",
    "ops/test_special_values.py",
)
CONVOLUTION = (
    "ops/test_conv_transpose_arguments.py",
    "ops/test_conv.py",
    "ops/test_conv_transpose.py",
    "ops/test_conv_transpose_parity.py",
    "ops/test_conv_transpose_gradients.py",
    "ops/test_conv_transpose_transformations.py",
)
ROOMS = {
    "geometry.py": ("test_geometry.py", "lowering/test_export.py", *POOLING[:3], *CONVOLUTION[:2]),
    "ops/adaptive_pooling.py": ("ops/test_adaptive_pooling.py",),
    "ops/fractional_pooling.py": ("ops/test_fractional_pooling.py",),
    "ops/lp_pooling.py": ("ops/test_lp_pooling.py",),
    "ops/max_unpooling.py": ("ops/test_unpool.py", "ops/test_dtypes.py"),
    "ops/tiling.py": (
        "ops/test_fractional_pooling.py",
        "ops/test_adaptive_pooling.py",
        "ops/test_lp_pooling.py",
    ),
    "ops/convolution.py": (*CONVOLUTION, "ops/test_conv_transpose_sharding.py"),
    "ops/primitive.py": ("ops/test_jet.py", *POOLING[:4], *CONVOLUTION[3:]),
    "ops/": (*POOLING, "ops/test_jet.py"),
    "lowering/apple.py": ("lowering/test_apple.py",),
    "lowering/library.py": ("native/test_library.py", "lowering/test_lowering.py"),
    "lowering/partition.py": ("lowering/test_partition.py", "ops/test_pooling_sharding.py"),
    "lowering/conv_transpose/": ("lowering/test_conv_transpose_lowering.py", *CONVOLUTION[1:5]),
    "lowering/pooling/": (
        "lowering/test_lowering.py",
        *POOLING[:2],
        "ops/test_selected_tap.py",
        "ops/test_unpool.py",
        "ops/test_half_reductions.py",
        "ops/test_special_values.py",
    ),
    "lowering/": ("lowering/test_lowering.py", "lowering/test_export.py", *POOLING[:2], *CONVOLUTION[1:2]),
    "stock/": (
        "stock/test_recognition.py",
        "stock/test_switch.py",
        "stock/test_platforms.py",
        "stock/test_random.py",
    ),
}
"""Tests of files, quick ones first; the first row that fits counts."""

CHANGES = [
    f"core/ReplaceBinaryOperator_{change}"
    for change in (
        "Add_Sub",
        "Sub_Add",
        "Mul_Add",
        "Div_Mul",
        "FloorDiv_Mul",
        "Mod_FloorDiv",
        "Pow_Mul",
        "BitAnd_BitOr",
    )
]
CHANGES += [
    f"core/ReplaceComparisonOperator_{change}"
    for change in ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")
]
CHANGES += [
    f"core/{change}"
    for change in (
        "AddNot",
        "NumberReplacer",
        "RemoveDecorator",
        "ReplaceAndWithOr",
        "ReplaceFalseWithTrue",
        "ReplaceOrWithAnd",
        "ReplaceTrueWithFalse",
        "ReplaceUnaryOperator_Delete_Not",
        "ReplaceUnaryOperator_USub_UAdd",
        "ZeroIterationForLoop",
    )
]
"""Of Cosmic Ray's operators. The others change annotations, or what these change too."""

Case = dict[str, Any]


def step(seed: int, number: int, check: Callable[[Case], None]) -> None:
    """A mutant of a random line."""
    rng = random.Random(f"{seed} {number}")
    names = files()
    (file,) = rng.choices(list(names), list(names.values()))
    operator, occurrence = rng.choice(changes(file))
    check({"file": file, "operator": operator, "occurrence": occurrence})


def check(case: Case) -> dict[str, int]:
    """Runs the tests on a mutant; how many were killed and have survived."""
    file, tests = case["file"], tests_of(case["file"])
    original = (PACKAGE / file).read_text()
    mutant = mutated(original, case["operator"], case["occurrence"])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "jax_mps")
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("native", "__pycache__"))
        (copy / file).write_text(mutant)
        if failure(folder, tests):
            (copy / file).write_text(original)
            without = failure(folder, tests, "--last-failed")
            assert not without, f"what fails does so without a mutant: {without[-1500:]}"
            return {"killed": 1}
    lines = (original.splitlines(), mutant.splitlines())
    print(
        f"SURVIVED {case}",
        *difflib.unified_diff(*lines, file, "mutant", lineterm=""),
        sep="\n",
        flush=True,
    )
    return {"survived": 1}


def failure(folder: str, tests: tuple[str, ...], *options: str) -> str:
    """How tests fail on the package in a folder; empty if they pass."""
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    options += ("-x", "-q", "-n", "0", "-o", f"cache_dir={folder}/cache", "--tb=line")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(str(TESTS / test) for test in tests)],
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LONGEST,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "time is over"
    # 1: a test fails; 2 and 4: a test or conftest.py cannot be imported. What a signal ends is killed too.
    assert done.returncode in (0, 1, 2, 4) or done.returncode < 0, done.stdout
    return f"exit status {done.returncode}: {done.stdout}" if done.returncode else ""


def tests_of(file: str) -> tuple[str, ...]:
    """The tests of a file of the package."""
    return next(tests for room, tests in ROOMS.items() if file.startswith(room))


@functools.cache
def files() -> dict[str, int]:
    """What has mutants, with its number of lines."""
    found = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }
    return {file: lines for file, lines in found.items() if file.startswith(tuple(ROOMS))}


@functools.cache
def changes(file: str) -> list[tuple[str, int]]:
    """Operators that change something in a file, each as often as it can."""
    nodes = list(ast_nodes(get_ast((PACKAGE / file).read_text())))
    found = []
    for name in CHANGES:
        operator = get_operator(name)()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        found += [(name, i) for i in range(count)]
    return found


def mutated(text: str, operator: str, occurrence: int) -> str:
    """A text with one change."""
    return str(mutate_code(text, get_operator(operator)(), occurrence))
