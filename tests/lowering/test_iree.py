"""Apple's programs through IREE, a compiler with a Metal backend: Metal source, and results elsewhere."""

from __future__ import annotations

import random

import jax
import pytest

import apple
import grid

pytest.importorskip("iree.compiler", reason="IREE is missing; the extra `test` has it for Linux")
pytest.importorskip("iree.runtime", reason="IREE is missing; the extra `test` has it for Linux")

import iree_module
from jax_mps.cli import metal_source

UNITS = [(*case, grid.FORMATS[i % 2], mode) for i, case in enumerate(apple.CASES) for mode in apple.MODES]
SAMPLE = 20


def pytest_generate_tests(metafunc):
    """A sample of the grid with one program of each unit; with `--iree BACKEND` every program of all."""
    if "unit" in metafunc.fixturenames:
        backend, seed = (metafunc.config.getoption(name) for name in ("iree", "seed"))
        units = UNITS if backend else random.Random(seed).sample(UNITS, SAMPLE)
        metafunc.parametrize("unit", units, ids=map("-".join, units))


def functions(unit, pick=None):
    """The functions of a case in a mode; one of them if `pick` chooses."""
    *case, mode = unit
    variants = [v for function in apple.functions(*case) for v in apple.in_mode(function, mode)]
    return [pick.choice(variants)] if pick else variants


def check(function, backend):
    """Metal source is made of the program, and another backend computes what the native kernels do."""
    lowered = function.lower("METAL")
    source = metal_source.metal_source(lowered.as_text())
    assert "kernel void" in source, "no kernel"
    results = iree_module.run(lowered, *function.operands, backend=backend)
    apple.check_close(results, jax.tree.leaves(jax.jit(function.call)(*function.operands)), function.name)


@pytest.mark.timeout(3600)
def test_programs_compile_for_metal_and_agree(unit, request, native):
    backend, seed = (request.config.getoption(name) for name in ("iree", "seed"))
    chosen = functions(unit) if backend else functions(unit, random.Random(f"{seed} {unit}"))
    failed = {}
    for i, function in enumerate(chosen):
        try:
            check(function, backend or ("llvm-cpu", "vmvx")[i % 2])
        except (AssertionError, RuntimeError) as error:
            failed[function.name] = str(error)
    print(f"{len(chosen)} programs, {len(failed)} failures")
    assert not failed
