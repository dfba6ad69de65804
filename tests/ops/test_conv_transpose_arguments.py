"""Bad arguments of both convolutions raise while tracing: which argument, which value, which rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grid
import jax_mps
from processes import finish, start

X = np.zeros((2, 4, 5, 6), np.float32)
KERNEL = np.zeros((3, 2, 6, 4), np.float32)
G = np.zeros((2, 9, 10, 4), np.float32)
GOOD = {"strides": 2}


def zeros(shape, dtype):
    """Traced or not, of any type."""
    return jnp.zeros(shape, dtype)


# Each as a function of an image and a kernel, of which it needs the values or the shape.


def forward(x, kernel, **arguments):
    return jax_mps.conv_transpose(x, kernel, **arguments)


def data(x, kernel, **arguments):
    return jax_mps.conv_transpose_gradient_data(
        zeros(G.shape, kernel.dtype), kernel, np.shape(x), **arguments
    )


def weights(x, kernel, **arguments):
    return jax_mps.conv_transpose_gradient_weights(zeros(G.shape, x.dtype), x, np.shape(kernel), **arguments)


def ordinary(x, kernel, **arguments):
    return jax_mps.conv(x, kernel, **arguments)


FUNCTIONS = {"forward": forward, "data": data, "weights": weights, "ordinary": ordinary}
SOURCE = {"forward": "x", "data": "source_shape", "weights": "source", "ordinary": "x"}
WINDOW = {"forward": "kernel", "data": "kernel", "weights": "kernel_shape", "ordinary": "kernel"}
ELSEWHERE = {"output_padding", "transpose_kernel"}
"""What the ordinary convolution does not have."""
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def refuse(function, error, match, x=X, kernel=KERNEL, **arguments):
    """Eagerly, while tracing for `jit`, and in the abstract."""
    call = FUNCTIONS.get(function, function)
    arguments = {**GOOD, **arguments}
    match = match.replace("SOURCE", SOURCE.get(function, "x")).replace(
        "WINDOW", WINDOW.get(function, "kernel")
    )
    with pytest.raises(error, match=match):
        call(x, kernel, **arguments)
    with pytest.raises(error, match=match):
        jax.jit(lambda x, k: call(x, k, **arguments)).trace(x, kernel)
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda x, k: call(x, k, **arguments), x, kernel)


@every_function
def test_good_arguments_are_accepted(function):
    like = {"forward": G, "data": X, "weights": KERNEL, "ordinary": np.zeros((2, 1, 2, 4))}[function]
    for arguments in ({}, {"precision": "highest"}, {"preferred_element_type": np.float32}):
        out = jax.eval_shape(lambda x, k: FUNCTIONS[function](x, k, **GOOD, **arguments), X, KERNEL)  # noqa: B023
        assert out.shape == like.shape


BAD_VALUES = {
    "stride of 0": ({"strides": 0}, r"strides must be at least 1 .*0"),
    "stride below 0": ({"strides": (2, -2)}, r"strides must be at least 1 .*\(2, -2\)"),
    "strides too short": ({"strides": (2,)}, r"strides must have one entry for each of the 2 .*\(2,\)"),
    "strides too long": ({"strides": (2, 2, 2)}, r"strides must have one entry for each of the 2"),
    "no strides": ({"strides": ()}, r"strides must have one entry for each of the 2 .*\(\)"),
    "dilation of 0": ({"kernel_dilation": 0}, r"kernel_dilation must be at least 1 .*0"),
    "dilation too long": (
        {"kernel_dilation": [1, 1, 1]},
        r"kernel_dilation must have one entry for each of the 2",
    ),
    "output padding below 0": ({"output_padding": -1}, r"output_padding must be at least 0 .*-1"),
    "output padding of the stride": (
        {"output_padding": 2},
        (
            r"output_padding must be 0 to 1 on spatial axis 0, below the greater of strides \(2\) and "
            r"kernel_dilation \(1\), got 2"
        ),
    ),
    "output padding of the dilation": (
        {"output_padding": (0, 3), "kernel_dilation": (1, 3), "strides": (1, 2)},
        r"output_padding must be 0 to 2 on spatial axis 1, .*strides \(2\) .*kernel_dilation \(3\), got 3",
    ),
    "output padding of no room": (
        {"output_padding": 1, "strides": 1},
        r"output_padding must be 0 to 0 on spatial axis 0, .* got 1",
    ),
    "output padding too long": (
        {"output_padding": (0, 0, 0)},
        r"output_padding must have one entry for each of the 2",
    ),
    "output padding with SAME": (
        {"output_padding": (0, 1), "padding": "SAME"},
        r"output_padding must be 0 with padding='SAME', .* got \(0, 1\)",
    ),
    "too few pairs": (
        {"padding": ((1, 1),)},
        r"padding must have one \(low, high\) pair for each of the 2 .*\(\(1, 1\),\)",
    ),
    "pairs of one": ({"padding": ((1,), (1,))}, r"padding must be .* pair .*\(\(1,\), \(1,\)\)"),
    "no pairs": ({"padding": (1, 1)}, r"padding must be .* pair .*\(1, 1\)"),
    "unknown padding": (
        {"padding": "FULL"},
        r"padding must be 'VALID', 'SAME', 'SAME_LOWER', an int or pairs, got 'FULL'",
    ),
    "unknown layout": (
        {"data_format": "HWCN"},
        r"data_format must be one of 'channels_last', 'channels_first', 'NWC', .*, got 'HWCN'",
    ),
    "everything cut off": (
        {"padding": ((0, 0), (4, 6))},
        (
            r"padding=\(4, 6\) of spatial axis 1 leaves nothing of the 10 pixels that 5 windows of 2 pixels "
            r"reach with strides 2 and output_padding 0: the output size would be below 1"
        ),
    ),
    "groups of 0": ({"groups": 0}, r"groups must be at least 1, got 0"),
    "groups below 0": ({"groups": -2}, r"groups must be at least 1, got -2"),
    "groups that do not divide the image": (
        {"groups": 4},
        r"groups must divide the 6 channels of SOURCE, got 4",
    ),
    "unknown implementation": (
        {"implementation": "cuda"},
        r"implementation must be None, 'native' or 'xla', got 'cuda'",
    ),
    "implementation of a wrong type": ({"implementation": True}, r"implementation must be .* got True"),
    "unknown precision": (
        {"precision": "exact"},
        r"precision must be None, a jax.lax.Precision, .* got 'exact'",
    ),
    "precision of another type": ({"precision": 3.5}, r"precision must be None, .* got 3.5"),
    "three precisions": ({"precision": ("high",) * 3}, r"precision as a pair must have 2 entries"),
    "a bad precision of two": ({"precision": ("high", "exact")}, r"precision must be .* got 'exact'"),
}


def each_call(table):
    """Every function with every row of a table that says what the function has."""
    rows = [
        (f, name)
        for f in FUNCTIONS
        for name, (arguments, _) in table.items()
        if f != "ordinary" or not (ELSEWHERE & set(arguments) or name == "everything cut off")
    ]
    return pytest.mark.parametrize(("function", "name"), rows)


@each_call(BAD_VALUES)
def test_bad_values(function, name):
    arguments, match = BAD_VALUES[name]
    refuse(function, ValueError, match, **arguments)


BAD_TYPES = {
    "float strides": ({"strides": 2.0}, r"strides must be an int .*2\.0"),
    "float in strides": ({"strides": (2, 1.5)}, r"strides must be an int .*1\.5"),
    "string strides": ({"strides": "2"}, r"strides must be an int .*'2'"),
    "bool strides": ({"strides": True}, r"strides must be an int .*True"),
    "no strides": ({"strides": None}, r"strides must be an int .*None"),
    "float dilation": ({"kernel_dilation": 1.5}, r"kernel_dilation must be an int .*1\.5"),
    "float output padding": ({"output_padding": 1.0}, r"output_padding must be an int .*1\.0"),
    "string output padding": ({"output_padding": "1"}, r"output_padding must be an int .*'1'"),
    "float padding": ({"padding": 1.0}, r"padding must be an int .*1\.0"),
    "float in padding": ({"padding": ((0, 0), (0.5, 0))}, r"padding must be an int .*0\.5"),
    "no padding": ({"padding": None}, r"padding must be an int .*None"),
    "float groups": ({"groups": 1.0}, r"groups must be an int .*1\.0"),
    "bool groups": ({"groups": True}, r"groups must be an int .*True"),
    "no groups": ({"groups": None}, r"groups must be an int .*None"),
    "int transpose_kernel": ({"transpose_kernel": 1}, r"transpose_kernel must be a bool, got .*1"),
    "string transpose_kernel": ({"transpose_kernel": "yes"}, r"transpose_kernel must be a bool, got .*'yes'"),
    "integer result": (
        {"preferred_element_type": np.int32},
        r"preferred_element_type must be float32 or a wider float of .*, got int32",
    ),
    "narrower result": (
        {"preferred_element_type": jnp.bfloat16},
        r"preferred_element_type must be float32 or a wider float .*, got bfloat16",
    ),
    "complex result": (
        {"preferred_element_type": np.complex64},
        r"preferred_element_type must be float32 or a wider float .*, got complex64",
    ),
    "float64 without 64-bit types": (
        {"preferred_element_type": np.float64},
        r"preferred_element_type=float64 needs jax_enable_x64",
    ),
}


@each_call(BAD_TYPES)
def test_bad_types(function, name):
    arguments, match = BAD_TYPES[name]
    refuse(function, TypeError, match, **arguments)


@pytest.mark.parametrize("narrow", [("float16", "bfloat16"), ("bfloat16", "float16")], ids=str)
def test_one_half_is_no_wider_than_the_other(narrow):
    dtype, preferred = narrow
    refuse(
        "forward",
        TypeError,
        f"preferred_element_type must be {dtype} or a wider float .* got {preferred}",
        X.astype(jnp.dtype(dtype)),
        KERNEL.astype(jnp.dtype(dtype)),
        preferred_element_type=preferred,
    )


@pytest.mark.parametrize(
    "argument", ["strides", "padding", "output_padding", "kernel_dilation", "groups", "transpose_kernel"]
)
@every_function
def test_traced_values(function, argument):
    if function == "ordinary" and argument in ELSEWHERE:
        argument = "input_dilation"

    def call(value):
        return FUNCTIONS[function](X, KERNEL, **{**GOOD, argument: value})

    match = (
        f"{argument} must be a bool" if argument == "transpose_kernel" else f"{argument} must be an int known"
    )
    with pytest.raises(TypeError, match=match):
        jax.jit(call)(1)
    if argument in ("strides", "output_padding", "input_dilation", "kernel_dilation"):
        with pytest.raises(TypeError, match=match):
            jax.jit(lambda v: call((v, 1)))(1)


@every_function
def test_keywords_only(function):
    with pytest.raises(TypeError, match="positional"):
        jax_mps.conv_transpose(X, KERNEL, None, 2)
    with pytest.raises(TypeError, match="positional"):
        jax_mps.conv(X, KERNEL, None, 2)
    with pytest.raises(TypeError, match="positional"):
        jax_mps.conv_transpose_gradient_data(G, KERNEL, X.shape, 2)
    with pytest.raises(TypeError, match="positional"):
        jax_mps.conv_transpose_gradient_weights(G, X, KERNEL.shape, 2)


# --- shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["forward", "data", "weights"])
def test_kernels_of_a_wrong_shape(function):
    wanted = r"WINDOW must have shape \(\*window, in / groups, out\) with transpose_kernel=False"
    for shape in ((3, 2, 4, 6), (3, 2, 3, 4), (3, 2, 12, 4)):
        got = rf"where SOURCE has in = 6 channels and groups = 1, got \({', '.join(map(str, shape))}\)"
        refuse(function, ValueError, f"{wanted}, {got}", kernel=np.zeros(shape, np.float32))
    refuse(
        function,
        ValueError,
        r"WINDOW must have shape \(\*window, out / groups, in\) with transpose_kernel=True, .* in = 6 .* got",
        transpose_kernel=True,
    )
    refuse(function, ValueError, r"in / groups, out\) .* groups = 2, got", groups=2)
    # The other convention with the right channels, and groups that do not divide what comes out.
    refuse(
        function,
        ValueError,
        r"groups must divide the 4 output channels of WINDOW, got 3",
        kernel=np.zeros((3, 2, 2, 4), np.float32),
        groups=3,
    )


def test_kernels_of_a_wrong_shape_for_the_ordinary_convolution():
    wanted = (
        r"kernel must have shape \(\*window, in / groups, out\), where x has in = 6 channels and groups = "
    )
    for shape in ((3, 2, 4, 6), (3, 2, 3, 4), (3, 2, 12, 4)):
        got = rf"1, got \({', '.join(map(str, shape))}\)"
        refuse("ordinary", ValueError, wanted + got, kernel=np.zeros(shape, np.float32))
    refuse("ordinary", ValueError, wanted + r"2, got \(3, 2, 6, 4\)", groups=2)
    refuse("ordinary", ValueError, r"groups must divide the 4 output channels of kernel, got 3", groups=3,
           kernel=np.zeros((3, 2, 2, 4), np.float32))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_dilation": 0}, r"input_dilation must be at least 1 .*0"),
        ({"input_dilation": (1, -1)}, r"input_dilation must be at least 1 .*\(1, -1\)"),
        ({"input_dilation": (1,)}, r"input_dilation must have one entry for each of the 2 .*\(1,\)"),
        (
            {"kernel_dilation": 3},
            (
                r"kernel of 3 taps with kernel_dilation=3 spans 7 pixels, more than the 4 of spatial axis 0 "
                r"\(size 4, padding \(0, 0\)\): the output size would be below 1"
            ),
        ),
        (
            {"padding": ((0, 0), (-2, -4)), "input_dilation": (1, 2), "kernel_dilation": (1, 3)},
            (
                r"kernel of 2 taps with kernel_dilation=3 spans 4 pixels, more than the 3 of spatial axis 1 "
                r"\(size 9, padding \(-2, -4\)\): the output size would be below 1"
            ),
        ),
    ],
    ids=str,
)
def test_bad_values_of_the_ordinary_convolution(arguments, match):
    refuse("ordinary", ValueError, match, **arguments)


def test_bad_types_of_the_ordinary_convolution():
    for value in (1.5, "2", True, None, (1, 2.0)):
        refuse("ordinary", TypeError, r"input_dilation must be an int", input_dilation=value)
    for name in ELSEWHERE:
        with pytest.raises(TypeError, match=name):
            jax_mps.conv(X, KERNEL, **{name: 1})


@every_function
def test_kernels_of_a_wrong_rank(function):
    for shape in ((), (6,), (6, 4), (1, 1, 1, 1, 6, 4)):
        refuse(
            function,
            ValueError,
            r"WINDOW must have 1 to 3 spatial axes and two channel axes of known sizes, got shape \(",
            kernel=np.zeros(shape, np.float32),
        )
    refuse(
        function,
        ValueError,
        r"kernel must be at least 1 .*\(3, 0\)",
        kernel=np.zeros((3, 0, 6, 4), np.float32),
    )


@every_function
def test_images_of_a_wrong_rank(function):
    for shape in ((), (6,), (4, 5)):
        refuse(
            function,
            ValueError,
            r"a kernel with 2 spatial axes needs an array with as many and a channel axis, got one of ",
            np.zeros(shape, np.float32),
        )
    refuse(function, ValueError, r"every spatial axis needs at least one pixel, got sizes \(0, 5\)",
           np.zeros((2, 0, 5, 6), np.float32))  # fmt: skip


def test_gradients_of_a_wrong_shape():
    match = (
        r"source_gradient must have shape \(2, 9, 10, 4\) \(that of the result of conv_transpose\), got \("
    )
    for shape in ((2, 9, 10, 6), (1, 9, 10, 4), (2, 8, 10, 4), (2, 9, 10), (2, 4, 9, 10), X.shape):
        g = np.zeros(shape, np.float32)
        refuse(
            lambda g, k, **c: jax_mps.conv_transpose_gradient_data(g, k, X.shape, **c), ValueError, match, g
        )
        refuse(
            lambda g, x, **c: jax_mps.conv_transpose_gradient_weights(g, x, KERNEL.shape, **c),
            ValueError, match, g, X,
        )  # fmt: skip


@pytest.mark.parametrize("value", [5, "abcd", None, 2.5])
def test_shapes_that_are_none(value):
    with pytest.raises(TypeError, match="source_shape must be a sequence of ints"):
        jax_mps.conv_transpose_gradient_data(G, KERNEL, value, **GOOD)
    with pytest.raises(TypeError, match="kernel_shape must be a sequence of ints"):
        jax_mps.conv_transpose_gradient_weights(G, X, value, **GOOD)


def test_shapes_of_bad_numbers():
    with pytest.raises(TypeError, match=r"source_shape must be an int .*4\.0"):
        jax_mps.conv_transpose_gradient_data(G, KERNEL, (2, 4.0, 5, 6), **GOOD)
    with pytest.raises(ValueError, match=r"source_shape must not have negative .*-4"):
        jax_mps.conv_transpose_gradient_data(G, KERNEL, (2, -4, 5, 6), **GOOD)
    with pytest.raises(TypeError, match=r"kernel_shape must be an int .*3\.0"):
        jax_mps.conv_transpose_gradient_weights(G, X, (3.0, 2, 6, 4), **GOOD)
    with pytest.raises(ValueError, match=r"kernel_shape must not have negative .*-2"):
        jax_mps.conv_transpose_gradient_weights(G, X, (3, -2, 6, 4), **GOOD)


# --- types --------------------------------------------------------------------------------------------

UNSUPPORTED = (*grid.INTEGERS, "int4", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", UNSUPPORTED)
def test_unsupported_types(dtype):
    match = rf"must have a dtype of float32, float64, float16, bfloat16, got {dtype}"
    x, kernel, g = (zeros(a.shape, jnp.dtype(dtype)) for a in (X, KERNEL, G))
    refuse("forward", TypeError, f"x {match}", x)
    refuse("forward", TypeError, f"kernel {match}", kernel=kernel)
    refuse("data", TypeError, match, kernel=kernel)
    refuse("weights", TypeError, match, x)
    refuse("ordinary", TypeError, f"x {match}", x)
    refuse("ordinary", TypeError, f"kernel {match}", kernel=kernel)
    with pytest.raises(TypeError, match=f"source_gradient {match}"):
        jax_mps.conv_transpose_gradient_data(g, KERNEL, X.shape, **GOOD)
    with pytest.raises(TypeError, match=f"source_gradient {match}"):
        jax_mps.conv_transpose_gradient_weights(g, X, KERNEL.shape, **GOOD)


def test_types_that_differ():
    half = KERNEL.astype(np.float16)
    for function in ("forward", "ordinary"):
        refuse(function, TypeError, "kernel must have the dtype of x, float32, got float16", kernel=half)
    g = G.astype(jnp.bfloat16)
    with pytest.raises(
        TypeError, match="kernel must have the dtype of source_gradient, bfloat16, got float32"
    ):
        jax_mps.conv_transpose_gradient_data(g, KERNEL, X.shape, **GOOD)
    with pytest.raises(
        TypeError, match="source must have the dtype of source_gradient, bfloat16, got float32"
    ):
        jax_mps.conv_transpose_gradient_weights(g, X, KERNEL.shape, **GOOD)


@every_function
def test_not_arrays(function):
    with pytest.raises(TypeError):
        jax_mps.conv_transpose("image", KERNEL)
    with pytest.raises(TypeError):
        jax_mps.conv_transpose(X, "kernel")
    with pytest.raises(TypeError):
        jax_mps.conv("image", KERNEL)
    with pytest.raises(TypeError):
        jax_mps.conv(X, "kernel")


# --- the native implementation where it cannot be had -------------------------------------------------

WITHOUT_NATIVE = """
import numpy as np, jax_mps
from without_native import check_refused
x, k, g = (np.ones(s, np.float32) for s in ((1, 4, 1), (2, 1, 1), (1, 8, 1)))
calls = [
    lambda i: jax_mps.conv_transpose(x, k, strides=2, implementation=i),
    lambda i: jax_mps.conv_transpose_gradient_data(g, k, x.shape, strides=2, implementation=i),
    lambda i: jax_mps.conv_transpose_gradient_weights(g, x, k.shape, strides=2, implementation=i),
    lambda i: jax_mps.conv(g, k, strides=2, implementation=i),
]
for call, expected in zip(calls, (1, 2, 4, 2), strict=True):
    np.testing.assert_array_equal(call(None), np.full(call("xla").shape, expected))
check_refused(calls)
print("done")
"""


def test_native_switched_off():
    assert finish(start(WITHOUT_NATIVE, JAX_MPS_NATIVE="off")) == "done\n"


@every_function
def test_native_on_another_platform(function, native):
    def call(x, k):
        return FUNCTIONS[function](x, k, **GOOD, implementation="native")

    with pytest.raises(ValueError, match="implementation='native' cannot be had on cuda"):
        jax.jit(call).trace(X, KERNEL).lower(lowering_platforms=("cuda",))
