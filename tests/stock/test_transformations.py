"""`accelerate()` under what JAX does with functions: the numbers are those of stock JAX, the code is ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
import processes
import stock_network
from stock_network import OPERATIONS, arrays, block, gradient

pytestmark = pytest.mark.usefixtures("native")


def scanned(kernels: Any, x: Any) -> Any:
    """A network of three equal layers."""
    _, *square = kernels  # six channels to six, then to two

    def layer(x: Any, dense: Any) -> tuple[Any, None]:
        y = block((dense, *square), x)
        return jnp.concatenate([x[..., :1], y[:, : x.shape[1], : x.shape[2]]], axis=-1), None

    return jnp.sum(jnp.sin(jax.lax.scan(layer, x, jnp.stack([kernels[0]] * 3))[0]))


def recomputed(kernels: Any, x: Any) -> Any:
    return jnp.sum(jnp.sin(jax.checkpoint(block)(kernels, x)))


def per_example(kernels: Any, x: Any) -> Any:
    """Gradients of each image: those of the kernels have a batch axis, and convolutions become grouped."""
    return jax.vmap(lambda image: gradient(kernels, image[None]))(x)


def ensemble(kernels: Any, x: Any) -> Any:
    """One image, several networks."""
    networks = jax.tree.map(lambda k: jnp.stack([k, k * 2, -k]), kernels)
    return jax.vmap(gradient, in_axes=(0, None))(networks, x)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gradient": gradient,
    "remat": jax.grad(recomputed, argnums=(0, 1)),
    "scan": jax.grad(scanned, argnums=(0, 1)),
    "per example": per_example,
    "ensemble": ensemble,
    "hvp": lambda kernels, x: jax.jvp(lambda k: gradient(k, x)[0], (kernels,), (kernels,))[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_jit(name: str) -> None:
    report = stock_network.check(jax.jit(FUNCTIONS[name]), *arrays())
    assert {row.operation for row in report} >= OPERATIONS
    assert all(row.ours for row in report), report


@pytest.mark.parametrize("name", ["gradient", "per example"])
def test_without_jit(name: str) -> None:
    f = FUNCTIONS[name]
    report = stock_network.check(f, *arrays())
    assert {row.operation for row in report} >= OPERATIONS
    assert all(row.ours for row in report), report
    with jax.disable_jit():
        report = stock_network.check(f, *arrays())
    assert all(row.ours for row in report), report


RESULTS = """
import jax, numpy as np, jax_mps, stock_network
with jax_mps.accelerate() as handle:
    found = jax.jit(stock_network.gradient)(*stock_network.arrays(batch=4))
assert len(handle.report()) > 5
assert all(row.ours for row in handle.report())
print([np.asarray(x).tobytes().hex() for x in jax.tree.leaves(found)])
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    running = [processes.start(RESULTS, NPROC=threads) for threads in ("1", "2", "5")]
    first, *others = processes.finish_all(running)
    assert len(first) > 1000
    assert others == [first, first]


TWO_COPIES = """
import sys, jax, jax.numpy as jnp, stock_network
import jax_mps as one
for name in list(sys.modules):
    if name.partition(".")[0] == "jax_mps":
        del sys.modules[name]
import jax_mps as two
assert one is not two

operands = stock_network.arrays()
def network(*operands):
    integers = jax.lax.reduce_window(jnp.arange(9), 0, jax.lax.add, (2,), (1,), "VALID")
    return stock_network.gradient(*operands), integers
expected = jax.jit(network)(*operands)

def ours(*handles):
    # Which of them have replaced operations of a program; what stays stock goes through both copies, once.
    before = [len(handle.report()) for handle in handles]
    function = jax.jit(lambda *operands: network(*operands))  # a function of its own is compiled anew
    stock_network.assert_close(function(*operands), expected)
    rows = [handle.report().rows[n:] for handle, n in zip(handles, before)]
    assert all(sum(not row.ours for row in some) <= 1 for some in rows), rows
    return [any(row.ours for row in some) for some in rows]

for outer, inner in ((one, two), (two, one)):
    for first_in_first_out in (False, True):
        handles = outer.accelerate(), inner.accelerate()
        assert ours(*handles) == [False, True]  # the later copy is asked first
        first, second = range(2) if first_in_first_out else (1, 0)
        handles[first].restore()
        assert ours(*handles) == [not first_in_first_out, first_in_first_out]
        again = (outer, inner)[first].accelerate()
        assert ours(*handles, again) == [False, False, True]
        again.restore()
        handles[second].restore()
        assert ours(*handles, again) == [False, False, False]
print("both")
"""


@pytest.mark.full
def test_two_copies_in_one_process() -> None:
    assert processes.finish(processes.start(TWO_COPIES)).strip() == "both"


AFTER = """
import jax, stock_network
report = stock_network.check(jax.jit(stock_network.gradient), *stock_network.arrays())
assert len(report) > 5
assert all(row.ours for row in report)
print("ours")
"""


def test_after_programs_have_run() -> None:
    """Devices are started and the network compiled before the first `accelerate()` of a process."""
    assert processes.finish(processes.start(AFTER)).strip() == "ours"


def test_the_switch_turns_between_two_calls_of_one_function() -> None:
    """Nothing of the one side is left in a cache of the other: gradients are traced once."""
    function = jax.jit(functools.partial(gradient))
    texts = []
    for _ in range(2):
        texts.append(function.lower(*arrays()).as_text())
        with jax_mps.accelerate():
            texts.append(function.lower(*arrays()).as_text())
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
    assert "jax_mps." in texts[1]
    assert "jax_mps." not in texts[0]


def test_numbers_of_one_image_are_those_of_the_batch() -> None:
    """What `vmap` makes of the network equals a loop."""
    kernels, images = arrays()
    with jax_mps.accelerate():
        together = jax.jit(per_example)(kernels, images)
        alone = [jax.jit(gradient)(kernels, image[None]) for image in images]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    stock_network.assert_close(together, stacked)
