"""Values and first derivatives of transposed convolution against loops over pixels and taps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convs
import grid
import jax_mps
import oracle
from jax_mps.geometry import Axis, Window
from jax_mps.ops.convolution import forward, gradient_data, gradient_weights


@functools.cache
def results(name, data_format, implementation):
    """The functions, their reverse and their forward mode of one case, in one compiled program."""
    case = convs.CASES[name]
    call = {**case.call, "data_format": data_format, "implementation": implementation}
    arrays = case.arrays(data_format)

    @jax.jit
    def run(arrays):
        x, kernel, g = arrays
        f = functools.partial(jax_mps.conv_transpose, **call)
        y, pull_back = jax.vjp(f, x, kernel)
        dx, dk = pull_back(g)
        # XLA compiles the same twice; that a gradient is the documented kernel is tested elsewhere too.
        ops = (convs.DATA, convs.WEIGHTS) if implementation == "native" else ()
        documented = {op.name: op.apply(arrays, **call) for op in ops}
        # Of the case's own arrays, so that the tangent is twice the value.
        tangent = jax.jvp(f, (x, kernel), (x, kernel))[1]
        return {"forward": y, "data": dx, "weights": dk, "tangent": tangent, "documented": documented}

    return arrays, run(arrays)


@convs.each_path
def test_geometry(name, data_format, implementation):
    arrays, found = results(name, data_format, implementation)
    expected = convs.expected(name, data_format)
    for op in convs.OPS:
        value, scale = expected[op.name]
        tolerance = {"length": convs.terms(op, arrays), "scale": scale}
        assert found[op.name].dtype == np.float32
        oracle.assert_close(found[op.name], value, **tolerance)
        if op.name in found["documented"]:
            oracle.assert_close(found["documented"][op.name], value, **tolerance)
    value, scale = expected["forward"]
    oracle.assert_close(
        found["tangent"], 2 * value, length=convs.terms(convs.FORWARD, arrays), scale=2 * scale
    )


@convs.on_both_paths(
    "name", ["halves", "fcn", "upsample", "groups-dilated"], lambda n: n in ("fcn", "upsample")
)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(dtype, name, implementation, x64):
    case = convs.CASES[name]
    arrays = case.arrays(dtype=dtype)
    found = convs.run_all({**case.call, "implementation": implementation})(arrays)
    for op in convs.OPS:
        assert found[op.name].dtype == dtype
        convs.check(op, found[op.name], arrays, **case.call)


@convs.on_both_paths("name", ["dilated-output-padding", "fcn"], lambda name: name != "fcn")
def test_batch_axes(name, implementation):
    case = convs.CASES[name]
    ways = {(b, f): case.arrays(f, b) for b in ((), (1,), (2, 1, 2)) for f in grid.FORMATS}

    @jax.jit
    def run(*several):
        return [
            [op.apply(a, **case.call, data_format=f, implementation=implementation) for op in convs.OPS]
            for (_, f), a in zip(ways, several, strict=True)
        ]

    for ((_, data_format), arrays), found in zip(ways.items(), run(*ways.values()), strict=True):
        for op, actual in zip(convs.OPS, found, strict=True):
            convs.check(op, actual, arrays, **case.call, data_format=data_format)


CHANNELS = [
    (1, 33, 1), (33, 1, 1), (3, 16, 1), (16, 3, 1), (7, 9, 1),
    (33, 33, 33), (18, 9, 9), (6, 66, 6), (34, 34, 2),
]  # fmt: skip


@convs.on_both_paths(
    ("inputs", "outputs", "groups", "data_format"),
    [(*c, f) for c in CHANNELS for f in grid.FORMATS],
    lambda i, o, g, f: f == "channels_last" and (i, o) in ((1, 33), (16, 3), (33, 33), (34, 34)),
)
def test_channels(data_format, inputs, outputs, groups, implementation):
    """Vector registers and matrix tiles hold many channels at once, with a tail."""
    case = convs.Conv((5, 9), (3, 4), 2, 1, 0, 1, inputs, outputs, groups, inputs % 2 == 1)
    call = {**case.call, "data_format": data_format}
    arrays = case.arrays(data_format)
    found = convs.run_all({**call, "implementation": implementation})(arrays)
    for op in convs.OPS:
        convs.check(op, found[op.name], arrays, **call)


def test_eager_equals_jit_bit_by_bit(implementation):
    case = convs.CASES["fcn"]
    arrays, call = case.arrays(), {**case.call, "implementation": implementation}
    compiled = convs.run_all(call)(arrays)
    for op in convs.OPS:
        np.testing.assert_array_equal(op.apply(arrays, **call), compiled[op.name])


@pytest.mark.parametrize("seed", range(30))
def test_random_calls(seed, implementation):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))

    def draw(low, high):
        return tuple(int(n) for n in rng.integers(low, high, size=rank))

    window, strides, dilation = draw(1, {1: 12, 2: 6, 3: 4}[rank]), draw(1, 5), draw(1, 4)
    pads = tuple((int(rng.integers(-2, k * d + 1)), int(rng.integers(-2, k * d + 1)))
                 for k, d in zip(window, dilation, strict=True))  # fmt: skip
    more = tuple(int(rng.integers(max(sd))) for sd in zip(strides, dilation, strict=True))
    groups = int(rng.integers(1, 4))
    case = convs.Conv(
        draw(1, {1: 20, 2: 8, 3: 5}[rank]), window, strides, pads, more, dilation,
        groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4)), groups, bool(rng.integers(2)),
    )  # fmt: skip
    data_format = grid.FORMATS[int(rng.integers(2))]
    call = {**case.call, "data_format": data_format}
    if any(a.size < 1 for a in case.lines):
        x, kernel = np.zeros(case.shape(data_format), np.float32), np.zeros(case.kernel_shape, np.float32)
        with pytest.raises(ValueError, match="output size would be below 1"):
            jax_mps.conv_transpose(x, kernel, **call, implementation=implementation)
        return
    arrays = case.arrays(data_format)
    found = convs.run_all({**call, "implementation": implementation})(arrays)
    for op in convs.OPS:
        convs.check(op, found[op.name], arrays, **call)


# (length, kernel, stride, dilation, total offset, size) of an MPS kernel; of some no window reaches it.
TOTAL_OFFSETS = [
    (4, 3, 2, 1, 0, 7), (4, 3, 2, 1, -1, 9), (4, 4, 2, 1, 2, 5), (4, 2, 3, 1, -7, 11),
    (3, 3, 2, 2, 5, 6), (3, 2, 1, 3, -2, 9), (4, 1, 2, 1, 1, 8), (3, 3, 2, 1, 40, 4),
    (3, 3, 2, 1, -40, 4), (2, 5, 3, 1, 3, 1),
]  # fmt: skip


def test_any_total_offset(implementation):
    """What no padding with an output padding says: any window of the expanded image, any size."""
    axes = [Axis.from_total_offset(*place) for place in TOTAL_OFFSETS]
    for axis, place in zip(axes, TOTAL_OFFSETS, strict=True):
        assert axis.total_offset == place[4]
    shapes = [((2, a.windows, 4), (a.taps, 2, 6), (2, a.size, 6)) for a in axes]
    arrays = [convs.Arrays(*(oracle.normal(s, seed=i) for i, s in enumerate(each))) for each in shapes]

    @jax.jit
    def run(arrays):
        def each(axis, a):
            params = {
                "window": Window((axis,)), "start": 1, "channels_last": True, "groups": 2,
                "transpose_kernel": False, "precision": None, "out_dtype": np.dtype(np.float32),
                "implementation": implementation,
            }  # fmt: skip
            return (
                forward(a.x, a.kernel, **params),
                gradient_data(a.g, a.kernel, **params),
                gradient_weights(a.g, a.x, **params),
            )

        return [each(axis, a) for axis, a in zip(axes, arrays, strict=True)]

    for place, a, (y, dx, dk) in zip(TOTAL_OFFSETS, arrays, run(arrays), strict=True):
        lines = [oracle.mps_transposed_line(*place)]
        x, g = (oracle.grouped(v, 1, 2, "channels_last") for v in (a.x, a.g))
        kernel = oracle.kernel_in(a.kernel, 2, False)
        references = (
            oracle.ungrouped(oracle.transposed_of(x, kernel, lines), 1, (2,), "channels_last"),
            oracle.ungrouped(oracle.transposed_data_of(g, kernel, lines), 1, (2,), "channels_last"),
            oracle.kernel_out(oracle.transposed_weights_of(g, x, lines), 2, False),
        )
        for actual, reference in zip((y, dx, dk), references, strict=True):
            oracle.assert_close(actual, reference, length=30, scale=4)


# --- how arguments may be written ---------------------------------------------------------------------


def written(strides, padding="VALID", output_padding=0, kernel_dilation=1):
    return locals()


WAYS = {
    "ints": (written(2, 1, 1), written((2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1))),
    "lists": (written([2, 1], [[0, 1], [1, 0]], [1, 0]), written((2, 1), ((0, 1), (1, 0)), (1, 0))),
    "numpy": (written(np.array([2, 1]), np.int64(1), np.int32(0)), written((2, 1), ((1, 1), (1, 1)))),
    "numpy-pairs": (written(2, np.array([[0, 1], [1, 0]])), written((2, 2), ((0, 1), (1, 0)))),
    "dilation": (written(1, 0, [0, 2], (1, 3)), written((1, 1), ((0, 0), (0, 0)), (0, 2), (1, 3))),
    "same": (written(2, "same"), written((2, 2), "SAME")),
    "valid": (written(2, "valid"), written((2, 2), ((0, 0), (0, 0)))),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_arguments(way):
    short, long = WAYS[way]
    arrays = convs.Conv((3, 4), (3, 2), **long).arrays()
    for op in convs.OPS:
        shapes = [jax.eval_shape(functools.partial(op.apply, **c), arrays).shape for c in (short, long)]
        assert shapes[0] == shapes[1]
    # The same parameters, which are all that the rest ever sees.
    one, other = (
        jax.make_jaxpr(functools.partial(jax_mps.conv_transpose, **c))(arrays.x, arrays.kernel)
        for c in (short, long)
    )
    assert str(one) == str(other)


@pytest.mark.parametrize("name", ["SAME", "SAME_LOWER"])
def test_strings_pad_as_documented(name):
    """Both give size * strides, and are the padding of the ordinary convolution from there to here."""
    for length, window, stride, dilation in [
        (5, 3, 2, 1),
        (4, 2, 3, 1),
        (3, 5, 2, 2),
        (6, 4, 1, 1),
        (5, 1, 4, 3),
    ]:
        x, kernel = np.zeros((1, length, 1), np.float32), np.zeros((window, 1, 1), np.float32)
        call = {"strides": stride, "kernel_dilation": dilation}
        size = length * stride
        y = jax.eval_shape(functools.partial(jax_mps.conv_transpose, padding=name, **call), x, kernel)
        assert y.shape == (1, size, 1)
        # What `lax` pads for a convolution that has the pixels we return.
        extent = (window - 1) * dilation + 1
        ((lo, hi),) = jax.lax.padtype_to_pads((size,), (extent,), (stride,), name)
        assert (size + lo + hi - extent) // stride + 1 == length
        pairs = functools.partial(jax_mps.conv_transpose, padding=((lo, hi),), **call)
        missing = size - jax.eval_shape(pairs, x, kernel).shape[1]
        assert 0 <= missing < max(stride, dilation)
        named, paired = (
            jax.make_jaxpr(functools.partial(jax_mps.conv_transpose, **call, **padding))(x, kernel)
            for padding in ({"padding": name}, {"padding": ((lo, hi),), "output_padding": missing})
        )
        assert str(named) == str(paired)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_output_size_as_in_pytorch(rank, implementation):
    torch = pytest.importorskip("torch")
    x, weight = oracle.normal((2, 4, *(5, 4, 3)[:rank])), oracle.normal((4, 3, *(3, 4, 2)[:rank]), seed=1)
    stride, dilation = (3, 2, 1)[:rank], (1, 1, 2)[:rank]
    layer = getattr(torch.nn, f"ConvTranspose{rank}d")(
        4, 3, weight.shape[2:], stride, padding=1, dilation=dilation, bias=False
    )
    layer.weight.data[:] = torch.tensor(weight)
    least = layer(torch.tensor(x)).shape[2:]
    call = functools.partial(
        jax_mps.conv_transpose, x, jax_mps.kernel_from_torch(weight), strides=stride, padding=1,
        kernel_dilation=dilation, data_format="channels_first", implementation=implementation,
    )  # fmt: skip
    for more in range(2):
        size = tuple(n + min(more, s - 1) for n, s in zip(least, stride, strict=True))
        expected = layer(torch.tensor(x), output_size=size).detach().numpy()
        np.testing.assert_allclose(call(output_size=size), expected, rtol=1e-5, atol=1e-5)
    most = [n + max(s, d) - 1 for n, s, d in zip(least, stride, dilation, strict=True)]
    for wrong in (least[0] - 1, most[0] + 1):
        match = rf"output_size must be {least[0]} to {most[0]} on spatial axis 0, .* got {wrong}"
        with pytest.raises(ValueError, match=match):
            call(output_size=(wrong, *least[1:]))
    with pytest.raises(ValueError, match=r"output_padding must be 0 with output_size=.* got 1"):
        call(output_size=most, output_padding=1)
    with pytest.raises(TypeError, match=r"output_size must be an int known at trace time, got 1.5"):
        call(output_size=1.5)


@pytest.mark.parametrize("name", ["SAME", "SAME_LOWER"])
def test_no_output_size_with_strings(name):
    x, kernel = np.zeros((1, 4, 1), np.float32), np.zeros((3, 1, 1), np.float32)
    with pytest.raises(ValueError, match=f"output_size must be None with padding='{name}'"):
        jax_mps.conv_transpose(x, kernel, padding=name, output_size=4)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("last", [True, False])
def test_short_names_of_layouts(rank, last):
    """They mean the same, and check the number of axes."""
    names = ("NWC", "NHWC", "NDHWC") if last else ("NCW", "NCHW", "NCDHW")
    long = "channels_last" if last else "channels_first"
    x = oracle.normal((2, *(4,) * rank, 4) if last else (2, 4, *(4,) * rank))
    kernel = oracle.normal((*(2,) * rank, 4, 4))
    window = {"window_shape": (2,) * rank, "strides": 2}
    for call in (
        functools.partial(jax_mps.max_pool, x, **window),
        functools.partial(jax_mps.avg_pool, x, **window),
        functools.partial(jax_mps.l2_pool, x, **window),
        functools.partial(jax_mps.max_unpool, x, x.astype(np.int32), (6,) * rank),
        functools.partial(jax_mps.conv, x, kernel),
        functools.partial(jax_mps.conv_transpose, x, kernel),
    ):
        np.testing.assert_array_equal(call(data_format=names[rank - 1]), call(data_format=long))
        other, axes = names[rank % 3], rank % 3 + 1
        with pytest.raises(ValueError, match=rf"data_format='{other}' has {axes} spatial axes, .* {rank}"):
            call(data_format=other)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_pooling_pads_as_jax_with_same_lower(rank):
    x = oracle.normal((2, *(5, 7, 6)[:rank], 3))
    window, strides = (2, 3, 4)[:rank], (1, 2, 1)[:rank]
    y = jax_mps.max_pool(x, window, strides=strides, padding="SAME_LOWER")
    expected = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), "SAME_LOWER")
    np.testing.assert_array_equal(y, expected)


def test_nested_lists_are_arrays(implementation):
    y = jax_mps.conv_transpose([[[1.0], [2.0]]], [[[3.0]], [[5.0]]], strides=2, implementation=implementation)
    np.testing.assert_array_equal(y[0, :, 0], [5, 3, 10, 6])


def test_the_result_keeps_no_weak_type(implementation):
    weak = jnp.broadcast_to(1.0, (1, 4, 1))
    assert weak.weak_type
    arrays = convs.Arrays(weak, weak[0, :, :, None], jnp.broadcast_to(1.0, (1, 7, 1)))
    for op in convs.OPS:
        assert not op.apply(arrays, implementation=implementation).weak_type


# --- odd sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_empty_batches_and_channels(data_format, transpose_kernel, implementation):
    """Nothing in gives zeros, no results are an empty array."""
    shapes = [
        (convs.Conv((3, 4), (3, 2), 2, 1, inputs=i, outputs=o, transpose_kernel=transpose_kernel), batch)
        for i, o, batch in [(3, 2, (0,)), (3, 2, (2, 0)), (0, 2, (2,)), (3, 0, (2,)), (0, 0, (2,))]
    ]

    @jax.jit
    def run(several):
        def each(case, a):
            call = {**case.call, "data_format": data_format, "implementation": implementation}
            f = functools.partial(jax_mps.conv_transpose, **call)
            return [op.apply(a, **call) for op in convs.OPS], jax.vjp(f, a.x, a.kernel)[1](a.g)

        return [each(case, a) for (case, _), a in zip(shapes, several, strict=True)]

    several = [case.arrays(data_format, batch) for case, batch in shapes]
    for arrays, (found, pulled) in zip(several, run(several), strict=True):
        wanted = (arrays.g, arrays.x, arrays.kernel)
        for actual, like in zip((*found, *pulled), (*wanted, *wanted[1:]), strict=True):
            np.testing.assert_array_equal(actual, np.zeros(like.shape, np.float32))


def test_groups_of_no_channels(implementation):
    case = convs.Conv((4,), (3,), 2, inputs=0, outputs=4, groups=2, transpose_kernel=True)
    arrays = case.arrays()
    found = convs.run_all({**case.call, "implementation": implementation})(arrays)
    assert [found[op.name].shape for op in convs.OPS] == [(2, 9, 4), (2, 4, 0), (3, 2, 0)]
    assert not np.any(found["forward"])


@pytest.mark.parametrize(
    "case",
    [
        convs.Conv((3, 4), (2, 2), 3, ((2, 5), (0, 0))),
        convs.Conv((3,), (2,), 1, ((-7, -1),), groups=1),
        convs.Conv((3, 2), (2, 2), 3, ((2, 5), (0, 0)), 0, 1, 2, 2, 2, True),
        convs.Conv((2,), (1,), 5, ((1, 1),), 0, 1, 1, 1),
        convs.Conv((2, 2, 2), (1, 2, 2), (4, 2, 2), ((1, 1), (0, 0), (0, 0)), inputs=2),
    ],
    ids=str,
)
def test_pixels_that_no_tap_reaches_are_zero(case, implementation):
    arrays = case.arrays()
    call = {**case.call, "implementation": implementation}
    found = convs.run_all(call)(convs.Arrays(arrays.x, np.ones_like(arrays.kernel), arrays.g))
    reached = convs.FORWARD.expect(
        convs.Arrays(np.ones_like(arrays.x), np.ones_like(arrays.kernel), arrays.g), **case.call
    )
    assert np.any(reached == 0)
    np.testing.assert_array_equal(np.asarray(found["forward"])[reached == 0], 0)
    for op in (convs.DATA, convs.WEIGHTS):
        convs.check(op, found[op.name], arrays._replace(kernel=np.ones_like(arrays.kernel)), **case.call)


# --- NaN and infinity ---------------------------------------------------------------------------------


SPECIAL = [
    "padded",
    "dilated-output-padding",
    "dcgan",
    "unet",
    "upsample",
    "depthwise-dilated",
    "groups",
    "mixed",
    "few-weights",
    "few-weights-groups",
    "groups-of-four",
]


@functools.cache
def special_results(name, implementation):
    return convs.run_all({**convs.CASES[name].call, "implementation": implementation})


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("op", convs.OPS, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_infinity_reach_what_they_feed(name, op, operand, implementation):
    """And nothing else: padding is not multiplied.

    StableHLO does multiply it where an ordinary convolution or a strided slice reads zeros beside a kernel or
    an image that is not finite, as PyTorch's does; what is not finite then stays in its channel.
    """
    case = convs.CASES[name]
    arrays = case.arrays()
    which = op.operands[operand]
    padding_counts = implementation == "xla" and (
        which == "kernel" if op is convs.DATA else which == "x" if op is convs.WEIGHTS else case.groups > 2
    )
    for poison in (np.nan, np.inf):
        # In channel 0, in the corner, where windows reach into the padding.
        poisoned = getattr(arrays, which).copy()
        corner = (0,) * poisoned.ndim if which == "kernel" else (0, *[slice(2)] * case.rank, 0)
        poisoned[corner] = poison
        bad = arrays._replace(**{which: poisoned})
        with np.errstate(invalid="ignore"):
            expected = op.expect(bad, **case.call)
        actual = np.asarray(special_results(name, implementation)(bad)[op.name], np.float64)
        wrong = ~np.isfinite(expected)
        assert wrong.any(), "the test has no effect"
        assert not wrong.all()
        assert not np.isfinite(actual[wrong]).any()
        finite = np.isfinite(actual)
        np.testing.assert_allclose(actual[finite], expected[finite], atol=1e-4 * case.taps)
        if padding_counts:
            continue
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        infinite = np.isinf(expected)
        np.testing.assert_array_equal(actual[infinite], expected[infinite])


# --- sums in half precision ---------------------------------------------------------------------------

HALVES = ("float16", "bfloat16")
N = 4096
# Every result is a sum of 4096 ones: over channels or over pixels.
LONG_SUMS = {
    "forward": (convs.FORWARD, convs.Conv((3,), (2,), 2, inputs=N, outputs=3)),
    "forward-overlap": (
        convs.FORWARD, convs.Conv((1, 2), (3, 3), (2, 1), ((0, 0), (1, 1)), inputs=N // 2, outputs=2)
    ),
    "data": (convs.DATA, convs.Conv((3,), (2,), 2, inputs=3, outputs=N // 2)),
    "weights": (convs.WEIGHTS, convs.Conv((64, 64), (2, 2), 2, inputs=3, outputs=2)),
    "weights-depthwise": (convs.WEIGHTS, convs.Conv((N,), (3,), 2, inputs=2, outputs=2, groups=2)),
    "weights-one-channel": (convs.WEIGHTS, convs.Conv((N,), (3,), 1, inputs=1, outputs=1)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LONG_SUMS)
def test_sums_of_4096_ones(name, dtype, implementation):
    op, case = LONG_SUMS[name]
    batch = (1,)
    ones = convs.Arrays(*(np.ones_like(a) for a in case.arrays(batch=batch, dtype=dtype)))
    out = jax.jit(lambda a: op.apply(a, **case.call, implementation=implementation))(ones)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.full(out.shape, N, np.float32))


@pytest.mark.parametrize("dtype", HALVES)
@convs.on_both_paths("name", ["fcn", "upsample", "unet"], lambda n: n == "fcn")
def test_results_of_a_preferred_type(name, dtype, implementation):
    """float32 of half precision, without a rounding to it on the way."""
    case = convs.CASES[name]
    arrays = case.arrays(dtype=dtype)
    call = {**case.call, "preferred_element_type": np.float32, "implementation": implementation}

    @jax.jit
    def run(arrays):
        y, pull_back = jax.vjp(lambda x, k: jax_mps.conv_transpose(x, k, **call), arrays.x, arrays.kernel)
        return [op.apply(arrays, **call) for op in convs.OPS], y, pull_back(arrays.g.astype(np.float32))

    found, y, pulled = run(arrays)
    for op, actual in zip(convs.OPS, found, strict=True):
        assert actual.dtype == np.float32
        convs.check(op, actual, arrays, **case.call)
    np.testing.assert_array_equal(y, found[0])
    for op, actual in zip((convs.DATA, convs.WEIGHTS), pulled, strict=True):
        assert actual.dtype == dtype  # that of what it is the gradient of
        convs.check(op, actual, arrays, **case.call)


def test_wide_gradients_of_half_precision_keep_their_digits(implementation):
    """257 is no bfloat16 number: rounded to one, the difference would be lost."""
    x, kernel = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([-1, 1], jnp.bfloat16).reshape(2, 1, 1)

    def f(x, kernel):
        return jax_mps.conv_transpose(
            x, kernel, preferred_element_type=jnp.float32, implementation=implementation
        )

    y, pull_back = jax.vjp(f, x, kernel)
    assert y.dtype == np.float32
    dx, dk = pull_back(jnp.array([257, 256], jnp.float32).reshape(1, 2, 1))
    assert dx.dtype == dk.dtype == jnp.bfloat16
    assert dx.item() == 1
    # The same in forward mode, and in the second order.
    _, tangent = jax.jvp(f, (x, kernel), (x, kernel))
    assert tangent.dtype == np.float32
    _, again = jax.vjp(lambda g: pull_back(g)[0], jnp.ones_like(y))
    assert again(dx)[0].dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_preferred_float64(dtype, implementation, x64):
    case = convs.CASES["fcn"]
    arrays = case.arrays(dtype=dtype)
    call = {**case.call, "preferred_element_type": np.float64, "implementation": implementation}
    found = convs.run_all(call)(arrays)
    for op in convs.OPS:
        assert found[op.name].dtype == np.float64
        convs.check(op, found[op.name], arrays, **case.call)
