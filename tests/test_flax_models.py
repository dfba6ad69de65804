"""The example models on our layers and on Flax's, one import line apart; weights of PyTorch; checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_mps.flax.models.linen as linen_models
import jax_mps.flax.models.nnx as nnx_models
from jax_mps.flax import linen, models, nnx
from jax_mps.flax.from_torch import arrays_from_torch, variables_from_torch

UNET = {"channels": 4, "levels": 3}
CALLS: dict[str, Any] = {
    # the model's arguments, those of its NNX form alone, and the shape of its operand
    "UNet": (UNET | {"depth": 1}, {}, (2, 12, 16, 3)),
    "Generator": ({"channels": 2}, {"noise": 5}, (2, 5)),
}


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Flax itself promotes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def operand(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def filled(shapes: Any) -> Any:
    """Random arrays; Flax's initialisers take seconds to compile for every shape."""
    random = np.random.default_rng(0)

    def fill(path: Any, like: Any) -> jax.Array:
        numbers = random.standard_normal(like.shape)
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(1 + np.abs(numbers), jnp.float32)
        return jnp.asarray(numbers * (2 / max(np.prod(like.shape[:-1]), 1)) ** 0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def linen_variables(model: Any, x: jax.Array) -> Any:
    return filled(jax.eval_shape(model.init, jax.random.key(0), x))


def nnx_model(make: Any) -> Any:
    """The module that `make` makes of its random numbers, filled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, filled(nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


# --- one import line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [linen_models, nnx_models])
def test_only_the_import_line_changes(ours: Any) -> None:
    stock = models.with_stock_flax(ours)
    path = Path(ours.__file__)
    (line,) = [line for line in path.read_text().splitlines() if "jax_mps" in line]
    assert line in ("from jax_mps.flax import linen as nn", "from jax_mps.flax import nnx")
    name = line.split()[-1]
    assert getattr(stock, name) in (flax.linen, flax.nnx)
    assert stock.UNet is not ours.UNet
    with pytest.raises(ValueError, match="one line"):
        models.with_stock_flax(models)


@pytest.mark.parametrize("name", CALLS)
def test_linen_models_as_on_flax(name: str) -> None:
    arguments, _, shape = CALLS[name]
    x = operand(*shape)
    train = {} if name == "UNet" else {"train": True}
    results = []
    for module in (linen_models, models.with_stock_flax(linen_models)):
        model = getattr(module, name)(**arguments)
        variables = linen_variables(model, x)

        def total(params: Any, x: jax.Array, rest: Any, model: Any = model) -> Any:
            y, statistics = model.apply({"params": params} | rest, x, **train, mutable="batch_stats")
            return jnp.sum(jnp.sin(y)), (y, statistics)

        params = variables.pop("params")
        results.append(jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x, variables))
    close(*results)


@pytest.mark.parametrize("name", CALLS)
def test_nnx_models_as_on_flax(name: str) -> None:
    arguments, others, shape = CALLS[name]
    x = operand(*shape)
    results = []
    for module in (nnx_models, models.with_stock_flax(nnx_models)):

        @nnx.jit
        def gradients(model: Any, x: jax.Array) -> Any:
            def total(model: Any, x: jax.Array) -> Any:
                y = model(x)
                return jnp.sum(jnp.sin(y)), y

            return nnx.grad(total, argnums=(0, 1), has_aux=True)(model, x)

        model = nnx_model(lambda rngs, module=module: getattr(module, name)(**arguments, **others, rngs=rngs))
        (gradient, gradient_x), y = gradients(model, x)
        statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        results.append((nnx.to_pure_dict(gradient), gradient_x, y, statistics))
    close(*results)


def test_discriminators() -> None:
    """They have none of our layers; Linen and NNX are the same function."""
    x = operand(2, 64, 64, 3)
    model = linen_models.Discriminator(channels=2)
    variables = linen_variables(model, x)
    y, statistics = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))(variables, x)
    assert y.shape == (2,)

    other = nnx_model(lambda rngs: nnx_models.Discriminator(channels=2, rngs=rngs))
    for i, layer in enumerate([*other.downs, other.last]):
        nnx.update(layer, variables["params"][f"Conv_{i}"])
    for i, norm in enumerate(other.norms):
        nnx.update(norm, variables["params"][f"BatchNorm_{i}"] | variables["batch_stats"][f"BatchNorm_{i}"])
    close(nnx.jit(lambda model, x: model(x))(other, x), y)
    close(other.norms[-1].mean[...], statistics["batch_stats"]["BatchNorm_2"]["mean"])


# --- PyTorch ------------------------------------------------------------------------------------------


class TorchUNet(torch.nn.Module):
    """The U-Net of `jax_mps.flax.models`, three levels, in PyTorch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        a, b, c = channels, 2 * channels, 4 * channels

        def block(before: int, after: int) -> torch.nn.Sequential:
            convolution, relu = torch.nn.Conv2d, torch.nn.ReLU()
            return torch.nn.Sequential(
                convolution(before, after, 3, padding=1), relu, convolution(after, after, 3, padding=1), relu
            )

        self.blocks = torch.nn.ModuleList(
            [block(3, a), block(a, b), block(b, c), block(2 * b, b), block(b, a)]
        )
        self.ups = torch.nn.ModuleList(
            [torch.nn.ConvTranspose2d(n, n // 2, 4, stride=2, padding=1) for n in (c, b)]
        )
        self.last = torch.nn.Conv2d(a, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth, fifth = self.blocks
        pool = torch.nn.functional.max_pool2d
        one = first(image)
        two = second(pool(one, 2))
        x = self.ups[0](third(pool(two, 2)))
        x = self.ups[1](fourth(torch.cat([two, x], 1)))
        return image + self.last(fifth(torch.cat([one, x], 1)))

    def convolutions(self) -> list[torch.nn.Module]:
        return [layer for block in self.blocks for layer in (block[0], block[2])]


def torch_generator(noise: int, channels: int) -> torch.nn.Sequential:
    widths = [8 * channels, 4 * channels, 2 * channels, channels, 3]
    layers: list[torch.nn.Module] = [torch.nn.ConvTranspose2d(noise, widths[0], 4, bias=False)]
    for i in range(4):
        norm = torch.nn.BatchNorm2d(widths[i])
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        up = torch.nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1, bias=False)
        layers += [norm, torch.nn.ReLU(), up]
    return torch.nn.Sequential(*layers, torch.nn.Tanh()).eval()


def in_torch(module: torch.nn.Module, x: jax.Array) -> np.ndarray:
    with torch.no_grad():
        return np.moveaxis(module(torch.tensor(np.moveaxis(np.asarray(x), -1, 1))).numpy(), 1, -1)


def test_unet_of_torch() -> None:
    torch.manual_seed(0)
    theirs, x = TorchUNet(4), operand(2, 12, 16, 3)
    expected = in_torch(theirs, x)
    convolutions = [*theirs.convolutions(), theirs.last]
    names = {f"Conv_{i}": layer for i, layer in enumerate(convolutions)}
    names |= {f"ConvTranspose_{i}": layer for i, layer in enumerate(theirs.ups)}
    model = linen_models.UNet(**UNET)
    close(jax.jit(model.apply)(variables_from_torch(names), x), expected)

    ours = nnx_model(lambda rngs: nnx_models.UNet(**UNET, rngs=rngs))
    blocks = [ours.first, *ours.down, *reversed(ours.merge)]
    layers = [*(layer for block in blocks for layer in block.convolutions), ours.last, *reversed(ours.up)]
    for layer, torch_layer in zip(layers, [*convolutions, *theirs.ups], strict=True):
        nnx.update(layer, arrays_from_torch(torch_layer))
    close(nnx.jit(ours)(x), expected)


def test_generator_of_torch() -> None:
    torch.manual_seed(0)
    theirs, noise = torch_generator(5, 2), operand(3, 5)
    expected = in_torch(theirs, noise[:, None, None, :])
    ups, norms = (
        [layer for layer in theirs if isinstance(layer, kind)]
        for kind in (torch.nn.ConvTranspose2d, torch.nn.BatchNorm2d)
    )
    names = {f"ConvTranspose_{i}": layer for i, layer in enumerate(ups)}
    names |= {f"BatchNorm_{i}": layer for i, layer in enumerate(norms)}
    model = linen_models.Generator(channels=2)
    close(jax.jit(model.apply)(variables_from_torch(names), noise), expected)

    ours = nnx_model(lambda rngs: nnx_models.Generator(noise=5, channels=2, rngs=rngs))
    for layer, torch_layer in zip([ours.first, *ours.ups, *ours.norms], [*ups, *norms], strict=True):
        nnx.update(layer, arrays_from_torch(torch_layer))
    ours.eval()
    close(nnx.jit(ours)(noise), expected)


@pytest.mark.parametrize(
    ("torch_layer", "flax_layer", "shape"),
    [
        (torch.nn.Linear(5, 4), flax.linen.Dense(4), (2, 5)),
        (
            torch.nn.Conv1d(4, 6, 3, groups=2),
            flax.linen.Conv(6, (3,), padding=0, feature_group_count=2),
            (2, 7, 4),
        ),
        (
            torch.nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2),
            linen.ConvTranspose(6, (3,), 2, 1, groups=2, padding_convention="torch"),
            (2, 7, 4),
        ),
        (torch.nn.GroupNorm(2, 4), flax.linen.GroupNorm(2, epsilon=1e-5), (2, 7, 4)),
        (torch.nn.BatchNorm1d(4, affine=False).eval(), None, (2, 7, 4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_torch(torch_layer: Any, flax_layer: Any, shape: tuple[int, ...]) -> None:
    if flax_layer is None:
        assert set(arrays_from_torch(torch_layer)) == {"mean", "var"}
        return
    x = operand(*shape)
    variables = {"params": arrays_from_torch(torch_layer)}
    close(flax_layer.apply(variables, x), in_torch(torch_layer, x))


def test_no_such_layer_of_torch() -> None:
    with pytest.raises(TypeError, match="got LSTM"):
        arrays_from_torch(torch.nn.LSTM(2, 2))


def test_arrays_are_copies() -> None:
    layer = torch.nn.Linear(2, 2)
    bias = arrays_from_torch(layer)["bias"]
    before = np.array(bias)
    with torch.no_grad():
        layer.bias += 1
    np.testing.assert_array_equal(bias, before)


# --- checkpoints --------------------------------------------------------------------------------------


def linen_pair() -> tuple[Any, Any, jax.Array, Any, jax.Array]:
    """The U-Net on ours, fresh, and on Flax's layers, trained; an image, and what the latter makes of it."""
    x = operand(1, 8, 8, 3)
    ours = linen_models.UNet(channels=2, levels=2, depth=1)
    theirs = models.with_stock_flax(linen_models).UNet(channels=2, levels=2, depth=1)
    variables = linen_variables(theirs, x)
    return ours, jax.eval_shape(ours.init, jax.random.key(0), x), x, variables, theirs.apply(variables, x)


def test_flax_serialization() -> None:
    ours, shapes, x, trained, expected = linen_pair()
    saved = flax.serialization.to_bytes(trained)
    fresh = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    restored = flax.serialization.from_bytes(fresh, saved)
    close(ours.apply(restored, x), expected)
    assert flax.serialization.to_bytes(restored) == saved


def test_orbax_linen(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    ours, shapes, x, trained, expected = linen_pair()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", trained)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "old", shapes)
        close(ours.apply(restored, x), expected)
        checkpointer.save(tmp_path / "new", restored)
        checkpointer.wait_until_finished()
        close(checkpointer.restore(tmp_path / "new", trained), trained, 0)


def test_orbax_nnx(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    x = operand(1, 8, 8, 3)
    arguments = {"channels": 2, "levels": 2, "depth": 1}
    theirs = nnx_model(lambda rngs: models.with_stock_flax(nnx_models).UNet(**arguments, rngs=rngs))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", nnx.state(theirs))
        checkpointer.wait_until_finished()
        graph, state = nnx.split(nnx.eval_shape(lambda: nnx_models.UNet(**arguments, rngs=nnx.Rngs(0))))
        ours = nnx.merge(graph, checkpointer.restore(tmp_path / "old", state))
    close(ours(x), theirs(x))
