"""The transposed convolutions of the benchmarks: how each library computes each case."""

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
from jax_mps.cli.bench.shapes import TRANSPOSED, TransposedShape

__all__ = ["ConvTranspose"]

_BY_NAME = {shape.name: shape for shape in TRANSPOSED}
_PRODUCTS = ("forward", "gradient_data", "gradient_weights")


class ConvTranspose:
    """Transposed convolution.

    | operation | what is timed |
    |---|---|
    | forward | the transposed convolution |
    | gradient_data | the gradient to the source, from the result's gradient and the kernel |
    | gradient_weights | the gradient to the kernel, from the result's gradient and the source |
    | step | all three in one program |

    What the gradients need are the operands, so nothing is kept, and `keep` would be `forward`. The limit
    that rates are compared with is `jnp.dot` of matrices of the same M, N and K.
    """

    ops = (*_PRODUCTS, "step")
    shapes = tuple(_BY_NAME)

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names."""
        conv = _BY_NAME[shape]
        if batch:
            conv = dataclasses.replace(conv, batch=batch)
        makers: dict[str, Callable[[], Contender]] = {}
        for name in contenders:
            make = _torch if name.startswith("torch") else _jax
            makers[name] = functools.partial(make, name, conv, op, dtype, layout)
        sizes = {
            "source": math.prod(conv.source_shape),
            "kernel": math.prod(conv.kernel_shape),
            "result": math.prod(conv.result_shape),
        }
        products = _products(op)
        return Case(
            shape=shape,
            description=str(conv),
            op=op,
            dtype=dtype,
            layout=layout,
            bytes_moved=sum(sizes.values()) * jnp.dtype(dtype).itemsize * (2 if op == "step" else 1),
            tolerances=tuple(_tolerance(conv, product, dtype) for product in products),
            contenders=makers,
            flops=2 * conv.products * len(products),
            yardstick=functools.partial(_dots, conv, products, dtype) if conv.groups == 1 else None,
        )


def _products(op: str) -> Sequence[str]:
    """What an operation computes, in the order of its outputs."""
    return _PRODUCTS if op == "step" else (op,)


def _tolerance(shape: TransposedShape, op: str, dtype: str) -> float:
    terms = {
        "forward": shape.taps * shape.inputs,
        "gradient_data": shape.taps * shape.outputs,
        "gradient_weights": math.prod(shape.source_shape[:-1]),
    }[op]
    # Some sum half precision in half precision.
    return 4 * float(jnp.finfo(dtype).eps) * math.sqrt(terms)


@functools.lru_cache(maxsize=1)
def _data(shape: TransposedShape) -> dict[str, np.ndarray]:
    """Source, kernel and a gradient of the result, in numbers that TF32 holds exactly, too."""
    rng = np.random.default_rng(0)
    shapes = {"source": shape.source_shape, "kernel": shape.kernel_shape, "gradient": shape.result_shape}
    return {
        name: np.asarray((rng.integers(-128, 128, size) + 0.5) / 64, np.float32)
        for name, size in shapes.items()
    }


# --- JAX ----------------------------------------------------------------------------------------------


def _jax(name: str, shape: TransposedShape, op: str, dtype: str, layout: str) -> Contender:
    channels_first = layout == "channels_first"
    data = {
        name: jax.device_put(np.moveaxis(a, -1, 1) if channels_first and name != "kernel" else a).astype(
            dtype
        )
        for name, a in _data(shape).items()
    }
    make = _stock if name == "lax" else functools.partial(_ours, implementation=name)
    calls = make(shape, layout)

    def fetch(outputs: Any) -> list[np.ndarray]:
        arrays = [np.asarray(a, np.float64) for a in jax.tree.leaves(outputs)]
        return [
            np.moveaxis(a, 1, -1) if channels_first and product != "gradient_weights" else a
            for product, a in zip(_products(op), arrays, strict=True)
        ]

    if op == "step":
        function, names = calls["forward"]
        operands = [data[name] for name in names]
        return compiled(*training.jax_call(op, function, operands, data["gradient"]), fetch)
    function, names = calls[op]
    return compiled(function, [data[name] for name in names], fetch)


_Calls = dict[str, tuple[Callable[..., Any], tuple[str, str]]]


def _ours(shape: TransposedShape, layout: str, implementation: str) -> _Calls:
    options: dict[str, Any] = {
        "strides": shape.stride,
        "padding": shape.padding,
        "output_padding": shape.output_padding,
        "groups": shape.groups,
        "transpose_kernel": True,
        "data_format": layout,
        "implementation": implementation,
    }
    source_shape = shape.source_shape
    if layout == "channels_first":
        source_shape = (source_shape[0], source_shape[-1], *source_shape[1:-1])
    return {
        "forward": (lambda x, k: jax_mps.conv_transpose(x, k, **options), ("source", "kernel")),
        "gradient_data": (
            lambda g, k: jax_mps.conv_transpose_gradient_data(g, k, source_shape, **options),
            ("gradient", "kernel"),
        ),
        "gradient_weights": (
            lambda g, x: jax_mps.conv_transpose_gradient_weights(g, x, shape.kernel_shape, **options),
            ("gradient", "source"),
        ),
    }


def _stock(shape: TransposedShape, layout: str) -> _Calls:
    """`lax.conv_transpose`; with groups what it would lower to, since it has no groups."""
    spatial = "DHW"[3 - shape.ndim :]
    image = f"N{spatial}C" if layout == "channels_last" else f"NC{spatial}"
    low = shape.window - 1 - shape.padding
    pads = ((low, low + shape.output_padding),) * shape.ndim
    strides = (shape.stride,) * shape.ndim

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if shape.groups == 1:
            numbers = (image, f"{spatial}IO", image)
            return lax.conv_transpose(
                x, kernel, strides, pads, dimension_numbers=numbers, transpose_kernel=True
            )
        window = kernel.shape[: shape.ndim]
        kernel = lax.rev(kernel, range(shape.ndim)).reshape(
            *window, shape.outputs // shape.groups, shape.groups, shape.inputs // shape.groups
        )
        kernel = jnp.moveaxis(kernel, -1, -3).swapaxes(-1, -2)
        return lax.conv_general_dilated(
            x,
            kernel.reshape(*window, shape.inputs // shape.groups, shape.outputs),
            (1,) * shape.ndim,
            pads,
            lhs_dilation=strides,
            dimension_numbers=(image, f"{spatial}IO", image),
            feature_group_count=shape.groups,
        )

    def pull_back(g: jax.Array, other: jax.Array, position: int) -> Any:
        wanted = shape.kernel_shape if position else shape.source_shape
        if not position and layout == "channels_first":
            wanted = (wanted[0], wanted[-1], *wanted[1:-1])
        like = jax.ShapeDtypeStruct(wanted, g.dtype)
        along = (lambda k: forward(other, k)) if position else (lambda x: forward(x, other))
        return jax.linear_transpose(along, like)(g)[0]

    return {
        "forward": (forward, ("source", "kernel")),
        "gradient_data": (functools.partial(pull_back, position=0), ("gradient", "kernel")),
        "gradient_weights": (functools.partial(pull_back, position=1), ("gradient", "source")),
    }


def _dots(shape: TransposedShape, products: Sequence[str], dtype: str) -> Contender:
    """One matrix product of the same size for each."""
    pixels, columns = math.prod(shape.source_shape[:-1]), shape.taps * shape.outputs
    sizes = {
        "forward": (pixels, columns, shape.inputs),
        "gradient_data": (pixels, shape.inputs, columns),
        "gradient_weights": (columns, shape.inputs, pixels),
    }
    rng = np.random.default_rng(0)
    pairs = [
        [jnp.asarray(rng.standard_normal(s), dtype) for s in ((m, k), (k, n))]
        for m, n, k in (sizes[product] for product in products)
    ]
    return compiled(lambda pairs: [jnp.dot(a, b) for a, b in pairs], (pairs,), lambda _: [])


# --- PyTorch ------------------------------------------------------------------------------------------


def _torch(name: str, shape: TransposedShape, op: str, dtype: str, layout: str) -> Contender:
    del layout  # PyTorch is asked in both of its own
    peer = torch_peer.Peer.find(name, shape.ndim, dtype)
    data = _data(shape)
    source, gradient = peer.tensor(data["source"]), peer.tensor(data["gradient"])
    # From (*window, out / groups, in) to PyTorch's (in, out / groups, *window).
    kernel = np.moveaxis(data["kernel"], -1, 0)
    kernel = peer.tensor(kernel, axis=1)
    function = getattr(peer.torch.nn.functional, f"conv_transpose{shape.ndim}d")

    def forward(source: Any, kernel: Any) -> Any:
        return function(
            source,
            kernel,
            stride=shape.stride,
            padding=shape.padding,
            output_padding=shape.output_padding,
            groups=shape.groups,
        )

    if op in training.OPS:
        call = training.torch_call(peer.torch, op, forward, (source, kernel), gradient)
    else:
        wanted = source if op == "gradient_data" else kernel
        wanted.requires_grad_(True)
        call = functools.partial(
            peer.torch.autograd.grad, forward(source, kernel), wanted, gradient, retain_graph=True
        )
    contender = peer.contender(call)

    def fetch(outputs: Any) -> list[np.ndarray]:
        return [
            np.moveaxis(a, 0, -1) if product == "gradient_weights" else a
            for product, a in zip(_products(op), contender.fetch(outputs), strict=True)
        ]

    return dataclasses.replace(contender, fetch=fetch)
