"""The native handlers, used wrongly and oddly: an error or a result, and never a crash."""

import json

import pytest

import hostile_calls
from processes import finish, start


@pytest.mark.usefixtures("native")
def test_wrong_use_of_the_handlers_is_an_error_and_never_a_crash():
    outcomes = json.loads(finish(start("import wrong_calls; wrong_calls.make_all()")))
    assert len(outcomes) > 90
    accepted = [name for name, outcome in outcomes.items() if "INVALID_ARGUMENT" not in outcome]
    assert not accepted, {name: outcomes[name] for name in accepted}


ODD_CALLS = """
import jax, jax.numpy as jnp, numpy as np
from jax_mps.lowering import library
from wrong_calls import call_handler
assert library.status().available

def call(handler, shape, *operands, **attributes):
    attributes = {k: (np.array if isinstance(v, list) else np.int64)(v) for k, v in attributes.items()}
    return call_handler(handler, shape, operands, attributes)

def window(**changes):
    pairs = {"window_shape": [2, 2], "strides": [2, 2], "window_dilation": [1, 1], "low": [0, 0]}
    return {"start": 1} | pairs | changes

like = jax.ShapeDtypeStruct
image, pooled = jnp.ones((1, 8, 8, 2)), like((1, 4, 4, 2), jnp.float32)
# Windows that lie in the padding, or reach far behind the image: every tap is checked against the image.
far = {"low": [100, 0]}, {"strides": [50, 50]}, {"window_dilation": [99, 1]}, {"window_shape": [9, 40]}
for changes in far:
    for handler in ("max_pool", "l2_pool"):
        jax.block_until_ready(call(handler, pooled, image, **window(**changes)))
    taps = like(pooled.shape, jnp.int16)
    jax.block_until_ready(call("max_pool_tap_index", taps, image, **window(**changes)))
# Images without pixels.
for shape, out in (((0, 8, 8, 2), (0, 4, 4, 2)), ((1, 8, 8, 0), (1, 4, 4, 0)), ((1, 0, 8, 2), (1, 1, 4, 2))):
    jax.block_until_ready(call("max_pool", like(out, jnp.float32), jnp.ones(shape), **window(low=[1, 0])))
# Indices that lie nowhere.
at = jnp.array([-1, -(2**31), 2**31 - 1, 64], jnp.int32).reshape(1, 2, 2, 1)
y = call("max_unpool", like((1, 8, 8, 1), jnp.float32), jnp.ones(at.shape), at, start=1, rank=2)
assert not np.any(y)
y = call("max_unpool_take", like(at.shape, jnp.float32), jnp.ones((1, 8, 8, 1)), at, start=1, rank=2)
assert not np.any(y)
# Convolutions whose taps lie anywhere, and images without pixels.
kernel = jnp.ones((2, 2, 2, 3))
windows = dict(window_shape=[2, 2], strides=[2, 2], window_dilation=[1, 1], low=[0, 0])
attributes = dict(start=1, channel=3, groups=1, transpose_kernel=0, **windows)
def all_three(x, g, **changes):
    shapes = [like(a.shape, jnp.float32) for a in (g, x, kernel)]
    operands = [(x, kernel), (g, kernel), (g, x)]
    for name, shape, pair in zip(("", "_gradient_data", "_gradient_weights"), shapes, operands):
        yield float(call("conv_transpose" + name, shape, *pair, **attributes | changes).sum())
for changes in ({"low": [1000, 0]}, {"low": [0, -1000]}, {"strides": [99, 50]}, {"window_dilation": [99, 1]}):
    # Sums of ones, over the same pairs of pixels and taps.
    y, dx, dk = all_three(image, jnp.ones((1, 5, 9, 3)), **changes)
    assert y == dx == dk, changes
for shape in ((0, 8, 8, 2), (1, 0, 8, 2), (1, 8, 0, 2)):
    assert set(all_three(jnp.ones(shape), jnp.ones((shape[0], 5, 9, 3)))) == {0}
for shape in ((1, 0, 9, 3), (1, 5, 0, 3)):
    assert set(all_three(image, jnp.ones(shape))) == {0}
print("done")
"""


@pytest.mark.usefixtures("native")
def test_odd_windows_and_positions_do_not_crash():
    assert finish(start(ODD_CALLS)) == "done\n"


HOSTILE_CALLS = """
import jax, hostile_calls
jax.config.update("jax_enable_x64", True)
print(sum(hostile_calls.check(hostile_calls.draw(seed)) for seed in range({begin}, {end})))
"""


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("begin", [0, 60])
def test_random_calls_are_refused_if_and_only_if_they_are_wrong(begin):
    """`.ci/soak --part hostile` makes more."""
    taken = int(finish(start(HOSTILE_CALLS.format(begin=begin, end=begin + 60))))
    assert 10 < taken < 40


FAR = {
    "taps beyond 2**31": {"window_shape": [1, 2**62]},
    "taps beyond 2**31 in all": {"window_shape": [2**16, 2**16]},
    "stride beyond 2**31": {"strides": [2**62, 1]},
    "dilation beyond 2**31": {"window_dilation": [1, 2**31]},
    "low beyond 2**61": {"low": [2**62, 0]},
    "bands beyond 2**61": {"band_low": [2**62, 0]},
    "more taps than the type of taps has numbers": {"window_shape": [13, 10]},
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", FAR)
def test_windows_beyond_all_integers_are_refused(name, x64):
    handler = "avg_pool" if "bands" in name else "max_pool_tap_index"
    pairs = {"window_shape": [2, 2], "strides": [2, 2], "window_dilation": [1, 1], "low": [0, 0]} | FAR[name]
    values = {"start": 1} | pairs
    if handler == "avg_pool":
        values = {"divisor": 0, "band_low": [0, 0], "band_high": [0, 0]} | values
    call = {
        "handler": handler,
        "operands": [[[1, 8, 8, 2], "float32"]],
        "results": [[[1, 4, 4, 2], "float32" if handler == "avg_pool" else "int8"]],
        "attributes": {name: ["int64", value] for name, value in values.items()},
    }
    assert not hostile_calls.right(call)
    assert not hostile_calls.check(call)
