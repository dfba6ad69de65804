"""The MPS classes against loops that follow their documentation, on random parameters."""

import json
from pathlib import Path

import numpy as np
import pytest

import mps_cases
import mps_oracle
import mps_random
from mps_comparison import compare

GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden.json").read_text())


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
