"""The meaning of the MPS CNN kernels as loops, one statement for one sentence of their documentation.

Slow, in float64, and on purpose ignorant of the library: nothing here is imported from it, and no formula
is shared with it. `run` takes a case in the schema of golden.json (see `Case` below) and gives its outputs.
Images are `[N, H, W, C]`, weights `[Cout, kH, kW, Cin / groups]`. Everything happens one axis at a time, in
the order z (images), y, x; two-element lists of a case are `[y, x]`, its structs name their fields.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Struct = dict[str, Any]
Pair = Sequence[int]  # y and x
Address = tuple[int, int] | None
Outputs = dict[str, np.ndarray | None]
Case = dict[str, Any]  # {"op": str, "params": {...}, "inputs": {name: array or None}}


def run(case: Case) -> Outputs:
    """The outputs of a case, by name; an output that was not asked for is None."""
    with np.errstate(all="ignore"):
        inputs = {
            name: None if x is None else np.asarray(x, np.float64) for name, x in case["inputs"].items()
        }
        return OPERATIONS[case["op"]](case["params"], **inputs)


# Windows


def dilated_extent(kernel: int, dilation: int) -> int:
    return (kernel - 1) * dilation + 1


def taps(centre: int, kernel: int, dilation: int) -> list[int]:
    """The coordinates that a window reads; an even extent leans to the top left."""
    first = centre - dilated_extent(kernel, dilation) // 2
    return [first + dilation * k for k in range(kernel)]


def address(tap: int, length: int, edge_mode: str) -> int | None:
    """The pixel that a tap reads, or None for the constant zero."""
    if 0 <= tap < length:
        return tap
    if edge_mode == "zero":
        return None
    return 0 if tap < 0 else length - 1


def window(params: Struct, centres: Pair, lengths: Pair, edge_mode: str) -> list[Address]:
    """The (y, x) addresses of all taps in row-major order; None where either coordinate is outside."""
    rows, columns = (
        [address(tap, length, edge_mode) for tap in taps(centre, kernel, dilation)]
        for centre, kernel, dilation, length in zip(
            centres, params["kernel"], params["dilation"], lengths, strict=True
        )
    )
    return [None if y is None or x is None else (y, x) for y, x in itertools.product(rows, columns)]


def values(image: np.ndarray, addresses: Sequence[Address]) -> np.ndarray:
    """What the taps read, `[taps, C]`."""
    return np.array([np.zeros(image.shape[-1]) if at is None else image[at] for at in addresses])


def divisor(params: Struct, centres: Pair, lengths: Pair) -> int:
    """How many pixels an average counts."""
    count = 1
    for axis, name in enumerate("yx"):
        kernel, length = params["kernel"][axis], lengths[axis]
        if params["edge_mode"] == "zero":
            count *= kernel
        else:  # the part of the window inside the image and its band of zeros
            first, band = centres[axis] - kernel // 2, params["zero_pad"][name]
            count *= max(0, min(first + kernel, length + band) - max(first, -band))
    return count


def average_taps(params: Struct, centres: Pair, lengths: Pair) -> list[tuple[int, int]]:
    """The addresses of the taps inside the image: outside ones add nothing, whatever the edge mode."""
    return [at for at in window(params, centres, lengths, "zero") if at is not None]


# Structs


def zyx(struct: Struct) -> tuple[int, int, int]:
    return tuple(struct[name] for name in "zyx")


def clip(rectangle: Struct | None, destination_shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """First pixel and size of the rectangle cut with the destination, as (z, y, x)."""
    bounds = destination_shape[:3]
    if rectangle is None:
        return (0, 0, 0), bounds
    origin = zyx(rectangle["origin"])
    size = [
        left if wanted is None else min(wanted, left)
        for wanted, left in zip(
            (rectangle["size"][name] for name in ("depth", "height", "width")),
            (max(0, bound - start) for bound, start in zip(bounds, origin, strict=True)),
            strict=True,
        )
    ]
    return origin, size


def channels(available: int, offset: int, max_count: int | None) -> int:
    left = available - offset
    return left if max_count is None else min(left, max_count)


def destination_of(params: Struct) -> np.ndarray:
    return np.full(params["destination_shape"], params["destination_fill"], np.float64)


def pixels(size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in size))


# Pooling


def pool_forward(params: Struct, source: np.ndarray) -> Outputs:
    result = destination_of(params)
    (z0, y0, x0), size = clip(params["clip_rect"], result.shape)
    first = params["source_feature_channel_offset"]
    count = channels(source.shape[3], first, params["source_feature_channel_max_count"])
    into = params["destination_feature_channel_offset"]
    if into + count > result.shape[3]:
        raise ValueError("no room for the channels")
    oz, oy, ox = zyx(params["offset"])
    if size[0] and not 0 <= oz <= source.shape[0] - size[0]:
        raise ValueError("source images that are not there")
    for b, j, i in pixels(size):
        image = source[oz + b, :, :, first : first + count]
        centres = (oy + params["stride"][0] * j, ox + params["stride"][1] * i)
        result[z0 + b, y0 + j, x0 + i, into : into + count] = pool_window(params, image, centres)
    return {"destination": result}


def pool_window(params: Struct, image: np.ndarray, centres: Pair) -> np.ndarray:
    lengths = image.shape[:2]
    if params["kind"] == "average":
        count = divisor(params, centres, lengths)
        total = np.zeros(image.shape[-1])
        for at in average_taps(params, centres, lengths):
            total = total + image[at]
        return total / count if count else np.zeros_like(total)
    read = values(image, window(params, centres, lengths, params["edge_mode"]))
    if params["kind"] == "l2norm":
        return np.sqrt((read**2).sum(axis=0))
    return read.max(axis=0)  # a NaN among the taps stays


def pool_gradient(params: Struct, source_gradient: np.ndarray, source: np.ndarray) -> Outputs:
    derivative = np.zeros_like(source)
    primary, secondary = zyx(params["primary_offset"]), zyx(params["secondary_offset"])
    size = params["source_size"] or {}
    counting = []
    for axis, name in enumerate(("depth", "height", "width")):
        end, bound = source_gradient.shape[axis], size.get(name)
        if bound is not None:
            end = min(end, primary[axis] + bound)
        counting.append(range(max(0, primary[axis]), end))
    for p in itertools.product(*counting):
        z, *centres = (
            secondary[axis] + (1, *params["stride"])[axis] * (p[axis] - primary[axis]) for axis in range(3)
        )
        if 0 <= z < source.shape[0]:
            pool_window_gradient(params, source_gradient[p], source[z], centres, derivative[z])

    result = destination_of(params)
    origin, clipped = clip(params["clip_rect"], result.shape)
    extents = [1] + [dilated_extent(*kd) for kd in zip(params["kernel"], params["dilation"], strict=True)]
    begin = [max(0, offset - extent // 2) for offset, extent in zip(secondary, extents, strict=True)]
    for j in pixels(clipped):
        at = tuple(b + k for b, k in zip(begin, j, strict=True))
        inside = all(k < n for k, n in zip(at, source.shape, strict=False))
        result[tuple(o + k for o, k in zip(origin, j, strict=True))] = derivative[at] if inside else 0.0
    return {"destination": result}


def pool_window_gradient(
    params: Struct, gradient: np.ndarray, image: np.ndarray, centres: Pair, derivative: np.ndarray
) -> None:
    """Adds to `derivative` what one pixel of the incoming gradient, `[C]`, sends to the source image."""
    lengths = image.shape[:2]
    if params["kind"] == "average":
        count = divisor(params, centres, lengths)
        for at in average_taps(params, centres, lengths) if count else ():
            derivative[at] += gradient / count
        return
    addresses = window(params, centres, lengths, params["edge_mode"])
    read = values(image, addresses)
    if params["kind"] == "l2norm":
        norm = np.sqrt((read**2).sum(axis=0))
        for at in {at for at in addresses if at is not None}:
            share = addresses.count(at) * image[at] / norm
            derivative[at] += np.where(norm == 0, 0.0, gradient * share)
        return
    for c in range(image.shape[-1]):
        # The first maximum in the order of the taps; a NaN beats every number and the first NaN wins.
        selected = addresses[int(np.argmax(read[:, c]))]
        if selected is not None:
            derivative[selected][c] += gradient[c]


# Transposed convolution


def total_offset(params: Struct) -> list[int]:
    """Where the first window's centre lies in the expanded image, (y, x)."""
    return [
        params["offset"][name] * params["stride"][axis] + params["kernel_offset"][name]
        for axis, name in enumerate("yx")
    ]


def expanded(source: np.ndarray, stride: Sequence[int]) -> np.ndarray:
    """The source with `stride - 1` zeros between neighbours."""
    n, height, width, c = source.shape
    wide = np.zeros(
        (n, max(0, (height - 1) * stride[0] + 1), max(0, (width - 1) * stride[1] + 1), c), source.dtype
    )
    wide[:, :: stride[0], :: stride[1]] = source
    return wide


def conv_transpose_forward(
    params: Struct, source: np.ndarray, weights: np.ndarray, bias: np.ndarray | None
) -> Outputs:
    assert params["edge_mode"] == "zero"
    result = destination_of(params)
    (z0, y0, x0), size = clip(params["clip_rect"], result.shape)
    outputs, kernel_height, kernel_width, group_inputs = weights.shape
    group_outputs = outputs // params["groups"]
    kernel = {"kernel": (kernel_height, kernel_width), "dilation": params["dilation"]}
    image = expanded(source, params["stride"])
    ty, tx = total_offset(params)
    oz = params["offset"]["z"]
    if size[0] and not 0 <= oz <= source.shape[0] - size[0]:
        raise ValueError("source images that are not there")
    for b, i, j in pixels(size):
        read = values(image[oz + b], window(kernel, (i + ty, j + tx), image.shape[1:3], "zero"))
        for o in range(outputs):
            g = o // group_outputs
            x = (
                weights[o].reshape(-1, group_inputs) * read[:, g * group_inputs : (g + 1) * group_inputs]
            ).sum()
            result[z0 + b, y0 + i, x0 + j, o] = neuron(
                params["neuron"], x + (0 if bias is None else bias[o]), o
            )
    return {"destination": result}


def neuron(descriptor: Struct, x: Any, channel: int) -> Any:
    kind = descriptor["type"].replace("_", "").lower()
    a, b, c = (descriptor[name] for name in "abc")
    match kind:
        case "none":
            return x
        case "relu":
            return x if x >= 0 else a * x
        case "linear":
            return a * x + b
        case "sigmoid":
            return 1 / (1 + np.exp(-x))
        case "hardsigmoid":
            return min(max(a * x + b, 0), 1)
        case "tanh":
            return a * np.tanh(b * x)
        case "absolute":
            return abs(x)
        case "softplus":
            return a * np.log(1 + np.exp(b * x))
        case "softsign":
            return x / (1 + abs(x))
        case "elu":
            return x if x >= 0 else a * (np.exp(x) - 1)
        case "prelu":
            return x if x >= 0 else a[channel] * x
        case "relun":
            return min(x if x >= 0 else a * x, b)
        case "power":
            return (a * x + b) ** c
        case "exponential":
            return c ** (a * x + b)
        case "logarithm":
            return np.log(a * x + b) / np.log(c)
        case "gelu":
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    raise ValueError(kind)


def conv_transpose_gradient(
    params: Struct, source_gradient: np.ndarray, source: np.ndarray, weights: np.ndarray
) -> Outputs:
    outputs, kernel_height, kernel_width, group_inputs = weights.shape
    group_outputs = outputs // params["groups"]
    (sy, sx), (dy, dx) = params["stride"], params["dilation"]
    ty, tx = total_offset(params)
    fy, fx = dilated_extent(kernel_height, dy) // 2, dilated_extent(kernel_width, dx) // 2
    images, height, width, _ = source_gradient.shape
    oz = params["offset"]["z"]  # image b of the gradient belongs to source image oz + b
    data, filters = np.zeros_like(source), np.zeros_like(weights)
    for n in range(images):
        for jy, jx in pixels(source.shape[1:3]):
            for ky, kx in pixels((kernel_height, kernel_width)):
                iy, ix = sy * jy - ty + fy - dy * ky, sx * jx - tx + fx - dx * kx
                if not (0 <= iy < height and 0 <= ix < width):
                    continue
                for o in range(outputs):
                    g = o // group_outputs
                    fed = slice(g * group_inputs, (g + 1) * group_inputs)
                    e = source_gradient[n, iy, ix, o]
                    data[oz + n, jy, jx, fed] += weights[o, ky, kx] * e
                    filters[o, ky, kx] += e * source[oz + n, jy, jx, fed]
    with_data, with_weights = (params["gradient_option"] & bit for bit in (1, 2))
    return {
        "gradient_data": data if with_data else None,
        "gradient_weights": filters if with_weights else None,
        "gradient_biases": source_gradient.sum(axis=(0, 1, 2)) if with_weights else None,
    }


OPERATIONS: dict[str, Callable[..., Outputs]] = {
    "pool_forward": pool_forward,
    "pool_gradient": pool_gradient,
    "conv_transpose_forward": conv_transpose_forward,
    "conv_transpose_gradient": conv_transpose_gradient,
}
