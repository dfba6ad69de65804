"""Transposed convolution beside PyTorch's and JAX's own: values and both gradients."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import convs
import grid
import jax_mps
import oracle

# --- PyTorch ------------------------------------------------------------------------------------------


def sample(rank, number):
    """One configuration of PyTorch's arguments, its layout and its type, out of all there are."""
    rng = np.random.default_rng([rank, number])

    def draw(low, high):
        return tuple(int(n) for n in rng.integers(low, high, size=rank, endpoint=True))

    window, strides, dilation = draw(1, 4), draw(1, 3), draw(1, 2)
    # As much as leaves something of any axis.
    padding = tuple(
        int(rng.integers(0, (k - 1) * d // 2, endpoint=True)) for k, d in zip(window, dilation, strict=True)
    )
    more = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(strides, dilation, strict=True))
    groups = (1, 2, 3)[number % 3]
    inputs, outputs = (groups * n for n in ((1, 1), (2, 3), (3, 1), (1, 2))[number % 4])
    lengths = draw(3, {1: 9, 2: 5, 3: 4}[rank])
    pairs = tuple((p, p) for p in padding)
    transpose_kernel = number % 2 == 0
    case = convs.Conv(
        lengths, window, strides, pairs, more, dilation, inputs, outputs, groups, transpose_kernel
    )
    return case, grid.FORMATS[number // 2 % 2], "float64" if number % 5 == 4 else "float32"


SAMPLES = {(rank, number): sample(rank, number) for rank in (1, 2, 3) for number in range(10)}


def test_the_sample_has_every_kind_of_call():
    for rank in (1, 2, 3):
        cases = [case for (r, _), (case, _, _) in SAMPLES.items() if r == rank]
        kinds = {
            "overlap": [any(k > s for k, s in zip(c.window, c.strides, strict=True)) for c in cases],
            "disjoint": [all(k <= s for k, s in zip(c.window, c.strides, strict=True)) for c in cases],
            "dilation": [max(c.kernel_dilation) > 1 for c in cases],
            "padding": [max(p for p, _ in c.padding) > 0 for c in cases],
            "output_padding": [max(c.output_padding) > 0 for c in cases],
            "dense": [c.groups == 1 for c in cases],
            "groups": [1 < c.groups < max(c.inputs, c.outputs) for c in cases],
            "depthwise": [1 < c.groups == c.inputs == c.outputs for c in cases],
        }
        for kind, found in kinds.items():
            if kind != "disjoint" or rank == 1:
                assert any(found), (rank, kind)


def from_torch(weight, groups, transpose_kernel):
    """PyTorch's `(in, out / groups, *window)`, by explicit transpositions and flips."""
    if transpose_kernel:
        return np.moveaxis(weight, (0, 1), (-1, -2))
    inputs, per_group, *window = weight.shape
    kernel = weight.reshape(groups, inputs // groups, per_group, *window)
    kernel = np.moveaxis(kernel, (0, 1, 2), (-2, -3, -1))  # (*window, in / groups, groups, out / groups)
    kernel = kernel.reshape(*window, inputs // groups, groups * per_group)
    return np.flip(kernel, range(len(window)))


def to_layout(x, rank, data_format):
    return np.moveaxis(x, -rank - 1, -1) if data_format == "channels_last" else x


def torch_results(case, x, weight, g):
    """Value and gradients, of NumPy arrays in PyTorch's layouts."""
    torch = pytest.importorskip("torch")
    function = getattr(torch.nn.functional, f"conv_transpose{case.rank}d")
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weight)]
    pads = tuple(p for p, _ in case.padding)
    y = function(
        *tensors, stride=case.strides, padding=pads, output_padding=case.output_padding,
        dilation=case.kernel_dilation, groups=case.groups,
    )  # fmt: skip
    y.backward(torch.tensor(g))
    return [a.detach().numpy() for a in (y, tensors[0].grad, tensors[1].grad)]


@convs.on_both_paths(("rank", "number"), SAMPLES, lambda rank, number: number < 3)
def test_torch(rank, number, implementation, x64):
    case, data_format, dtype = SAMPLES[rank, number]
    x = oracle.normal(case.shape("channels_first"), dtype)
    weight = oracle.normal((case.inputs, case.outputs // case.groups, *case.window), dtype, 1)
    g = oracle.normal(case.result_shape("channels_first"), dtype, 2)
    y, dx, dw = torch_results(case, x, weight, g)

    f = functools.partial(
        jax_mps.conv_transpose, **case.call, data_format=data_format, implementation=implementation
    )

    @jax.jit
    def run(x, kernel, g):
        y, pull_back = jax.vjp(f, x, kernel)
        return y, *pull_back(g)

    image = functools.partial(to_layout, rank=rank, data_format=data_format)
    kernel = functools.partial(from_torch, groups=case.groups, transpose_kernel=case.transpose_kernel)
    found = run(image(x), kernel(weight), image(g))
    expected = (image(y), image(dx), kernel(dw))
    lengths = (weight.size, weight.size, x.size)
    for actual, reference, length in zip(found, expected, lengths, strict=True):
        assert actual.dtype == dtype
        oracle.assert_close(actual, reference, length=length, scale=2 * math.sqrt(length))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@convs.on_both_paths("number", [1, 3, 5], lambda number: number == 1)
def test_torch_in_float64_of_halves(number, dtype, implementation):
    """PyTorch's own halves round on the way; ours are as close to its float64 as they can be."""
    case = SAMPLES[2, number][0]._replace(transpose_kernel=True)
    shapes = (
        case.shape("channels_first"),
        (case.inputs, case.outputs // case.groups, *case.window),
        case.result_shape("channels_first"),
    )
    x, weight, g = (oracle.normal(s, jnp.dtype(dtype), i) for i, s in enumerate(shapes))
    y, dx, dw = torch_results(case, *(a.astype(np.float64) for a in (x, weight, g)))
    call = {**case.call, "data_format": "channels_first", "implementation": implementation}
    kernel = from_torch(weight, case.groups, True)
    found = convs.run_all(call)(convs.Arrays(x, kernel, g))
    for name, reference in {"forward": y, "data": dx, "weights": from_torch(dw, case.groups, True)}.items():
        assert found[name].dtype == dtype
        oracle.assert_close(found[name], reference, length=x.size, scale=2 * math.sqrt(weight.size))


# --- jax.lax ------------------------------------------------------------------------------------------


def lax_transposed(case, data_format, x, kernel):
    """The definition of the unrotated kernel: a convolution of the image with zeros between its pixels."""
    assert not case.transpose_kernel
    strides, dilation = (oracle.each_axis(v, case.rank) for v in (case.strides, case.kernel_dilation))
    pads = []
    for line, s in zip(case.lines, strides, strict=True):
        extent, expanded = (line.taps - 1) * line.dilation + 1, (line.windows - 1) * s + 1
        low = extent - 1 - line.low
        pads.append((low, line.size + extent - 1 - expanded - low))
    letters = "DHW"[3 - case.rank :]
    layout = f"N{letters}C" if data_format == "channels_last" else f"NC{letters}"
    return lax.conv_general_dilated(
        x, kernel, (1,) * case.rank, pads, lhs_dilation=strides, rhs_dilation=dilation,
        dimension_numbers=(layout, f"{letters}IO", layout), feature_group_count=case.groups,
    )  # fmt: skip


WITH_LAX = {
    "uneven": convs.CASES["uneven"],
    "hifigan": convs.CASES["hifigan"],
    "gaps-wide": convs.CASES["gaps-wide"],
    "groups-dilated": convs.CASES["groups-dilated"],
    "mixed": convs.CASES["mixed"],
    "volume-head": convs.CASES["volume-head"],
    # Enough work to be shared among threads, in uneven parts.
    "large": convs.Conv((19, 26), (4, 4), 2, 1, 0, 1, 40, 24),
    "large-depthwise": convs.Conv((29, 34), (4, 3), 2, 1, 1, 1, 37, 37, 37),
    "large-disjoint": convs.Conv((33, 21), (2, 2), 2, 0, 0, 1, 24, 19),
    "large-groups": convs.Conv((431,), (8,), 4, 2, 0, 1, 48, 32, 4),
    "large-one-output": convs.Conv((9, 10, 11), (3, 3, 3), 2, 1, 1, 1, 16, 1),
    "large-three-outputs": convs.Conv((41, 38), (4, 4), 2, 1, 0, 1, 16, 3),
}


@functools.cache
def lax_results(name, data_format):
    """In float64, and the same of absolute values."""
    case = WITH_LAX[name]
    arrays = jax.tree.map(lambda a: a.astype(np.float64), case.arrays(data_format))

    @jax.jit
    def run(x, kernel, g):
        y, pull_back = jax.vjp(functools.partial(lax_transposed, case, data_format), x, kernel)
        return y, *pull_back(g)

    return [[np.asarray(a) for a in run(*operands)] for operands in (arrays, map(np.abs, arrays))]


@convs.on_both_paths("name", WITH_LAX, lambda name: name in ("mixed", "large"))
def test_lax(name, implementation, x64):
    data_format = grid.FORMATS[list(WITH_LAX).index(name) % 2]
    case = WITH_LAX[name]
    arrays = case.arrays(data_format)
    call = {**case.call, "data_format": data_format, "implementation": implementation}
    found = convs.run_all(call)(arrays)
    for op, reference, sizes in zip(convs.OPS, *lax_results(name, data_format), strict=True):
        assert found[op.name].dtype == np.float32
        oracle.assert_close(
            found[op.name], reference, length=convs.terms(op, arrays), scale=float(sizes.max())
        )


def test_conv_transpose_of_lax(implementation):
    """Its strings as ours: SAME alike, VALID with an output padding where windows do not touch."""
    calls = [
        (rank, window, stride, dilation, padding, transpose_kernel)
        for rank, window, stride, dilation in [(1, 3, 2, 1), (1, 2, 3, 1), (1, 4, 1, 2), (2, 4, 2, 1)]
        for padding in ("SAME", "VALID", (2, 1))
        for transpose_kernel in (False, True)
    ]
    operands = [
        (
            oracle.normal((2, *(5, 4)[:rank], 3)),
            oracle.normal((*[window] * rank, *((2, 3) if t else (3, 2))), seed=1),
        )
        for rank, window, _, _, _, t in calls
    ]

    @jax.jit
    def run(operands):
        pairs = []
        for (rank, window, stride, dilation, padding, transpose_kernel), (x, kernel) in zip(
            calls, operands, strict=True
        ):
            extent = (window - 1) * dilation + 1
            ours = {"padding": padding, "transpose_kernel": transpose_kernel}
            if padding == "VALID":
                ours["output_padding"] = max(stride - extent, 0)
            if isinstance(padding, tuple):  # theirs pads the image with zeros between its pixels
                ours["padding"] = (tuple(extent - 1 - p for p in padding),) * rank
            stock = lax.conv_transpose(
                x, kernel, (stride,) * rank, padding if isinstance(padding, str) else (padding,) * rank,
                rhs_dilation=(dilation,) * rank, transpose_kernel=transpose_kernel,
            )  # fmt: skip
            ours |= {"strides": stride, "kernel_dilation": dilation, "implementation": implementation}
            pairs.append((jax_mps.conv_transpose(x, kernel, **ours), stock))
        return pairs

    for ours, theirs in run(operands):
        oracle.assert_close(ours, np.asarray(theirs, np.float64), length=48, scale=10)
