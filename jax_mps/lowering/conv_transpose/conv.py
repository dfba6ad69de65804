"""The form `conv`: the strided convolution that is transposed, and what JAX makes of its transposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jax_mps.geometry import Window, at_least_zero
from jax_mps.lowering.axes import cut, resize
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.conv_transpose.kernels import from_ordinary, to_ordinary

Array = Any
Pads = Sequence[tuple[Any, Any]]


def forward(conv: Conv, x: Array, kernel: Array) -> Array:
    conv, x = _reaching(conv, x)
    kernel = to_ordinary(conv, kernel)
    transpose = jax.linear_transpose(lambda y: _strided(conv, y, kernel), _trimmed_like(conv, x))
    return _untrimmed(conv, transpose(x)[0])


def data(conv: Conv, g: Array, kernel: Array) -> Array:
    return _strided(conv, _trimmed(conv, g), to_ordinary(conv, kernel))


def weights(conv: Conv, g: Array, x: Array) -> Array:
    g = _trimmed(conv, g)
    like = jax.ShapeDtypeStruct((*conv.window.shape, conv.outputs // conv.groups, conv.inputs), x.dtype)
    (kernel,) = jax.linear_transpose(lambda kernel: _strided(conv, g, kernel), like)(x)
    return from_ordinary(conv, kernel)


def convolve(
    conv: Conv, image: Array, kernel: Array, strides: Sequence[int], pads: Pads, dilation: Sequence[int]
) -> Array:
    """An ordinary convolution; `kernel` is `(*window, channels of a group, channels of the result)`."""
    lifted = conv.platform == "apple" and conv.rank == 1
    if lifted:  # Apple's plugins do not all have groups along one axis
        image = lax.expand_dims(image, (conv.spatial,))
        kernel = lax.expand_dims(kernel, (0,))
        strides, pads, dilation = (1, *strides), ((0, 0), *pads), (1, *dilation)
    rank = len(strides)
    letters = "DHW"[3 - rank :]
    if conv.channels_last:
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    else:
        kernel = lax.transpose(kernel, (rank + 1, rank, *range(rank)))
        numbers = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    out = lax.conv_general_dilated(
        image,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=conv.groups,
        precision=conv.precision,
    )
    return lax.squeeze(out, (conv.spatial,)) if lifted else out


def _strided(conv: Conv, image: Array, kernel: Array) -> Array:
    """The convolution that is transposed, over an image that the windows cover exactly or with padding."""
    axes = conv.window.axes
    pads = tuple((at_least_zero(a.low), at_least_zero(a.high)) for a in axes)
    if not conv.window.is_static():  # the operation pads by known widths alone
        for dim, (low, high) in enumerate(pads, conv.spatial):
            image = resize(image, dim, low, high, 0)
        pads = ((0, 0),) * conv.rank
    strides, dilation = (tuple(a.stride for a in axes), tuple(a.dilation for a in axes))
    return convolve(conv, image, kernel, strides, pads, dilation)


def _trimmed(conv: Conv, image: Array) -> Array:
    """Without the pixels before the first and behind the last window: negative padding, cut off."""
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        image = resize(image, dim, -at_least_zero(-axis.low), -at_least_zero(-axis.high), 0)
    return image


def _untrimmed(conv: Conv, image: Array) -> Array:
    """The transpose of `_trimmed`: zeros where pixels were cut off."""
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        image = resize(image, dim, at_least_zero(-axis.low), at_least_zero(-axis.high), 0)
    return image


def _trimmed_like(conv: Conv, x: Array) -> Any:
    """The type of a trimmed image."""
    shape = list(x.shape)
    shape[conv.channel] = conv.outputs
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        shape[dim] = axis.size - at_least_zero(-axis.low) - at_least_zero(-axis.high)
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _reaching(conv: Conv, x: Array) -> tuple[Conv, Array]:
    """Without the windows at the ends that do not reach the image.

    They would turn into negative padding, with which XLA's CPU compiler reads beside the array.
    """
    axes = []
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        if axis.is_static():
            first = max(-(-(axis.low - axis.extent + 1) // axis.stride), 0)
            limit = min(-(-(axis.size + axis.low) // axis.stride), axis.windows)
            if (first, limit) != (0, axis.windows):
                x, axis = cut(x, dim, first, limit), axis.select(first, limit - first)
        axes.append(axis)
    return dataclasses.replace(conv, window=Window(tuple(axes))), x
