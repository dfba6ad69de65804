"""Transposed convolution, the two halves of its documented gradient, and ordinary convolution.

Three primitives, each linear in each of its operands, each transpose of one being another of them:

    y  = forward(x, kernel)          y[i, o]     = sum over j, k, c of x[j, c] kernel[k, o, c]
    dx = gradient_data(g, kernel)    dx[j, c]    = sum over k, o of    g[i, o] kernel[k, o, c]
    dk = gradient_weights(g, x)      dk[k, o, c] = sum over j of       g[i, o] x[j, c]

where tap k of window j lies at the pixel i = stride * j - low + dilation * k, and taps outside the image are
left out. These are the windows of the ordinary convolution of y with the same kernel, whose result has the
shape of x. So each primitive has a `Window`: `window.sizes` belong to y and g, `window.counts` to x and dx.

`conv`, the ordinary convolution, is the second of them under another name, with its image in the place of g.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from jax_mps import _compat, geometry
from jax_mps.geometry import DataFormat, Ints, Padding, Window
from jax_mps.lowering import conv_transpose as lowered
from jax_mps.lowering import partition, rule
from jax_mps.ops import edges, operands, primitive
from jax_mps.ops.operands import FLOATS

Array = Any
Precision = Any
"""What `jax.lax` takes: None, a `lax.Precision`, its name, or a pair of these for the two operands."""

# --- public functions ---------------------------------------------------------------------------------


@operands.by_parts(2, added="bias")
def conv(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "VALID",
    input_dilation: Ints = 1,
    kernel_dilation: Ints = 1,
    groups: int = 1,
    data_format: DataFormat = "channels_last",
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The ordinary convolution of an image, as neural networks have it: the kernel is not rotated.

        y[..., j, o] = bias[o] + sum over k, c of x[..., i, c] * kernel[k, c, o]

    with `i = strides * j - low + kernel_dilation * k`, and taps outside the image left out. With groups, c
    and o run over the channels of one group. Sums, that with the bias and those of the gradients included,
    are formed in float32 (float64 for float64) and rounded once. Linear in `x` and in `kernel`;
    differentiable to any order.

    It computes what `conv_transpose_gradient_data` does: `conv_transpose(y, kernel, transpose_kernel=True)`,
    with the same kernel, strides and padding, is its transpose in `x`.

    Args:
      x: array of shape `(*batch, *spatial, in)`, or `(*batch, in, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16, bfloat16, complex64 or complex128.
      kernel: array of shape `(*window, in / groups, out)` and of the dtype of `x`; its shape says how many
        spatial axes there are. A weight of PyTorch is one after `jnp.moveaxis(weight, (0, 1), (-1, -2))`.
      strides: pixels of `x` from one pixel of `y` to the next; an int, or one for each spatial axis.
      padding: pixels around `x`: "VALID" (none), "SAME" (outputs = ceil(size / strides)), "SAME_LOWER" (the
        same, the odd pixel before the image), an int for all sides, or a
        `(low, high)` pair for each spatial axis. Negative numbers crop.
      input_dilation: pixels from one pixel of `x` to the next: the `input_dilation - 1` zeros between them
        are pixels of `x` to all other arguments, but are not multiplied. With `strides` above 1 too, the
        results of stride 1 are computed, and those wanted are picked.
      kernel_dilation: pixels of `x` from one tap to the next.
      groups: the number of groups of channels, which divides those of `x` and of `y`; as many groups as
        channels is depthwise.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      precision: what `jax.lax` calls precision, for matrix units that can multiply with less than float32.
        Native kernels always have all of it.
      preferred_element_type: the dtype of the result, of the kind of `x` and at least as wide, which is
        the default.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The array y, with `out` channels and
      `(size + low + high - kernel_dilation * (window - 1) - 1) // strides + 1` pixels along each spatial
      axis, where `size` is `(pixels - 1) * input_dilation + 1`.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: a value is out of range, shapes disagree, the output would be empty, or
        `implementation="native"` cannot be had.

    Examples:
      >>> import jax, jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)
      >>> kernel = jnp.array([1., 10., 100.]).reshape(3, 1, 1)
      >>> jax_mps.conv(x, kernel).ravel()
      Array([321., 432.], dtype=float32)
      >>> jax_mps.conv(x, kernel, strides=2, padding=1).ravel()
      Array([210., 432.], dtype=float32)
      >>> jax_mps.conv(x, kernel, input_dilation=2, padding="SAME").ravel()
      Array([ 10., 201.,  20., 302.,  30., 403.,  40.], dtype=float32)

    Source: `MPSCNNConvolution` in MPSCNNConvolution.h; the options are those of PyTorch's `conv2d` and of
    Flax's `Conv`.
    """
    image = operands.array("x", x, FLOATS)
    weights = operands.array("kernel", kernel, FLOATS)
    placement = geometry.place_conv(
        image.shape, _taps("kernel", weights.shape), strides, padding, input_dilation, kernel_dilation,
        data_format,
    )  # fmt: skip
    params = _params(
        image.shape, placement.transposed, placement.start, groups, False, data_format, precision,
        implementation,
    )  # fmt: skip
    outputs = _check_channels("x", image.shape, "kernel", weights.shape, params)
    operands.check_same_dtype("kernel", weights, "x", image)

    def convolve(x: Array, kernel: Array, out_dtype: Any) -> Array:
        call = params | {"out_dtype": out_dtype}
        return edges.trim(_ordinary(edges.grow(x, placement), kernel, outputs, placement, call), placement)

    out_dtype = _preferred(preferred_element_type, image.dtype)
    channel = _channel(placement.transposed, placement.start, params["channels_last"])
    return _add_bias(convolve, image, weights, bias, out_dtype, outputs, channel)


def _ordinary(
    x: Array, kernel: Array, outputs: int, placement: geometry.ConvPlacement, params: dict[str, Any]
) -> Array:
    """The ordinary convolution with the windows of `placement`."""
    if placement.ordinary is not None:
        return gradient_data(x, kernel, **params | {"window": placement.ordinary, "transpose_kernel": True})
    y, picked = forward(x, kernel, **params), placement.picked
    if picked.sizes == picked.counts:
        return y
    one = lax.full((1,) * picked.rank + (1, outputs), 1, y.dtype)
    pick = {"window": picked, "groups": max(outputs, 1), "transpose_kernel": True}
    return gradient_data(y, one, **params | pick)


@operands.by_parts(2, added="bias")
def conv_transpose(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: Ints = 1,
    padding: Padding = "VALID",
    output_padding: Ints = 0,
    output_size: Ints | None = None,
    kernel_dilation: Ints = 1,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: DataFormat = "channels_last",
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The transposed convolution of an image.

    Every pixel j of `x` is multiplied by the kernel, and the products are added up where they fall. Along
    each spatial axis, with K taps, tap k falls on the pixel `i = strides * j - low + kernel_dilation * k`:

        y[..., i, o] = sum over j, k, c of x[..., j, c] * kernel[k, o, c]       transpose_kernel=True
        y[..., i, o] = sum over j, k, c of x[..., j, c] * kernel[K-1-k, c, o]   transpose_kernel=False

    and `bias[o]` is added to both. The second is the convolution, without rotation of the kernel, of `x` with
    `strides - 1` zeros between its pixels. With groups, c and o run over the channels of one group. Sums,
    that with the bias and those of the gradients included, are formed in float32 (float64 for float64) and
    rounded once. Linear in `x` and in `kernel`; differentiable to any order.

    Args:
      x: array of shape `(*batch, *spatial, in)`, or `(*batch, in, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16, bfloat16, complex64 or complex128.
      kernel: array of the dtype of `x`; its shape says how many spatial axes there are.
        `(*window, in / groups, out)` with `transpose_kernel=False`, used as it is (MPS, Flax);
        `(*window, out / groups, in)` with `transpose_kernel=True`: the kernel of the ordinary convolution
        that this one transposes (PyTorch, Keras; see `kernel_from_torch`).
      bias: array of shape `(out,)`, of any floating dtype no wider than the sums; None adds nothing.
      strides: pixels of `y` from one pixel of `x` to the next; an int, or one for each spatial axis.
      padding: that of the ordinary convolution of `y` to `x`, which is cut off here: "VALID" (none), "SAME"
        (outputs = size * strides), "SAME_LOWER", an int for all sides, or a `(low, high)` pair for each
        spatial axis. Negative numbers add zeros. `conventions` has the paddings of other libraries.
      output_padding: pixels that the high end of each axis has beyond the least size: 0 to
        `max(strides, kernel_dilation) - 1`. Not with "SAME".
      output_size: instead, the pixels of `y` along each spatial axis, as PyTorch takes them; an int, or one
        for each spatial axis. Not with "SAME".
      kernel_dilation: pixels of `y` from one tap to the next.
      groups: the number of groups of channels, which divides those of `x` and of `y`; as many groups as
        channels is depthwise.
      transpose_kernel: which of the two kernels above it is.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      precision: what `jax.lax` calls precision, for matrix units that can multiply with less than float32.
        Native kernels always have all of it.
      preferred_element_type: the dtype of the result, of the kind of `x` and at least as wide, which is
        the default.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The array y, with `out` channels and
      `(size - 1) * strides + kernel_dilation * (window - 1) + 1 - low - high + output_padding` pixels along
      each spatial axis.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: a value is out of range, shapes disagree, the output would be empty, or
        `implementation="native"` cannot be had.

    Examples:
      >>> import jax, jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)
      >>> kernel = jnp.array([1., 10., 100.]).reshape(3, 1, 1)
      >>> jax_mps.conv_transpose(x, kernel, strides=2).ravel()
      Array([100.,  10., 201.,  20., 302.,  30., 403.,  40.,   4.], dtype=float32)
      >>> jax_mps.conv_transpose(x, kernel, strides=2, transpose_kernel=True).ravel()
      Array([  1.,  10., 102.,  20., 203.,  30., 304.,  40., 400.], dtype=float32)
      >>> jax_mps.conv_transpose(x, kernel, strides=2, padding=1, output_padding=1).ravel()
      Array([ 10., 201.,  20., 302.,  30., 403.,  40.,   4.], dtype=float32)

    Source: `MPSCNNConvolutionTranspose` in MPSCNNConvolution.h; the options are those of PyTorch's
    `conv_transpose2d`.
    """
    image = operands.array("x", x, FLOATS)
    weights = operands.array("kernel", kernel, FLOATS)
    if output_size is not None:
        if output_padding != 0:
            raise ValueError(f"output_padding must be 0 with output_size={output_size}, got {output_padding}")
        output_padding = geometry.output_padding_of(
            output_size, image.shape, _taps("kernel", weights.shape), strides, padding, kernel_dilation,
            data_format,
        )  # fmt: skip
    call = _place(
        image.shape, weights.shape, strides, padding, output_padding, kernel_dilation, groups,
        transpose_kernel, data_format, precision, implementation, source="x",
    )  # fmt: skip
    operands.check_same_dtype("kernel", weights, "x", image)

    def convolve(x: Array, kernel: Array, out_dtype: Any) -> Array:
        return edges.trim(forward(x, kernel, out_dtype=out_dtype, **call.params), call.placement)

    channel = _channel(call.params["window"], call.params["start"], call.params["channels_last"])
    out_dtype = _preferred(preferred_element_type, image.dtype)
    return _add_bias(convolve, image, weights, bias, out_dtype, call.result_shape[channel], channel)


@operands.by_parts(2)
def conv_transpose_gradient_data(
    source_gradient: ArrayLike,
    kernel: ArrayLike,
    source_shape: Sequence[int],
    *,
    strides: Ints = 1,
    padding: Padding = "VALID",
    output_padding: Ints = 0,
    kernel_dilation: Ints = 1,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: DataFormat = "channels_last",
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The gradient kernel of `conv_transpose` to its image: an ordinary strided convolution.

        dx[..., j, c] = sum over k, o of source_gradient[..., i, o] * kernel[k, o, c]

    with `i = strides * j - low + kernel_dilation * k`, taps outside left out, and `kernel` written as for
    `transpose_kernel=True`. The transpose of `conv_transpose` in `x`.

    Args:
      source_gradient: gradient of the result of `conv_transpose`, in its shape.
      kernel: the kernel, of the dtype of `source_gradient`.
      source_shape: shape of the image, batch and channels included.
      strides: as for `conv_transpose`, and so are the arguments that follow.
      padding: that of the ordinary convolution.
      output_padding: as for `conv_transpose`.
      kernel_dilation: pixels from one tap to the next.
      groups: the number of groups of channels.
      transpose_kernel: which of the two kernels it is.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      precision: as for `conv_transpose`.
      preferred_element_type: the dtype of the result, by default that of `source_gradient`.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array of shape `source_shape`.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: as for `conv_transpose`, or the shape of `source_gradient` is not that of its result.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> g = jnp.array([1., 10., 100., 1000.]).reshape(1, 4, 1)
      >>> kernel = jnp.array([1., 10., 100.]).reshape(3, 1, 1)
      >>> jax_mps.conv_transpose_gradient_data(g, kernel, (1, 4, 1), padding=1).ravel()
      Array([   20.,   300.,  3000., 20000.], dtype=float32)

    Source: `MPSCNNConvolutionTransposeGradient` with `gradientOption` "with data".
    """
    g = operands.array("source_gradient", source_gradient, FLOATS)
    weights = operands.array("kernel", kernel, FLOATS)
    call = _place(
        geometry.shape("source_shape", source_shape), weights.shape, strides, padding, output_padding,
        kernel_dilation, groups, transpose_kernel, data_format, precision, implementation,
        source="source_shape",
    )  # fmt: skip
    operands.check_shape("source_gradient", g, call.result_shape, "that of the result of conv_transpose")
    operands.check_same_dtype("kernel", weights, "source_gradient", g)
    g = edges.untrim(g, call.placement)
    return gradient_data(g, weights, out_dtype=_preferred(preferred_element_type, g.dtype), **call.params)


@operands.by_parts(2)
def conv_transpose_gradient_weights(
    source_gradient: ArrayLike,
    source: ArrayLike,
    kernel_shape: Sequence[int],
    *,
    strides: Ints = 1,
    padding: Padding = "VALID",
    output_padding: Ints = 0,
    kernel_dilation: Ints = 1,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: DataFormat = "channels_last",
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The gradient kernel of `conv_transpose` to its kernel, summed over the batch.

        dk[k, o, c] = sum over batch, j of source_gradient[..., i, o] * source[..., j, c]

    with `i = strides * j - low + kernel_dilation * k`, taps outside left out, and the kernel written as for
    `transpose_kernel=True`. The transpose of `conv_transpose` in `kernel`.

    Args:
      source_gradient: gradient of the result of `conv_transpose`, in its shape.
      source: the image, of the dtype of `source_gradient`.
      kernel_shape: shape of the kernel, `(*window, in / groups, out)`, or `(*window, out / groups, in)` with
        `transpose_kernel=True`.
      strides: as for `conv_transpose`, and so are the arguments that follow.
      padding: that of the ordinary convolution.
      output_padding: as for `conv_transpose`.
      kernel_dilation: pixels from one tap to the next.
      groups: the number of groups of channels.
      transpose_kernel: which of the two kernels is wanted.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      precision: as for `conv_transpose`.
      preferred_element_type: the dtype of the result, by default that of `source_gradient`.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array of shape `kernel_shape`.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: as for `conv_transpose`, or the shape of `source_gradient` is not that of its result.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> g = jnp.array([1., 10., 100., 1000.]).reshape(1, 4, 1)
      >>> x = jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)
      >>> jax_mps.conv_transpose_gradient_weights(g, x, (3, 1, 1), padding=1).ravel()
      Array([3210., 4321.,  432.], dtype=float32)

    Source: `MPSCNNConvolutionTransposeGradient` with `gradientOption` "with weights and bias"; the gradient
    of the bias is the sum of `source_gradient` over batch and pixels.
    """
    g = operands.array("source_gradient", source_gradient, FLOATS)
    x = operands.array("source", source, FLOATS)
    call = _place(
        x.shape, geometry.shape("kernel_shape", kernel_shape), strides, padding, output_padding,
        kernel_dilation, groups, transpose_kernel, data_format, precision, implementation,
        source="source", kernel="kernel_shape",
    )  # fmt: skip
    operands.check_shape("source_gradient", g, call.result_shape, "that of the result of conv_transpose")
    operands.check_same_dtype("source", x, "source_gradient", g)
    g = edges.untrim(g, call.placement)
    return gradient_weights(g, x, out_dtype=_preferred(preferred_element_type, g.dtype), **call.params)


class _Call(NamedTuple):
    placement: geometry.TransposedPlacement
    params: dict[str, Any]
    result_shape: tuple[Any, ...]


def _place(
    shape: Sequence[Any],
    kernel_shape: Sequence[Any],
    strides: Ints,
    padding: Padding,
    output_padding: Ints,
    kernel_dilation: Ints,
    groups: int,
    transpose_kernel: bool,
    data_format: str,
    precision: Precision,
    implementation: str | None,
    *,
    source: str,
    kernel: str = "kernel",
) -> _Call:
    """Checks the arguments that the transposed functions share; `source` and `kernel` name the shapes."""
    geometry.flag("transpose_kernel", transpose_kernel)
    placement = geometry.place_transposed(
        shape, _taps(kernel, kernel_shape), strides, padding, output_padding, kernel_dilation, data_format
    )
    window, start = placement.window, placement.start
    params = _params(
        shape, window, start, groups, bool(transpose_kernel), data_format, precision, implementation
    )
    outputs = _check_channels(source, shape, kernel, kernel_shape, params, f" with {transpose_kernel=}")
    result = list(shape)
    result[start : start + window.rank] = placement.sizes
    result[_channel(window, start, params["channels_last"])] = outputs
    return _Call(placement, params, tuple(result))


def _taps(kernel: str, kernel_shape: Sequence[Any]) -> tuple[int, ...]:
    """Taps along each axis of a kernel of that shape."""
    if not 3 <= len(kernel_shape) <= 5 or not all(isinstance(n, int) for n in kernel_shape):
        raise ValueError(
            f"{kernel} must have 1 to 3 spatial axes and two channel axes of known sizes, "
            f"got shape {tuple(kernel_shape)}"
        )
    return tuple(kernel_shape[:-2])


def _params(
    shape: Sequence[Any],
    window: Window,
    start: int,
    groups: int,
    transpose_kernel: bool,
    data_format: str,
    precision: Precision,
    implementation: str | None,
) -> dict[str, Any]:
    """The parameters of the primitives, for an array of that shape."""
    static = window.is_static() and all(isinstance(n, int) for n in shape)
    rule.check_implementation(implementation, static=static)
    return {
        "window": window,
        "start": start,
        "channels_last": geometry.channels_last(data_format, window.rank),
        "groups": geometry.integer("groups", groups),
        "transpose_kernel": transpose_kernel,
        "precision": _precision(precision),
        "implementation": implementation,
    }


def _check_channels(
    source: str,
    shape: Sequence[Any],
    kernel: str,
    kernel_shape: Sequence[int],
    params: dict[str, Any],
    choice: str = "",
) -> int:
    """The channels of the result; `choice` says why the kernel has this layout."""
    channel, groups = _channel(params["window"], params["start"], params["channels_last"]), params["groups"]
    if channel < 0:
        raise ValueError(f"{source} needs a channel axis before its spatial axes, got shape {tuple(shape)}")
    inputs = shape[channel]
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if inputs % groups != 0:
        raise ValueError(f"groups must divide the {inputs} channels of {source}, got {groups}")
    per_group, full = kernel_shape[-2:]
    if params["transpose_kernel"]:
        right, outputs, layout = full == inputs, per_group * groups, "(*window, out / groups, in)"
    else:
        right, outputs, layout = per_group == inputs // groups, full, "(*window, in / groups, out)"
    if not right:
        raise ValueError(
            f"{kernel} must have shape {layout}{choice}, where {source} has in = {inputs} channels and "
            f"groups = {groups}, got {tuple(kernel_shape)}"
        )
    if outputs % groups != 0:
        raise ValueError(f"groups must divide the {outputs} output channels of {kernel}, got {groups}")
    return outputs


def _precision(precision: Precision) -> Any:
    """The argument in a form that hashes."""
    if isinstance(precision, list | tuple):
        if len(precision) != 2:
            raise ValueError(f"precision as a pair must have 2 entries, got {precision!r}")
        return tuple(map(_precision, precision))
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    try:
        return lax.Precision(precision)
    except ValueError:
        names = ", ".join(repr(p.name.lower()) for p in lax.Precision)
        raise ValueError(
            f"precision must be None, a jax.lax.Precision, one of {names}, or a pair, got {precision!r}"
        ) from None


def _preferred(preferred: Any, dtype: np.dtype[Any]) -> Any:
    if preferred is None:
        return dtype
    if preferred is UNROUNDED:
        return preferred
    wanted = jnp.dtype(preferred)
    if wanted.name not in FLOATS or (wanted != dtype and wanted.itemsize <= dtype.itemsize):
        raise TypeError(
            f"preferred_element_type must be {dtype.name} or a wider float of {', '.join(FLOATS)}, "
            f"got {wanted.name}"
        )
    if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError("preferred_element_type=float64 needs jax_enable_x64")
    return wanted


# --- sums that are rounded later ----------------------------------------------------------------------

UNROUNDED: Any = object()
"""As a dtype: that of the sums, for numbers that will be rounded to the dtype of the operands.

Where the processor's own products give half precision (CUDA, Apple), they are rounded already: convolutions
of bfloat16 with results in float32 take up to twice as long there.
"""

_Convolve = Callable[[Array, Array, Any], Array]
"""A convolution of an image and a kernel to a result of a given dtype."""


def _add_bias(
    convolve: _Convolve, x: Array, kernel: Array, bias: Any, out_dtype: Any, outputs: int, channel: int
) -> Array:
    """A convolution plus a bias along the axis `channel`, rounded once."""
    if bias is None:
        return convolve(x, kernel, out_dtype)
    added = operands.array("bias", bias, FLOATS)
    if tuple(added.shape) != (outputs,):
        raise ValueError(
            f"bias must have shape ({outputs},), one number for each output channel, got {added.shape}"
        )
    sums = rule.accumulator(out_dtype)
    if added.dtype.itemsize > sums.itemsize:
        raise TypeError(f"bias must be no wider than the sums, {sums.name}, got {added.dtype.name}")
    y = unrounded(convolve, x, kernel, out_dtype)
    added = lax.convert_element_type(added, sums)
    # Spread as an array of the type of the sums, so that its gradient is summed in it, too.
    y = y + lax.expand_dims(added, [i for i in range(y.ndim) if i != channel])
    return lax.convert_element_type(y, out_dtype)


def unrounded(convolve: _Convolve, x: Array, kernel: Array, out_dtype: Any) -> Array:
    """A convolution in the type of its sums, which the caller rounds to `out_dtype` later.

    Its cotangent comes from something of `out_dtype`, so that to compute its derivatives in that type loses
    nothing; in the type of the sums they would take up to twice the memory, and more on a matrix unit.
    """
    sums = rule.accumulator(out_dtype)
    if np.dtype(out_dtype).itemsize >= sums.itemsize:
        return convolve(x, kernel, out_dtype)

    @jax.custom_jvp
    def sum_up(x: Array, kernel: Array) -> Array:
        return convolve(x, kernel, UNROUNDED)

    def jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        (x, kernel), (dx, dkernel) = primals, tangents
        y = sum_up(x, kernel)
        operands_of_terms = [(dx, kernel), (x, dkernel)]
        terms = [
            lax.convert_element_type(convolve(a, b, out_dtype), sums)
            for a, b in operands_of_terms
            if SymbolicZero not in (type(a), type(b))
        ]
        return y, functools.reduce(lax.add, terms) if terms else lax.full_like(y, 0)

    sum_up.defjvp(jvp, symbolic_zeros=True)
    return sum_up(x, kernel)


# --- on windows that are placed already ---------------------------------------------------------------


def forward(x: Array, kernel: Array, *, out_dtype: Any, **params: Any) -> Array:
    """`conv_transpose` with the given windows, which may lie anywhere."""
    return _bind(conv_transpose_p, x, kernel, out_dtype, params)


def gradient_data(g: Array, kernel: Array, *, out_dtype: Any, **params: Any) -> Array:
    """`conv_transpose_gradient_data` with the given windows."""
    return _bind(conv_transpose_gradient_data_p, g, kernel, out_dtype, params)


def gradient_weights(g: Array, x: Array, *, out_dtype: Any, **params: Any) -> Array:
    """`conv_transpose_gradient_weights` with the given windows."""
    return _bind(conv_transpose_gradient_weights_p, g, x, out_dtype, params)


def _bind(prim: Any, a: Array, b: Array, out_dtype: Any, params: dict[str, Any]) -> Array:
    """Binds with operands of one type, and a result of that type or of the one that it accumulates in."""
    dtype = max(a.dtype, b.dtype, key=lambda t: t.itemsize)
    rounds_later = out_dtype is UNROUNDED
    if rounds_later:
        out_dtype = rule.accumulator(dtype)
    if out_dtype == np.float64:
        dtype = np.dtype(np.float64)
    a, b = (lax.convert_element_type(v, dtype) for v in (a, b))
    narrow = np.dtype(out_dtype).itemsize <= dtype.itemsize and out_dtype != dtype
    bound_dtype = rule.accumulator(dtype) if narrow else np.dtype(out_dtype)
    out = prim.bind(*_compat.vary_alike(a, b), out_dtype=bound_dtype, rounds_later=rounds_later, **params)
    return lax.convert_element_type(out, out_dtype)


# --- types and attributes -----------------------------------------------------------------------------


def _channel(window: Window, start: int, channels_last: bool) -> int:
    return start + window.rank if channels_last else start - 1


def _image_aval(
    x: Any, kernel: Any, sizes: Sequence[Any], channels: int, full: bool, params: dict[str, Any]
) -> Any:
    """The type of an image of those sizes and channels, beside the image type `x`.

    `full` says whether the last axis of the kernel holds the channels of all groups, or that before it those
    of one.
    """
    start, channel = params["start"], _channel(params["window"], params["start"], params["channels_last"])
    shape, origin = list(x.shape), list[int | None](range(x.ndim))
    shape[start : start + len(sizes)] = sizes
    shape[channel] = channels
    origin[channel] = None
    if params["groups"] == 1:
        also = _compat.sharding_of(kernel, -1 if full else -2)[0]
    else:
        also = _of_groups(x, channel, params) or (_of_groups(kernel, -1, params) if full else None)
    return _compat.retyped(x, tuple(shape), params["out_dtype"], origin, {channel: also})


def _of_groups(array: Any, axis: int, params: dict[str, Any]) -> Any:
    """How an axis with the channels of several groups is sharded, if each part holds whole groups."""
    names, parts = _compat.sharding_of(array, axis)
    return names if params["groups"] % parts == 0 else None


def _forward_aval(x: Any, kernel: Any, **params: Any) -> Any:
    full = not params["transpose_kernel"]
    outputs = kernel.shape[-1] if full else kernel.shape[-2] * params["groups"]
    return _image_aval(x, kernel, params["window"].sizes, outputs, full, params)


def _data_aval(g: Any, kernel: Any, **params: Any) -> Any:
    full = params["transpose_kernel"]
    inputs = kernel.shape[-1] if full else kernel.shape[-2] * params["groups"]
    return _image_aval(g, kernel, params["window"].counts, inputs, full, params)


def _weights_aval(g: Any, x: Any, **params: Any) -> Any:
    window, channel = params["window"], _channel(params["window"], params["start"], params["channels_last"])
    pair = (g, x) if params["transpose_kernel"] else (x, g)
    minor, full = (a.shape[channel] for a in pair)
    shape = (*window.shape, minor // params["groups"], full)
    if params["groups"] == 1:
        also = {window.rank + i: _compat.sharding_of(a, channel)[0] for i, a in enumerate(pair)}
    else:
        also = {window.rank + 1: _of_groups(pair[1], channel, params)}
    return _compat.retyped(g, shape, params["out_dtype"], [None] * len(shape), also)


def _native(name: str) -> Callable[..., tuple[str, dict[str, Any]]]:
    def call(
        *, window: Window, start: int, channels_last: bool, groups: int, transpose_kernel: bool, **_: Any
    ) -> tuple[str, dict[str, Any]]:
        return name, primitive.window_attributes(window, start) | {
            "channel": np.int64(_channel(window, start, channels_last)),
            "groups": np.int64(groups),
            "transpose_kernel": np.int64(transpose_kernel),
        }

    return call


# --- several devices ----------------------------------------------------------------------------------


class _Roles(NamedTuple):
    """Of the operands and the result of a primitive: which is y, x or the kernel."""

    arrays: tuple[str, str]
    result: str


def _factors(roles: _Roles) -> Callable[..., partition.Factors]:
    """What devices share of a primitive: images, pixels, groups, and channels within a group."""

    def factors(a: Any, b: Any, *, window: Window, start: int, **params: Any) -> partition.Factors:
        channel, groups = _channel(window, start, params["channels_last"]), params["groups"]
        kinds = {"x": partition.POOLED, "y": partition.IMAGE}
        ndim = (a if roles.arrays[0] != "kernel" else b).ndim
        shapes = dict(zip(roles.arrays, (a.shape, b.shape), strict=True))
        sizes = {"group": groups}
        if "kernel" in shapes:
            pair = ("out", "in") if params["transpose_kernel"] else ("in", "out")
            sizes |= {pair[0]: shapes["kernel"][-2], pair[1]: shapes["kernel"][-1] // groups}
        else:
            sizes |= {"in": shapes["x"][channel] // groups, "out": shapes["y"][channel] // groups}

        def channels(factor: str) -> tuple[str, ...]:
            return tuple(f for f in ("group", factor) if sizes[f] > 1) or (factor,)

        arrays = {}
        for name, factor in (("x", "in"), ("y", "out")):
            image = partition.of_images(ndim, start, window.rank, kinds[name])
            arrays[name] = (*image[:channel], channels(factor), *image[channel + 1 :])
        taps = tuple((f"{partition.TAP}{k}",) for k in range(window.rank))
        minor, full = ("out", "in") if params["transpose_kernel"] else ("in", "out")
        arrays["kernel"] = (*taps, (minor,), channels(full))
        return partition.Factors(tuple(arrays[name] for name in roles.arrays), (arrays[roles.result],), sizes)

    return factors


# --- vmap ---------------------------------------------------------------------------------------------
#
# `vmap` adds a batch axis where only an image is mapped. Otherwise the mapped axis becomes part of a channel
# axis: of the one that one operand alone has, if that operand alone is mapped, or of the groups.


class _Channels(NamedTuple):
    """The channel axes of the arrays of a primitive: of images, and two of the kernel."""

    image: int
    per_group: int
    full: int
    groups: int
    transpose_kernel: bool

    @classmethod
    def of_call(cls, params: dict[str, Any]) -> _Channels:
        rank = params["window"].rank
        image = _channel(params["window"], params["start"], params["channels_last"])
        return cls(image, rank, rank + 1, params["groups"], params["transpose_kernel"])

    def of_role(self, array: str, role: str) -> tuple[int, int]:
        """The axis of the channels of y or x in an array, and how many groups it holds."""
        if array != "kernel":
            return self.image, self.groups
        return (self.per_group, 1) if (role == "y") == self.transpose_kernel else (self.full, self.groups)

    def of_groups(self, array: str) -> int:
        """The axis of an array that holds all groups."""
        return self.full if array == "kernel" else self.image


def _batch(roles: _Roles) -> Callable[..., tuple[Array, int]]:
    def batch(prim: Any, arrays: Sequence[Array], dims: Sequence[Any], **params: Any) -> tuple[Array, int]:
        mapped = [i for i, d in enumerate(dims) if d is not None]
        if arrays[mapped[0]].shape[dims[mapped[0]]] == 0:
            return _of_no_examples(prim, arrays, dims, params), 0
        if len(mapped) == 2:
            return _batch_into_groups(prim, arrays, dims, roles, params)
        (i,) = mapped
        case = _batch_into_channels if "kernel" in (roles.arrays[i], roles.result) else _batch_into_batch
        return case(prim, list(arrays), i, dims[i], roles, params)

    return batch


def _of_no_examples(prim: Any, arrays: Sequence[Array], dims: Sequence[Any], params: dict[str, Any]) -> Array:
    """The result for a mapped axis of length 0, which no group and no channel could be made of."""
    shapes = [
        a.shape if d is None else (*a.shape[:d], *a.shape[d + 1 :]) for a, d in zip(arrays, dims, strict=True)
    ]
    one = [jax.ShapeDtypeStruct(shape, a.dtype) for shape, a in zip(shapes, arrays, strict=True)]
    like = jax.eval_shape(lambda *operands: prim.bind(*operands, **params), *one)
    return lax.full((0, *like.shape), 0, like.dtype)


def _batch_into_groups(
    prim: Any, arrays: Sequence[Array], dims: Sequence[Any], roles: _Roles, params: dict[str, Any]
) -> tuple[Array, int]:
    """Both operands are mapped: each example has groups of its own."""
    channels, size = _Channels.of_call(params), arrays[0].shape[dims[0]]
    merged = [
        _insert(a, d, channels.of_groups(name), 1)
        for a, d, name in zip(arrays, dims, roles.arrays, strict=True)
    ]
    out = prim.bind(*merged, **params | {"groups": channels.groups * size})
    return _extract(out, channels.of_groups(roles.result), 1, size), 0


def _batch_into_batch(
    prim: Any, arrays: list[Array], i: int, dim: int, roles: _Roles, params: dict[str, Any]
) -> tuple[Array, int]:
    """Operand `i` alone is mapped, an image, and so is the result: one batch axis more."""
    leading = min(_Channels.of_call(params).image, params["start"])
    at = dim if dim <= leading else 0
    arrays[i] = jnp.moveaxis(arrays[i], dim, at)
    return prim.bind(*arrays, **params | {"start": params["start"] + 1}), at


def _batch_into_channels(
    prim: Any, arrays: list[Array], i: int, dim: int, roles: _Roles, params: dict[str, Any]
) -> tuple[Array, int]:
    """Operand `i` alone is mapped: its examples become channels, of those it shares with the result alone."""
    channels, size, name = _Channels.of_call(params), arrays[i].shape[dim], roles.arrays[i]
    role = roles.result if name == "kernel" else name
    arrays[i] = _insert(arrays[i], dim, *channels.of_role(name, role))
    return _extract(prim.bind(*arrays, **params), *channels.of_role(roles.result, role), size), 0


def _insert(x: Array, dim: int, axis: int, outer: int) -> Array:
    """Moves the axis `dim` into `axis` of the rest, between its first `outer` and its other factor."""
    x = jnp.moveaxis(x, dim, 0)
    size, length = x.shape[0], x.shape[axis + 1]
    split = (size, *x.shape[1 : axis + 1], outer, length // outer, *x.shape[axis + 2 :])
    x = jnp.moveaxis(x.reshape(split), 0, axis + 1)
    return x.reshape(*x.shape[:axis], size * length, *x.shape[axis + 3 :])


def _extract(x: Array, axis: int, outer: int, size: int) -> Array:
    """The inverse of `_insert`, with the new axis in front."""
    inner = x.shape[axis] // (outer * size)
    x = x.reshape(*x.shape[:axis], outer, size, inner, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(size, *x.shape[1 : axis + 1], outer * inner, *x.shape[axis + 3 :])


# --- the three primitives -----------------------------------------------------------------------------

conv_transpose_p = primitive.define(
    "conv_transpose",
    _forward_aval,
    xla_fun=lowered.forward,
    native=_native("conv_transpose"),
    batch=_batch(_Roles(("x", "kernel"), "y")),
    factors=_factors(_Roles(("x", "kernel"), "y")),
)
conv_transpose_gradient_data_p = primitive.define(
    "conv_transpose_gradient_data",
    _data_aval,
    xla_fun=lowered.gradient_data,
    native=_native("conv_transpose_gradient_data"),
    batch=_batch(_Roles(("y", "kernel"), "x")),
    factors=_factors(_Roles(("y", "kernel"), "x")),
)
conv_transpose_gradient_weights_p = primitive.define(
    "conv_transpose_gradient_weights",
    _weights_aval,
    xla_fun=lowered.gradient_weights,
    native=_native("conv_transpose_gradient_weights"),
    batch=_batch(_Roles(("y", "x"), "kernel")),
    factors=_factors(_Roles(("y", "x"), "kernel")),
)


def _transpose(function: Callable[..., Array], i: int) -> Callable[..., Array]:
    """The cotangent of operand `i`: `function` of the cotangent and the other operand, in the type wanted."""

    def transpose(ct: Array, *arrays: Any, out_dtype: Any, rounds_later: bool, **params: Any) -> Array:
        del out_dtype, rounds_later
        return function(ct, arrays[1 - i], out_dtype=arrays[i].aval.dtype, **params)

    return transpose


def _swapped(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b, **params: function(b, a, **params)


primitive.define_multilinear(
    conv_transpose_p, {0: _transpose(gradient_data, 0), 1: _transpose(gradient_weights, 1)}
)
primitive.define_multilinear(
    conv_transpose_gradient_data_p, {0: _transpose(forward, 0), 1: _transpose(_swapped(gradient_weights), 1)}
)
primitive.define_multilinear(
    conv_transpose_gradient_weights_p,
    {0: _transpose(_swapped(forward), 0), 1: _transpose(_swapped(gradient_data), 1)},
)
