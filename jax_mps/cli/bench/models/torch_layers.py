"""The layers on PyTorch, as its users write them, with the parameters of a Flax network."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jax_mps.cli.bench.models.layers import Layers
from jax_mps.cli.bench.torch_peer import Peer

__all__ = ["forward", "from_tensor", "to_tensor"]

_EPSILON, _LAYER_EPSILON = 1e-5, 1e-6  # Flax's


def to_tensor(peer: Peer, layer: str, array: np.ndarray) -> Any:
    """A parameter of a Flax layer as PyTorch has it, in the memory order of `peer`."""
    if array.ndim == 1:
        return peer.torch.from_numpy(np.array(array)).to(device=peer.device, dtype=peer.dtype)
    if layer.startswith("ConvTranspose"):  # Flax does not mirror its kernel, PyTorch does
        array = np.flip(array, tuple(range(array.ndim - 2))).swapaxes(-1, -2)
    return peer.tensor(np.moveaxis(array, -1, 0))


def from_tensor(layer: str, tensor: Any) -> np.ndarray:
    """What `to_tensor` made, or a gradient to it, as the Flax layer has it."""
    array = tensor.detach().cpu().double().numpy()
    if array.ndim == 1:
        return array
    array = np.moveaxis(array, (0, 1), (-1, -2))
    if layer.startswith("ConvTranspose"):
        array = np.flip(array.swapaxes(-1, -2), tuple(range(array.ndim - 2)))
    return array


def forward(
    function: Callable[..., Any], torch: Any, variables: dict[str, Any], inputs: Sequence[Any], *, train: bool
) -> Any:
    """What a network makes of inputs, with parameters and running means of the Flax network as tensors."""
    layers: Layers = _TorchLayers(torch, variables["params"], variables["batch_stats"], train=train)
    return function(layers, *inputs)


class _TorchLayers:
    """The layers, for one pass through a network. They find their parameters by the names that Flax gives."""

    def __init__(self, torch: Any, params: dict[str, Any], stats: dict[str, Any], *, train: bool) -> None:
        self._f = f = torch.nn.functional
        self._torch, self._params, self._batch_stats, self._train = torch, params, stats, train
        self._seen: collections.Counter[str] = collections.Counter()
        self.relu, self.relu6, self.leaky_relu = f.relu, f.relu6, f.leaky_relu
        self.silu, self.gelu, self.sigmoid, self.tanh = f.silu, f.gelu, torch.sigmoid, torch.tanh

    def _next(self, kind: str) -> str:
        name = f"{kind}_{self._seen[kind]}"
        self._seen[kind] += 1
        return name

    def conv(
        self, x: Any, features: int, window: int, stride: int = 1,
        padding: int | Literal["same", "causal"] = "same", *,
        dilation: int = 1, groups: int = 1, bias: bool = True,
    ) -> Any:  # fmt: skip
        params = self._params[self._next("Conv")]
        spread = (window - 1) * dilation
        around = spread // 2 if padding == "same" else spread if padding == "causal" else padding
        conv = (self._f.conv1d, self._f.conv2d, self._f.conv3d)[x.ndim - 3]
        y = conv(x, params["kernel"], params.get("bias"), stride, around, dilation, groups)
        return y[..., : x.shape[-1]] if padding == "causal" else y

    def conv_transpose(
        self, x: Any, features: int, window: int, stride: int, padding: int = 0, *, bias: bool = True
    ) -> Any:
        params = self._params[self._next("ConvTranspose")]
        f = self._f
        conv = (f.conv_transpose1d, f.conv_transpose2d, f.conv_transpose3d)[x.ndim - 3]
        return conv(x, params["kernel"], params.get("bias"), stride, padding)

    def dense(self, x: Any, features: int) -> Any:
        params = self._params[self._next("Dense")]
        return self._f.linear(x.movedim(1, -1), params["kernel"], params["bias"]).movedim(-1, 1)

    def batch_norm(self, x: Any) -> Any:
        name = self._next("BatchNorm")
        params, stats = self._params[name], self._batch_stats[name]
        return self._f.batch_norm(
            x, stats["mean"], stats["var"], params["scale"], params["bias"], self._train, 0.1, _EPSILON
        )

    def layer_norm(self, x: Any) -> Any:
        params = self._params[self._next("LayerNorm")]
        last = x.movedim(1, -1)
        normal = self._f.layer_norm(last, last.shape[-1:], params["scale"], params["bias"], _LAYER_EPSILON)
        return normal.movedim(-1, 1)

    def max_pool(self, x: Any, window: int, stride: int, padding: int = 0) -> Any:
        pool = (self._f.max_pool1d, self._f.max_pool2d, self._f.max_pool3d)[x.ndim - 3]
        return pool(x, window, stride, padding)

    def mean(self, x: Any) -> Any:
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)

    def concatenate(self, *arrays: Any) -> Any:
        return self._torch.cat(arrays, 1)

    def split(self, x: Any) -> tuple[Any, Any]:
        one, other = x.chunk(2, 1)
        return one, other

    def stack(self, *arrays: Any) -> Any:
        return self._torch.cat(arrays)
