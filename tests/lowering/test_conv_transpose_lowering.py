"""What StableHLO transposed convolution becomes on each platform, and that it says the same on all."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import convs
import grid
import jax_mps
import oracle
from jax_mps.lowering import apple
from programs import export_it, lower, operations, size

FORBIDDEN = {
    f"stablehlo.{name}"
    for name in (
        "gather", "dynamic_gather", "scatter", "dynamic_slice", "dynamic_update_slice", "select_and_scatter",
        "reduce_window", "while", "case", "if", "sort", "iota", "custom_call",
    )
}  # fmt: skip


def abstract(case, data_format="channels_last", dtype=np.float32, batch=(2,)):
    shapes = (case.shape(data_format, batch), case.kernel_shape, case.result_shape(data_format, batch))
    return convs.Arrays(*(jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for s in shapes))


def program(op, case, platform, data_format="channels_last", dtype=np.float32, **more):
    """The lowered program of one function alone, of its two operands."""
    arrays = abstract(case, data_format, dtype)
    call = {**case.call, "data_format": data_format, **more}

    def function(a, b):
        return op.apply(arrays._replace(**dict(zip(op.operands, (a, b), strict=True))), **call)

    return lower(function, *op.of(arrays), platform=platform)


def numbers(pattern, text):
    """The integers of the first group of a pattern."""
    found = re.search(pattern, text)
    return [int(n) for n in re.findall(r"-?\d+", found.group(1))] if found else []


def check_edges(operation):
    if operation.name == "stablehlo.pad":
        for side in ("edge_padding_low", "edge_padding_high"):
            assert min(operation.attributes[side]) >= 0, str(operation)
        assert set(operation.attributes["interior_padding"]) == {0}, str(operation)
    if operation.name == "stablehlo.slice":
        assert min(operation.attributes["strides"]) >= 1, str(operation)


def check_is_apple_safe(lowered):
    assert apple.violations(lowered) == []


# --- which operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data_format"),
    [(n, f) for n in convs.CASES for f in grid.FORMATS if f == "channels_last" or n in convs.BOTH_LAYOUTS],
)
def test_apple_gets_only_what_its_plugins_have(name, data_format):
    for op in convs.OPS:
        check_is_apple_safe(program(op, convs.CASES[name], "METAL", data_format))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["fcn", "upsample", "groups", "volume-head"])
def test_apple_gets_no_more_for_half_precision(name, dtype):
    for op in convs.OPS:
        check_is_apple_safe(program(op, convs.CASES[name], "mps", dtype=dtype))
        wide = program(op, convs.CASES[name], "mps", dtype=dtype, preferred_element_type=np.float32)
        check_is_apple_safe(wide)


DERIVED = {
    "vjp": lambda f, x, k: jax.vjp(f, x, k)[1](f(x, k)),
    "jvp": lambda f, x, k: jax.jvp(f, (x, k), (x, k)),
    "vmap of both": lambda f, x, k: jax.vmap(f)(jnp.stack([x, x]), jnp.stack([k, k])),
    "vmap of kernels": lambda f, x, k: jax.vmap(f, (None, 0))(x, jnp.stack([k, k])),
}


@pytest.mark.parametrize("how", DERIVED)
def test_apple_gets_no_more_for_derivatives_and_vmap(how):
    for name in ("fcn", "upsample", "groups-dilated", "volume-groups"):
        case = convs.CASES[name]
        x, kernel, _ = abstract(case)
        f = functools.partial(jax_mps.conv_transpose, **case.call)
        check_is_apple_safe(lower(lambda x, k: DERIVED[how](f, x, k), x, kernel, platform="METAL"))  # noqa: B023


@pytest.mark.parametrize("name", convs.CASES)
def test_no_platform_multiplies_inserted_zeros(name):
    case = convs.CASES[name]
    for op in convs.OPS:
        for platform in ("cpu", "cuda"):
            lowered = program(op, case, platform, implementation="xla")
            found = operations(lowered)
            assert not {operation.name for operation in found} & FORBIDDEN
            for operation in found:
                check_edges(operation)
                if operation.name == "stablehlo.convolution" and platform != "cuda":
                    dilated = numbers(r"lhs_dilate = \[([^]]*)\]", str(operation))
                    assert set(dilated) <= {1}, str(operation)


def test_cuda_gets_the_convolutions_that_its_library_knows():
    """The transpose of a strided convolution, as JAX itself writes it: what the compiler matches."""
    case = convs.CASES["dcgan"]._replace(outputs=16)  # few channels have another form
    texts = [program(op, case, "cuda").as_text() for op in convs.OPS]
    assert [text.count("stablehlo.convolution") for text in texts] == [1, 1, 1]
    strided = [numbers(r"stride = \[([^]]*)\]", text) for text in texts]
    assert strided[1] == [2, 2]
    assert numbers(r"lhs_dilate = \[([^]]*)\]", texts[0]) == [2, 2]
    assert numbers(r"rhs_dilate = \[([^]]*)\]", texts[2]) == [2, 2]


UNSTRIDED = {
    "causal": convs.Conv((11,), (4,), 1, ((3, 0),), inputs=5, outputs=5, groups=5),
    "dilated": convs.Conv((9,), (3,), 1, ((0, 1),), 0, 3, 4, 4, 4, True),
    "cropped": convs.Conv((8,), (3,), 1, ((-2, 4),), inputs=3, outputs=3, groups=3),
    "volume": convs.Conv((3, 2, 5), (2, 3, 2), 1, 1, 0, (1, 1, 2), 3, 3, 3),
}
"""Depthwise, whose neighbouring results CUDA's threads compute together."""

CUT = {"cut": convs.Conv((5, 4), (3, 3), 2, ((-1, -2), (2, -1)), inputs=3, outputs=12)}
"""A transposed convolution with pixels that no window reaches, of so many channels that cuDNN has it."""


FOR_CUDA = (
    "hifigan", "dilated", "fcn", "image-head", "upsample", "depthwise-dilated", "one-output-a-group",
    "groups", "groups-dilated", "volume-head", "volume-depthwise", "same-2d",
)  # fmt: skip
"""Cases of all rows of the table of choices."""


@pytest.mark.parametrize("op", convs.OPS, ids=str)
@pytest.mark.parametrize(
    ("name", "data_format"),
    [*((n, "channels_last") for n in FOR_CUDA), *((n, f) for n in UNSTRIDED | CUT for f in grid.FORMATS)],
)
def test_the_forms_for_cuda_are_right(name, data_format, op, monkeypatch):
    """What CUDA gets, run on the CPU."""
    monkeypatch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: "cuda")
    case = (convs.CASES | UNSTRIDED | CUT)[name]
    call = {**case.call, "data_format": data_format}
    arrays = case.arrays(data_format)
    compiled = jax.jit(lambda arrays: op.apply(arrays, **call, implementation="xla"))
    convs.check(op, compiled(arrays), arrays, **call)


DISJOINT = {
    "1-D": convs.Conv((6,), (3,), 3, inputs=4),
    "2-D": convs.Conv((3, 4), (2, 2), 2, inputs=4, transpose_kernel=True),
    "2-D groups": convs.Conv((3, 4), (2, 3), (2, 3), 0, 0, 1, 4, 6, 2),
    "2-D padded": convs.Conv((3, 4), (2, 2), 2, ((1, 0), (-1, 1)), 1, inputs=4),
    "2-D depthwise multiplier": convs.Conv((3, 4), (2, 2), 2, 0, 0, 1, 3, 6, 3),
    "2-D one pixel": convs.Conv((3, 4), (1, 1)),
    "3-D": convs.Conv((2, 3, 2), (2, 2, 2), 2, inputs=4),
}


ORDINARY = {
    "groups": {"groups": 8, "padding": 1},
    "groups, strided": {"groups": 8, "strides": 2, "padding": 1},
    "depthwise": {"groups": 16, "padding": "SAME"},
    "dilated": {"kernel_dilation": 2, "padding": 2},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_cuda_gets_the_ordinary_convolution_as_it_is(name):
    """Its library is fastest with these; only the gradient to a dilated kernel is a matrix product."""
    call = ORDINARY[name]
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), np.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 16 // call.get("groups", 1), 16), np.float32)
    f = functools.partial(jax_mps.conv, **call)
    functions = [f, lambda x, k: jax.vjp(lambda x: f(x, k), x)[1](f(x, k))[0]]
    if name != "dilated":
        functions.append(lambda x, k: jax.vjp(lambda k: f(x, k), k)[1](f(x, k))[0])
    for count, function in enumerate(functions):
        found = operations(lower(function, x, kernel, platform="cuda"))
        names = [o.name for o in found]
        assert names.count("stablehlo.convolution") == 1 + (count > 0)
        assert "stablehlo.dot_general" not in names


@pytest.mark.parametrize("name", ["dilated", "spread", "spread, strided"])
@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_apple_gets_only_what_its_plugins_have_of_the_ordinary_convolution(name, data_format):
    more = {"spread": {"input_dilation": (2, 1)}, "spread, strided": {"input_dilation": 2, "strides": (3, 2)}}
    f = functools.partial(jax_mps.conv, data_format=data_format, **more.get(name, ORDINARY["dilated"]))
    x = jax.ShapeDtypeStruct(convs.image((2,), (8, 7), 4, data_format), np.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 6), np.float32)

    def all_of_it(x, k):
        y, pull_back = jax.vjp(f, x, k)
        return y, pull_back(y)

    check_is_apple_safe(lower(all_of_it, x, kernel, platform="METAL"))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "METAL", "tpu"])
@pytest.mark.parametrize("name", DISJOINT)
def test_kernels_of_the_stride_are_one_matrix_product(name, platform):
    for op in convs.OPS:
        for data_format in grid.FORMATS:
            text = program(op, DISJOINT[name], platform, data_format, implementation="xla").as_text()
            assert text.count("stablehlo.dot_general") == 1
            assert "stablehlo.convolution" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "METAL", "tpu"])
def test_depthwise_needs_no_matrix_unit(platform):
    for name in ("vocoder", "upsample", "depthwise-dilated", "depthwise-disjoint", "volume-depthwise"):
        for op in convs.OPS:
            text = program(op, convs.CASES[name], platform, implementation="xla").as_text()
            assert "stablehlo.dot_general" not in text
            assert "stablehlo.convolution" not in text


def test_precision_reaches_every_product():
    for name in ("fcn", "unet", "groups", "volume-head"):
        for platform in ("cpu", "cuda", "METAL"):
            for op in convs.OPS:
                call = {"precision": ("highest", "default"), "implementation": "xla"}
                lowered = program(op, convs.CASES[name], platform, **call)
                names = ("stablehlo.dot_general", "stablehlo.convolution")
                products = [str(o) for o in operations(lowered) if o.name in names]
                assert products
                for text in products:
                    assert text.count("HIGHEST") == 1
                    assert text.count("DEFAULT") == 1


# --- sizes of programs --------------------------------------------------------------------------------

PLATFORMS = ("METAL", "cuda", "tpu")
NAMED = {
    "dcgan": convs.Conv((16, 16), (4, 4), 2, 1, inputs=256, outputs=128),
    "unet_up": convs.Conv((32, 32), (2, 2), 2, inputs=128, outputs=64),
    "fcn": convs.Conv((64, 64), (3, 3), 2, 1, 1, inputs=64, outputs=32),
    "upsample": convs.Conv((32, 32), (4, 4), 2, 1, inputs=128, outputs=128, groups=128),
    "image_head": convs.Conv((256, 256), (4, 4), 2, 1, inputs=32, outputs=3),
    "hifigan": convs.Conv((512,), (16,), 8, 4, inputs=256, outputs=128),
    "vocoder_depthwise": convs.Conv((4096,), (12,), 2, 5, inputs=96, outputs=96, groups=96),
    "nnunet_up": convs.Conv((16, 16, 16), (2, 2, 2), 2, inputs=128, outputs=64),
    "volume_head": convs.Conv((64, 64, 32), (3, 3, 3), 2, 1, 1, inputs=64, outputs=1),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", NAMED)
def test_programs_do_not_grow_with_the_image(name, platform):
    case = NAMED[name]
    small = case._replace(lengths=tuple(n // 4 for n in case.lengths))
    for op in convs.OPS:
        one, other = (size(program(op, c, platform)) for c in (small, case))
        assert one == other
        assert one < 500


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("mapped", [(None, 0), (0, None), (0, 0)], ids=["kernels", "images", "both"])
def test_programs_do_not_grow_with_vmap(mapped, platform):
    """One program for 3 and for 300 kernels, so one compilation, of three functions."""
    for name in ("upsample", "groups-dilated"):
        case = convs.CASES[name]
        arrays = abstract(case)
        for op in convs.OPS:

            def function(a, b, op=op, arrays=arrays, case=case):
                a = arrays._replace(**dict(zip(op.operands, (a, b), strict=True)))
                return op.apply(a, **case.call, implementation="xla")

            sizes = [
                size(
                    lower(
                        jax.vmap(function, mapped),
                        *(
                            s if at is None else jax.ShapeDtypeStruct((n, *s.shape), s.dtype)
                            for s, at in zip(op.of(arrays), mapped, strict=True)
                        ),
                        platform=platform,
                    )
                )
                for n in (3, 300)
            ]
            assert sizes[0] == sizes[1]


# --- the same numbers ---------------------------------------------------------------------------------

# Where a platform has a form of its own: Apple's plugins for the forward pass, but for groups in volumes.
ELSEWHERE = {
    "apple": ["padded", "cut-and-pad", "gaps-wide", "hifigan", "first-pixels-cut", "dcgan", "groups",
              "groups-dilated", "multiplier", "same-2d", "volume-head", "volume-groups"],
    "cuda": ["padded", "cut-and-pad", "dilated-output-padding", "first-pixels-cut", "last-pixels-cut",
             "larger-than-image", "one-pixel", "fcn", "groups-dilated", "only-padding", "volume-head"],
}  # fmt: skip
CHOSEN = [(p, n, grid.FORMATS[i % 2]) for p, names in ELSEWHERE.items() for i, n in enumerate(names)]
OTHERS = [
    pytest.param(p, n, f, marks=pytest.mark.full)
    for p in ("apple", "cuda", "any")
    for n in convs.CASES
    for f in grid.FORMATS
    if (p, n, f) not in CHOSEN
]


@pytest.mark.parametrize(("platform", "name", "data_format"), [*CHOSEN, *OTHERS])
def test_programs_for_other_platforms_have_the_same_values(platform, name, data_format, monkeypatch):
    """What Apple's plugins and CUDA would get, run on the CPU."""
    monkeypatch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: platform)
    case, arrays = convs.CASES[name], convs.CASES[name].arrays(data_format)
    call = {**case.call, "data_format": data_format, "implementation": "xla"}
    ops = convs.OPS[:1] if platform == "apple" and name != "volume-groups" else convs.OPS
    lowered = jax.jit(lambda arrays: [op.apply(arrays, **call) for op in ops]).lower(arrays)
    if platform == "apple":
        check_is_apple_safe(lowered)
    for op, found in zip(ops, lowered.compile()(arrays), strict=True):
        value, scale = convs.expected(name, data_format)[op.name]
        oracle.assert_close(found, value, length=convs.terms(op, arrays), scale=scale)


def names(lowered):
    return [operation.name for operation in operations(lowered)]


@pytest.mark.parametrize(("platform", "other"), [("apple", "METAL"), ("cuda", "cuda"), ("any", "tpu")])
def test_the_programs_that_ran_are_those_of_the_platforms(platform, other, monkeypatch):
    for name in ("dcgan", "groups-dilated", "volume-head"):
        case = convs.CASES[name]
        for op in convs.OPS:
            wanted = names(program(op, case, other))
            with monkeypatch.context() as patch:
                patch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: platform)
                found = names(program(op, case, "cpu", implementation="xla"))
            assert found == wanted


# --- exported programs --------------------------------------------------------------------------------

EXPORTED = {
    "k2 s2": convs.CASES["unet"],
    "k4 s2 p1": convs.CASES["dcgan"],
    "SAME": convs.CASES["same-2d"],
    "groups, dilation": convs.CASES["groups-dilated"],
    "depthwise": convs.CASES["upsample"],
    "1-D": convs.CASES["cut-and-pad"],
    "3-D": convs.Conv((3, 2, 4), (2, 1, 2), (1, 1, 2), 1, (0, 0, 1)),
}
SYMBOLS = {1: "a, b, h", 2: "a, b, h, w", 3: "a, b, d, h, w"}


def value_and_gradients(case, data_format="channels_last"):
    def function(x, kernel):
        f = functools.partial(jax_mps.conv_transpose, **case.call, data_format=data_format)
        y, pull_back = jax.vjp(f, x, kernel)
        return y, *pull_back(2 * y)

    return function


def check_exported(call, case, data_format="channels_last", batch=(1, 2)):
    x, kernel, _ = case.arrays(data_format, batch)
    keywords = {**case.call, "data_format": data_format}
    y, *gradients = call(x, kernel)
    expected = oracle.conv_transpose(x, kernel, **keywords)
    arrays = convs.Arrays(x, kernel, 2 * expected)
    oracle.assert_close(y, expected, length=kernel.size, scale=convs.FORWARD.scale(arrays, **keywords))
    for op, actual in zip((convs.DATA, convs.WEIGHTS), gradients, strict=True):
        convs.check(op, actual, arrays, **keywords)


@pytest.mark.parametrize("name", EXPORTED)
def test_symbolic_batch_and_sizes(name):
    case = EXPORTED[name]
    symbols = SYMBOLS[case.rank]
    least = [f"{symbol} >= 2" for symbol in symbols.split(", ")[2:]]
    shape = export.symbolic_shape(f"{symbols}, {case.inputs}", constraints=least)
    exported = export_it(
        value_and_gradients(case),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct(case.kernel_shape, np.float32),
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    check_exported(exported.call, case)
    check_exported(exported.call, case._replace(lengths=tuple(n + 3 for n in case.lengths)), batch=(2, 1))


def test_symbolic_channels_first():
    case = EXPORTED["k4 s2 p1"]
    shape = export.symbolic_shape(f"n, {case.inputs}, h, w", constraints=["h >= 2", "w >= 2"])
    exported = export_it(
        value_and_gradients(case, "channels_first"),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct(case.kernel_shape, np.float32),
    )
    check_exported(exported.call, case, "channels_first", (3,))


def test_concrete_sizes_are_exported_without_our_kernels():
    case = convs.CASES["fcn"]
    x, kernel, _ = abstract(case, batch=(1, 2))
    check_exported(export_it(value_and_gradients(case), x, kernel).call, case)


def test_kernels_of_unknown_shape_are_refused():
    window = export.symbolic_shape("k, l, 3, 2")
    like = jax.ShapeDtypeStruct(window, np.float32)
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match="two channel axes of known sizes, got shape"):
        export.export(jax.jit(jax_mps.conv_transpose))(x, like)


def test_forcing_the_native_path_in_an_export_is_an_error(native):
    f = functools.partial(jax_mps.conv_transpose, implementation="native")
    kernel = jax.ShapeDtypeStruct((2, 2, 3, 4), np.float32)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, 3"), np.float32)
    with pytest.raises(ValueError, match="implementation='native' needs static shapes"):
        export.export(jax.jit(f))(symbolic, kernel)
    with pytest.raises(ValueError, match="implementation='native' cannot be had: an exported program"):
        export.export(jax.jit(f))(jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32), kernel)
