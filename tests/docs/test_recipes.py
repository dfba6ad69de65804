"""The recipes of docs/recipes.md: their code is run, and compared with the layers that it replaces."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

os.environ.setdefault("KERAS_BACKEND", "jax")

pytestmark = pytest.mark.filterwarnings(r"ignore:accelerate\(\) replaces nothing")


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """The other libraries promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def recipe(monkeypatch: pytest.MonkeyPatch, *titles: str) -> dict[str, Any]:
    """The names that the code below these headings defines."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    module = ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)  # where classes look for their module
    for title in titles:
        blocks = re.findall(r"^```python\n(.*?)^```", sections[title], re.DOTALL | re.MULTILINE)
        assert blocks, title
        for block in blocks:
            exec(block, vars(module))
    return vars(module)


def check_acceleration(acceleration: jax_mps.Acceleration) -> None:
    """The block with stock layers has used the native kernels where they are."""
    ours = {row.operation for row in acceleration.report() if row.ours}
    assert ours >= {"conv_general_dilated", "select_and_scatter_add"} or not jax_mps.native_available()


def image(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_every_section_is_tested() -> None:
    titles = re.findall(r"^## (.*)", PAGE.read_text(), re.MULTILINE)
    assert titles == ["Flax", "Weights of PyTorch", "Equinox", "Haiku", "Keras 3"]


def test_flax_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    r = recipe(monkeypatch, "Flax", "Weights of PyTorch")
    x = image(2, 5, 4, 8)
    variables = {"params": {"kernel": image(4, 4, 8, 16), "bias": image(16)}}
    y = r["flax_layer"].apply(variables, x)
    np.testing.assert_allclose(r["same_layer"].apply(variables, x), y, rtol=1e-5, atol=1e-5)

    jax.tree.map(np.testing.assert_array_equal, r["from_checkpoint"], r["variables"])

    r["norm"].running_mean[:] = torch.tensor([1.0, 2.0, 3.0])
    variables = r["variables_from_torch"]({"ConvTranspose_0": r["conv"], "BatchNorm_0": r["norm"]})
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, r["variables"])
    conv = r["conv"](torch.tensor(np.moveaxis(np.asarray(x), -1, 1)))
    norm = np.moveaxis(r["norm"].eval()(conv).detach().numpy(), 1, -1)
    np.testing.assert_allclose(r["Up"]().apply(variables, x), norm, rtol=1e-5, atol=1e-5)
    conv = np.moveaxis(conv.detach().numpy(), 1, -1)
    np.testing.assert_allclose(r["layer"](x), conv, rtol=1e-5, atol=1e-5)


def test_equinox(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers compute what Equinox' do, and a model trains with them as with those."""
    eqx = pytest.importorskip("equinox")
    r = recipe(monkeypatch, "Equinox")
    check_acceleration(r["acceleration"])
    key, other = jax.random.split(jax.random.key(0))
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "key": key}

    class Model(eqx.Module):
        down: Any
        pool: Any
        up: Any

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.up(self.pool(jax.nn.relu(self.down(x))))

    down = eqx.nn.Conv2d(2, 4, 3, padding=1, key=other)
    models = [
        Model(down, pool, up)
        for pool, up in (
            (r["MaxPool2d"](2, 2), r["ConvTranspose2d"](4, 2, 3, **options)),
            (eqx.nn.MaxPool2d(2, 2), eqx.nn.ConvTranspose2d(4, 2, 3, **options)),
        )
    ]
    images = image(3, 2, 6, 8)

    @eqx.filter_value_and_grad
    def loss(model: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((jax.vmap(model)(x) - x) ** 2)

    @eqx.filter_jit
    def step(model: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        value, gradient = loss(model, x)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.5 * g, gradient)), value

    losses = []
    for model in models:
        losses.append([])
        for _ in range(10):
            model, value = step(model, images)
            losses[-1].append(value)
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="Haiku wants a newer JAX")
def test_haiku(monkeypatch: pytest.MonkeyPatch) -> None:
    hk = pytest.importorskip("haiku")
    r = recipe(monkeypatch, "Haiku")
    check_acceleration(r["acceleration"])
    x = image(2, 5, 4, 3)
    np.testing.assert_array_equal(
        r["max_pool"](x, (2, 2), (2, 2), "SAME"), hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
    )
    for padding in ("SAME", "VALID"):
        theirs, ours = (
            hk.transform(lambda x, layer=layer: layer(4, (4, 3), 2, padding=padding, name="up")(x))  # noqa: B023
            for layer in (hk.Conv2DTranspose, r["Conv2DTranspose"])
        )
        parameters = theirs.init(jax.random.key(0), x)
        shapes = jax.eval_shape(ours.init, jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, parameters)
        np.testing.assert_allclose(
            ours.apply(parameters, None, x), theirs.apply(parameters, None, x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # Keras' own
def test_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "jax"
    r = recipe(monkeypatch, "Keras 3")
    check_acceleration(r["acceleration"])
    x = image(2, 6, 4, 3)
    fast = {"kernel_initializer": "zeros"}  # others take seconds to compile
    models = [
        keras.Sequential(
            [
                keras.Input((None, None, 3)),
                pool(2, padding="same"),
                up(4, (4, 3), strides=2, padding="same", activation="relu", **fast),
                up(3, 3, strides=1, padding="valid", dilation_rate=2, **fast),
                up(3, 3, strides=2, padding="valid", output_padding=1, **fast),
            ]
        )
        for pool, up in (
            (r["MaxPooling2D"], r["Conv2DTranspose"]),
            (keras.layers.MaxPooling2D, keras.layers.Conv2DTranspose),
        )
    ]
    ours, theirs = models
    weights = [0.2 * np.asarray(image(*w.shape)) for w in theirs.get_weights()]
    for model in models:
        model.set_weights(weights)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    target = image(*theirs(x).shape)
    losses = []
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), "mse")
        losses.append([float(model.train_on_batch(x, target)) for _ in range(2)])
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)
