"""Flax NNX with this library's pooling and convolutions.

    from jax_mps.flax import nnx        instead of        from flax import nnx

is all that a model changes. Whatever this module does not define is Flax's own: `nnx.Module`, `nnx.jit`, ...
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping

import flax.nnx
import jax
import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import PaddingLike
from jax.typing import DTypeLike

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
from jax_mps.ops.convolution import Precision

# `Any` would hide the filter `nnx.Any`, so `typing` keeps its name here.
__all__ = ["Conv", "ConvTranspose", "avg_pool", "l2_pool", "max_pool", "max_unpool", "min_pool"]


# What an attribute that may later hold an array is wrapped in; older versions of Flax do not ask for it.
_data: typing.Any = getattr(flax.nnx, "data", lambda value: value)


class Conv(flax.nnx.Conv):
    """Flax's `Conv`, computed by `jax_mps.conv`.

    It is Flax's layer, and only hands it another `conv_general_dilated`. So arguments, parameters (`kernel`
    and `bias`), initialisers, types and numbers are those of the Flax that is installed, and a checkpoint of
    either loads into the other. Stock JAX computes what `jax_mps.conv` does not: integers and complex
    numbers, more than three spatial axes, empty results.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
      kernel_size: taps along each spatial axis; an int for one axis.
      strides: pixels of the inputs from one pixel of the result to the next; None is 1.
      implementation: None chooses; "native" or "xla" forces a path.
      conv_general_dilated: another function to compute the convolution, such as that of `jax.lax`.
      options: Flax's other arguments: `padding` ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", an int,
        or for each spatial axis an int or a pair), `input_dilation` (with paddings as numbers alone),
        `kernel_dilation`, `feature_group_count`, `use_bias`, `mask`, `dtype`, `param_dtype`, `precision`,
        `kernel_init`, `bias_init`, `promote_dtype`, `preferred_element_type`, `rngs`, `kernel_metadata` and
        `bias_metadata`, as far as the installed version has them.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, shapes disagree, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import nnx
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> layer = nnx.Conv(3, 16, (3, 3), strides=2, padding="CIRCULAR", rngs=nnx.Rngs(0))
      >>> layer(x).shape, layer.kernel.shape
      ((1, 4, 4, 16), (3, 3, 3, 16))

    Source: `flax.nnx.Conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Ints,
        strides: Ints | None = 1,
        *,
        implementation: str | None = None,
        conv_general_dilated: Callable[..., jax.Array] | None = None,
        **options: typing.Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            conv_general_dilated=conv_general_dilated
            or Convolution(implementation, adds_bias=options.get("use_bias", True)),
            **options,
        )
        self.implementation = implementation
        if conv_general_dilated is None and self.use_bias and hasattr(self, "promote_dtype"):
            self.promote_dtype: typing.Any = layers.WideBias(self.promote_dtype)

    def __call__(self, inputs: jax.Array, *arguments: typing.Any, **options: typing.Any) -> jax.Array:
        """The convolution of `inputs`; Flax's other arguments, as far as the installed version has them."""
        if not isinstance(self.conv_general_dilated, Convolution) or self.bias is None:
            return super().__call__(inputs, *arguments, **options)
        with layers.adding_wide_bias(self):
            y = super().__call__(inputs, *arguments, **options)
        promote = getattr(self, "promote_dtype", promote_dtype)
        arrays = (inputs, self.kernel[...], self.bias[...])
        preferred = getattr(self, "preferred_element_type", None)
        return layers.round_half(y, lambda: promote(arrays, dtype=self.dtype), preferred)


class ConvTranspose(flax.nnx.ConvTranspose):
    """Flax's `ConvTranspose`, computed by `jax_mps.conv_transpose`.

    Attributes, parameters (`kernel` and `bias`), initialisers, types and numbers are Flax's, so that a
    checkpoint of either loads into the other. Inputs have shape `(*batch, *spatial, channels)` with any
    number of batch axes. float32, float64, float16 and bfloat16 are computed; integers are promoted.

    Args:
      in_features: the number of input channels.
      out_features: the number of output channels.
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
        `(*window, out_features / groups, in_features)` instead of
        `(*window, in_features / groups, out_features)`.
      promote_dtype: the function of `((inputs, kernel, bias), dtype=...)` that brings all to one type.
      preferred_element_type: the type of the result, a float at least as wide as the computation's.
      groups: the number of groups of channels.
      output_padding: pixels that the high end of each axis has beyond the padding's size.
      padding_convention: "flax", or "torch" for paddings as in PyTorch: numbers alone, which are pixels of
        the *result*, cut off.
      implementation: None chooses; "native" or "xla" forces a path.
      rngs: the random numbers of the initialisers.
      kernel_metadata: what the kernel's `nnx.Param` is to know.
      bias_metadata: what the bias' `nnx.Param` is to know.

    Raises:
      TypeError: an argument has the wrong type, or the inputs an unsupported dtype.
      ValueError: a value is out of range, or shapes disagree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import nnx
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> layer = nnx.ConvTranspose(3, 16, (4, 4), strides=(2, 2), rngs=nnx.Rngs(0))
      >>> layer(x).shape, layer.kernel.shape
      ((1, 16, 16, 16), (4, 4, 3, 16))

      The layer of PyTorch's `ConvTranspose2d(3, 12, 3, stride=2, padding=1, output_padding=1, groups=3)`:

      >>> layer = nnx.ConvTranspose(
      ...     3, 12, (3, 3), strides=2, padding=1, output_padding=1, groups=3, padding_convention="torch",
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(x).shape
      (1, 16, 16, 12)

    Source: `flax.nnx.ConvTranspose`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Ints,
        strides: Ints | None = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: Ints | None = None,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Precision = None,
        kernel_init: typing.Any = default_kernel_init,
        bias_init: typing.Any = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: typing.Any = promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        groups: int = 1,
        output_padding: Ints = 0,
        padding_convention: PaddingConvention = "flax",
        implementation: str | None = None,
        rngs: flax.nnx.Rngs,
        kernel_metadata: Mapping[str, typing.Any] | None = None,
        bias_metadata: Mapping[str, typing.Any] | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.groups = groups
        self.output_padding = output_padding
        self.padding_convention = padding_convention
        self.implementation = implementation
        self.kernel_shape = layers.kernel_shape(self, in_features, out_features)
        self.kernel = flax.nnx.Param(
            kernel_init(rngs.params(), self.kernel_shape, param_dtype), **(kernel_metadata or {})
        )
        self.bias: flax.nnx.Param[jax.Array] | None
        if use_bias:
            bias = bias_init(rngs.params(), (out_features,), param_dtype)
            self.bias = flax.nnx.Param(bias, **(bias_metadata or {}))
        else:
            self.bias = _data(None)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The transposed convolution of `inputs`."""
        kernel = layers.masked(self, self.kernel[...])
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return layers.transposed(self, inputs, kernel, bias)


if typing.TYPE_CHECKING:
    from flax.nnx import *  # type: ignore[assignment, no-redef]  # noqa: F403
else:

    def __getattr__(name: str) -> typing.Any:
        if name.startswith("__"):  # a module's own, such as `__path__`
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(flax.nnx, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *dir(flax.nnx)})
