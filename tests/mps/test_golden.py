"""Every published case through the classes of `jax_mps.mps`, on both paths."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mps_cases
from jax_mps import mps

GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden.json").read_text())
CASES = {case["id"]: case for case in GOLDEN["cases"]}


def check(name: str, implementation: str, dtype: str = "float32") -> None:
    case = CASES[name]
    outputs = mps_cases.run_case(case, implementation, dtype)
    assert outputs.keys() == case["outputs"].keys()
    rtol = GOLDEN["tolerance"][dtype]
    for key, entry in case["outputs"].items():
        if entry is None:
            assert outputs[key] is None
            continue
        expected = mps_cases.array(entry)
        assert outputs[key].shape == expected.shape
        largest = float(np.max(np.abs(expected), initial=1, where=np.isfinite(expected)))
        np.testing.assert_allclose(outputs[key], expected, rtol=rtol, atol=rtol * largest, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_native(name, native):
    check(name, "native")


@pytest.mark.full  # the compiler's time
@pytest.mark.parametrize("name", CASES)
def test_stablehlo(name):
    check(name, "xla")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case["op"].startswith("pool")][::12])
def test_under_jit_and_with_64_bits(name, x64):
    """Kernels as arguments of a compiled function: of pooling everything is static."""
    case = CASES[name]
    kernel = mps_cases.build(case)
    assert jax.tree.leaves(kernel) == []
    arrays = [
        np.asarray(mps_cases.array(case["inputs"][n]))
        for n in ("source_gradient", "source")
        if n in case["inputs"]
    ]
    to = np.full(case["params"]["destination_shape"], case["params"]["destination_fill"], np.float64)

    @jax.jit
    def encode(kernel, arrays, to):
        if isinstance(kernel, mps.MPSCNNPooling):
            return kernel.encode(*arrays, to)
        return kernel.encode(*arrays, destination_gradient=to)

    out = encode(kernel, arrays, to)
    assert out.dtype == np.float64
    expected = mps_cases.array(case["outputs"]["destination"])
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-11)
