"""Small networks on this library's layers or on stock JAX's, for the demonstration and the benchmarks.

Ordinary convolutions are stock JAX in both. Parameters are dictionaries of arrays, images channels last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jax_mps

__all__ = ["STOCK", "Layers", "dcgan_init", "dcgan_losses", "denoiser_init", "ours", "unet", "unet_init"]

Params = dict[str, jax.Array]


class Layers(NamedTuple):
    """The layers that differ.

    Attributes:
      pool: the maximum of every 2 x 2 pixels.
      up: the transposed convolution of (image, kernel, padding), stride 2; the kernel is
        `(*window, out, in)`.
    """

    pool: Callable[[jax.Array], jax.Array]
    up: Callable[[jax.Array, jax.Array, int], jax.Array]


def ours(implementation: str | None = None) -> Layers:
    """This library's layers."""
    return Layers(
        pool=lambda x: jax_mps.max_pool(x, 2, strides=2, implementation=implementation),
        up=lambda x, kernel, padding: jax_mps.conv_transpose(
            x, kernel, strides=2, padding=padding, transpose_kernel=True, implementation=implementation
        ),
    )


def _stock_up(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    around = ((kernel.shape[0] - 1 - padding,) * 2,) * 2
    return lax.conv_transpose(x, kernel, (2, 2), around, transpose_kernel=True)


STOCK = Layers(
    pool=lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    up=_stock_up,
)


def _convolution(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _weights(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Normal numbers that keep the variance of what passes through, and zeros for biases."""
    params = {}
    for (name, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        if len(shape) == 1:
            params[name] = jnp.zeros(shape)
            continue
        *window, a, b = shape
        # With stride 2 a pixel of the result is reached by a quarter of the taps.
        terms = math.prod(window) * b / 4 if name.startswith("up") else math.prod(window) * a
        params[name] = jax.random.normal(k, shape) * math.sqrt(2 / terms)
    return params


# --- U-Net --------------------------------------------------------------------------------------------


def unet_init(
    key: jax.Array, channels: int, levels: int, *, depth: int = 2, window: int = 2, colors: int = 3
) -> Params:
    """Weights of a U-Net with `channels` at the top and twice as many on every level below.

    Args:
      key: for the random numbers.
      channels: of the highest level.
      levels: how many there are.
      depth: ordinary convolutions, of 3 x 3 taps, in a row.
      window: taps of the transposed convolutions along an axis, an even number.
      colors: of the images.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def block(name: str, before: int, after: int) -> None:
        for i in range(depth):
            shapes.update(
                {f"{name}_{i}": (3, 3, after if i else before, after), f"{name}_{i}_bias": (after,)}
            )

    widths = [channels * 2**level for level in range(levels)]
    for level, width in enumerate(widths):
        block(f"down{level}", colors if level == 0 else widths[level - 1], width)
    for level in reversed(range(levels - 1)):
        shapes[f"up{level}"] = (window, window, widths[level], widths[level + 1])
        block(f"merge{level}", 2 * widths[level], widths[level])
    # At first the network adds nothing.
    return _weights(key, shapes) | {"last": jnp.zeros((1, 1, channels, colors))}


def denoiser_init(key: jax.Array) -> Params:
    """Weights of the U-Net of the demonstration."""
    return unet_init(key, channels=16, levels=3, depth=1, window=4)


def unet(layers: Layers, params: Params, x: jax.Array) -> jax.Array:
    """The image plus what the network adds to it; sizes have to be multiples of `2 ** (levels - 1)`."""

    def block(name: str, x: jax.Array, i: int = 0) -> jax.Array:
        if f"{name}_{i}" not in params:
            return x
        x = jax.nn.relu(_convolution(x, params[f"{name}_{i}"]) + params[f"{name}_{i}_bias"])
        return block(name, x, i + 1)

    levels = sum(name.startswith("down") and name.endswith("_0") for name in params)
    image, skips = x, []
    for level in range(levels):
        x = block(f"down{level}", x if level == 0 else layers.pool(x))
        skips.append(x)
    for level in reversed(range(levels - 1)):
        kernel = params[f"up{level}"]
        x = layers.up(x, kernel, kernel.shape[0] // 2 - 1)
        x = block(f"merge{level}", jnp.concatenate([skips[level], x], axis=-1))
    return image + _convolution(x, params["last"])


# --- DCGAN --------------------------------------------------------------------------------------------


def dcgan_init(key: jax.Array, channels: int = 64, noise: int = 100) -> tuple[Params, Params]:
    """Weights of a generator of 64 x 64 pixels in three colours, and of its discriminator."""
    widths = [8 * channels, 4 * channels, 2 * channels, channels, 3]
    pairs = list(itertools.pairwise(widths))
    generator = {f"up{i}": (4, 4, after, before) for i, (before, after) in enumerate(pairs)}
    discriminator = {f"down{3 - i}": (4, 4, after, before) for i, (before, after) in enumerate(pairs)}
    one, other = jax.random.split(key)
    return (
        _weights(one, {"project": (noise, 16 * widths[0]), **generator}),
        _weights(other, {**discriminator, "head": (16 * widths[0], 1)}),
    )


def _normalized(x: jax.Array) -> jax.Array:
    """Batch normalisation without learned scale."""
    axes = tuple(range(x.ndim - 1))
    return jax.nn.standardize(x, axis=axes, epsilon=1e-5)


def _generate(layers: Layers, params: Params, noise: jax.Array) -> jax.Array:
    x = (noise @ params["project"]).reshape(len(noise), 4, 4, -1)
    for i in range(4):
        x = layers.up(jax.nn.relu(_normalized(x)), params[f"up{i}"], 1)
    return jnp.tanh(x)


def _judge(params: Params, x: jax.Array) -> jax.Array:
    for i in range(4):
        x = _convolution(x, params[f"down{i}"], 2)
        x = jax.nn.leaky_relu(x if i == 0 else _normalized(x), 0.2)
    return (x.reshape(len(x), -1) @ params["head"])[:, 0]


def dcgan_losses(
    layers: Layers, generator: Params, discriminator: Params, images: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses of generator and discriminator on a batch of real images and a batch of noise."""
    made = _generate(layers, generator, noise)
    fooled = jax.nn.softplus(-_judge(lax.stop_gradient(discriminator), made)).mean()
    told = jax.nn.softplus(-_judge(discriminator, images)) + jax.nn.softplus(
        _judge(discriminator, lax.stop_gradient(made))
    )
    return fooled, told.mean()
