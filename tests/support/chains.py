"""Chains of native calls, each of which wants the result of the one before, by many threads at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mps

THREADS = CHAINS = 8
LINKS = 6
WINDOW: dict[str, Any] = {"window_shape": 3, "strides": 1, "padding": 1, "implementation": "native"}
POOLS: tuple[Callable[..., Any], ...] = (jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool)
# Large enough for several threads to share a call.
SHAPE = (8, 24, 24, 8)
NHWC = ("NHWC", "HWIO", "NHWC")


def link(number: int, x: Any) -> Any:
    """A call of a kernel, or of its gradient; XLA's own operations are exact, or go element by element."""
    kernel = jnp.linspace(-1, 1, 3 * 3 * 8 * 8, dtype=x.dtype).reshape(3, 3, 8, 8) / 8
    if number % 7 == 6:
        y = jax_mps.conv_transpose(x, kernel, strides=1, padding="SAME", implementation="native")
    else:
        pool = functools.partial(POOLS[number % 3], **WINDOW)
        y = pool(x) if number % 2 else jax.vjp(pool, x)[1](x)[0]
    return jnp.tanh(x / 2 + y)


def chain(number: int, x: Any, between: Callable[[Any], Any] = lambda x: x) -> Any:
    """Links of the chain of that number."""
    for i in range(LINKS):
        x = between(link(number + i, x))
    return x


def mapped(number: int, x: Any) -> Any:
    """Under `vmap`."""
    return jax.vmap(functools.partial(chain, number))(x[:, None])


def scanned(number: int, x: Any) -> Any:
    """Nested in `scan`."""
    return jax.lax.scan(lambda x, _: (link(number, x), None), x, length=LINKS)[0]


def called_back(number: int, x: Any) -> Any:
    """Beside calls of Python from the program."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return chain(number, x, lambda x: jax.pure_callback(lambda x: x, shape, x))


FORMS: dict[str, Callable[[int, Any], Any]] = {
    "plain": chain,
    "vmap": mapped,
    "scan": scanned,
    "callback": called_back,
    "sharded": chain,
}


def energy(fun: Callable[[Any], Any], x: Any) -> Any:
    """Something to derive."""
    return (fun(x) ** 2).sum()


def traced(rounds: int, seed: int) -> None:
    """All threads trace and compile at once, while some switch stock operations: as one thread alone."""
    draws = np.random.default_rng(seed).standard_normal((2, 30, 30, 8), np.float32)
    kernel = jnp.asarray(draws[:, :3, :12].reshape(3, 3, 8, 8))
    start = threading.Barrier(THREADS)

    def results(number: int, together: bool = True) -> list[np.ndarray]:
        # Functions are made anew, and every thread has its own shapes: nothing is in a cache.
        x = draws[:, number:]
        functions: list[Callable[[Any], Any]] = [
            *(functools.partial(pool, **WINDOW) for pool in POOLS),
            lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC),
        ]
        if together:
            start.wait()
        with jax_mps.accelerate() if number % 2 else contextlib.nullcontext():
            return [np.asarray(jax.jit(jax.grad(functools.partial(energy, fun)))(x)) for fun in functions]

    alone = [results(number, together=False) for number in range(THREADS)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(rounds):
            for found, expected in zip(pool.map(results, range(THREADS)), alone, strict=True):
                for y, z in zip(found[:-1], expected[:-1], strict=True):
                    np.testing.assert_array_equal(y, z)
                # Stock or ours: which one depends on the other threads.
                np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4, atol=1e-2)


def run(form: str, rounds: int, seed: int) -> None:
    """All threads run all chains again and again, each on one of the devices, and get the same bits."""
    if form == "traced":
        traced(rounds // 10 + 1, seed)
        return
    devices = jax.devices()
    draws = np.random.default_rng(seed).standard_normal((THREADS, *SHAPE), np.float32)
    places: list[Any] = [devices[i % len(devices)] for i in range(THREADS)]
    if form == "sharded":
        places = [NamedSharding(Mesh(np.array(devices), ("batch",)), P("batch"))] * THREADS
    images = [jax.device_put(x, place) for x, place in zip(draws, places, strict=True)]
    chains = jax.jit(lambda x: [FORMS[form](number, x) for number in range(CHAINS)])

    def bits(x: Any) -> list[bytes]:
        return [np.asarray(y).tobytes() for y in chains(x)]

    alone = [bits(x) for x in images]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(rounds):
            assert list(pool.map(bits, images)) == alone
