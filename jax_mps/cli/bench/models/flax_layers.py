"""The layers on Flax Linen: its own modules with its own arguments, nothing of this library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jax_mps.cli.bench.models.layers import Layers

__all__ = ["Network", "variables"]


class Network(nn.Module):
    """A network as a Flax module, channels last.

    Attributes:
      function: of the layers and the inputs.
      train: whether normalisation uses the batch, or the running means.
    """

    function: Callable[..., Any]
    train: bool

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """What the function makes of the inputs."""
        layers: Layers = _FlaxLayers(self.train)
        return self.function(layers, *inputs)


class _FlaxLayers:
    """The layers of `Layers`, inside a compact Flax module."""

    relu = staticmethod(nn.relu)
    relu6 = staticmethod(nn.relu6)
    leaky_relu = staticmethod(nn.leaky_relu)
    silu = staticmethod(nn.silu)
    sigmoid = staticmethod(nn.sigmoid)
    tanh = staticmethod(nn.tanh)

    def __init__(self, train: bool) -> None:
        self._train = train

    def conv(
        self, x: jax.Array, features: int, window: int, stride: int = 1,
        padding: int | Literal["same", "causal"] = "same", *,
        dilation: int = 1, groups: int = 1, bias: bool = True,
    ) -> jax.Array:  # fmt: skip
        rank = x.ndim - 2
        around = (window - 1) * dilation // 2 if padding == "same" else padding
        return nn.Conv(
            features,
            (window,) * rank,
            strides=stride,
            padding="CAUSAL" if around == "causal" else [(around, around)] * rank,
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=bias,
        )(x)

    def conv_transpose(
        self, x: jax.Array, features: int, window: int, stride: int, padding: int = 0, *, bias: bool = True
    ) -> jax.Array:
        rank, around = x.ndim - 2, window - 1 - padding
        return nn.ConvTranspose(
            features, (window,) * rank, (stride,) * rank, [(around, around)] * rank, use_bias=bias
        )(x)

    def dense(self, x: jax.Array, features: int) -> jax.Array:
        return nn.Dense(features)(x)

    def batch_norm(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=not self._train, momentum=0.9)(x)

    def layer_norm(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm()(x)

    def max_pool(self, x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
        rank = x.ndim - 2
        pool: Callable[..., jax.Array] = nn.max_pool
        return pool(x, (window,) * rank, (stride,) * rank, [(padding, padding)] * rank)

    def mean(self, x: jax.Array) -> jax.Array:
        return x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True)

    def concatenate(self, *arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays, axis=-1)

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        one, other = jnp.split(x, 2, axis=-1)
        return one, other

    def stack(self, *arrays: jax.Array) -> jax.Array:
        return jnp.concatenate(arrays)

    def gelu(self, x: jax.Array) -> jax.Array:
        return nn.gelu(x, approximate=False)


def variables(network: Network, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Parameters that keep the variance; Flax's initialisers take seconds to compile for every shape."""
    random = np.random.default_rng(0)

    def fill(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            scale = math.sqrt(2 / math.prod(like.shape[:-1]))
            return jnp.asarray(scale * random.standard_normal(like.shape), like.dtype)
        return jnp.full(like.shape, name in ("scale", "var"), like.dtype)

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(fill, {"batch_stats": {}, **found})
