"""Layers and models with PyTorch's weights in Flax: the same outputs."""

from __future__ import annotations

import sys
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
prune = pytest.importorskip("torch.nn.utils.prune")
torch.manual_seed(0)


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


def conv(**options: Any) -> Any:
    return torch.nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, groups=2, **options)


def same_outputs(layer: Any) -> None:
    """The result of `conv()`, or of it in other clothes, in evaluation."""
    x = operand(2, 5, 4, 4)
    ours = linen.ConvTranspose(6, (3, 2), 2, 1, groups=2, padding_convention="torch")
    arrays = {k: v.astype(jnp.float32) for k, v in arrays_from_torch(layer).items()}
    close(ours.apply({"params": arrays}, x), in_torch(layer.eval().float(), x))


def everything(layer: Any) -> dict[str, Any]:
    return {name: value.detach().clone().numpy() for name, value in layer.state_dict().items()}


NORMALISED = {
    "weight_norm": lambda: torch.nn.utils.weight_norm(conv()),
    "spectral_norm": lambda: torch.nn.utils.spectral_norm(conv()),
    "pruning": lambda: prune.random_unstructured(conv(), "weight", 0.5),
    "pruned_bias": lambda: prune.random_unstructured(conv(), "bias", 0.5),
    "both": lambda: prune.random_unstructured(torch.nn.utils.spectral_norm(conv()), "bias", 0.5),
    "parametrised_weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(conv()),
    "parametrised_spectral_norm": lambda: torch.nn.utils.parametrizations.spectral_norm(conv()),
    "old_and_parametrised": lambda: prune.random_unstructured(
        torch.nn.utils.parametrizations.spectral_norm(conv()), "bias", 0.5
    ),
    "parametrised_orthogonal": lambda: torch.nn.utils.parametrizations.orthogonal(conv()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", NORMALISED.values(), ids=NORMALISED)
def test_effective_weight(make: Any, training: bool) -> None:
    """That of a checkpoint, which the attribute may not show before a call; the layer stays as it is."""
    torch.manual_seed(0)
    layer, other = make(), make()
    other.load_state_dict({name: 1.5 * value + 0.1 for name, value in layer.state_dict().items()})
    other.train(training)
    before = everything(other)
    arrays_from_torch(other)
    assert other.training == training
    jax.tree.map(np.testing.assert_array_equal, everything(other), before)
    same_outputs(other)


class Own(torch.nn.ConvTranspose2d):
    """A layer whose class is not one of torch's."""


def test_derived_class() -> None:
    same_outputs(Own(4, 6, (3, 2), stride=2, padding=1, groups=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_types_of_torch(dtype: str) -> None:
    layer = torch.nn.Linear(3, 2, dtype=getattr(torch, dtype))
    arrays = arrays_from_torch(layer)
    assert {a.dtype for a in arrays.values()} == {jnp.dtype(dtype)}
    weight = layer.weight.detach().to(torch.complex64).numpy()
    np.testing.assert_array_equal(arrays["kernel"].astype(jnp.complex64), weight.T)


def test_bfloat16_layer_of_torch() -> None:
    same_outputs(conv(dtype=torch.bfloat16))


def test_float64_of_torch(x64: None) -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    np.testing.assert_array_equal(arrays_from_torch(layer)["kernel"], layer.weight.detach().numpy().T)


class WithMore(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lora = torch.nn.Parameter(torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (lambda: torch.nn.LSTM(2, 2), TypeError, ["layer", "got LSTM"]),
        (lambda: torch.nn.LocalResponseNorm(2), TypeError, ["layer", "got LocalResponseNorm"]),
        (lambda: 3, TypeError, ["layer", "got int"]),
        (lambda: conv().state_dict(), TypeError, ["state_dict", "groups", "load_state_dict"]),
        (WithMore, TypeError, ["lora", "WithMore", "Linear"]),
        (lambda: torch.nn.LazyConvTranspose2d(2, 2), ValueError, ["weight", "LazyConvTranspose2d", "call"]),
        (lambda: conv(device="meta"), ValueError, ["weight", "ConvTranspose2d", "meta", "load_state_dict"]),
    ],
)
def test_bad_layers_of_torch(layer: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        arrays_from_torch(layer())
    assert all(word in str(caught.value) for word in words), caught.value


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing imports PyTorch for what is not a layer of it."""
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(TypeError, match="got int"):
        arrays_from_torch(3)
    with pytest.raises(TypeError, match="got int"):
        variables_from_torch({"Dense_0": 3})
    assert jax_mps.kernel_from_torch(np.zeros((4, 2, 3), np.float32)).shape == (3, 4, 2)
    assert "torch" not in sys.modules


def test_lazy_layer_after_a_call() -> None:
    layer = torch.nn.LazyLinear(2)
    x = operand(3, 4)
    expected = in_torch(layer, x)
    close(flax.linen.Dense(2).apply({"params": arrays_from_torch(layer)}, x), expected)


def test_checkpoint_into_the_meta_device() -> None:
    """A module costs nothing until its checkpoint is there."""
    full, empty = conv(), conv(device="meta")
    empty.load_state_dict(full.state_dict(), assign=True)
    jax.tree.map(np.testing.assert_array_equal, arrays_from_torch(empty), arrays_from_torch(full))


def test_arrays_are_copies() -> None:
    layer = torch.nn.Linear(2, 2)
    bias = arrays_from_torch(layer)["bias"]
    before = np.array(bias)
    with torch.no_grad():
        layer.bias += 1
    np.testing.assert_array_equal(bias, before)


# --- variables ----------------------------------------------------------------------------------------


def test_variables_of_a_module() -> None:
    """Layers under their own names, parametrisations and parts without parameters passed over."""
    up = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(conv()), torch.nn.ReLU())
    norm = torch.nn.BatchNorm2d(6)
    variables = variables_from_torch(torch.nn.ModuleDict({"up": up, "norm": norm, "same": norm}))
    expected = arrays_from_torch(norm)
    statistics = {k: expected.pop(k) for k in ("mean", "var")}
    jax.tree.map(
        np.testing.assert_array_equal,
        variables,
        {
            "params": {"up": {"0": arrays_from_torch(up[0])}, "norm": expected, "same": expected},
            "batch_stats": {"norm": statistics, "same": statistics},
        },
    )


def test_variables_of_one_layer() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    variables = variables_from_torch(layer)
    jax.tree.map(np.testing.assert_array_equal, variables, {"params": arrays_from_torch(layer)})


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda: torch.nn.Sequential(conv()).state_dict(), ["state_dict", "groups", "load_state_dict"]),
        (lambda: {"state_dict": conv().state_dict()}, ["state_dict", "groups", "load_state_dict"]),
        (
            lambda: torch.nn.ModuleDict({"rnn": torch.nn.LSTM(2, 2)}),
            ["weight_ih_l0", "LSTM", "'rnn'", "by name"],
        ),
        (lambda: [torch.nn.Linear(2, 2)], ["layers", "mapping", "list"]),
    ],
)
def test_bad_variables_of_torch(layers: Any, words: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        variables_from_torch(layers())
    assert all(word in str(caught.value) for word in words), caught.value


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
