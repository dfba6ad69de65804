"""The published one-row examples and small images of the MPS kernels, all parameters of them.

`golden.json` was made from the documented formulas and checked against JAX, PyTorch and NumPy; each case
lists with what. The functions here do what a class `MPSCNNPooling...` or `MPSCNNConvolutionTranspose...`
would: clip rectangle, offsets of images, channels and gradients, the untouched rest of the destination, bias
and neuron are slices and sums around one call.
"""

from __future__ import annotations

import collections
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convs
import oracle
from jax_mps import geometry
from jax_mps.ops.avg_pooling import gradient as average_gradient
from jax_mps.ops.avg_pooling import pool as average_pool
from jax_mps.ops.convolution import forward as transposed_forward
from jax_mps.ops.convolution import gradient_data as transposed_data
from jax_mps.ops.convolution import gradient_weights as transposed_weights
from jax_mps.ops.l2_pooling import gradient as l2_pool_gradient
from jax_mps.ops.l2_pooling import pool as l2_pool
from jax_mps.ops.max_pooling import gradient as max_gradient
from jax_mps.ops.max_pooling import pool as max_pool

GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden.json").read_text())
ALL = {case["id"]: case for case in GOLDEN["cases"]}
CASES = {name: case for name, case in ALL.items() if case["op"].startswith("pool")}
CONVOLUTIONS = {name: case for name, case in ALL.items() if case["op"].startswith("conv_transpose")}
KINDS = {"max": "max", "dilated_max": "max", "average": "average", "l2norm": "l2"}


def array(entry: dict[str, Any]) -> np.ndarray:
    return np.array([float(v) for v in entry["data"]]).reshape(entry["shape"])


class Library:
    """The functions of the library on placed windows, in one type."""

    def __init__(self, dtype: str, implementation: str):
        self.dtype, self.implementation = dtype, implementation

    def _call(self, function: Any, *arrays: np.ndarray, **static: Any) -> np.ndarray:
        call = jax.jit(lambda *a: function(*a, **static, implementation=self.implementation))
        out = call(*(jnp.asarray(a, self.dtype) for a in arrays))
        assert out.dtype == self.dtype
        return np.asarray(out, np.float64)

    def _windows(self, axes: list[dict[str, int]], edge: str, pads: list[int]) -> dict[str, Any]:
        window = geometry.Window(
            tuple(
                geometry.Axis.from_offset(
                    a["size"], a["kernel"], a["stride"], a["dilation"], a["offset"], a["first"] + a["out"]
                ).select(a["first"], a["out"])
                for a in axes
            )
        )
        clamp = geometry.Divisor(0, tuple((p, p) for p in pads))
        divisor = clamp if edge == "clamp" else geometry.Divisor(window.taps, ())
        return {"window": window, "start": 1, "edge": edge, "divisor": divisor}

    def forward(self, kind: str, x: np.ndarray, *place: Any) -> np.ndarray:
        static = self._windows(*place)
        static.pop("edge" if kind == "average" else "divisor")
        return self._call({"max": max_pool, "average": average_pool, "l2": l2_pool}[kind], x, **static)

    def gradient(self, kind: str, g: np.ndarray, x: np.ndarray, *place: Any) -> np.ndarray:
        static = self._windows(*place)
        if kind == "average":
            static.pop("edge")
            return self._call(average_gradient, g, **static)
        static.pop("divisor")
        return self._call({"max": max_gradient, "l2": l2_pool_gradient}[kind], g, x, **static)

    def transposed(
        self, op: str, a: np.ndarray, b: np.ndarray, axes: list[dict[str, int]], groups: int
    ) -> np.ndarray:
        """A transposed convolution ("forward") or one of its gradients ("data", "weights")."""
        functions = {"forward": transposed_forward, "data": transposed_data, "weights": transposed_weights}
        return self._call(
            functools.partial(functions[op], out_dtype=np.dtype(self.dtype)),
            a,
            b,
            window=geometry.Window(tuple(geometry.Axis.from_total_offset(**axis) for axis in axes)),
            start=1,
            channels_last=True,
            groups=groups,
            transpose_kernel=False,
            precision=None,
        )


class Loops:
    """The same functions of the oracle, so that it too stands on the published numbers."""

    def _windows(self, axes: list[dict[str, int]], edge: str, pads: list[int]) -> Any:
        lines = [
            oracle.mps_line(
                a["size"],
                a["kernel"],
                a["stride"],
                a["dilation"],
                a["offset"] + a["stride"] * a["first"],
                a["out"],
            )
            for a in axes
        ]
        taps = math.prod(a["kernel"] for a in axes)
        counted = oracle.counted(lines, [(p, p) for p in pads])
        return lines, counted if edge == "clamp" else lambda i: taps

    def forward(self, kind: str, x: np.ndarray, axes: Any, edge: str, pads: list[int]) -> np.ndarray:
        lines, divisor = self._windows(axes, edge, pads)
        spatial = oracle.spatial_first(x, 1, 2)
        y = {
            "max": lambda: oracle.max_of(spatial, lines, edge)[0],
            "average": lambda: oracle.average_of(spatial, lines, divisor),
            "l2": lambda: oracle.norm_of(spatial, lines, edge),
        }[kind]()
        return oracle.back(y, x.shape, 1, 2)

    def gradient(
        self, kind: str, g: np.ndarray, x: np.ndarray, axes: Any, edge: str, pads: list[int]
    ) -> np.ndarray:
        lines, divisor = self._windows(axes, edge, pads)
        g, spatial = (oracle.spatial_first(a, 1, 2) for a in (g, x))
        dx = {
            "max": lambda: oracle.max_gradient_of(g, spatial, lines, edge),
            "average": lambda: oracle.average_gradient_of(g, lines, divisor),
            "l2": lambda: oracle.norm_gradient_of(g, spatial, lines, edge),
        }[kind]()
        return oracle.back(dx, x.shape, 1, 2)

    def transposed(
        self, op: str, a: np.ndarray, b: np.ndarray, axes: list[dict[str, int]], groups: int
    ) -> np.ndarray:
        lines = [oracle.mps_transposed_line(**axis) for axis in axes]
        first = oracle.grouped(a, 2, groups, "channels_last")
        if op == "weights":
            second = oracle.grouped(b, 2, groups, "channels_last")
            return oracle.kernel_out(oracle.transposed_weights_of(first, second, lines), groups, False)
        function = oracle.transposed_of if op == "forward" else oracle.transposed_data_of
        result = function(first, oracle.kernel_in(b, groups, False), lines)
        return oracle.ungrouped(result, 2, a.shape[:1], "channels_last")


def clip(params: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Origin and size (image, y, x) of the clip rectangle inside the destination."""
    shape = params["destination_shape"][:3]
    if params["clip_rect"] is None:
        return [0, 0, 0], shape
    origin = [params["clip_rect"]["origin"][c] for c in "zyx"]
    size = [params["clip_rect"]["size"][c] for c in ("depth", "height", "width")]
    rest = [n - o for n, o in zip(shape, origin, strict=True)]
    return origin, [r if s is None else min(r, s) for r, s in zip(rest, size, strict=True)]


def encode_forward(case: dict[str, Any], kernels: Any) -> np.ndarray:
    """Encodes a pooling kernel: what `encode(commandBuffer:sourceImage:destinationImage:)` does."""
    params, source = case["params"], array(case["inputs"]["source"])
    origin, size = clip(params)
    first, dest_first = (
        params["source_feature_channel_offset"],
        params["destination_feature_channel_offset"],
    )
    channels = source.shape[3] - first
    if params["source_feature_channel_max_count"] is not None:
        channels = min(channels, params["source_feature_channel_max_count"])
    z = params["offset"]["z"]
    source = source[z : z + size[0], :, :, first : first + channels]
    axes = [
        {
            "size": source.shape[1 + i],
            "kernel": params["kernel"][i],
            "stride": params["stride"][i],
            "dilation": params["dilation"][i],
            "offset": params["offset"]["yx"[i]],
            "first": 0,
            "out": size[1 + i],
        }
        for i in range(2)
    ]
    pads = [params["zero_pad"][c] for c in "yx"]
    destination = np.full(params["destination_shape"], params["destination_fill"], np.float64)
    block = tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))
    destination[(*block, slice(dest_first, dest_first + channels))] = kernels.forward(
        KINDS[params["kind"]], source, axes, params["edge_mode"], pads
    )
    return destination


def encode_gradient(case: dict[str, Any], kernels: Any) -> np.ndarray:
    """Encodes a gradient kernel; `region` holds the incoming pixels that count, as (first, last + 1)."""
    params = case["params"]
    source, incoming = array(case["inputs"]["source"]), array(case["inputs"]["source_gradient"])
    origin, size = clip(params)
    primary = [params["primary_offset"][c] for c in "zyx"]
    secondary = [params["secondary_offset"][c] for c in "zyx"]
    limits = params["source_size"] or {}
    limits = [limits.get(c) for c in ("depth", "height", "width")]
    region = [
        (max(p, 0), n if limit is None else min(n, p + limit))
        for p, limit, n in zip(primary, limits, incoming.shape, strict=False)
    ]
    destination = np.full(params["destination_shape"], params["destination_fill"], np.float64)
    block = tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))
    destination[block] = 0
    if any(last <= first for first, last in region):
        return destination

    # Image b of the destination belongs to `primary + b` of the gradient and `secondary + b` of the source.
    images = [b for b in range(size[0]) if region[0][0] <= primary[0] + b < region[0][1]]
    axes = [
        {
            "size": source.shape[1 + i],
            "kernel": params["kernel"][i],
            "stride": params["stride"][i],
            "dilation": params["dilation"][i],
            "offset": secondary[1 + i],
            "first": region[1 + i][0] - primary[1 + i],
            "out": region[1 + i][1] - region[1 + i][0],
        }
        for i in range(2)
    ]
    (y, y_end), (x, x_end) = region[1:]
    dx = kernels.gradient(
        KINDS[params["kind"]],
        incoming[[primary[0] + b for b in images], y:y_end, x:x_end],
        source[[secondary[0] + b for b in images]],
        axes,
        params["edge_mode"],
        [params["zero_pad"][c] for c in "yx"],
    )
    # The clip origin receives the first pixel of the image that the first window covers.
    extents = [(a["kernel"] - 1) * a["dilation"] + 1 for a in axes]
    start = [max(0, s - e // 2) for s, e in zip(secondary[1:], extents, strict=True)]
    dx = dx[:, start[0] :, start[1] :][:, : size[1], : size[2]]
    for b, image in zip(images, dx, strict=True):
        destination[
            origin[0] + b, origin[1] : origin[1] + image.shape[0], origin[2] : origin[2] + image.shape[1]
        ] = image
    return destination


def transposed_axes(
    case: dict[str, Any], lengths: tuple[int, ...], sizes: tuple[int, ...]
) -> list[dict[str, int]]:
    """The axes (y, x), of `lengths` pixels in the source and of `sizes` in the result."""
    params = case["params"]
    assert params.get("edge_mode", "zero") == "zero"
    return [
        {
            "length": lengths[i],
            "kernel": array(case["inputs"]["weights"]).shape[1 + i],
            "stride": params["stride"][i],
            "dilation": params["dilation"][i],
            "total": params["offset"][c] * params["stride"][i] + params["kernel_offset"][c],
            "size": sizes[i],
        }
        for i, c in enumerate("yx")
    ]


def neuron(x: np.ndarray, kind: str, a: float, b: float) -> np.ndarray:
    if kind == "none":
        return x
    leaky = np.where(x >= 0, x, a * x)
    return {"relu": leaky, "relun": np.minimum(leaky, b)}[kind]


def encode_transposed(case: dict[str, Any], kernels: Any) -> dict[str, np.ndarray]:
    params, (source, weights) = case["params"], (array(case["inputs"][n]) for n in ("source", "weights"))
    origin, size = clip(params)
    z = params["offset"]["z"]
    source = source[z : z + size[0]]
    axes = transposed_axes(case, source.shape[1:3], size[1:])
    y = kernels.transposed("forward", source, weights.transpose(1, 2, 3, 0), axes, params["groups"])
    if case["inputs"]["bias"] is not None:
        y = y + array(case["inputs"]["bias"])
    destination = np.full(params["destination_shape"], params["destination_fill"], np.float64)
    block = tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))
    destination[block] = neuron(y, *(params["neuron"][name] for name in ("type", "a", "b")))
    return {"destination": destination}


def encode_transposed_gradient(case: dict[str, Any], kernels: Any) -> dict[str, np.ndarray | None]:
    params = case["params"]
    g, source, weights = (array(case["inputs"][n]) for n in ("source_gradient", "source", "weights"))
    axes = transposed_axes(case, source.shape[1:3], g.shape[1:3])
    groups, option = params["groups"], params["gradient_option"]
    out: dict[str, np.ndarray | None] = dict.fromkeys(case["outputs"])
    if option & 1:
        out["gradient_data"] = kernels.transposed("data", g, weights.transpose(1, 2, 3, 0), axes, groups)
    if option & 2:
        dk = kernels.transposed("weights", g, source, axes, groups)
        out["gradient_weights"] = dk.transpose(3, 0, 1, 2)
        out["gradient_biases"] = g.sum((0, 1, 2))
    return out


def check_transposed(case: dict[str, Any], kernels: Any, rtol: float) -> None:
    forward = case["op"] == "conv_transpose_forward"
    actual = (encode_transposed if forward else encode_transposed_gradient)(case, kernels)
    assert actual.keys() == case["outputs"].keys()
    for name, entry in case["outputs"].items():
        if entry is None:
            assert actual[name] is None
            continue
        expected = array(entry)
        assert actual[name].shape == expected.shape
        np.testing.assert_allclose(
            actual[name], expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=name
        )


def check(case: dict[str, Any], kernels: Any, rtol: float) -> None:
    encode = encode_forward if case["op"] == "pool_forward" else encode_gradient
    expected = array(case["outputs"]["destination"])
    actual = encode(case, kernels)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * 30)


def fits_half(case: dict[str, Any]) -> bool:
    """Whether float16 holds every input exactly and every result at all."""
    inputs = [array(a) for a in case["inputs"].values() if a is not None]
    exact = all(np.array_equal(a, a.astype(np.float16).astype(np.float64), equal_nan=True) for a in inputs)
    outputs = [array(a) for a in case["outputs"].values() if a is not None]
    return exact and all(float(np.nanmax(np.abs(a))) < 6e4 for a in outputs)


def test_the_file_is_complete():
    count = collections.Counter(c["op"] for c in ALL.values())
    pools = {"pool_forward": 51, "pool_gradient": 47}
    convolutions = {"conv_transpose_forward": 24, "conv_transpose_gradient": 15}
    assert count == pools | convolutions
    assert len(CASES) + len(CONVOLUTIONS) == len(GOLDEN["cases"]) == 137


@pytest.mark.parametrize("name", CASES)
def test_oracle(name):
    check(CASES[name], Loops(), GOLDEN["tolerance"]["float64"])


@pytest.mark.parametrize("name", CASES)
def test_float64(name, implementation, x64):
    check(CASES[name], Library("float64", implementation), GOLDEN["tolerance"]["float64"])


# XLA's path is one for all types; the native kernels are one for each.


@pytest.mark.parametrize("name", CASES)
def test_float32(name, native):
    check(CASES[name], Library("float32", "native"), GOLDEN["tolerance"]["float32"])


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if fits_half(c)])
def test_float16(name, native):
    check(CASES[name], Library("float16", "native"), GOLDEN["tolerance"]["float16"])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_transposed_oracle(name):
    check_transposed(CONVOLUTIONS[name], Loops(), GOLDEN["tolerance"]["float64"])


@convs.on_both_paths("name", CONVOLUTIONS, lambda name: name.startswith("convt"))
def test_transposed_float64(name, implementation, x64):
    check_transposed(CONVOLUTIONS[name], Library("float64", implementation), GOLDEN["tolerance"]["float64"])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_transposed_float32(name, native):
    check_transposed(CONVOLUTIONS[name], Library("float32", "native"), GOLDEN["tolerance"]["float32"])


@pytest.mark.parametrize("name", [n for n, c in CONVOLUTIONS.items() if fits_half(c)])
def test_transposed_float16(name, native):
    check_transposed(CONVOLUTIONS[name], Library("float16", "native"), GOLDEN["tolerance"]["float16"])
