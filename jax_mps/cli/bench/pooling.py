"""The pooling family of the benchmarks: how this library, stock JAX and PyTorch compute each case."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_mps
from jax_mps.cli.bench import torch_peer, training
from jax_mps.cli.bench.runner import Case, Contender, compiled
from jax_mps.cli.bench.shapes import POOLING, PoolingShape

__all__ = ["Pooling", "pooling_case"]

_OURS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "max": (jax_mps.max_pool, jax_mps.max_pool_gradient),
    "avg": (jax_mps.avg_pool, jax_mps.avg_pool_gradient),
    "l2": (jax_mps.l2_pool, jax_mps.l2_pool_gradient),
}

_BY_NAME = {shape.name: shape for shape in POOLING}


class Pooling:
    """Max, average and L2 pooling.

    The operations are those of `training`, and `gradient_kernel`: the gradient from (source gradient,
    source), nothing else given.
    """

    ops = (*training.OPS, "gradient_kernel")
    shapes = tuple(_BY_NAME)

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names."""
        pooling = _BY_NAME[shape]
        if batch:
            pooling = dataclasses.replace(pooling, batch=batch)
        return pooling_case(pooling, op, dtype, layout, contenders)


def pooling_case(shape: PoolingShape, op: str, dtype: str, layout: str, contenders: Sequence[str]) -> Case:
    """An operation of the pooling of that shape."""
    makers: dict[str, Callable[[], Contender]] = {}
    for name in contenders:
        make = _torch if name.startswith("torch") else _jax
        makers[name] = functools.partial(make, name, shape, op, dtype, layout)
    # Stock JAX adds half precision numbers in half precision: the error grows like the square root of
    # the number of terms, for independent roundings.
    tolerance = 4 * float(jnp.finfo(dtype).eps) * math.sqrt(shape.taps)
    return Case(
        shape=shape.name,
        description=str(shape),
        op=op,
        dtype=dtype,
        layout=layout,
        bytes_moved=_bytes_moved(shape, op, jnp.dtype(dtype).itemsize),
        tolerances=(tolerance,) * (2 if op == "step" else 1),
        contenders=makers,
    )


def _bytes_moved(shape: PoolingShape, op: str, itemsize: int) -> int:
    source, result = shape.source_size * itemsize, shape.result_size * itemsize
    tap_indices = shape.result_size * (shape.kind == "max")  # a byte says which tap won
    if op == "forward":
        return source + result
    if op == "keep":
        return source + result + tap_indices
    if op == "step":
        return 2 * (source + result)
    if shape.kind == "avg":
        return result + source
    if shape.kind == "max" and op == "pull_back":
        return result + tap_indices + source
    return result + 2 * source


@functools.lru_cache(maxsize=1)
def _data(shape: PoolingShape) -> tuple[np.ndarray, np.ndarray]:
    """A source and the gradient of a result, channels last, in numbers that every type holds exactly.

    No window of the source has a tie: each plane repeats a shuffled block of distinct values that is
    larger than any window.
    """
    rng = np.random.default_rng(0)
    period = int(256 ** (1 / shape.ndim))
    assert period >= shape.extent
    planes = shape.batch * shape.channels
    values = np.broadcast_to(np.arange(period**shape.ndim), (planes, period**shape.ndim))
    block = rng.permuted(values, axis=1).reshape(shape.batch, shape.channels, *[period] * shape.ndim)
    block = np.moveaxis(block, 1, -1)
    tiled = np.tile(block, (1, *(-(-n // period) for n in shape.spatial), 1))
    source = tiled[:, *(slice(n) for n in shape.spatial), :]
    gradient = rng.integers(-128, 128, shape.result_shape)
    # Halves, lest there be a zero.
    return _scaled(source - 128), _scaled(gradient)


def _scaled(integers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((integers + 0.5) / 64, np.float32)


# --- JAX ----------------------------------------------------------------------------------------------


def _jax(name: str, shape: PoolingShape, op: str, dtype: str, layout: str) -> Contender:
    channels_first = layout == "channels_first"
    source, gradient = (
        jax.device_put(np.moveaxis(a, -1, 1) if channels_first else a).astype(dtype) for a in _data(shape)
    )
    make = _stock if name == "lax" else functools.partial(_ours, implementation=name)
    pool, kernel = make(shape, layout)

    def fetch(outputs: Any) -> list[np.ndarray]:
        compared = outputs[0] if op == "keep" else outputs  # what is kept differs
        arrays = [np.asarray(a, np.float64) for a in jax.tree.leaves(compared)]
        return [np.moveaxis(a, 1, -1) if channels_first else a for a in arrays]

    if op == "gradient_kernel":
        return compiled(kernel, (gradient, source), fetch)
    return compiled(*training.jax_call(op, pool, (source,), gradient), fetch)


def _ours(
    shape: PoolingShape, layout: str, implementation: str
) -> tuple[Callable[[jax.Array], Any], Callable[[jax.Array, jax.Array], Any]]:
    forward, backward = _OURS[shape.kind]
    window = (shape.window,) * shape.ndim
    options: dict[str, Any] = {
        "strides": shape.stride,
        "padding": shape.padding,
        "window_dilation": shape.dilation,
        "data_format": layout,
        "implementation": implementation,
    }
    return (
        lambda x: forward(x, window, **options),
        lambda g, x: backward(g, x.shape if shape.kind == "avg" else x, window, **options),
    )


def _stock(
    shape: PoolingShape, layout: str
) -> tuple[Callable[[jax.Array], Any], Callable[[jax.Array, jax.Array], Any]]:
    def full(each: Any, other: Any) -> tuple[Any, ...]:
        spatial = (each,) * shape.ndim
        return (other, other, *spatial) if layout == "channels_first" else (other, *spatial, other)

    def reduce(x: jax.Array, start: float, computation: Callable[..., Any]) -> Any:
        return lax.reduce_window(
            x,
            np.asarray(start, x.dtype),  # JAX knows a maximum or a sum only by a concrete start
            computation,
            full(shape.window, 1),
            full(shape.stride, 1),
            full((shape.padding, shape.padding), (0, 0)),
            window_dilation=full(shape.dilation, 1),
        )

    def pool(x: jax.Array) -> Any:
        if shape.kind == "max":
            return reduce(x, -jnp.inf, lax.max)
        if shape.kind == "avg":
            return reduce(x, 0, lax.add) / shape.taps
        return lax.sqrt(reduce(lax.square(x), 0, lax.add))

    return pool, lambda g, x: jax.vjp(pool, x)[1](g)


# --- PyTorch ------------------------------------------------------------------------------------------


def _torch(name: str, shape: PoolingShape, op: str, dtype: str, layout: str) -> Contender:
    del layout  # PyTorch is asked in both of its own
    peer = torch_peer.Peer.find(name, shape.ndim, dtype)
    source, gradient = map(peer.tensor, _data(shape))
    # PyTorch has no gradient from the source alone, so it takes a whole step for that.
    called = "step" if op == "gradient_kernel" else op
    call = training.torch_call(peer.torch, called, _torch_pool(peer.torch, shape), (source,), gradient)
    return peer.contender((lambda: call()[1:]) if op == "gradient_kernel" else call)


def _torch_pool(torch: Any, shape: PoolingShape) -> Callable[[Any], Any]:
    functional = torch.nn.functional
    function = getattr(functional, f"{'lp' if shape.kind == 'l2' else shape.kind}_pool{shape.ndim}d")
    options: dict[str, Any] = {"kernel_size": shape.window, "stride": shape.stride}
    if shape.kind == "max":
        options["dilation"] = shape.dilation
    elif shape.dilation > 1:
        raise NotImplementedError(f"PyTorch's {shape.kind} pooling has no dilation")
    if shape.kind == "l2":
        options["norm_type"] = 2
    # lp_pool takes no padding, the others at most half a window; whoever needs more pads first.
    if shape.kind != "l2" and shape.padding <= shape.window // 2:
        return functools.partial(function, padding=shape.padding, **options)
    pads = (shape.padding,) * (2 * shape.ndim)
    value = -math.inf if shape.kind == "max" else 0.0
    return lambda x: function(functional.pad(x, pads, value=value), **options)
