"""Kernels and paddings of transposed convolutions in other libraries, to and from the arguments of this one.

Everyone means something else by the padding of a transposed convolution. With L pixels along an axis, a
stride S and a kernel that spans E = dilation * (K - 1) + 1 pixels, let N = (L - 1) * S + E be the pixels
that the kernel reaches. The result has

| library | padding | pixels |
|---|---|---|
| this one | `(low, high)`, cut off | `N - low - high + output_padding` |
| PyTorch | p, cut off on both sides | `N - 2 * p + output_padding` |
| Flax, `jax.lax` | `(a, b)`, put around the image with its zeros | `N - 2 * (E - 1) + a + b` |
| Flax, `jax.lax` | "VALID" and "SAME" | `L * S + max(E - S, 0)` and `L * S` |
| Keras | "valid" | `N + output_padding`, by default as Flax |
| Keras | "same" | `N - 2 * (E // 2) + output_padding`, by default as Flax |

The `padding_from_...` functions give pairs for `conv_transpose`, with its `output_padding` left at 0; the
`padding_to_...` functions go the other way and raise a `ValueError` where the other library has no such
padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import Ints, Padding

__all__ = [
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


def kernel_from_torch(weight: ArrayLike, groups: int = 1, *, transpose_kernel: bool = False) -> jax.Array:
    """The kernel of `conv_transpose` for a weight of PyTorch's `ConvTranspose1d`, `2d` or `3d`.

        transpose_kernel=False   kernel[k, c, g * out / groups + o] = weight[g * in / groups + c, o, K-1-k]
        transpose_kernel=True    kernel[k, o, c] = weight[c, o, k]

    Args:
      weight: array of shape `(in, out / groups, *window)`, of any dtype.
      groups: the number of groups of channels.
      transpose_kernel: what `conv_transpose` will be told.

    Returns:
      An array of shape `(*window, in / groups, out)`, or `(*window, out / groups, in)` with
      `transpose_kernel`.

    Raises:
      TypeError: `groups` is not an int.
      ValueError: `weight` does not have 3 to 5 axes, or `groups` does not divide its first.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> weight = jnp.array([1., 10., 100.]).reshape(1, 1, 3)
      >>> jax_mps.kernel_from_torch(weight).ravel()
      Array([100.,  10.,   1.], dtype=float32)

    Source: `torch.nn.ConvTranspose2d`.
    """
    array = jnp.asarray(weight)
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
    padding: Padding, window_shape: Sequence[int], *, strides: Ints = 1, kernel_dilation: Ints = 1
) -> Pairs:
    """The padding of `conv_transpose` for one of Flax's `ConvTranspose` or `jax.lax.conv_transpose`.

        low = E - 1 - a,    high = E - 1 - b

    Args:
      padding: "SAME", "VALID", an int for all sides, or an `(a, b)` pair for each spatial axis.
      window_shape: taps of the kernel along each spatial axis.
      strides: as for `conv_transpose`.
      kernel_dilation: as for `conv_transpose`.

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

    Source: `jax.lax.conv_transpose`.
    """
    axes = _Axes(window_shape, strides, kernel_dilation)
    if isinstance(padding, str) and padding.upper() in ("SAME", "VALID"):
        same = padding.upper() == "SAME"
        around = []
        for extent, s in zip(axes.extent, axes.stride, strict=True):
            total = extent + s - 2 + (0 if same else max(extent - s, 0))
            before = extent - 1 if not same or s > extent - 1 else -(-total // 2)
            around.append((before, total - before))
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
) -> Pairs:
    """The inverse of `padding_from_flax`: an `(a, b)` pair for each spatial axis, which always exists.

    Args:
      padding: as for `conv_transpose`, and so are the arguments that follow.
      window_shape: taps of the kernel along each spatial axis.
      strides: pixels of the result from one pixel of the image to the next.
      output_padding: pixels beyond the least size.
      kernel_dilation: pixels from one tap to the next.

    Returns:
      What `flax.linen.ConvTranspose` takes as `padding`.

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
    pairs = axes.pairs(padding, output_padding)
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
