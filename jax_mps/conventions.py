"""Kernels and paddings of transposed convolutions in other libraries, to and from the arguments of this one.

Everyone means something else by the padding of a transposed convolution. With L pixels along an axis, a
stride S and a kernel that spans E = dilation * (K - 1) + 1 pixels, let N = (L - 1) * S + E be the pixels
that the kernel reaches. The result has

| library | padding | pixels |
|---|---|---|
| this one | `(low, high)`, cut off | `N - low - high + output_padding` |
| PyTorch | p, cut off on both sides | `N - 2 * p + output_padding` |
| Flax, `jax.lax` | `(a, b)`, put around the image with its zeros | `N - 2 * (E - 1) + a + b` |
| `jax.lax`, with `use_consistent_padding=True` | `(low, high)`, cut off | `N - low - high` |
| Flax, `jax.lax` | "VALID" and "SAME" | `L * S + max(E - S, 0)` and `L * S` |
| Keras | "valid" | `N + output_padding`, by default as Flax |
| Keras | "same" | `N - 2 * (E // 2) + output_padding`, by default as Flax |

The `padding_from_...` functions give pairs for `conv_transpose`, with its `output_padding` left at 0; the
`padding_to_...` functions go the other way and raise a `ValueError` where the other library has no such
padding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import Ints, Padding

__all__ = [
    "indices_from_onnx",
    "indices_from_tensorflow",
    "kernel_from_torch",
    "kernel_to_torch",
    "overlap",
    "padding_from_flax",
    "padding_from_keras",
    "padding_from_torch",
    "padding_to_flax",
    "padding_to_keras",
    "padding_to_torch",
]

Pairs = tuple[tuple[int, int], ...]


# --- kernels ------------------------------------------------------------------------------------------


def kernel_from_torch(weight: Any, groups: int = 1, *, transpose_kernel: bool = False) -> jax.Array:
    """The kernel of `conv_transpose` for a weight of PyTorch's `ConvTranspose1d`, `2d` or `3d`.

        transpose_kernel=False   kernel[k, c, g * out / groups + o] = weight[g * in / groups + c, o, K-1-k]
        transpose_kernel=True    kernel[k, o, c] = weight[c, o, k]

    Args:
      weight: array, or tensor or parameter of PyTorch, of shape `(in, out / groups, *window)` and any dtype.
      groups: the number of groups of channels.
      transpose_kernel: what `conv_transpose` will be told.

    Returns:
      An array of shape `(*window, in / groups, out)`, or `(*window, out / groups, in)` with
      `transpose_kernel`.

    Raises:
      TypeError: `groups` is not an int, or `weight` is a tensor that NumPy cannot hold (sparse, quantized).
      ValueError: `weight` does not have 3 to 5 axes, `groups` does not divide its first, or there are no
        values yet (a lazy layer, the device "meta").

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> weight = jnp.array([1., 10., 100.]).reshape(1, 1, 3)
      >>> jax_mps.kernel_from_torch(weight).ravel()
      Array([100.,  10.,   1.], dtype=float32)

    Source: `torch.nn.ConvTranspose2d`.
    """
    array = array_from_torch("weight", weight)
    geometry.flag("transpose_kernel", transpose_kernel)
    groups = _groups(groups, "weight", array, 0)
    kernel = jnp.moveaxis(array, (0, 1), (-1, -2))
    return kernel if transpose_kernel else _other(kernel, groups)


def kernel_to_torch(kernel: ArrayLike, groups: int = 1, *, transpose_kernel: bool = False) -> jax.Array:
    """The inverse of `kernel_from_torch`.

    Args:
      kernel: array of shape `(*window, in / groups, out)`, or `(*window, out / groups, in)` with
        `transpose_kernel`.
      groups: the number of groups of channels.
      transpose_kernel: what `conv_transpose` was told.

    Returns:
      An array of shape `(in, out / groups, *window)`.

    Raises:
      TypeError: `groups` is not an int.
      ValueError: `kernel` does not have 3 to 5 axes, or `groups` does not divide its last.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> kernel = jnp.zeros((4, 3, 8, 16))
      >>> jax_mps.kernel_to_torch(kernel, groups=2).shape
      (16, 8, 4, 3)

    Source: `torch.nn.ConvTranspose2d`.
    """
    array = jnp.asarray(kernel)
    geometry.flag("transpose_kernel", transpose_kernel)
    groups = _groups(groups, "kernel", array, -1)
    ordinary = array if transpose_kernel else _other(array, groups)
    return jnp.moveaxis(ordinary, (-1, -2), (0, 1))


def array_from_torch(name: str, value: Any) -> jax.Array:
    """An array, or a copy of a tensor of PyTorch with its type; `name` is for messages."""
    torch = sys.modules.get("torch")  # a tensor of PyTorch has imported it
    if torch is None or not isinstance(value, torch.Tensor):
        return jnp.asarray(value)
    if torch.nn.parameter.is_lazy(value):
        raise ValueError(f"{name} must have values, got a lazy parameter: call the layer once before")
    if value.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor on the device 'meta': load a checkpoint before, "
            f"with `load_state_dict(state, assign=True)`"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    narrow = dtype.startswith(("bfloat16", "float8"))  # NumPy has no such types; float32 holds their values
    value = value.detach().cpu().resolve_conj().resolve_neg()
    try:
        array = (value.float() if narrow else value).numpy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor that NumPy can hold, got {dtype}, {value.layout}"
        ) from error
    # A copy, for PyTorch updates its own in place.
    return jnp.array(array, dtype if narrow else None)


def _other(kernel: jax.Array, groups: int) -> jax.Array:
    """From either layout of `conv_transpose` to the other: mirrored, and its channels exchanged."""
    *window, per_group, full = kernel.shape
    kernel = jnp.flip(kernel, range(len(window))).reshape(*window, per_group, groups, full // groups)
    return jnp.moveaxis(kernel, -3, -1).swapaxes(-3, -2).reshape(*window, full // groups, per_group * groups)


def _groups(groups: int, name: str, array: Any, axis: int) -> int:
    groups = geometry.integer("groups", groups)
    if not 3 <= array.ndim <= 5:
        raise ValueError(
            f"{name} must have two channel axes and 1 to 3 spatial axes, got shape {array.shape}"
        )
    if groups < 1 or array.shape[axis] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {array.shape[axis]} channels of {name}, got {groups}"
        )
    return groups


# --- indices of maxima --------------------------------------------------------------------------------


def indices_from_tensorflow(
    argmax: ArrayLike, input_shape: Sequence[int], *, include_batch_in_index: bool = False
) -> jax.Array:
    """Positions for `max_unpool` from those of TensorFlow's `max_pool_with_argmax`.

        position = argmax // channels,    modulo the pixels of a plane if the batch counts

    Args:
      argmax: integers of shape `(batch, rows, columns, channels)`.
      input_shape: shape of what was pooled, `(batch, height, width, channels)`.
      include_batch_in_index: what `max_pool_with_argmax` was told.

    Returns:
      An int32 array of the shape of `argmax`: flat positions in the planes of `height * width` pixels.

    Raises:
      TypeError: `argmax` does not hold integers, or an argument has the wrong type.
      ValueError: `input_shape` does not have 4 sizes of at least 1, or a plane has 2**31 pixels.

    Examples:
      >>> import numpy as np, jax_mps
      >>> argmax = np.array([[[[10, 7]]]])  # row 1, column 2, channel 0; row 1, column 0, channel 1
      >>> jax_mps.conventions.indices_from_tensorflow(argmax, (1, 2, 3, 2)).ravel()
      Array([5, 3], dtype=int32)

    Source: `tf.nn.max_pool_with_argmax`.
    """
    geometry.flag("include_batch_in_index", include_batch_in_index)
    at, shape = _indices("argmax", argmax, input_shape, channels_first=False)
    if len(shape) != 4:
        raise ValueError(f"input_shape must have 4 sizes, (batch, height, width, channels), got {shape}")
    at = at // shape[3]
    return jnp.asarray(at % (shape[1] * shape[2]) if include_batch_in_index else at, np.int32)


def indices_from_onnx(indices: ArrayLike, input_shape: Sequence[int], *, storage_order: int = 0) -> jax.Array:
    """Positions for `max_unpool(..., data_format="channels_first")` from those of ONNX' `MaxPool`.

        position = indices modulo the pixels of a plane

    ONNX counts through the whole array, batch and channels included.

    Args:
      indices: integers of shape `(batch, channels, *spatial)`.
      input_shape: shape of what was pooled, `(batch, channels, *spatial)`.
      storage_order: the attribute of `MaxPool`: 0 counts planes row by row; 1 counts them column by column,
        the first spatial axis fastest.

    Returns:
      An int32 array of the shape of `indices`: flat row-major positions in the planes.

    Raises:
      TypeError: `indices` does not hold integers, or an argument has the wrong type.
      ValueError: `input_shape` does not have 3 to 5 sizes of at least 1, a plane has 2**31 pixels, or
        `storage_order` is neither 0 nor 1.

    Examples:
      >>> import numpy as np, jax_mps
      >>> indices = np.array([[[[5]], [[9]]]])  # of two channels of 2 x 3 pixels
      >>> jax_mps.conventions.indices_from_onnx(indices, (1, 2, 2, 3)).ravel()
      Array([5, 3], dtype=int32)

    Source: the operator `MaxPool` of ONNX.
    """
    at, shape = _indices("indices", indices, input_shape, channels_first=True)
    order = geometry.integer("storage_order", storage_order)
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"input_shape must be (batch, channels, *spatial), 3 to 5 sizes, got {shape}")
    if order not in (0, 1):
        raise ValueError(f"storage_order must be 0 or 1, got {order}")
    sizes = shape[2:]
    at = at % math.prod(sizes)
    if order == 1:
        step, position = math.prod(sizes), at * 0
        for n in sizes:
            step //= n
            position, at = position + at % n * step, at // n
        at = position
    return jnp.asarray(at, np.int32)


def _indices(
    name: str, value: ArrayLike, input_shape: Sequence[int], *, channels_first: bool
) -> tuple[Any, tuple[int, ...]]:
    """Integers as an array that holds them all, and the checked shape of what was pooled."""
    shape = geometry.shape("input_shape", input_shape)
    # Without 64-bit types JAX would cut NumPy's integers to 32 bits.
    array: Any = value if hasattr(value, "dtype") else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    spatial = shape[2:] if channels_first else shape[1:-1]
    if 0 in shape or math.prod(spatial) >= 2**31:
        raise ValueError(
            f"input_shape must have sizes of at least 1, and planes of fewer than 2**31 pixels, got {shape}"
        )
    return array, shape


# --- paddings -----------------------------------------------------------------------------------------


class _Axes:
    """Kernel, stride, dilation and extent of every axis, checked."""

    def __init__(self, window_shape: Sequence[int], strides: Ints, kernel_dilation: Ints) -> None:
        frozen = geometry.freeze("window_shape", window_shape)
        if isinstance(frozen, int) or not 1 <= len(frozen) <= 3:
            raise ValueError(f"window_shape must be a sequence of 1 to 3 ints, got {window_shape!r}")
        self.rank = len(frozen)
        self.kernel = geometry.per_axis("window_shape", frozen, self.rank)
        self.stride = self.each("strides", strides)
        self.dilation = self.each("kernel_dilation", kernel_dilation)
        self.extent = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def each(self, name: str, value: Ints, least: int = 1) -> tuple[int, ...]:
        return geometry.per_axis(name, geometry.freeze(name, value), self.rank, least=least)

    def pairs(self, padding: Padding, output_padding: Ints = 0) -> Pairs:
        """Our padding as pairs that say all: `output_padding` taken off the high end."""
        pads = geometry.transposed_pads(
            geometry.freeze_padding(padding), self.kernel, self.stride, self.dilation
        )
        more = self.each("output_padding", output_padding, least=0)
        return tuple((low, high - op) for (low, high), op in zip(pads, more, strict=True))


def padding_from_flax(
    padding: Padding,
    window_shape: Sequence[int],
    *,
    strides: Ints = 1,
    kernel_dilation: Ints = 1,
    use_consistent_padding: bool = False,
) -> Pairs:
    """The padding of `conv_transpose` for one of Flax's `ConvTranspose` or `jax.lax.conv_transpose`.

        low = E - 1 - a,    high = E - 1 - b        use_consistent_padding=False
        low = a,            high = b                use_consistent_padding=True

    Args:
      padding: "SAME", "VALID", an int for all sides, or an `(a, b)` pair for each spatial axis.
      window_shape: taps of the kernel along each spatial axis.
      strides: as for `conv_transpose`.
      kernel_dilation: as for `conv_transpose`.
      use_consistent_padding: what a newer `jax.lax.conv_transpose` is told. Numbers are then the padding of
        the ordinary convolution, as here; the strings mean the same with and without it.

    Returns:
      A `(low, high)` pair for each spatial axis.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, or lengths disagree.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_from_flax("SAME", (4,), strides=2)
      ((1, 1),)
      >>> jax_mps.conventions.padding_from_flax(1, (4,), strides=2)
      ((2, 2),)
      >>> jax_mps.conventions.padding_from_flax(1, (4,), strides=2, use_consistent_padding=True)
      ((1, 1),)

    Source: `jax.lax.conv_transpose`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    geometry.flag("use_consistent_padding", use_consistent_padding)
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f"padding must be 'SAME', 'VALID', an int or pairs in Flax, got {padding!r}")
        same = padding.upper() == "SAME"
        around = []
        for extent, s in zip(axes.extent, axes.stride, strict=True):
            total = extent + s - 2 + (0 if same else max(extent - s, 0))
            before = extent - 1 if not same or s > extent - 1 else -(-total // 2)
            around.append((before, total - before))
    elif use_consistent_padding:
        return axes.pairs(padding)
    else:
        around = list(axes.pairs(padding))
    return tuple((e - 1 - a, e - 1 - b) for e, (a, b) in zip(axes.extent, around, strict=True))


def padding_to_flax(
    padding: Padding,
    window_shape: Sequence[int],
    *,
    strides: Ints = 1,
    output_padding: Ints = 0,
    kernel_dilation: Ints = 1,
    use_consistent_padding: bool = False,
) -> Pairs:
    """The inverse of `padding_from_flax`: an `(a, b)` pair for each spatial axis, which always exists.

    Args:
      padding: as for `conv_transpose`, and so are the arguments that follow.
      window_shape: taps of the kernel along each spatial axis.
      strides: pixels of the result from one pixel of the image to the next.
      output_padding: pixels beyond the least size.
      kernel_dilation: pixels from one tap to the next.
      use_consistent_padding: what `jax.lax.conv_transpose` will be told.

    Returns:
      What `flax.linen.ConvTranspose` takes as `padding`, or `jax.lax.conv_transpose`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, or lengths disagree.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_to_flax(1, (4, 4), strides=2)
      ((2, 2), (2, 2))

    Source: `jax.lax.conv_transpose`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    geometry.flag("use_consistent_padding", use_consistent_padding)
    pairs = axes.pairs(padding, output_padding)
    if use_consistent_padding:
        return pairs
    return tuple((e - 1 - low, e - 1 - high) for e, (low, high) in zip(axes.extent, pairs, strict=True))


def padding_from_torch(padding: Ints, window_shape: Sequence[int], *, output_padding: Ints = 0) -> Pairs:
    """The padding of `conv_transpose` for one of PyTorch's transposed convolutions, as pairs.

    `conv_transpose` understands PyTorch's `padding` and `output_padding` themselves; this puts both into
    pairs, `(p, p - output_padding)`.

    Args:
      padding: an int of at least 0, or one for each spatial axis.
      window_shape: taps of the kernel along each spatial axis.
      output_padding: an int of at least 0, or one for each spatial axis.

    Returns:
      A `(low, high)` pair for each spatial axis.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, or lengths disagree.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_from_torch(1, (3, 3), output_padding=1)
      ((1, 0), (1, 0))

    Source: `torch.nn.ConvTranspose2d`.
    """
    axes = _Axes(window_shape, 1, 1)
    pads, more = axes.each("padding", padding, 0), axes.each("output_padding", output_padding, 0)
    return tuple((p, p - op) for p, op in zip(pads, more, strict=True))


def padding_to_torch(
    padding: Padding,
    window_shape: Sequence[int],
    *,
    strides: Ints = 1,
    output_padding: Ints = 0,
    kernel_dilation: Ints = 1,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """PyTorch's `padding` and `output_padding` for a padding of `conv_transpose`.

    Args:
      padding: as for `conv_transpose`, and so are the arguments that follow.
      window_shape: taps of the kernel along each spatial axis.
      strides: pixels of the result from one pixel of the image to the next.
      output_padding: pixels beyond the least size.
      kernel_dilation: pixels from one tap to the next.

    Returns:
      Two tuples with an int for each spatial axis.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, lengths disagree, or PyTorch has no such padding: it needs
        `low >= 0` and `0 <= low - high + output_padding < max(strides, kernel_dilation)`.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_to_torch("SAME", (4,), strides=2)
      ((1,), (0,))
      >>> jax_mps.conventions.padding_to_torch("SAME", (2,), strides=3)
      ((0,), (1,))

    Source: `torch.nn.ConvTranspose2d`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    pairs = axes.pairs(padding, output_padding)
    for i, ((low, high), s, d) in enumerate(zip(pairs, axes.stride, axes.dilation, strict=True)):
        if low < 0 or not 0 <= low - high < max(s, d):
            raise ValueError(
                f"padding={(low, high)} of spatial axis {i} cannot be had in PyTorch, which needs low >= 0 "
                f"and an output padding low - high of 0 to {max(s, d) - 1}, got {low - high}"
            )
    return tuple(low for low, _ in pairs), tuple(low - high for low, high in pairs)


def padding_from_keras(
    padding: str,
    window_shape: Sequence[int],
    *,
    strides: Ints = 1,
    output_padding: Ints | None = None,
    kernel_dilation: Ints = 1,
) -> Pairs:
    """The padding of `conv_transpose` for one of Keras' `Conv1DTranspose`, `2D` or `3D`.

    Args:
      padding: "valid" or "same".
      window_shape: taps of the kernel along each spatial axis.
      strides: as for `conv_transpose`.
      output_padding: Keras' own, by default None.
      kernel_dilation: as for `conv_transpose`.

    Returns:
      A `(low, high)` pair for each spatial axis.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: `padding` is neither string, a value is out of range, or lengths disagree.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_from_keras("same", (4, 4), strides=2)
      ((1, 1), (1, 1))

    Source: `keras.layers.Conv2DTranspose`, whose kernel is that of `transpose_kernel=True`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    more = None if output_padding is None else axes.each("output_padding", output_padding, 0)
    if not isinstance(padding, str) or padding.lower() not in ("valid", "same"):
        raise ValueError(f"padding must be 'valid' or 'same' in Keras, got {padding!r}")
    pairs = []
    for i, (e, s) in enumerate(zip(axes.extent, axes.stride, strict=True)):
        if padding.lower() == "valid":
            low, op = 0, max(e, s) - e if more is None else more[i]
            pairs.append((low, -op))
            continue
        # Around the image with its zeros there are `total` pixels, the odd one before it.
        total = e + s - 2 if more is None else e + e % 2 - 2 + more[i]
        before = min(-(-total // 2), e - 1)
        pairs.append((e - 1 - before, e - 1 - (total - before)))
    return tuple(pairs)


def padding_to_keras(
    padding: Padding,
    window_shape: Sequence[int],
    *,
    strides: Ints = 1,
    output_padding: Ints = 0,
    kernel_dilation: Ints = 1,
) -> tuple[str, tuple[int, ...] | None]:
    """Keras' `padding` and `output_padding` for a padding of `conv_transpose`.

    Args:
      padding: as for `conv_transpose`, and so are the arguments that follow.
      window_shape: taps of the kernel along each spatial axis.
      strides: pixels of the result from one pixel of the image to the next.
      output_padding: pixels beyond the least size.
      kernel_dilation: pixels from one tap to the next.

    Returns:
      "valid" or "same", and None or a tuple with an int for each spatial axis.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, lengths disagree, or Keras has no such padding.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.padding_to_keras(1, (4,), strides=2)
      ('same', None)

    Source: `keras.layers.Conv2DTranspose`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    wanted = axes.pairs(padding, output_padding)
    options: dict[str, Any] = {"strides": axes.stride, "kernel_dilation": axes.dilation}
    for name in ("valid", "same"):
        if padding_from_keras(name, axes.kernel, **options) == wanted:
            return name, None
        found = []
        for k, s, d, pair in zip(axes.kernel, axes.stride, axes.dilation, wanted, strict=True):
            for op in range(s):
                if padding_from_keras(name, (k,), strides=s, output_padding=op, kernel_dilation=d) == (pair,):
                    found.append(op)
                    break
        if len(found) == axes.rank:
            return name, tuple(found)
    raise ValueError(
        f"padding={wanted} as pairs cannot be had in Keras, which knows 'valid' and 'same' alone, "
        f"with window_shape={axes.kernel} and strides={axes.stride}"
    )


# --- checkerboards ------------------------------------------------------------------------------------


def overlap(
    window_shape: Sequence[int], strides: Ints, *, kernel_dilation: Ints = 1
) -> tuple[tuple[int, ...], ...]:
    """How many taps of a transposed convolution reach a pixel of its result, away from the border.

    Along an axis with K taps, stride S and dilation D, the pixel i of the result is reached by

        n[r] = number of taps k < K with D * k = r (mod S),        r = (i + low) mod S,

    and along several axes the numbers multiply. Where the numbers of an axis differ the result has a
    checkerboard. With dilation 1 they are equal if and only if S divides K. The same is true of the
    gradient of a convolution or of an average pooling with this window.

    Args:
      window_shape: taps of the kernel along each spatial axis.
      strides: as for `conv_transpose`.
      kernel_dilation: as for `conv_transpose`.

    Returns:
      For each spatial axis a tuple of `strides` ints, one for each r, whose sum is K.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: a value is out of range, or lengths disagree.

    Examples:
      >>> import jax_mps
      >>> jax_mps.conventions.overlap((3, 4), strides=2)
      ((2, 1), (2, 2))
      >>> jax_mps.conventions.overlap((4,), strides=2, kernel_dilation=2)
      ((4, 0),)

    Source: Odena, Dumoulin and Olah, "Deconvolution and Checkerboard Artifacts", 2016.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    return tuple(
        tuple(sum(d * k % s == r for k in range(taps)) for r in range(s))
        for taps, s, d in zip(axes.kernel, axes.stride, axes.dilation, strict=True)
    )
