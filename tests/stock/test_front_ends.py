"""Models of Equinox, Haiku and Keras under `accelerate()`: gradients are those of stock JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps

os.environ.setdefault("KERAS_BACKEND", "jax")

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """The other libraries promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def image(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def check(gradient: Callable[..., Any], *operands: Any) -> None:
    """Compares a gradient with that of stock JAX, and demands that ours was used."""
    expected = jax.jit(gradient)(*operands)
    with jax_mps.accelerate() as acceleration:
        ours = jax.jit(gradient)(*operands)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)
    report = acceleration.report()
    operations = {row.operation for row in report}
    assert {"conv_general_dilated", "reduce_window_max", "reduce_window_sum"} <= operations, report
    ours_are = {row.operation for row in report if row.ours}
    assert {"conv_general_dilated", "select_and_scatter_add"} <= ours_are, report


def test_equinox() -> None:
    """Channels first, one image at a time under `vmap`."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
            eqx.nn.MaxPool2d(3, 2, padding=1),
            eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=keys[1]),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Conv2d(8, 6, 1, key=keys[2]),
            eqx.nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1, key=keys[3]),
        ]
    )
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(arrays: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sin(jax.vmap(eqx.combine(arrays, rest))(x)))

    check(jax.grad(loss, argnums=(0, 1)), arrays, image(2, 3, 12, 16))


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="Haiku wants a newer JAX")
@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
def test_haiku(data_format: str) -> None:
    hk = pytest.importorskip("haiku")
    first = data_format == "NCHW"
    window, channel_axis = ((1, 1, 2, 2), 1) if first else ((1, 2, 2, 1), -1)

    def network(x: jax.Array) -> jax.Array:
        x = hk.Conv2D(8, 3, data_format=data_format)(x)
        x = hk.MaxPool(window, window, "SAME", channel_axis=channel_axis)(x)
        x = hk.DepthwiseConv2D(2, 3, data_format=data_format)(x)
        x = hk.AvgPool(window, window, "VALID", channel_axis=channel_axis)(x)
        return hk.Conv2DTranspose(3, 4, 2, data_format=data_format)(x)

    model = hk.without_apply_rng(hk.transform(network))
    x = image(2, 3, 12, 16) if first else image(2, 12, 16, 3)
    params = jax.jit(model.init)(jax.random.key(0), x)
    check(jax.grad(lambda params, x: jnp.mean(jnp.sin(model.apply(params, x))), argnums=(0, 1)), params, x)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # Keras' own
def test_keras() -> None:
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "jax"
    fast = {"kernel_initializer": "zeros"}  # others take seconds to compile
    model = keras.Sequential(
        [
            keras.Input((12, 16, 3)),
            keras.layers.Conv2D(8, 3, padding="same", **fast),
            keras.layers.MaxPooling2D(2),
            keras.layers.DepthwiseConv2D(3, padding="same", depthwise_initializer="zeros"),
            keras.layers.AveragePooling2D(2),
            keras.layers.SeparableConv2D(6, 3, depthwise_initializer="zeros", pointwise_initializer="zeros"),
            keras.layers.Conv2DTranspose(3, 4, strides=2, padding="same", **fast),
        ]
    )
    weights = [0.2 * image(*v.shape) for v in model.trainable_variables]

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        y, _ = model.stateless_call(weights, [], x)
        return jnp.mean(jnp.sin(y))

    check(jax.grad(loss, argnums=(0, 1)), weights, image(2, 12, 16, 3))
