"""Flax Linen with this library's pooling and convolutions.

    from jax_mps.flax import linen as nn        instead of        from flax import linen as nn

is all that a model changes. Whatever this module does not define is Flax's own: `nn.Module`, `nn.Dense`, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen
import jax
from flax.linen.dtypes import promote_dtype

from jax_mps.flax import layers
from jax_mps.flax.layers import (
    Convolution,
    PaddingConvention,
    avg_pool,
    l2_pool,
    max_pool,
    max_unpool,
    min_pool,
)
from jax_mps.geometry import Ints

__all__ = ["Conv", "ConvTranspose", "avg_pool", "l2_pool", "max_pool", "max_unpool", "min_pool"]


class Conv(flax.linen.Conv):
    """Flax's `Conv`, computed by `jax_mps.conv`.

    It is Flax's layer, and only hands it another `conv_general_dilated`. So arguments, parameters (`kernel`
    and `bias`), initialisers, types and numbers are those of the Flax that is installed, and a checkpoint of
    either loads into the other. Stock JAX computes what `jax_mps.conv` does not: integers and complex
    numbers, more than three spatial axes, empty results.

    Attributes:
      features: the number of output channels.
      kernel_size: taps along each spatial axis; an int for one axis.
      strides: pixels of the inputs from one pixel of the result to the next; None is 1.
      padding: "SAME", "VALID", "CIRCULAR" (periodic), "REFLECT" (mirrored; not in old versions of Flax),
        "CAUSAL" (one axis, zeros before it), an int, or for each spatial axis an int or a pair.
      input_dilation: pixels from one pixel of the inputs to the next, with zeros between them; None is 1.
        Flax wants paddings as numbers with it.
      kernel_dilation: pixels from one tap to the next; None is 1.
      feature_group_count: the number of groups of channels.
      use_bias: whether a bias is added.
      mask: what the kernel is multiplied by, in its shape.
      dtype: the type to compute in; by default that of inputs and parameters together.
      param_dtype: the type of the parameters.
      precision: as for `jax_mps.conv`.
      kernel_init: the kernel's initialiser.
      bias_init: the bias' initialiser.
      promote_dtype: the function of `(inputs, kernel, bias, dtype=...)` that brings all to one type.
      conv_general_dilated: another function to compute the convolution, such as that of `jax.lax`.
      implementation: None chooses; "native" or "xla" forces a path.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, shapes disagree, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> layer = nn.Conv(16, (3, 3), strides=2, padding="CIRCULAR")
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 4, 4, 16), (3, 3, 3, 16))

    Source: `flax.linen.Conv`.
    """

    implementation: str | None = None

    def __post_init__(self) -> None:
        given = self.conv_general_dilated
        # A clone is given the function of the layer that it was made from.
        if self.conv_general_dilated_cls is None and (given is None or isinstance(given, Convolution)):
            ours = Convolution(self.implementation, adds_bias=self.use_bias)
            object.__setattr__(self, "conv_general_dilated", ours)
            promote = getattr(self, "promote_dtype", None)  # not in old versions of Flax
            if self.use_bias and promote is not None and not isinstance(promote, layers.WideBias):
                object.__setattr__(self, "promote_dtype", layers.WideBias(promote))
        super().__post_init__()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of `inputs`."""
        if not (isinstance(self.conv_general_dilated, Convolution) and self.use_bias):
            return super().__call__(inputs)
        with layers.adding_wide_bias(self):
            y = super().__call__(inputs)
        promote = getattr(self, "promote_dtype", promote_dtype)
        arrays = (inputs, *(self.get_variable("params", name) for name in ("kernel", "bias")))
        return layers.round_half(y, lambda: promote(*arrays, dtype=self.dtype), None)


class ConvTranspose(flax.linen.ConvTranspose):
    """Flax's `ConvTranspose`, computed by `jax_mps.conv_transpose`.

    Attributes, parameters (`kernel` and `bias`), initialisers, types and numbers are Flax's, so that a
    checkpoint of either loads into the other. Inputs have shape `(*batch, *spatial, channels)` with any
    number of batch axes. float32, float64, float16 and bfloat16 are computed; integers are promoted.

    Attributes:
      features: the number of output channels.
      kernel_size: taps along each spatial axis; an int for one axis.
      strides: pixels of the result from one pixel of the inputs to the next; None is 1.
      padding: "SAME" (size * strides), "SAME_LOWER", "VALID", "CIRCULAR" (periodic), an int, or for each
        spatial axis an int or a pair. Numbers are pixels put *around* the inputs with their zeros, as in
        `jax.lax`; see `padding_convention`.
      kernel_dilation: pixels from one tap to the next; None is 1.
      use_bias: whether a bias is added.
      mask: what the kernel is multiplied by, in its shape.
      dtype: the type to compute in; by default that of inputs and parameters together.
      param_dtype: the type of the parameters.
      precision: as for `jax_mps.conv_transpose`.
      kernel_init: the kernel's initialiser.
      bias_init: the bias' initialiser.
      transpose_kernel: whether the kernel is that of the ordinary convolution that this one transposes,
        `(*window, features / groups, in)` instead of `(*window, in / groups, features)`.
      promote_dtype: the function of `(inputs, kernel, bias, dtype=...)` that brings all to one type.
      preferred_element_type: the type of the result, a float at least as wide as the computation's.
      groups: the number of groups of channels.
      output_padding: pixels that the high end of each axis has beyond the padding's size.
      padding_convention: "flax", or "torch" for paddings as in PyTorch: numbers alone, which are pixels of
        the *result*, cut off.
      implementation: None chooses; "native" or "xla" forces a path.

    Raises:
      TypeError: an argument has the wrong type, or the inputs an unsupported dtype.
      ValueError: a value is out of range, or shapes disagree.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> layer = nn.ConvTranspose(16, (4, 4), strides=(2, 2))
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 16, 16, 16), (4, 4, 3, 16))

      The layer of PyTorch's `ConvTranspose2d(3, 12, 3, stride=2, padding=1, output_padding=1, groups=3)`:

      >>> layer = nn.ConvTranspose(
      ...     12, (3, 3), strides=2, padding=1, output_padding=1, groups=3, padding_convention="torch"
      ... )
      >>> layer.init_with_output(jax.random.key(0), x)[0].shape
      (1, 16, 16, 12)

    Source: `flax.linen.ConvTranspose`.
    """

    # These two are younger than the oldest Flax that is supported.
    promote_dtype: Any = promote_dtype
    preferred_element_type: Any = None
    groups: int = 1
    output_padding: Ints = 0
    padding_convention: PaddingConvention = "flax"
    implementation: str | None = None

    @flax.linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The transposed convolution of `inputs`."""
        shape = layers.kernel_shape(self, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        kernel = layers.masked(self, kernel)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return layers.transposed(self, inputs, kernel, bias)


if TYPE_CHECKING:
    from flax.linen import *  # type: ignore[assignment, no-redef]  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):  # a module's own, such as `__path__`
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(flax.linen, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *dir(flax.linen)})
