"""Layers and models with PyTorch's weights in Flax: the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
import jax_mps.flax.models.linen as linen_models
import jax_mps.flax.models.nnx as nnx_models
from flax_arrays import close, filled_nnx, needs_nnx_lists, numbers, operand
from jax_mps.flax import linen, nnx
from jax_mps.flax.from_torch import arrays_from_torch, variables_from_torch

torch = pytest.importorskip("torch")
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """Flax itself promotes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- one layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "transpose_kernel", "options"),
    [
        ((3, 3), False, {"stride": 2, "padding": 1, "output_padding": 1}),
        ((4, 2), True, {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2), "groups": 2}),
        ((3,), False, {"stride": 2, "padding": 2, "dilation": 3, "output_padding": 2, "groups": 4}),
        ((2, 2, 2), True, {"stride": 2}),
    ],
)
def test_as_torch(window: tuple[int, ...], transpose_kernel: bool, options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    layer = getattr(torch.nn, f"ConvTranspose{len(window)}d")(4, 8, window, **options)
    x = np.random.default_rng(0).standard_normal((2, 4, *(5, 4, 3)[: len(window)]), np.float32)
    expected = np.moveaxis(layer(torch.tensor(x)).detach().numpy(), 1, -1)
    names = {"stride": "strides", "dilation": "kernel_dilation"}
    ours: dict[str, Any] = {"padding": 0} | {names.get(k, k): v for k, v in options.items()}
    ours |= {"padding_convention": "torch", "transpose_kernel": transpose_kernel}
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()

    def results(x: jax.Array) -> Any:
        kernel = jax_mps.kernel_from_torch(weight, groups, transpose_kernel=transpose_kernel)
        arrays = {"kernel": kernel, "bias": jnp.asarray(bias)}
        nnx_layer = nnx.ConvTranspose(
            4, 8, window, **ours, kernel_init=numbers, bias_init=numbers, rngs=nnx.Rngs(0)
        )
        assert nnx_layer.kernel.shape == kernel.shape
        nnx.update(nnx_layer, arrays)
        return linen.ConvTranspose(8, window, **ours).apply({"params": arrays}, x), nnx_layer(x)

    for y in jax.jit(results)(jnp.asarray(np.moveaxis(x, 1, -1))):
        close(y, expected, 1e-6)


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
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_torch(torch_layer: Any, flax_layer: Any, shape: tuple[int, ...]) -> None:
    x = operand(*shape)
    variables = {"params": arrays_from_torch(torch_layer)}
    close(flax_layer.apply(variables, x), in_torch(torch_layer, x))


def test_normalisation_without_scale() -> None:
    assert set(arrays_from_torch(torch.nn.BatchNorm1d(4, affine=False))) == {"mean", "var"}


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


# --- whole networks -----------------------------------------------------------------------------------


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


@needs_nnx_lists
def test_unet_of_torch() -> None:
    torch.manual_seed(0)
    theirs, x = TorchUNet(4), operand(2, 12, 16, 3)
    expected = in_torch(theirs, x)
    convolutions = [*theirs.convolutions(), theirs.last]
    names = {f"Conv_{i}": layer for i, layer in enumerate(convolutions)}
    names |= {f"ConvTranspose_{i}": layer for i, layer in enumerate(theirs.ups)}
    model = linen_models.UNet(channels=4, levels=3)
    close(jax.jit(model.apply)(variables_from_torch(names), x), expected)

    ours = filled_nnx(lambda rngs: nnx_models.UNet(channels=4, levels=3, rngs=rngs))
    blocks = [ours.first, *ours.down, *reversed(ours.merge)]
    layers = [*(layer for block in blocks for layer in block.convolutions), ours.last, *reversed(ours.up)]
    for layer, torch_layer in zip(layers, [*convolutions, *theirs.ups], strict=True):
        nnx.update(layer, arrays_from_torch(torch_layer))
    close(nnx.jit(ours)(x), expected)


@needs_nnx_lists
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

    ours = filled_nnx(lambda rngs: nnx_models.Generator(noise=5, channels=2, rngs=rngs))
    for layer, torch_layer in zip([ours.first, *ours.ups, *ours.norms], [*ups, *norms], strict=True):
        nnx.update(layer, arrays_from_torch(torch_layer))
    ours.eval()
    close(nnx.jit(ours)(noise), expected)
