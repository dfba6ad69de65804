"""The rows of the benchmark: every contender computes the same, and keeps what its gradient needs."""

import functools

import jax
import numpy as np
import pytest

import jax_mps
from jax_mps.cli.bench import conv_transpose, runner, training
from jax_mps.cli.bench.conv_transpose import ConvTranspose
from jax_mps.cli.bench.pooling import Pooling, pooling_case
from jax_mps.cli.bench.shapes import PoolingShape, TransposedShape

CONTENDERS = ("native", "xla", "lax", "torch", "torch_channels_last")


def _run(case):
    """Refuses results that differ. `queued` saves the time that calls have to settle."""
    return runner.run(case, rounds=3, seconds=0, queued=True)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("op", Pooling.ops)
@pytest.mark.parametrize(("kind", "ndim"), [("avg", 1), ("max", 2), ("l2", 3)])
def test_poolings_agree(kind, ndim, op, layout, native):
    shape = PoolingShape("", kind, 2, (9, 7, 6)[:ndim], 3, window=3, stride=2, padding=1)
    case = pooling_case(shape, op, "float32", layout, CONTENDERS)
    result = _run(case)
    assert set(result.timings) | set(result.absent) == set(CONTENDERS)
    assert {"native", "xla", "lax"} <= set(result.timings)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("op", ConvTranspose.ops)
def test_transposed_convolutions_agree(op, layout, native, monkeypatch):
    shape = TransposedShape("tiny", 2, (5, 4), 6, 4, window=3, stride=2, padding=1, output_padding=1)
    monkeypatch.setitem(conv_transpose._BY_NAME, "tiny", shape)
    result = _run(ConvTranspose().case("tiny", op, "float32", layout, None, CONTENDERS))
    assert {"native", "xla", "lax", "yardstick"} <= set(result.timings)
    assert result.flops == 2 * shape.products * (3 if op == "step" else 1)


def _call(op, function, operands, gradient):
    function, operands = training.jax_call(op, function, operands, gradient)
    return jax.jit(function)(*operands)


def test_the_rows_of_jax():
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), "float32")
    pool = functools.partial(jax_mps.max_pool, window_shape=3, strides=2)
    y = pool(x)
    gradient = y + 1
    expected = jax_mps.max_pool_gradient(gradient, x, 3, strides=2)
    call = functools.partial(_call, function=pool, operands=(x,), gradient=gradient)

    np.testing.assert_array_equal(call("forward"), y)
    kept_y, kept = call("keep")
    np.testing.assert_array_equal(kept_y, y)
    (tap_index,) = jax.tree.leaves(kept)
    assert (tap_index.shape, tap_index.dtype) == (y.shape, "int8")
    (dx,) = call("pull_back")
    np.testing.assert_array_equal(dx, expected)
    step_y, step_dx = call("step")
    np.testing.assert_array_equal(step_y, y)
    np.testing.assert_array_equal(step_dx, expected)


def test_the_rows_of_torch():
    torch = pytest.importorskip("torch")
    x, gradient = torch.arange(12.0).reshape(1, 3, 4), torch.ones(1, 3, 2)

    def call(op):
        pool = functools.partial(torch.nn.functional.max_pool1d, kernel_size=2)
        return training.torch_call(torch, op, pool, (x,), gradient)()

    (y,) = call("forward")
    assert y.grad_fn is None
    (kept,) = call("keep")
    assert kept.grad_fn is not None
    assert torch.equal(kept, y)
    expected = torch.tensor([0.0, 1, 0, 1]).expand(1, 3, 4)
    (dx,) = call("pull_back")
    assert torch.equal(dx, expected)
    step_y, step_dx = call("step")
    assert torch.equal(step_y, y)
    assert torch.equal(step_dx, expected)
