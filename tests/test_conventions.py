"""Kernels and paddings of other libraries: the same results as those libraries."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps
from jax_mps import conventions

FLAX_PADDINGS: list[Any] = ["SAME", "VALID", 0, 1, ((0, 2),), ((-1, 3),)]


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(-4, 5, shape), jnp.float32)


# --- kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(("rank", "groups"), list(itertools.product((1, 2, 3), (1, 3))))
def test_kernel_from_torch(rank: int, groups: int, transpose_kernel: bool) -> None:
    torch = pytest.importorskip("torch")
    window = (2, 3, 4)[:rank]
    weight, x = array(6, 2, *window), array(2, 6, *(3, 4, 2)[:rank])
    function = getattr(torch.nn.functional, f"conv_transpose{rank}d")
    expected = function(
        torch.tensor(np.asarray(x)), torch.tensor(np.asarray(weight)), stride=2, groups=groups
    )
    kernel = jax_mps.kernel_from_torch(weight, groups, transpose_kernel=transpose_kernel)
    y = jax_mps.conv_transpose(
        x,
        kernel,
        strides=2,
        groups=groups,
        transpose_kernel=transpose_kernel,
        data_format="channels_first",
    )
    np.testing.assert_array_equal(y, expected)  # integers
    back = jax_mps.kernel_to_torch(kernel, groups, transpose_kernel=transpose_kernel)
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64", "int8"])
def test_kernel_from_a_tensor(dtype: str) -> None:
    """A tensor, as one that is conjugated; and a copy of it."""
    torch = pytest.importorskip("torch")
    tensor = torch.arange(-12, 12).reshape(4, 2, 3).to(getattr(torch, dtype)).conj()
    kernel = jax_mps.kernel_from_torch(tensor, 2, transpose_kernel=True)
    assert kernel.dtype == jnp.dtype(dtype)
    expected = np.moveaxis(np.arange(-12, 12).reshape(4, 2, 3), (0, 1), (-1, -2))
    np.testing.assert_array_equal(kernel.astype(jnp.complex64), expected)
    tensor.zero_()
    np.testing.assert_array_equal(kernel.astype(jnp.complex64), expected)


def test_kernel_from_a_parameter() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
    assert layer.weight.requires_grad
    kernel = jax_mps.kernel_from_torch(layer.weight, 2)
    np.testing.assert_array_equal(jax_mps.kernel_to_torch(kernel, 2), layer.weight.detach().numpy())


def test_kernel_from_a_tensor_that_has_no_array() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"weight .* NumPy .* torch\.sparse_coo"):
        jax_mps.kernel_from_torch(torch.ones(1, 1, 2).to_sparse())
    with pytest.raises(ValueError, match=r"weight .* 'meta'"):
        jax_mps.kernel_from_torch(torch.ones(1, 1, 2, device="meta"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jax_mps.kernel_from_torch(jnp.zeros((4, 2))), ValueError, ["weight", "(4, 2)"]),
        (lambda: jax_mps.kernel_from_torch(jnp.zeros((4, 2, 3)), 3), ValueError, ["groups", "4", "3"]),
        (lambda: jax_mps.kernel_from_torch(jnp.zeros((4, 2, 3)), 0), ValueError, ["groups", "0"]),
        (lambda: jax_mps.kernel_from_torch(jnp.zeros((4, 2, 3)), 1.5), TypeError, ["groups", "1.5"]),
        (lambda: jax_mps.kernel_to_torch(jnp.zeros((3, 2, 5)), 2), ValueError, ["groups", "5", "2"]),
        (lambda: jax_mps.kernel_to_torch(jnp.zeros((3,) * 6)), ValueError, ["kernel", "3 spatial"]),
    ],
)
def test_kernel_errors(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


# --- paddings: Flax -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "s", "d"), [(1, 1, 1), (3, 1, 1), (4, 2, 1), (3, 2, 1), (2, 3, 1), (3, 2, 2)])
def test_padding_of_flax(k: int, s: int, d: int) -> None:
    x, kernel = array(2, 5, 3), array(k, 3, 4)
    for padding in FLAX_PADDINGS:
        pads = padding if isinstance(padding, str | tuple) else ((padding, padding),)
        if not isinstance(pads, str) and (5 - 1) * s + 1 + sum(pads[0]) < (k - 1) * d + 1:
            continue  # nothing would be left
        expected = lax.conv_transpose(x, kernel, (s,), pads, rhs_dilation=(d,))
        pairs = conventions.padding_from_flax(padding, (k,), strides=s, kernel_dilation=d)
        y = jax_mps.conv_transpose(x, kernel, strides=s, padding=pairs, kernel_dilation=d)
        np.testing.assert_array_equal(y, expected, err_msg=str(padding))
        around = conventions.padding_to_flax(pairs, (k,), strides=s, kernel_dilation=d)
        if not isinstance(pads, str):
            assert around == pads
        again = lax.conv_transpose(x, kernel, (s,), around, rhs_dilation=(d,))
        np.testing.assert_array_equal(again, expected)


@pytest.mark.skipif(
    "use_consistent_padding" not in inspect.signature(lax.conv_transpose).parameters,
    reason="this JAX has no such argument",
)
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0),), ((1, 2),), ((-1, 3),)])
@pytest.mark.parametrize(("k", "s", "d"), [(1, 1, 1), (4, 2, 1), (3, 2, 1), (2, 3, 1), (3, 2, 2)])
def test_consistent_padding_of_jax(padding: Any, k: int, s: int, d: int) -> None:
    x, kernel = array(2, 5, 3), array(k, 3, 4)

    def stock(padding: Any) -> jax.Array:
        return lax.conv_transpose(x, kernel, (s,), padding, rhs_dilation=(d,), use_consistent_padding=True)

    expected = stock(padding)
    options: dict[str, Any] = {"strides": s, "kernel_dilation": d}
    pairs = conventions.padding_from_flax(padding, (k,), **options, use_consistent_padding=True)
    y = jax_mps.conv_transpose(x, kernel, padding=pairs, **options)
    np.testing.assert_array_equal(y, expected)
    back = conventions.padding_to_flax(pairs, (k,), **options, use_consistent_padding=True)
    np.testing.assert_array_equal(stock(back), expected)


def test_padding_of_a_flax_layer() -> None:
    layer = flax.linen.ConvTranspose(4, (3, 2), strides=(2, 3), padding="SAME", use_bias=False)
    x = array(1, 4, 5, 3)
    variables = layer.init(jax.random.key(0), x)
    pairs = conventions.padding_from_flax("SAME", (3, 2), strides=(2, 3))
    y = jax_mps.conv_transpose(x, variables["params"]["kernel"], strides=(2, 3), padding=pairs)
    np.testing.assert_allclose(y, layer.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_output_padding_to_flax() -> None:
    x, kernel = array(1, 4, 2), array(3, 2, 2)
    around = conventions.padding_to_flax(1, (3,), strides=2, output_padding=1)
    expected = jax_mps.conv_transpose(x, kernel, strides=2, padding=1, output_padding=1)
    np.testing.assert_array_equal(lax.conv_transpose(x, kernel, (2,), around), expected)


# --- paddings: PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "s", "d", "p", "op"),
    [(3, 2, 1, 1, 1), (4, 2, 1, 1, 0), (2, 3, 1, 0, 2), (3, 1, 3, 2, 2), (5, 2, 2, 3, 1)],
)
def test_padding_of_torch(k: int, s: int, d: int, p: int, op: int) -> None:
    torch = pytest.importorskip("torch")
    x, weight = array(2, 3, 6), array(3, 4, k)
    options: dict[str, Any] = {"stride": s, "dilation": d, "padding": p, "output_padding": op}
    expected = torch.nn.functional.conv_transpose1d(
        torch.tensor(np.asarray(x)), torch.tensor(np.asarray(weight)), **options
    )
    pairs = conventions.padding_from_torch(p, (k,), output_padding=op)
    y = jax_mps.conv_transpose(
        x,
        jax_mps.kernel_from_torch(weight),
        strides=s,
        padding=pairs,
        kernel_dilation=d,
        data_format="channels_first",
    )
    np.testing.assert_array_equal(y, expected)
    assert conventions.padding_to_torch(pairs, (k,), strides=s, kernel_dilation=d) == ((p,), (op,))


@pytest.mark.parametrize("padding", ["SAME", ((0, 1),), ((-1, -1),), ((3, 0),)])
def test_no_such_padding_in_torch(padding: Any) -> None:
    with pytest.raises(ValueError, match="cannot be had in PyTorch") as caught:
        conventions.padding_to_torch(padding, (3,), strides=2)
    assert "0 to 1" in str(caught.value)


# --- paddings: Keras ----------------------------------------------------------------------------------

# What keras.ops.conv_transpose (Keras 3, JAX backend) gives for the source 1 2 3 and the kernel 1 10 100 ...:
# padding, window, strides, dilation, output_padding, result.
KERAS: list[tuple[str, int, int, int, int | None, list[int]]] = [
    ("valid", 3, 2, 1, None, [1, 10, 102, 20, 203, 30, 300]),
    ("valid", 2, 3, 1, None, [1, 10, 0, 2, 20, 0, 3, 30, 0]),
    ("valid", 3, 2, 1, 1, [1, 10, 102, 20, 203, 30, 300, 0]),
    ("valid", 2, 3, 1, 2, [1, 10, 0, 2, 20, 0, 3, 30, 0, 0]),
    ("valid", 3, 1, 2, None, [1, 2, 13, 20, 130, 200, 300]),
    ("same", 3, 2, 1, None, [1, 10, 102, 20, 203, 30]),
    ("same", 4, 2, 1, None, [10, 102, 1020, 203, 2030, 300]),
    ("same", 2, 3, 1, None, [1, 10, 0, 2, 20, 0, 3, 30, 0]),
    ("same", 3, 2, 1, 0, [10, 102, 20, 203, 30]),
    ("same", 3, 2, 1, 1, [1, 10, 102, 20, 203, 30]),
    ("same", 4, 2, 1, 1, [10, 102, 1020, 203, 2030]),
    ("same", 2, 3, 1, 2, [1, 10, 0, 2, 20, 0, 3, 30]),
    ("same", 5, 3, 1, 2, [10, 100, 1002, 10020, 200, 2003, 20030, 300, 3000]),
    ("same", 3, 1, 2, None, [13, 20, 130]),
]


@pytest.mark.parametrize(("padding", "k", "s", "d", "op", "expected"), KERAS)
def test_padding_of_keras(padding: str, k: int, s: int, d: int, op: int | None, expected: list[int]) -> None:
    x = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    kernel = 10.0 ** jnp.arange(k, dtype=jnp.float32).reshape(k, 1, 1)
    options: dict[str, Any] = {"strides": s, "kernel_dilation": d}
    pairs = conventions.padding_from_keras(padding, (k,), output_padding=op, **options)
    y = jax_mps.conv_transpose(x, kernel, padding=pairs, transpose_kernel=True, **options)
    np.testing.assert_allclose(y.ravel(), expected)
    name, more = conventions.padding_to_keras(pairs, (k,), **options)
    assert conventions.padding_from_keras(name, (k,), output_padding=more, **options) == pairs


def test_no_such_padding_in_keras() -> None:
    with pytest.raises(ValueError, match="cannot be had in Keras"):
        conventions.padding_to_keras(((2, 0),), (3,), strides=2)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: conventions.padding_from_keras("full", (3,)), ValueError, ["padding", "'full'", "'same'"]),
        (lambda: conventions.padding_from_keras(1, (3,)), ValueError, ["padding", "1"]),
        (lambda: conventions.padding_from_flax("SAME_LOWER", (3,)), ValueError, ["padding", "SAME_LOWER"]),
        (
            lambda: conventions.padding_from_flax(0, (3,), use_consistent_padding=1),
            TypeError,
            ["use_consistent_padding", "1"],
        ),
        (lambda: conventions.padding_from_flax(0, 3), ValueError, ["window_shape", "3"]),
        (lambda: conventions.padding_from_flax(0, (0,)), ValueError, ["window_shape", "at least 1"]),
        (lambda: conventions.padding_from_flax(0, (3,), strides=0), ValueError, ["strides", "at least 1"]),
        (lambda: conventions.padding_from_torch(-1, (3,)), ValueError, ["padding", "at least 0", "-1"]),
        (
            lambda: conventions.padding_from_torch((1, 1), (3,)),
            ValueError,
            ["padding", "1 spatial", "(1, 1)"],
        ),
        (lambda: conventions.padding_to_flax(1.0, (3,)), TypeError, ["padding", "1.0"]),
    ],
)
def test_padding_errors(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


# --- indices of maxima --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_indices_from_tensorflow(with_batch: bool, wide: bool) -> None:
    """Numbers counted by NumPy through all axes that TensorFlow counts through."""
    shape = (2, 6, 5, 3)
    x = np.random.default_rng(0).permutation(np.prod(shape)).astype(np.float32).reshape(shape)
    y, expected = jax_mps.max_pool(x, 2, strides=2, return_indices=True)
    every = np.arange(x.size, dtype=np.int64 if wide else np.int32).reshape(shape)
    numbers = every if with_batch else every - every[:, :1, :1, :1]
    where = dict(zip(x.ravel(), numbers.ravel(), strict=True))
    argmax = np.array([where[v] for v in np.asarray(y).ravel()], every.dtype).reshape(y.shape)
    convert = conventions.indices_from_tensorflow
    np.testing.assert_array_equal(convert(argmax, shape, include_batch_in_index=with_batch), expected)
    if not wide:
        traced = jax.jit(lambda a: convert(a, shape, include_batch_in_index=with_batch))(argmax)
        np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("storage_order", [0, 1])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_indices_from_onnx(rank: int, storage_order: int) -> None:
    """Numbers counted by NumPy through the whole array; planes by columns with `storage_order`."""
    shape = (2, 3, *(6, 5, 4)[:rank])
    x = np.random.default_rng(0).permutation(np.prod(shape)).astype(np.float32).reshape(shape)
    y, expected = jax_mps.max_pool(
        x, (2,) * rank, strides=2, data_format="channels_first", return_indices=True
    )
    pixels = np.prod(shape[2:])
    plane = np.arange(pixels).reshape(shape[2:], order="F" if storage_order else "C")
    numbers = plane + np.arange(6).reshape(2, 3, *(1,) * rank) * pixels
    where = dict(zip(x.ravel(), numbers.ravel(), strict=True))
    indices = np.array([where[v] for v in np.asarray(y).ravel()]).reshape(y.shape)
    actual = conventions.indices_from_onnx(indices, shape, storage_order=storage_order)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.int32


def test_wrong_indices_of_other_libraries() -> None:
    at = np.zeros((1, 2, 2, 1), np.int64)
    with pytest.raises(TypeError, match="argmax must hold integers, got float32"):
        conventions.indices_from_tensorflow(at.astype(np.float32), (1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"input_shape must have 4 sizes, .* got \(1, 4, 1\)"):
        conventions.indices_from_tensorflow(at, (1, 4, 1))
    with pytest.raises(TypeError, match="include_batch_in_index must be a bool, got 1"):
        conventions.indices_from_tensorflow(at, (1, 4, 4, 1), include_batch_in_index=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage_order must be 0 or 1, got 2"):
        conventions.indices_from_onnx(at, (1, 1, 4, 4), storage_order=2)
    with pytest.raises(ValueError, match=r"input_shape must have sizes of at least 1.*got \(1, 1, 0, 4\)"):
        conventions.indices_from_onnx(at, (1, 1, 0, 4))
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pixels, got \(1, 1, 65536, 65536\)"):
        conventions.indices_from_onnx(at, (1, 1, 2**16, 2**16))


# --- checkerboards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, 1, 2])
@pytest.mark.parametrize(("stride", "dilation"), list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4))))
def test_overlap_counts_taps(stride: int, dilation: int, low: int) -> None:
    """A transposed convolution of ones with ones counts them: PyTorch's."""
    torch = pytest.importorskip("torch")
    for taps in range(1, 7):
        extent = (taps - 1) * dilation + 1
        low = min(low, extent // 2)
        line = torch.ones(1, 1, 2 * extent + 8)
        y = torch.nn.functional.conv_transpose1d(
            line, torch.ones(1, 1, taps), stride=stride, dilation=dilation, padding=low
        )
        (counts,) = conventions.overlap((taps,), stride, kernel_dilation=dilation)
        middle = np.arange(extent, extent + stride)
        np.testing.assert_array_equal(y[0, 0, middle], np.array(counts)[(middle + low) % stride])
        if dilation == 1:
            assert (len(set(counts)) == 1) == (taps % stride == 0)


def test_overlap_of_several_axes() -> None:
    axes = conventions.overlap((3, 4, 5), (2, 2, 3), kernel_dilation=(1, 2, 1))
    assert axes == ((2, 1), (4, 0), (2, 2, 1))


@pytest.mark.parametrize(
    ("window", "strides", "error", "words"),
    [
        ((3, 0), 2, ValueError, r"window_shape must be at least 1 .*\(3, 0\)"),
        ((3,), 0, ValueError, "strides must be at least 1 .*0"),
        (
            (3,),
            (2, 2),
            ValueError,
            r"strides must have one entry for each of the 1 spatial axes, got \(2, 2\)",
        ),
        (3, 2, ValueError, "window_shape must be a sequence of 1 to 3 ints, got 3"),
        ((3,), 2.0, TypeError, "strides must be an int known at trace time, got 2.0"),
    ],
)
def test_overlap_refuses(window: Any, strides: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        conventions.overlap(window, strides)
