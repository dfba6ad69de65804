"""The MPS classes against loops that follow their documentation, on random parameters."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mps_cases
import mps_oracle
import mps_random

GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden.json").read_text())

# Compiling takes most of the time: many cases share a program, and it is compiled in haste.
CHUNK = 20
HASTE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_loops_give_the_published_numbers(case):
    inputs = {name: mps_cases.array(entry) for name, entry in case["inputs"].items()}
    outputs = mps_oracle.run({**case, "inputs": inputs})
    assert outputs.keys() == case["outputs"].keys()
    for name, entry in case["outputs"].items():
        expected = mps_cases.array(entry)
        if expected is None:
            assert outputs[name] is None
            continue
        assert outputs[name].shape == expected.shape
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-12, atol=1e-9, err_msg=name)


def test_cases_are_the_same_everywhere_and_not_trivial():
    for name in mps_random.CLASSES:
        cases = [mps_random.draw(name, i).case for i in range(50)]
        again = mps_random.draw(name, 49).case
        assert again["params"] == cases[49]["params"]
        outputs = [out for case in cases for out in mps_oracle.run(case).values() if out is not None]
        computed = [np.unique(out).size > 2 for out in outputs]
        assert sum(computed) > 0.4 * len(computed), name


@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_native(name, native, x64, request):
    """`--random N` says how many."""
    compare(name, range(request.config.getoption("--random")), "native")


@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_xla(name, x64):
    compare(name, range(180, 200), "xla")


@pytest.mark.full
@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_many_with_xla(name, x64, request):
    compare(name, range(request.config.getoption("--random")), "xla")


def compare(name, indices, implementation):
    """Runs cases of a class through it and through the loops; reports every case that differs."""
    randoms = sorted((mps_random.draw(name, i) for i in indices), key=lambda r: r.dtype)
    wrong = []
    for dtype, group in itertools.groupby(randoms, key=lambda r: r.dtype):
        for chunk in batched(group):
            for random, actual in zip(
                chunk, run([r.case for r in chunk], dtype, implementation), strict=True
            ):
                wrong += differences(random, actual, implementation)
    assert not wrong, "\n".join(wrong)


def batched(items):
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def run(cases, dtype, implementation):
    """The outputs of many cases, computed by one program."""
    kernels = [mps_cases.build(case, implementation, dtype) for case in cases]
    dtype = mps_random.DTYPES[dtype]
    images = [
        {
            name: value.astype(dtype)
            for name, value in case["inputs"].items()
            if name in ("source", "source_gradient")
        }
        for case in cases
    ]
    for case, arrays in zip(cases, images, strict=True):
        if "destination_shape" in case["params"]:
            shape, fill = case["params"]["destination_shape"], case["params"]["destination_fill"]
            arrays["destination"] = np.full(shape, fill, dtype)

    def program(kernels, images):
        ops = (case["op"] for case in cases)
        return [encode(op, k, **arrays) for op, k, arrays in zip(ops, kernels, images, strict=True)]

    lowered = jax.jit(program).lower(kernels, images)
    try:
        compiled = lowered.compile(compiler_options=HASTE)
    except jax.errors.JaxRuntimeError:  # a version without one of the options
        compiled = lowered.compile()
    return compiled(kernels, images)


def encode(op, kernel, source, source_gradient=None, destination=None):
    if op == "conv_transpose_gradient":
        data, state = kernel.encode(source_gradient, source)
        return {
            "gradient_data": data,
            "gradient_weights": state.gradient_for_weights,
            "gradient_biases": state.gradient_for_biases,
        }
    if op == "pool_gradient":
        return {"destination": kernel.encode(source_gradient, source, destination_gradient=destination)}
    return {"destination": kernel.encode(source, destination)}


def differences(random, actual, implementation):
    """What is wrong with the outputs of a case, in words."""
    expected, wrong = mps_oracle.run(random.case), []
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        if right is None or actual[name] is None:
            if right is not actual[name]:
                wrong.append(f"{random.case['id']} {name}: one is None")
            continue
        # Sums run in float32 at least and are rounded once; so does every other output but the results.
        assert actual[name].dtype == (
            random.dtype if name in ("destination", "gradient_data") else sums(random.dtype)
        )
        got = np.asarray(actual[name], np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(got - right) <= tolerance(random, name, right)
        bad = ~((got == right) | (np.isnan(got) & np.isnan(right)) | near)
        if implementation == "xla" and random.case["op"].startswith("conv"):
            # There zeros around the image are multiplied too, and NaN and infinities spread through them.
            bad &= ~(np.isnan(got) & spoilt(random))
        if got.shape != right.shape or bad.any():
            at = tuple(np.argwhere(bad)[0]) if got.shape == right.shape else ()
            wrong.append(
                f"{random.case['id']} {random.dtype} {name}{list(at)}: {got[at] if at else got.shape}, "
                f"not {right[at] if at else right.shape}; {int(bad.sum())} of {bad.size} differ"
            )
    return wrong


def spoilt(random):
    return not all(np.isfinite(x).all() for x in random.case["inputs"].values() if x is not None)


def sums(dtype):
    return "float64" if dtype == "float64" else "float32"


def tolerance(random, name, right):
    """Half a unit in the last place for rounding once, and what may get lost in the sums before."""
    out = jnp.finfo(random.dtype if name in ("destination", "gradient_data") else sums(random.dtype))
    inputs = [x for x in random.case["inputs"].values() if x is not None]
    largest = [np.abs(x[np.isfinite(x)]).max(initial=0) for x in inputs]
    terms = np.prod([max(1.0, x) for x in largest]) if random.case["op"].startswith("conv") else max(largest)
    return 0.51 * float(out.eps) * np.abs(right) + 64 * float(jnp.finfo(sums(random.dtype)).eps) * terms
