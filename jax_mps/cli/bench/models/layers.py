"""The layers that networks are made of. A network is a function of these, the same for Flax and PyTorch."""

from __future__ import annotations

from typing import Any, Literal, Protocol

__all__ = ["Array", "Layers"]

Array = Any
"""An array of JAX, channels last, or a tensor of PyTorch, channels first."""


class Layers(Protocol):
    """Layers of one library. A call makes the next layer of its kind, with parameters of its own.

    Windows are the same along all spatial axes. `padding` is what is added on both sides; "same" is what
    keeps the size with stride 1, "causal" the same sum at the low end alone.
    """

    def conv(
        self, x: Array, features: int, window: int, stride: int = 1,
        padding: int | Literal["same", "causal"] = "same", *,
        dilation: int = 1, groups: int = 1, bias: bool = True,
    ) -> Array:  # fmt: skip
        """An ordinary convolution."""

    def conv_transpose(
        self, x: Array, features: int, window: int, stride: int, padding: int = 0, *, bias: bool = True
    ) -> Array:
        """A transposed convolution; `padding` is cut off on both sides."""

    def dense(self, x: Array, features: int) -> Array:
        """A matrix product over the channels."""

    def batch_norm(self, x: Array) -> Array:
        """Normalisation of every channel over the batch, or by the running means when not training."""

    def layer_norm(self, x: Array) -> Array:
        """Normalisation of every pixel over its channels."""

    def max_pool(self, x: Array, window: int, stride: int, padding: int = 0) -> Array:
        """The maximum of every window."""

    def mean(self, x: Array) -> Array:
        """The mean of every channel over all pixels; the spatial axes stay, with one element."""

    def concatenate(self, *arrays: Array) -> Array:
        """Arrays joined along the channels."""

    def split(self, x: Array) -> tuple[Array, Array]:
        """Both halves of the channels."""

    def stack(self, *arrays: Array) -> Array:
        """Arrays joined along the batch."""

    def relu(self, x: Array) -> Array:
        """`max(x, 0)`."""

    def relu6(self, x: Array) -> Array:
        """`min(max(x, 0), 6)`."""

    def leaky_relu(self, x: Array, slope: float) -> Array:
        """`max(x, slope * x)`."""

    def silu(self, x: Array) -> Array:
        """`x * sigmoid(x)`."""

    def gelu(self, x: Array) -> Array:
        """`x` times the normal distribution function of it."""

    def sigmoid(self, x: Array) -> Array:
        """The logistic function."""

    def tanh(self, x: Array) -> Array:
        """The hyperbolic tangent."""
