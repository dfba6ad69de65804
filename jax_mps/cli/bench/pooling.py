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
from jax_mps.cli.bench import torch_peer
from jax_mps.cli.bench.runner import Case, Contender, compiled
from jax_mps.cli.bench.shapes import POOLING, PoolingShape

__all__ = ["Pooling"]

_OURS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "max": (jax_mps.max_pool, jax_mps.max_pool_gradient),
    "avg": (jax_mps.avg_pool, jax_mps.avg_pool_gradient),
    "l2": (jax_mps.l2_pool, jax_mps.l2_pool_gradient),
}

_BY_NAME = {shape.name: shape for shape in POOLING}


class Pooling:
    """Max, average and L2 pooling.

    | operation | what is timed |
    |---|---|
    | forward | the pooling |
    | gradient | the pull-back alone, with the residuals that the forward pass left |
    | gradient_kernel | the gradient from (source gradient, source), nothing else given |
    | step | value and gradient of half the sum of the result's squares |
    """

    ops = ("forward", "gradient", "gradient_kernel", "step")
    shapes = tuple(_BY_NAME)

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names."""
        pooling = _BY_NAME[shape]
        if batch:
            pooling = dataclasses.replace(pooling, batch=batch)
        makers: dict[str, Callable[[], Contender]] = {}
        for name in contenders:
            make = _torch if name.startswith("torch") else _jax
            makers[name] = functools.partial(make, name, pooling, op, dtype, layout)
        return Case(
            shape=shape,
            description=str(pooling),
            op=op,
            dtype=dtype,
            layout=layout,
            bytes_moved=_bytes_moved(pooling, op, jnp.dtype(dtype).itemsize),
            tolerances=_tolerances(pooling, op, dtype),
            contenders=makers,
        )


def _bytes_moved(shape: PoolingShape, op: str, itemsize: int) -> int:
    source, result = shape.source_size * itemsize, shape.result_size * itemsize
    if op == "forward":
        return source + result
    if op == "step":
        return 2 * source  # the pooled values need never leave the processor
    if shape.kind == "avg":
        return result + source
    if shape.kind == "max" and op == "gradient":
        return result + shape.result_size + source  # a byte says which tap won
    return result + 2 * source


def _tolerances(shape: PoolingShape, op: str, dtype: str) -> tuple[float, ...]:
    # Stock JAX adds half precision numbers in half precision: the error grows like the square root of
    # the number of terms, for independent roundings.
    array = 4 * float(jnp.finfo(dtype).eps) * math.sqrt(shape.taps)
    loss = array + float(jnp.finfo(jnp.float32).eps) * math.sqrt(shape.result_size)
    return (loss, array) if op == "step" else (array,)


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
    function, operands = _jax_call(op, pool, kernel, source, gradient)

    def fetch(outputs: Any) -> list[np.ndarray]:
        arrays = [np.asarray(a, np.float64) for a in jax.tree.leaves(outputs)]
        return [np.moveaxis(a, 1, -1) if channels_first and a.ndim else a for a in arrays]

    return compiled(function, operands, fetch)


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


def _jax_call(
    op: str, pool: Callable[..., Any], kernel: Callable[..., Any], source: jax.Array, gradient: jax.Array
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if op == "forward":
        return pool, (source,)
    if op == "gradient":
        _, pull_back = jax.jit(lambda x: jax.vjp(pool, x))(source)
        return lambda pull_back, g: pull_back(g), (pull_back, gradient)
    if op == "gradient_kernel":
        return kernel, (gradient, source)

    def loss(x: jax.Array) -> jax.Array:
        y = pool(x)
        return jnp.sum(jnp.square(y.astype(jnp.promote_types(y.dtype, jnp.float32)))) / 2

    return jax.value_and_grad(loss), (source,)


# --- PyTorch ------------------------------------------------------------------------------------------


def _torch(name: str, shape: PoolingShape, op: str, dtype: str, layout: str) -> Contender:
    del layout  # PyTorch is asked in both of its own
    peer = torch_peer.Peer.find(name, shape.ndim, dtype)
    source, gradient = map(peer.tensor, _data(shape))
    source.requires_grad_(op != "forward")
    return peer.contender(_torch_call(peer.torch, op, _torch_pool(peer.torch, shape), source, gradient))


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


def _torch_call(
    torch: Any, op: str, pool: Callable[[Any], Any], source: Any, gradient: Any
) -> Callable[[], tuple[Any, ...]]:
    grad = torch.autograd.grad
    if op == "forward":
        return lambda: (pool(source),)
    if op == "gradient":
        result = pool(source)
        return lambda: grad(result, source, gradient, retain_graph=True)
    if op == "gradient_kernel":
        return lambda: grad(pool(source), source, gradient)

    def step() -> tuple[Any, ...]:
        result = pool(source)
        loss = result.to(torch.promote_types(result.dtype, torch.float32)).square().sum() / 2
        return loss, *grad(loss, source)

    return step
