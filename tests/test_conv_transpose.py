"""Values and first derivatives of transposed convolution against loops over pixels and taps."""

from __future__ import annotations

import functools

import jax
import numpy as np

import convs
import jax_mps
import oracle


@functools.cache
def results(name, data_format, implementation):
    """The functions, their reverse and their forward mode of one case, in one compiled program."""
    case = convs.CASES[name]
    call = {**case.call, "data_format": data_format, "implementation": implementation}
    arrays = case.arrays(data_format)

    @jax.jit
    def run(arrays):
        x, kernel, g = arrays
        f = functools.partial(jax_mps.conv_transpose, **call)
        y, pull_back = jax.vjp(f, x, kernel)
        dx, dk = pull_back(g)
        documented = {op.name: op.apply(arrays, **call) for op in (convs.DATA, convs.WEIGHTS)}
        # Of the case's own arrays, so that the tangent is twice the value.
        tangent = jax.jvp(f, (x, kernel), (x, kernel))[1]
        return {"forward": y, "data": dx, "weights": dk, "tangent": tangent, "documented": documented}

    return arrays, run(arrays)


@convs.each_path
def test_geometry(name, data_format, implementation):
    arrays, found = results(name, data_format, implementation)
    expected = convs.expected(name, data_format)
    for op in convs.OPS:
        value, scale = expected[op.name]
        tolerance = {"length": convs.terms(op, arrays), "scale": scale}
        assert found[op.name].dtype == np.float32
        oracle.assert_close(found[op.name], value, **tolerance)
        if op is not convs.FORWARD:
            oracle.assert_close(found["documented"][op.name], value, **tolerance)
    value, scale = expected["forward"]
    oracle.assert_close(
        found["tangent"], 2 * value, length=convs.terms(convs.FORWARD, arrays), scale=2 * scale
    )
