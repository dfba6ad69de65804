"""The three operations, by the form that the table of choices names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax import lax

from jax_mps.lowering.conv_transpose import channelwise, dot, phases, taps
from jax_mps.lowering.conv_transpose import conv as conv_form
from jax_mps.lowering.conv_transpose.choices import Form, choose
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.conv_transpose.kernels import from_public, to_public
from jax_mps.lowering.rule import accumulator

Array = Any
OnArrays = Callable[[Conv, Array, Array], Array]
"""A form of an operation. Images have one batch axis, kernels the layout of all forms."""

_FORWARD: dict[Form, OnArrays] = {
    "conv": conv_form.forward,
    "phases": phases.forward,
    "dot": dot.forward,
    "channelwise": channelwise.forward,
}
_DATA: dict[Form, OnArrays] = {
    "conv": conv_form.data,
    "dot": dot.data,
    "channelwise": channelwise.data,
}
_WEIGHTS: dict[Form, OnArrays] = {
    "conv": conv_form.weights,
    "dot": dot.weights,
    "taps": taps.weights,
    "channelwise": channelwise.weights,
}


def forward(x: Array, kernel: Array, *, start: int, **params: Any) -> Array:
    conv = _described(kernel.shape[-2:], **params)
    result = (*conv.window.sizes, conv.outputs)
    return _to_image(_FORWARD[choose("forward", conv)], conv, x, start, kernel, result)


def gradient_data(g: Array, kernel: Array, *, start: int, **params: Any) -> Array:
    conv = _described(kernel.shape[-2:], **params)
    result = (*conv.window.counts, conv.inputs)
    return _to_image(_DATA[choose("data", conv)], conv, g, start, kernel, result)


def gradient_weights(g: Array, x: Array, *, start: int, **params: Any) -> Array:
    channel = start + params["window"].rank if params["channels_last"] else start - 1
    outputs, inputs, groups = g.shape[channel], x.shape[channel], params["groups"]
    pair = (outputs // groups, inputs) if params["transpose_kernel"] else (inputs // groups, outputs)
    conv = _described(pair, **params)
    g, x = (_one_batch_axis(a, start, conv) for a in _widened(conv, g, x))
    if conv.apart:
        return lax.full((*conv.window.shape, *pair), 0, conv.out_dtype)
    kernel = _WEIGHTS[choose("weights", conv)](conv, g, x)
    return lax.convert_element_type(to_public(conv, kernel), conv.out_dtype)


def _described(
    kernel_channels: tuple[int, int], *, groups: int, transpose_kernel: bool, **params: Any
) -> Conv:
    """The convolution whose public kernel has those two channel axes."""
    per_group, full = kernel_channels
    outputs, inputs = (per_group * groups, full) if transpose_kernel else (full, per_group * groups)
    return Conv(groups=groups, outputs=outputs, inputs=inputs, transpose_kernel=transpose_kernel, **params)


def _to_image(
    form: OnArrays, conv: Conv, image: Array, start: int, kernel: Array, result: tuple[Any, ...]
) -> Array:
    """A form of `forward` or `gradient_data` on arrays as the primitives have them.

    `result` has the sizes and the channels of the result.
    """
    batch = image.shape[: start if conv.channels_last else start - 1]
    if conv.apart:
        shape = result if conv.channels_last else (result[-1], *result[:-1])
        return lax.full((*batch, *shape), 0, conv.out_dtype)
    image, kernel = _widened(conv, image, kernel)
    out = form(conv, _one_batch_axis(image, start, conv), from_public(conv, kernel))
    out = lax.convert_element_type(out, conv.out_dtype)
    return out if len(batch) == 1 else lax.reshape(out, (*batch, *out.shape[1:]))


def _widened(conv: Conv, *arrays: Array) -> Iterator[Array]:
    """Half precision in the type that sums are formed in, unless the processor's products do that inside."""
    for array in arrays:
        fits = conv.rounds_later or conv.out_dtype == array.dtype
        inside = fits and conv.platform in ("cuda", "apple")
        yield array if inside else lax.convert_element_type(array, accumulator(array.dtype))


def _one_batch_axis(x: Array, start: int, conv: Conv) -> Array:
    axes = start if conv.channels_last else start - 1
    if axes == 1:
        return x
    return lax.reshape(x, (math.prod(x.shape[:axes]), *x.shape[axes:]))
