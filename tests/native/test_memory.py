"""Memory of the native kernels: what a thread keeps, and calls that find none."""

import re
import sys

import pytest

import endurance
from memory import FRESH
from processes import finish, start

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process are those of Linux"),
    pytest.mark.usefixtures("native"),
]

# The gradient of unpooling wants a byte of scratch for every element of a plane, here 72 MB.
TAKE = """
import jax, jax.numpy as jnp, jax_mps

def take(image):
    at = jnp.full((len(image), 1, 1, 8), 7, jnp.int32)
    unpool = lambda y: jax_mps.max_unpool(y, at, image.shape[1:3], implementation="native")
    return jax.vjp(unpool, jnp.ones(at.shape, image.dtype))[1](image)[0]

image = jnp.ones((1, 3000, 3000, 8), jnp.float16)
"""
# The table of the rows that a pooling reads takes five times the memory of this image.
WITHOUT_MEMORY = """
import resource
import numpy as np
from memory import size

def run(f, x):
    compiled = jax.jit(f).lower(x).compile()
    compiled(x).block_until_ready()  # what compiled and what the call took is given back now
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size() + (40 << 20), before[1]))
    try:
        compiled(x).block_until_ready()
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert np.all(np.asarray(compiled(x)) == 1)

call = dict(window_shape=(2, 1), strides=1, implementation="native")
run(lambda x: jax_mps.avg_pool(x, **call), jnp.ones((1, 3_000_000, 2, 1)))
run(take, image)
"""


def test_a_call_without_memory_is_an_error_and_the_next_one_is_right():
    lines = finish(start(TAKE + WITHOUT_MEMORY, NPROC="2", **FRESH)).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(
            "(ValueError|[A-Z][a-z]+RuntimeError) RESOURCE_EXHAUSTED: .*jax_mps: no memory for scratch", line
        )


GIVEN_BACK = """
from memory import resident

compiled = jax.jit(take).lower(image).compile()
image.block_until_ready()
before = resident()
compiled(image).block_until_ready()
print((resident() - before) >> 20)
"""


def test_a_thread_keeps_little_scratch():
    assert int(finish(start(TAKE + GIVEN_BACK, NPROC="1"))) < 16


@pytest.mark.full
@pytest.mark.parametrize("name", endurance.CALLS)
def test_calls_that_run_out_of_memory_are_errors(name):
    code = f"import endurance; endurance.run_out({name!r}, 12, 0)"
    assert int(finish(start(code, **FRESH))) > 0


@pytest.mark.full
def test_memory_is_flat_while_a_network_trains():
    finish(start("import endurance; endurance.train(10_000, 0)"))


@pytest.mark.full
def test_memory_is_flat_over_many_shapes():
    finish(start("import endurance; endurance.trace_many(400, 0)"))


def test_caches_are_bounded():
    unbounded = [name for name, cache in endurance.caches() if cache.cache_parameters()["maxsize"] is None]
    assert not unbounded
