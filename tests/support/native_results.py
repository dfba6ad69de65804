"""What every native kernel computes, for processes that do it in different circumstances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convs
import jax_mps
from jax_mps.lowering import library

# (image, keywords): odd sizes and channels around the widths of vectors, and images large enough to be
# shared among threads, where windows cross the borders between the shares.
GEOMETRIES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 64, 65, 33), {"window_shape": (3, 3), "strides": 1, "padding": 1}),
    ((2, 97, 63, 16), {"window_shape": (3, 2), "strides": 2, "padding": ((1, 1), (0, 1))}),
    ((3, 70, 71, 5), {"window_shape": (2, 2), "strides": 2}),
    ((1, 60, 59, 7), {"window_shape": (3, 3), "strides": 1, "padding": 6, "window_dilation": 6}),
    ((2, 33, 47, 49), {"window_shape": (3, 3), "strides": 2, "data_format": "channels_first"}),
    ((1, 50, 51, 3), {"window_shape": (40, 33), "strides": (1, 3), "padding": ((0, 0), (5, 5))}),
    ((2, 4099, 9), {"window_shape": (4,), "strides": 2, "padding": 1}),
    ((1, 31, 1, 1), {"window_shape": (5, 1), "strides": 3}),
    ((1, 90, 61, 18), {"window_shape": 9, "strides": 1, "padding": 4}),
    ((2, 6, 72, 71), {"window_shape": 4, "strides": (4, 5), "data_format": "channels_first"}),
    ((2, 18, 19, 20, 24), {"window_shape": (2, 3, 2), "strides": (2, 4, 3)}),
    ((1, 17, 16, 15, 6), {"window_shape": (2, 3, 2), "strides": (2, 1, 2), "padding": ((0, 0), (1, 1), (1, 0))}),  # noqa: E501
)  # fmt: skip


# Transposed convolutions that take different ways through the kernels: many channels, few channels on either
# side, depthwise, groups, windows that do not overlap, each large enough to be shared among threads.
CONVOLUTIONS = (
    (convs.Conv((33, 31), (4, 4), 2, 1, 0, 1, 40, 24), "channels_last"),
    (convs.Conv((21, 19), (3, 3), 2, 1, 1, 1, 35, 18, 1, True), "channels_first"),
    (convs.Conv((40, 41), (3, 4), 2, 1, 1, 1, 37, 37, 37), "channels_last"),
    (convs.Conv((40, 41), (3, 3), (1, 2), 1, 0, 2, 9, 9, 9), "channels_first"),
    (convs.Conv((33, 30), (2, 2), 2, 0, 0, 1, 24, 19), "channels_last"),
    (convs.Conv((61, 58), (4, 4), 2, 1, 0, 1, 16, 3), "channels_last"),
    (convs.Conv((45, 44), (3, 3), 1, 1, 0, 1, 1, 17, 1, True), "channels_first"),
    (convs.Conv((431,), (16,), 8, 4, 0, 1, 48, 32, 4), "channels_last"),
    (convs.Conv((9, 10, 11), (3, 3, 3), 2, 1, 1, 1, 16, 1), "channels_last"),
)


def results() -> dict[str, np.ndarray]:
    """The results of every native kernel on every geometry, and of every type on some."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # it is not XLA's code that is examined
    found = {}

    def store(name: str, f: Callable[..., Any], x: Any) -> None:
        for i, leaf in enumerate(jax.tree.leaves(jax.jit(f)(x))):
            found[f"{name} {i}"] = np.asarray(leaf)

    def derivatives(f: Callable[..., Any]) -> Callable[..., Any]:
        """Forward, reverse, and the reverse of that, which runs the kernels of the forward derivative."""

        def function(x: Any) -> Any:
            y, pull_back = jax.vjp(f, x)
            dx, push = jax.vjp(lambda g: pull_back(g)[0], y)
            return y, dx, push(dx)

        return function

    types = ("float64", "float16", "bfloat16")
    integers = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")
    for number, (shape, keywords) in enumerate(GEOMETRIES):
        native = {"implementation": "native"} | keywords
        data_format = keywords.get("data_format", "channels_last")
        sizes = shape[1:-1] if data_format == "channels_last" else shape[2:]

        def unpool(x: Any, native: Any = native, sizes: Any = sizes, data_format: Any = data_format) -> Any:
            y, at = jax_mps.max_pool(x, return_indices=True, **native)
            return jax_mps.max_unpool(y, at, sizes, data_format=data_format, implementation="native")

        functions: dict[str, Callable[..., Any]] = {
            "max": functools.partial(jax_mps.max_pool, **native),
            "unpool": unpool,
            "avg": functools.partial(jax_mps.avg_pool, **native),
            "avg excluding": functools.partial(jax_mps.avg_pool, count_include_pad=False, **native),
            "l2": functools.partial(jax_mps.l2_pool, **native),
        }
        rng = np.random.default_rng(number)
        normal = rng.standard_normal(shape)
        normal[rng.random(shape) < 0.3] = 0  # ties, and norms of 0
        for dtype in ("float32", types[number % 3]):
            for name, f in functions.items():
                store(f"{name} {number} {dtype}", derivatives(f), normal.astype(jnp.dtype(dtype)))
        dtype = integers[number % 7]
        x = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
        store(f"max {number} {dtype}", functions["max"], x)
        store(f"max index {number} {dtype}", functools.partial(functions["max"], return_indices=True), x)
    for number, (case, data_format) in enumerate(CONVOLUTIONS):
        run = convs.run_all({**case.call, "data_format": data_format, "implementation": "native"})
        for dtype in ("float32", types[number % 3]):
            # Of one sign, so that sums do not cancel and all their digits mean something.
            arrays = case.arrays(data_format, dtype=dtype)
            store(f"conv {number} {dtype}", run, convs.Arrays(*map(np.abs, arrays)))
    return found


def save(path: str) -> None:
    """Writes the results into a file, and prints on what they were computed."""
    arrays = results()
    # NumPy's files know no bfloat16.
    known = {k: v if v.dtype.kind in "fiub" else v.view(np.uint16) for k, v in arrays.items()}
    np.savez(path, **known)  # type: ignore[arg-type]  # a name could be that of an option
    print(library.status().instruction_set, library.status().threads)
