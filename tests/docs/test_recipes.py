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


needs_haiku = pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="Haiku wants a newer JAX")


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """The other libraries promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def recipe(monkeypatch: pytest.MonkeyPatch, *titles: str, first: int = 0) -> dict[str, Any]:
    """The names that the code below these headings defines, from one of their blocks on."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    module = ModuleType("recipe")
    monkeypatch.setitem(sys.modules, "recipe", module)  # where classes look for their module
    for title in titles:
        blocks = re.findall(r"^```python\n(.*?)^```", sections[title], re.DOTALL | re.MULTILINE)
        assert blocks, title
        for block in blocks[first:]:
            exec(block, vars(module))
    return vars(module)


def check_acceleration(acceleration: jax_mps.Acceleration) -> None:
    """The block with stock layers has used the native kernels where they are."""
    ours = {row.operation for row in acceleration.report() if row.ours}
    assert ours >= {"conv_general_dilated", "select_and_scatter_add"} or not jax_mps.native_available()


def image(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module", params=["Equinox", "Haiku", "Keras 3"])
def layers(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The layers of one section, without the block of stock layers."""
    pytest.importorskip(request.param.split()[0].lower())
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield recipe(monkeypatch, request.param, first=1)


def of(title: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layers", [title], indirect=True, ids=[""])


def same(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


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
            (r["MaxPool2d"](2, 2), r["ConvTranspose"](2, 4, 2, 3, **options)),
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


EQUINOX_PADDINGS = ["VALID", "SAME", "SAME_LOWER", 0, 1, (2, 0, 1), ((0, 1), (1, 0), (1, 2))]


@of("Equinox")
@pytest.mark.parametrize(
    ("stride", "dilation", "groups"),
    [
        *((1, 1, 1), (2, 1, 2), ((3, 1, 2), 1, 1)),
        *((1, (2, 1, 3), 2), (2, (2, 1, 3), 1), ((3, 1, 2), (2, 1, 3), 2)),
    ],
)
@pytest.mark.parametrize(
    ("padding", "mode"),
    [*((padding, "ZEROS") for padding in EQUINOX_PADDINGS), ("SAME", "CIRCULAR"), ("SAME_LOWER", "circular")],
)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equinox_arguments(
    layers: dict[str, Any], rank: int, padding: Any, mode: str, stride: Any, dilation: Any, groups: int
) -> None:
    """Values and gradients of every argument of Equinox' layer."""
    eqx = pytest.importorskip("equinox")
    options = {"padding": padding, "stride": stride, "dilation": dilation}
    options = {k: v[:rank] if isinstance(v, tuple) else v for k, v in options.items()}
    x = image(4, *(4, 5, 3)[:rank])
    steps = np.broadcast_to(np.array(options["stride"]), rank)
    for more in {(0,) * rank} if mode != "ZEROS" else {(0,) * rank, tuple(int(s) - 1 for s in steps)}:
        make = (layers["ConvTranspose"], eqx.nn.ConvTranspose)
        ours, theirs = (
            layer(
                *(rank, 4, 2, (3, 2, 4)[:rank]),
                **options,
                output_padding=more,
                groups=groups,
                use_bias=groups == 1,
                padding_mode=mode,
                key=jax.random.key(0),
            )
            for layer in make
        )

        @jax.jit
        def results(x: jax.Array, ours: Any = ours, theirs: Any = theirs) -> Any:
            def loss(both: Any) -> Any:
                layer, x = both
                y = layer(x)
                return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

            found = [eqx.filter_grad(loss, has_aux=True)((layer, x)) for layer in (ours, theirs)]
            return [jax.tree.leaves(tree) for tree in found]

        same(*results(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@of("Equinox")
def test_gradient_to_the_bias_of_equinox(layers: dict[str, Any], dtype: str) -> None:
    """A sum of 65,536 numbers, which half precision cannot count."""
    eqx = pytest.importorskip("equinox")
    layer = layers["ConvTranspose"](2, 1, 1, 1, dtype=jnp.dtype(dtype), key=jax.random.key(0))
    x = jnp.zeros((16, 1, 64, 64), dtype)
    gradient = eqx.filter_grad(lambda f: jnp.mean(jax.vmap(f)(x).astype(jnp.float32)))(layer)
    np.testing.assert_allclose(gradient.bias.astype(jnp.float32), 1, rtol=2e-3)


@needs_haiku
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@of("Haiku")
def test_gradient_to_the_bias_of_haiku(layers: dict[str, Any], dtype: str) -> None:
    hk = pytest.importorskip("haiku")

    def upsample(x: jax.Array) -> Any:
        return layers["Conv2DTranspose"](1, 1)(x)

    network = hk.without_apply_rng(hk.transform(upsample))
    x = jnp.zeros((16, 64, 64, 1), dtype)
    parameters = network.init(jax.random.key(0), x)
    gradient = jax.grad(lambda p: jnp.mean(network.apply(p, x).astype(jnp.float32)))(parameters)
    (bias,) = (g for path, g in jax.tree_util.tree_leaves_with_path(gradient) if path[-1].key == "b")
    np.testing.assert_allclose(bias.astype(jnp.float32), 1, rtol=2e-3)


@needs_haiku
def test_haiku(monkeypatch: pytest.MonkeyPatch) -> None:
    hk = pytest.importorskip("haiku")
    r = recipe(monkeypatch, "Haiku")
    check_acceleration(r["acceleration"])
    x = image(2, 5, 4, 3)
    arguments = (x, (2, 2, 1), (2, 2, 1), "SAME")
    np.testing.assert_array_equal(r["max_pool"](*arguments), hk.max_pool(*arguments))
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


@needs_haiku
@of("Haiku")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("padding", "sizes"),
    [("SAME", None), ("VALID", None), (((0, 1), (2, 1), (1, 1)), None), ("SAME", "most"), ("VALID", "least")],
)
@pytest.mark.parametrize("channels", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_haiku_arguments(
    layers: dict[str, Any], rank: int, channels: str, padding: Any, sizes: str | None, masked: bool
) -> None:
    """Values, gradients and initial weights, with and without the axis of images."""
    hk = pytest.importorskip("haiku")
    spatial, window, stride = (4, 5, 3)[:rank], (3, 2, 4)[:rank], (2, 3, 1)[:rank]
    shape = {
        None: None,
        "most": [n * s for n, s in zip(spatial, stride, strict=True)],
        "least": [(n - 1) * s + k for n, k, s in zip(spatial, window, stride, strict=True)],
    }[sizes]
    options = {
        "padding": padding if isinstance(padding, str) else padding[:rank],
        "output_shape": shape,
        "data_format": channels,
        "with_bias": not masked,
        "mask": jnp.tri(2, 3) * jnp.ones((*window, 1, 1)) if masked else None,
        "name": "up",
    }
    name = f"Conv{rank}DTranspose"
    ours, theirs = (
        hk.without_apply_rng(hk.transform(lambda x, layer=layer: layer(2, window, stride, **options)(x)))
        for layer in (layers[name], getattr(hk, name))
    )
    x = image(*((2, *spatial, 3) if channels == "channels_last" else (2, 3, *spatial)))
    parameters = theirs.init(jax.random.key(0), x)
    same(ours.init(jax.random.key(0), x), parameters)

    @jax.jit
    def results(parameters: Any, x: jax.Array) -> Any:
        def loss(layer: Any, parameters: Any, x: jax.Array) -> Any:
            y = layer.apply(parameters, x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        return [jax.grad(loss, (1, 2), has_aux=True)(layer, parameters, x) for layer in (ours, theirs)]

    same(*results(parameters, x))
    same(*results(parameters, x[0]))


@needs_haiku
@of("Haiku")
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("size", range(6, 14))
def test_haiku_sizes(layers: dict[str, Any], padding: str, size: int) -> None:
    """A size of the result is taken or refused as Haiku does."""
    hk = pytest.importorskip("haiku")

    def result(layer: Any) -> Any:
        network = hk.without_apply_rng(
            hk.transform(lambda x: layer(2, 4, 3, size, padding, with_bias=False)(x))  # noqa: PLW0108
        )
        x = image(1, 3, 2)
        try:
            return network.apply(network.init(jax.random.key(0), x), x)
        except ValueError as error:
            return str("size" in str(error) or "output_shape" in str(error))

    ours, theirs = result(layers["Conv1DTranspose"]), result(hk.Conv1DTranspose)
    assert isinstance(ours, str) == isinstance(theirs, str)
    assert ours == theirs if isinstance(ours, str) else not same(ours, theirs)


@needs_haiku
@of("Haiku")
@pytest.mark.filterwarnings("ignore:When running under vmap:DeprecationWarning")  # Haiku's own
@pytest.mark.parametrize(
    ("shape", "window", "strides", "channel_axis"),
    [
        ((2, 6, 5, 3), 2, 2, -1),
        ((2, 6, 5, 3), (3, 2, 1), (2, 1, 1), 3),
        ((2, 3, 6, 5), (1, 1, 3, 2), (2, 1), 1),
        ((2, 3, 6), 3, 1, -2),
        ((2, 6, 5, 4, 3), (2, 1, 2, 1), 2, -1),
    ],
)
def test_pooling_of_haiku(
    layers: dict[str, Any], shape: Any, window: Any, strides: Any, channel_axis: int
) -> None:
    hk = pytest.importorskip("haiku")
    for padding in ("SAME", "VALID"):
        arguments = (image(*shape), window, strides, padding, channel_axis)
        np.testing.assert_array_equal(layers["max_pool"](*arguments), hk.max_pool(*arguments))


@needs_haiku
@of("Haiku")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((2, 2, 2), 1, "SAME"), ["window_shape", "(2, 2, 2)"]),
        (((2, 2, 2, 1), 1, "SAME"), ["window_shape", "(2, 2, 2, 1)"]),
        ((2, (1, 1, 3), "SAME"), ["strides", "(1, 1, 3)"]),
        ((2, 2, "SAME", None), ["channel_axis", "None"]),
        ((2, 2, "SAME", 2), ["channel_axis", "2"]),
    ],
)
def test_pooling_that_haiku_alone_has(layers: dict[str, Any], arguments: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        layers["max_pool"](image(2, 6, 5, 3), *arguments)
    assert all(word in str(caught.value) for word in words), caught.value


own_warning = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"  # Keras' own
)


@own_warning
@of("Keras 3")
@pytest.mark.parametrize(("padding", "bias"), [("same", True), ("VALID", False)])
@pytest.mark.parametrize(
    ("dilation", "output_padding"), [(1, None), (1, 0), (1, (1, 2, 0)), ((2, 1, 3), None), ((2, 1, 3), 0)]
)
@pytest.mark.parametrize("channels", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keras_arguments(
    layers: dict[str, Any],
    rank: int,
    channels: str,
    padding: str,
    dilation: Any,
    output_padding: Any,
    bias: bool,
) -> None:
    """Values and gradients; Keras has strides or dilation."""
    keras = pytest.importorskip("keras")
    options = {"strides": (2, 3, 1) if dilation == 1 else 1, "dilation_rate": dilation}
    options |= {"padding": padding, "output_padding": output_padding}
    options = {k: v[:rank] if isinstance(v, tuple) else v for k, v in options.items()}
    options |= {"data_format": channels, "use_bias": bias, "activation": "tanh" if bias else None}
    spatial, window, name = (6, 5, 8)[:rank], (3, 2, 4)[:rank], f"Conv{rank}DTranspose"
    x = image(*((2, *spatial, 3) if channels == "channels_last" else (2, 3, *spatial)))
    both = [layer(2, window, **options) for layer in (layers[name], getattr(keras.layers, name))]
    for layer in both:
        layer.build(x.shape)
        layer.set_weights([np.asarray(image(*w.shape)) for w in layer.get_weights()])
    weights = [v.value for v in both[0].trainable_variables]

    @jax.jit
    def results(weights: Any, x: jax.Array) -> Any:
        def loss(layer: Any, weights: Any, x: jax.Array) -> Any:
            y, _ = layer.stateless_call(weights, [], x)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        return [jax.grad(loss, (1, 2), has_aux=True)(layer, weights, x) for layer in both]

    same(*results(weights, x))


@own_warning
@of("Keras 3")
@pytest.mark.parametrize("channels", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_pooling_of_keras(layers: dict[str, Any], rank: int, channels: str) -> None:
    keras = pytest.importorskip("keras")
    x = image(*((2, *(6, 5, 8)[:rank], 3) if channels == "channels_last" else (2, 3, *(6, 5, 8)[:rank])))
    name = f"MaxPooling{rank}D"
    for strides, padding in ((None, "same"), ((2, 3, 1)[:rank], "valid")):
        ours, theirs = (
            layer((3, 2, 4)[:rank], strides, padding, channels)(x)
            for layer in (layers[name], getattr(keras.layers, name))
        )
        np.testing.assert_array_equal(ours, theirs)


@own_warning
@of("Keras 3")
def test_half_precision_of_keras(layers: dict[str, Any]) -> None:
    keras = pytest.importorskip("keras")
    x = image(2, 4, 5, 3)
    options = {"strides": 2, "dtype": "mixed_bfloat16"}
    both = [f(2, 3, **options) for f in (layers["Conv2DTranspose"], keras.layers.Conv2DTranspose)]
    for layer in both:
        layer.build(x.shape)
        layer.set_weights([np.asarray(image(*w.shape)) for w in layer.get_weights()])
    ours, theirs = (layer(x) for layer in both)
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0.03, atol=0.1)


@own_warning
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
