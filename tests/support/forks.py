"""Processes that a program with the native library starts, as the workers of a loader of data are."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

import jax_mps

WORKERS = 2
SEEDS = range(6)


def image(seed: int) -> np.ndarray:
    """What a worker loads, with NumPy alone."""
    return np.random.default_rng(seed).standard_normal((4, 40, 40, 8)).astype(np.float32)


@jax.jit
def step(x: jax.Array) -> jax.Array:
    """Native kernels, forward and backward."""

    def pool(x: jax.Array) -> jax.Array:
        y = jax_mps.max_pool(x, 3, strides=2, implementation="native")
        return jax_mps.l2_pool(y, 2, strides=1, implementation="native")

    y, pull_back = jax.vjp(pool, x)
    return pull_back(y)[0]


def result(seed: int) -> bytes:
    """The bits of what they compute."""
    return np.asarray(step(image(seed))).tobytes()


@contextmanager
def pool(method: str) -> Iterator[concurrent.futures.Executor]:
    """Workers that are started by `fork` or `spawn`."""
    with warnings.catch_warnings():
        # JAX warns of every fork.
        warnings.simplefilter("ignore")
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(WORKERS, context) as executor:
            yield executor


def forked_before_use() -> None:
    """Workers use the kernels, forked from a process that has loaded them, and has not used them yet."""
    with pool("fork") as workers:
        found = list(workers.map(result, SEEDS))
    assert found == list(map(result, SEEDS))


def forked_after_use() -> None:
    """Workers load images, forked while threads of the process use the kernels."""
    expected, stop = result(0), threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert result(0) == expected

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work) for _ in range(2)]
        try:
            for _ in range(3):
                with pool("fork") as workers:
                    for found, seed in zip(workers.map(image, SEEDS), SEEDS, strict=True):
                        np.testing.assert_array_equal(found, image(seed))
        finally:
            stop.set()
        for each in working:
            each.result()


def spawned() -> None:
    """Workers use the kernels beside the process that spawned them."""
    expected = list(map(result, SEEDS))
    with pool("spawn") as workers:
        assert list(workers.map(result, SEEDS)) == expected


class Images:
    """A data set for PyTorch."""

    def __len__(self) -> int:
        return len(SEEDS)

    def __getitem__(self, number: int) -> np.ndarray:
        return image(SEEDS[number])


def loaded() -> None:
    """PyTorch's `DataLoader` brings images from its workers, while they are pooled."""
    from torch.utils.data import DataLoader

    expected = list(map(result, SEEDS))
    for method in ("fork", "spawn"):
        images: Any = DataLoader(Images(), None, num_workers=WORKERS, multiprocessing_context=method)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [np.asarray(step(x.numpy())).tobytes() for x in images] == expected


WAYS = {f.__name__: f for f in (forked_before_use, forked_after_use, spawned, loaded)}
