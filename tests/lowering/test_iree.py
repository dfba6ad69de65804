"""Apple's programs through IREE, a compiler with a Metal backend: Metal source, and results elsewhere.

`--iree BACKEND` is for everything, which takes two hours on two cores; without it a sample runs.
"""

from __future__ import annotations

import functools
import random

import jax
import numpy as np
import pytest

import apple
import grid
import jax_mps
import stock_random

pytest.importorskip("iree.compiler", reason="IREE is missing; the extra `test` has it")
pytest.importorskip("iree.runtime", reason="IREE is missing; the extra `test` has it")

import iree_module
from jax_mps.cli import metal_source

UNITS = [(*case, grid.FORMATS[i % 2], mode) for i, case in enumerate(apple.CASES) for mode in apple.MODES]
KINDS = ("convolution", "max", "min", "sum")
MODELS = ("unet_2x2", "gan", "resnet18", "tcn", "unet_3d")
STEPS = [(name, optimiser) for name in MODELS for optimiser in ("sgd", "adam")]
SAMPLE = 20


def pytest_generate_tests(metafunc):
    whole = metafunc.config.getoption("iree")
    if "unit" in metafunc.fixturenames:
        seed = metafunc.config.getoption("seed")
        units = UNITS if whole else random.Random(seed).sample(UNITS, SAMPLE)
        metafunc.parametrize("unit", units, ids=map("-".join, units))
    if "step" in metafunc.fixturenames:
        steps = STEPS if whole else STEPS[:1]
        metafunc.parametrize("step", steps, ids=map("-".join, steps))


@pytest.fixture
def backends(request):
    """What runs the programs."""
    whole = request.config.getoption("iree")
    return (whole,) if whole else ("llvm-cpu", "vmvx")


def results(lowered, operands, backend):
    """Makes Metal source of a program, and runs it on another backend."""
    source = metal_source.metal_source(lowered.as_text())
    assert "kernel void" in source, "no kernel"
    return iree_module.run(lowered, *operands, backend=backend)


# --- the grid -----------------------------------------------------------------------------------------


def functions(unit):
    """The functions of a case in a mode."""
    *case, mode = unit
    return [variant for function in apple.functions(*case) for variant in apple.in_mode(function, mode)]


@pytest.mark.timeout(3600)
def test_programs_compile_for_metal_and_agree(unit, backends, request, native):
    """With the native kernels. Of the sample one function of each unit."""
    chosen, failed = functions(unit), {}
    if not request.config.getoption("iree"):
        seed = request.config.getoption("seed")
        chosen = [random.Random(f"{seed} {unit}").choice(chosen)]
    for function in chosen:
        lowered = function.lower("METAL")
        expected = jax.tree.leaves(jax.jit(function.call)(*function.operands))
        for backend in backends:
            try:
                apple.check_close(results(lowered, function.operands, backend), expected, function.name)
            except (AssertionError, RuntimeError) as error:
                failed[function.name, backend] = str(error)
    print(f"{len(chosen)} programs, {len(failed)} failures")
    assert not failed


# --- stock operations ---------------------------------------------------------------------------------


def with_gradients(f, *operands):
    y, pull_back = jax.vjp(f, *operands)
    return y, pull_back(np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype))


def lower_accelerated(f, *operands):
    """The program, and whether all of its operations are ours."""
    with jax_mps.accelerate() as handle:
        lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=("METAL",))
    return lowered, all(row.ours or row.operation == "pad" for row in handle.report().rows)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_stock_operations_compile_for_metal_and_agree(kind, backends, request):
    """Accelerated, with their gradients, against stock JAX; a tenth of `--random N`."""
    whole, count = (request.config.getoption(name) for name in ("iree", "random"))
    compared, failed = 0, {}
    for seed in range(max(count // 10, 1) if whole else 4):
        if kind == "convolution":
            case = stock_random.convolution(seed)
        else:
            case = stock_random.reduction(seed, kind, special=seed % 2 == 0)
        f = functools.partial(with_gradients, case.function) if case.differentiable else case.function
        lowered, ours = lower_accelerated(f, *case.operands)
        if not ours:
            continue
        expected = jax.tree.leaves(jax.jit(f)(*case.operands))
        for backend in backends:
            try:
                check_near(results(lowered, case.operands, backend), expected, 1e-4, case.note)
            except (AssertionError, RuntimeError) as error:
                failed[case.note, backend] = str(error)
        compared += 1
    print(f"{compared} programs, {len(failed)} failures")
    assert not failed
    assert compared


def check_near(actual, expected, rounding, note):
    """Equal but for rounding, relative to the largest number of an array."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), note
        scale = np.abs(e[np.isfinite(e)]).max(initial=1)
        np.testing.assert_allclose(a, e, rtol=rounding, atol=rounding * scale, err_msg=note)


# --- models -------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings(r"ignore:accelerate\(\) replaces nothing on the CPU")
def test_training_steps_compile_for_metal_and_agree(step, request):
    """Unmodified Flax models, accelerated; parameters are left out after Adam, which normalises rounding."""
    import training

    name, optimiser = step
    call, operands = training.step(name, optimiser)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lowered, ours = lower_accelerated(call, *operands)
        expected = jax.jit(call)(*operands)
    assert ours
    backend = request.config.getoption("iree") or "llvm-cpu"
    found = jax.tree.unflatten(jax.tree.structure(expected), results(lowered, operands, backend))
    compared = slice(1, None) if optimiser == "adam" else slice(None)
    found, expected = (jax.tree.leaves(tree[compared]) for tree in (found, expected))
    check_near(found, expected, 1e-3, f"{name}, {optimiser}")
