"""Ordinary convolution beside PyTorch's and JAX's own in float64: values and derivatives of two orders."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import convs
import grid
import jax_mps
import oracle


class Case(NamedTuple):
    """A call of `conv` but for its arrays."""

    sizes: tuple[int, ...]
    window: tuple[int, ...]
    strides: Any = 1
    padding: Any = "VALID"
    input_dilation: Any = 1
    kernel_dilation: Any = 1
    inputs: int = 3
    outputs: int = 2
    groups: int = 1

    @property
    def rank(self):
        return len(self.window)

    @property
    def call(self):
        names = ("strides", "padding", "input_dilation", "kernel_dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def kernel_shape(self):
        return (*self.window, self.inputs // self.groups, self.outputs)

    def each(self, name):
        return oracle.each_axis(getattr(self, name), self.rank)

    @property
    def pads(self):
        """The padding as pairs, and the results along each axis."""
        found = []
        columns = (self.each(n) for n in ("strides", "padding", "input_dilation", "kernel_dilation"))
        for n, k, s, p, e, d in zip(self.sizes, self.window, *columns, strict=True):
            size, extent = (n - 1) * e + 1, (k - 1) * d + 1
            if p == "SAME":
                total = max((math.ceil(size / s) - 1) * s + extent - size, 0)
                p = (total // 2, total - total // 2)
            low, high = (0, 0) if p == "VALID" else (p, p) if isinstance(p, int) else p
            count = (size + low + high - extent) // s + 1
            # Of the high end only what windows reach.
            found.append(((low, (count - 1) * s + extent - low - size), count))
        return found

    def arrays(self, data_format="channels_last", batch=(2,), dtype="float32"):
        """An image, a kernel, a gradient of the result, and tangents of the first two."""
        x = convs.image(batch, self.sizes, self.inputs, data_format)
        g = convs.image(batch, tuple(count for _, count in self.pads), self.outputs, data_format)
        shapes = (x, self.kernel_shape, g, x, self.kernel_shape)
        return [oracle.normal(s, jnp.dtype(dtype), seed) for seed, s in enumerate(shapes)]


CASES = {
    # one axis
    "plain": Case((7,), (3,)),
    "strided": Case((9,), (3,), 2, 1),
    "same": Case((8,), (3,), 2, "SAME"),
    "cropped": Case((9,), (2,), 1, ((-2, -3),)),
    "crop-and-pad": Case((8,), (4,), 3, ((-1, 4),)),
    "beyond-the-image": Case((4,), (2,), 1, ((-6, 9),)),
    "larger-than-image": Case((3,), (7,), 1, 3),
    "dilated": Case((11,), (3,), 2, 2, 1, 3),
    "one-tap": Case((5,), (1,)),
    "skips": Case((9,), (1,), 4),
    "causal": Case((7,), (3,), 1, ((4, 0),), 1, 2),
    "spread": Case((5,), (3,), 1, "SAME", 2),
    "spread-cropped": Case((5,), (3,), 1, ((-2, 1),), 3, 2),
    "spread-strided": Case((6,), (3,), 2, 1, 2),
    "spread-strided-same": Case((6,), (4,), 3, "SAME", 2, 2, 4, 6, 2),
    "depthwise-1d": Case((12,), (5,), 1, 2, 1, 1, 4, 4, 4),
    # two axes
    "resnet": Case((7, 8), (3, 3), 1, 1, 1, 1, 4, 5),
    "downsample": Case((8, 9), (3, 3), 2, "SAME", 1, 1, 4, 6),
    "pointwise": Case((5, 4), (1, 1), 1, 0, 1, 1, 6, 8),
    "patches": Case((8, 6), (4, 3), (4, 3), 0, 1, 1, 3, 8),
    "depthwise": Case((6, 7), (3, 3), 1, 1, 1, 1, 5, 5, 5),
    "depthwise-strided": Case((7, 8), (3, 5), 2, "SAME", 1, 1, 4, 4, 4),
    "multiplier": Case((6, 5), (3, 3), 1, 1, 1, 1, 3, 9, 3),
    "groups": Case((6, 7), (3, 2), (1, 2), ((1, 0), (2, 1)), 1, (2, 1), 4, 6, 2),
    "rectangle": Case((6, 9), (1, 7), (1, 2), ((0, 0), (3, 3))),
    "spread-mixed": Case((4, 5), (3, 2), (2, 1), ((1, 2), (-1, 2)), (1, 3), (1, 2), 4, 6, 2),
    # three axes
    "volume": Case((4, 5, 3), (3, 3, 3), 1, 1, 1, 1, 2, 3),
    "volume-strided": Case((5, 6, 4), (2, 3, 2), 2, ((0, 1), (1, 1), (-1, 2)), 1, (1, 1, 2), 2, 3),
    "volume-depthwise": Case((4, 4, 5), (3, 2, 3), (1, 2, 1), "SAME", 1, 1, 3, 3, 3),
    "volume-spread": Case((3, 2, 3), (2, 3, 2), 1, 1, (2, 1, 3), 1, 2, 4, 2),
}
XLA = ("crop-and-pad", "dilated", "spread-cropped", "spread-strided", "resnet", "groups", "volume-depthwise")
PATHS = [(name, data_format) for name in CASES for data_format in grid.FORMATS]


def derivatives(f, x, kernel, g, tx, tk):
    """Values, gradients, tangents, and two ways to the second order, of which bilinear maps have one part."""
    pull = lambda x, k: jax.vjp(f, x, k)[1](g)  # noqa: E731

    def along(x, k):
        dx, dk = pull(x, k)
        return jnp.sum(dx * tx) + jnp.sum(dk * tk)

    return {
        "value": f(x, kernel),
        "gradient": pull(x, kernel),
        "tangent": jax.jvp(f, (x, kernel), (tx, tk))[1],
        "forward over reverse": jax.jvp(pull, (x, kernel), (tx, tk))[1],
        "reverse over reverse": jax.grad(along, (0, 1))(x, kernel),
    }


def ours(case, data_format, implementation, **more):
    f = functools.partial(
        jax_mps.conv, **case.call, data_format=data_format, implementation=implementation, **more
    )
    return jax.jit(functools.partial(derivatives, f))


def check(case, found, reference, dtype):
    """Compares all derivatives; sums of halves are as exact as one rounding lets them be."""
    length = 2 * max(math.prod(case.kernel_shape), 2 * math.prod(case.sizes) * case.inputs)
    for name, expected in reference.items():
        for actual, wanted in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected), strict=True):
            assert actual.dtype == dtype
            oracle.assert_close(actual, np.asarray(wanted), length=length, scale=2 * math.sqrt(length))


# --- jax.lax ------------------------------------------------------------------------------------------


def lax_conv(case, data_format, x, kernel):
    """Stock JAX's, of the image as it is after padding: XLA's CPU code for negative padding is wrong."""
    start = x.ndim - case.rank - (data_format == "channels_last")
    pads = [(0, 0, 0)] * x.ndim
    for i, (((low, high), _), e) in enumerate(zip(case.pads, case.each("input_dilation"), strict=True)):
        pads[start + i] = (low, high, e - 1)
    letters = "DHW"[3 - case.rank :]
    layout = f"N{letters}C" if data_format == "channels_last" else f"NC{letters}"
    return lax.conv_general_dilated(
        lax.pad(x, np.zeros((), x.dtype), pads), kernel, tuple(case.each("strides")), "VALID",
        rhs_dilation=tuple(case.each("kernel_dilation")), feature_group_count=case.groups,
        dimension_numbers=(layout, f"{letters}IO", layout),
    )  # fmt: skip


@functools.cache
def lax_results(name, data_format, dtype="float32"):
    """In float64, of arrays of that type."""
    arrays = [a.astype(np.float64) for a in CASES[name].arrays(data_format, dtype=dtype)]
    f = functools.partial(lax_conv, CASES[name], data_format)
    return jax.tree.map(np.asarray, jax.jit(functools.partial(derivatives, f))(*arrays))


@convs.on_both_paths(("name", "data_format"), PATHS, lambda n, f: n in XLA and f == "channels_last")
def test_lax(name, data_format, implementation, x64):
    case = CASES[name]
    found = ours(case, data_format, implementation)(*case.arrays(data_format))
    check(case, found, lax_results(name, data_format), "float32")


@convs.on_both_paths(
    "name", ["crop-and-pad", "spread", "spread-strided", "downsample", "depthwise", "groups", "volume"],
    lambda name: name == "spread-strided",
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(dtype, name, implementation, x64):
    case = CASES[name]
    found = ours(case, "channels_last", implementation)(*case.arrays(dtype=dtype))
    check(case, found, lax_results(name, "channels_last", dtype), dtype)


def test_same_is_that_of_lax():
    """And of the image with its zeros, where zeros are put between pixels."""
    for n, k, s, d in [(7, 3, 1, 1), (8, 3, 2, 1), (9, 4, 3, 1), (5, 2, 4, 1), (6, 3, 2, 2), (4, 9, 1, 1)]:
        x, kernel = np.zeros((1, n, 1), np.float32), np.zeros((k, 1, 1), np.float32)
        pairs = lax.padtype_to_pads((n,), ((k - 1) * d + 1,), (s,), "SAME")
        call = {"strides": s, "kernel_dilation": d}
        one, other = (
            jax.make_jaxpr(functools.partial(jax_mps.conv, padding=p, **call))(x, kernel)
            for p in ("SAME", [tuple(map(int, p)) for p in pairs])
        )
        assert str(one) == str(other)
        assert one.out_avals[0].shape == (1, math.ceil(n / s), 1)
        for e in (2, 3):
            f = functools.partial(jax_mps.conv, padding="SAME", input_dilation=e, **call)
            assert jax.eval_shape(f, x, kernel).shape == (1, math.ceil(((n - 1) * e + 1) / s), 1)


# --- PyTorch ------------------------------------------------------------------------------------------


def random_case(seed):
    """Any arguments at all that leave a result, with a layout and a type."""
    rng = np.random.default_rng(seed)
    while True:
        rank = int(rng.integers(1, 4))

        def draw(low, high):
            return tuple(int(n) for n in rng.integers(low, high, size=rank))  # noqa: B023

        window = draw(1, {1: 9, 2: 5, 3: 4}[rank])
        strides, expansion = (draw(1, 4) if rng.random() < chance else 1 for chance in (0.6, 0.3))
        pads = tuple(tuple(int(n) for n in rng.integers(-2, 5, 2)) for _ in range(rank))
        groups = int(rng.choice([1, 1, 2, 3]))
        inputs, outputs = (groups * int(n) for n in rng.integers(1, 4, 2))
        if rng.random() < 0.2:
            groups, outputs = inputs, inputs * int(rng.integers(1, 3))
        dilation = draw(1, 4) if rng.random() < 0.4 else 1
        sizes = draw(1, {1: 20, 2: 9, 3: 6}[rank])
        case = Case(sizes, window, strides, pads, expansion, dilation, inputs, outputs, groups)
        if all(count > 0 for _, count in case.pads):
            dtype = rng.choice(["float32", "float32", "float64", "float16", "bfloat16"])
            return case, grid.FORMATS[int(rng.integers(2))], str(dtype)


def torch_derivatives(case, data_format, arrays):
    """All derivatives in float64, from PyTorch's convolution of a tensor padded before."""
    torch = pytest.importorskip("torch")
    first = data_format == "channels_first"
    to_torch = lambda a: torch.tensor(np.asarray(a, np.float64), requires_grad=True)  # noqa: E731
    x, kernel, g, tx, tk = map(to_torch, arrays)

    def image(a):
        return a if first else a.movedim(-1, 1)

    steps = case.each("input_dilation")
    spread = torch.zeros(
        *image(x).shape[:2], *((n - 1) * e + 1 for n, e in zip(case.sizes, steps, strict=True)),
        dtype=torch.float64,
    )  # fmt: skip
    spread[(slice(None), slice(None), *(slice(None, None, e) for e in steps))] = image(x)
    pads = [n for pair, _ in case.pads[::-1] for n in pair]
    # Grown first and cut then: PyTorch does not cut off more than there is.
    padded = torch.nn.functional.pad(spread, [max(n, 0) for n in pads])
    padded = torch.nn.functional.pad(padded, [min(n, 0) for n in pads])
    y = getattr(torch.nn.functional, f"conv{case.rank}d")(
        padded, kernel.movedim((-1, -2), (0, 1)),
        stride=tuple(case.each("strides")), dilation=tuple(case.each("kernel_dilation")), groups=case.groups,
    )  # fmt: skip
    y = y if first else y.movedim(1, -1)
    gradient = torch.autograd.grad(y, (x, kernel), g, create_graph=True)
    along = (gradient[0] * tx).sum() + (gradient[1] * tk).sum()
    *second, tangent = torch.autograd.grad(along, (x, kernel, g))
    found = {"value": y, "gradient": gradient, "tangent": tangent}
    found |= dict.fromkeys(("forward over reverse", "reverse over reverse"), tuple(second))
    return jax.tree.map(lambda t: t.detach().numpy(), found)


@convs.on_both_paths("seed", range(120), lambda seed: seed % 10 == 0)
def test_torch(seed, implementation, x64):
    case, data_format, dtype = random_case(seed)
    arrays = case.arrays(data_format, dtype=dtype)
    found = ours(case, data_format, implementation)(*arrays)
    check(case, found, torch_derivatives(case, data_format, arrays), dtype)


def test_random_cases_are_of_every_kind():
    cases = [random_case(seed) for seed in range(120)]
    kinds = {
        "strides": lambda c: max(c.each("strides")) > 1,
        "input dilation": lambda c: max(c.each("input_dilation")) > 1,
        "both": lambda c: max(c.each("strides")) > 1 < max(c.each("input_dilation")),
        "kernel dilation": lambda c: max(c.each("kernel_dilation")) > 1,
        "negative padding": lambda c: min(n for pair in c.padding for n in pair) < 0,
        "groups": lambda c: 1 < c.groups < c.inputs,
        "multiplier": lambda c: 1 < c.groups == c.inputs < c.outputs,
        "window beyond the image": lambda c: any(k > n for k, n in zip(c.window, c.sizes, strict=True)),
    }
    for kind, holds in kinds.items():
        assert sum(holds(case) for case, _, _ in cases) >= 5, kind
    for part, values in ((1, grid.FORMATS), (2, grid.FLOATS)):
        assert {case[part] for case in cases} == set(values)


# --- transformations ----------------------------------------------------------------------------------


@convs.on_both_paths(
    "name", ["same", "spread-strided-same", "groups", "depthwise", "volume-spread"], lambda n: n == "groups"
)
def test_vmap(name, implementation):
    case = CASES[name]
    f = functools.partial(jax_mps.conv, **case.call, implementation=implementation)
    x, kernel, *_ = case.arrays()
    many = [np.stack([a, 2 - a, a * a]) for a in (x, kernel)]
    mappings = [(1, None), (None, -1), (0, 2)]

    @jax.jit
    def run(many):
        found = []
        for axes in mappings:
            operands = [
                a[0] if at is None else jnp.moveaxis(a, 0, at) for a, at in zip(many, axes, strict=True)
            ]
            found.append(jax.vmap(f, axes)(*operands))
        rows = [[f(x, k) for k in many[1]] for x in many[0]]
        return found, rows

    found, rows = run([jnp.asarray(a) for a in many])
    for axes, stack in zip(mappings, found, strict=True):
        for i, y in enumerate(stack):
            wanted = rows[0 if axes[0] is None else i][0 if axes[1] is None else i]
            oracle.assert_close(y, np.asarray(wanted, np.float64), length=math.prod(case.kernel_shape))


def test_eager_equals_jit_bit_by_bit(implementation):
    for name in ("downsample", "spread-strided"):
        case = CASES[name]
        x, kernel, *_ = case.arrays()
        f = functools.partial(jax_mps.conv, **case.call, implementation=implementation)
        np.testing.assert_array_equal(f(x, kernel), jax.jit(f)(x, kernel))


def names_of(f, *operands):
    return [str(e.primitive) for e in jax.make_jaxpr(f)(*operands).eqns if "conv" in str(e.primitive)]


def test_it_is_one_operation_and_so_is_each_gradient():
    case = CASES["groups"]
    x, kernel, g, *_ = case.arrays()
    f = functools.partial(jax_mps.conv, **case.call)
    assert names_of(f, x, kernel) == ["conv_transpose_gradient_data"]
    pull = lambda g: jax.linear_transpose(lambda x: f(x, kernel), x)(g)[0]  # noqa: E731
    assert names_of(pull, g) == ["conv_transpose"]
    pull = lambda g: jax.linear_transpose(lambda k: f(x, k), kernel)(g)[0]  # noqa: E731
    assert names_of(pull, g) == ["conv_transpose_gradient_weights"]
    spread = functools.partial(jax_mps.conv, **CASES["spread"].call)
    assert names_of(spread, *CASES["spread"].arrays()[:2]) == ["conv_transpose"]


def test_it_is_the_transpose_of_conv_transpose(implementation):
    """With the same kernel and arguments, as the page says."""
    call = {"strides": 2, "padding": 1, "groups": 2, "implementation": implementation}
    x, kernel = oracle.normal((2, 8, 8, 4)), oracle.normal((4, 4, 2, 6), seed=1)
    y = oracle.normal((2, 4, 4, 6), seed=2)
    (pulled,) = jax.linear_transpose(lambda x: jax_mps.conv(x, kernel, **call), x)(y)
    direct = jax_mps.conv_transpose(y, kernel, transpose_kernel=True, **call)
    np.testing.assert_array_equal(pulled, direct)


def test_exported_with_symbolic_sizes():
    export = pytest.importorskip("jax.export")
    if jax.__version_info__ < (0, 6):
        pytest.importorskip("absl")
    kernel = oracle.normal((3, 3, 2, 4), seed=1)
    sizes = export.symbolic_shape("a, h, w, 2", constraints=("h >= 3", "w >= 3"))
    call = {"strides": (2, 1), "padding": "SAME", "input_dilation": (1, 2)}
    f = jax.jit(lambda x: jax_mps.conv(x, kernel, **call))
    exported = export.export(f)(jax.ShapeDtypeStruct(sizes, np.float32))
    for shape in ((1, 5, 6, 2), (2, 4, 3, 2)):
        x = oracle.normal(shape)
        oracle.assert_close(exported.call(x), np.asarray(f(x), np.float64), length=18)


# --- types, batches, and numbers that are not finite --------------------------------------------------


@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_batch_axes(data_format, implementation):
    """None, some, and empty ones; no channels at either end."""
    case = CASES["groups"]
    x, kernel, *_ = case.arrays(data_format, (2, 3))

    @jax.jit
    def run(x, kernel):
        f = functools.partial(
            jax_mps.conv, **case.call, data_format=data_format, implementation=implementation
        )
        plain = functools.partial(
            jax_mps.conv, padding=1, data_format=data_format, implementation=implementation
        )
        none = jnp.zeros(convs.image((2,), (4, 4), 0, data_format))
        empty = [f(x[:0], kernel), plain(none, jnp.zeros((3, 3, 0, 2))), plain(none, jnp.zeros((3, 3, 0, 0)))]
        return f(x, kernel), [[f(x, kernel) for x in row] for row in x], empty

    many, each, (empty, zeros, nothing) = run(x, kernel)
    np.testing.assert_allclose(many, np.array(jax.tree.map(np.asarray, each)), rtol=1e-5, atol=1e-5)
    assert empty.shape == (0, *many.shape[1:])
    np.testing.assert_array_equal(zeros, np.zeros(convs.image((2,), (4, 4), 2, data_format)))
    assert nothing.shape == convs.image((2,), (4, 4), 0, data_format)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["downsample", "spread", "spread-strided"])
def test_results_of_a_preferred_type(name, dtype, implementation, x64):
    """float32 of half precision, without a rounding to it on the way; gradients have their operand's type."""
    case = CASES[name]
    x, kernel, g, *_ = case.arrays(dtype=dtype)
    call = {**case.call, "preferred_element_type": np.float32, "implementation": implementation}
    y, pull_back = jax.vjp(lambda x, k: jax_mps.conv(x, k, **call), x, kernel)
    reference = lax_results(name, "channels_last", dtype)
    check(case, {"value": y}, {"value": reference["value"]}, "float32")
    gradient = pull_back(g.astype(np.float32))
    check(case, {"gradient": gradient}, {"gradient": reference["gradient"]}, dtype)


def test_the_sum_of_4096_ones_in_half_precision(implementation):
    for dtype in ("float16", "bfloat16"):
        x, kernel = jnp.ones((1, 3, 2048), dtype), jnp.ones((2, 2048, 1), dtype)
        y = jax_mps.conv(x, kernel, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(y, np.float32).ravel(), [4096, 4096])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["strided", "spread", "spread-strided", "depthwise", "groups"])
def test_nan_and_infinity_reach_the_windows_that_read_them(name, poison, implementation):
    case = CASES[name]
    x, kernel, *_ = case.arrays(batch=(1,))
    at = (0, *[1] * case.rank, 0)
    bad, mark = x.copy(), np.zeros(x.shape, np.float32)
    bad[at], mark[at] = poison, 1
    f = jax.jit(functools.partial(jax_mps.conv, **case.call, implementation=implementation))
    # Ones say which windows read the pixel.
    read = np.asarray(f(mark, np.ones_like(kernel))) > 0.5
    assert read.any()
    assert not read.all()
    found = np.asarray(f(bad, np.abs(kernel)))
    np.testing.assert_array_equal(np.isfinite(found), ~read)
    if np.isinf(poison):
        assert np.all(found[read] == np.inf)
    np.testing.assert_allclose(found[~read], np.asarray(f(x, np.abs(kernel)))[~read], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["strided", "spread", "spread-strided"])
def test_neither_padding_nor_the_zeros_between_pixels_are_multiplied(name, native):
    case = CASES[name]
    x, kernel, *_ = case.arrays()
    f = functools.partial(jax_mps.conv, **case.call, implementation="native")
    assert np.all(np.asarray(f(np.abs(x), np.full_like(kernel, np.inf))) == np.inf)


WAYS = {
    "ints": ({"strides": 2, "padding": 1}, {"strides": (2, 2), "padding": ((1, 1), (1, 1))}),
    "lists": (
        {"strides": [2, 1], "padding": [[0, 1], [1, 0]], "input_dilation": [1, 1]},
        {"strides": (2, 1), "padding": ((0, 1), (1, 0))},
    ),
    "numpy": ({"input_dilation": np.array([2, 1]), "padding": np.int64(1)},
              {"input_dilation": (2, 1), "padding": ((1, 1), (1, 1))}),
    "dilation": ({"kernel_dilation": (1, 2)}, {"kernel_dilation": [1, np.int32(2)], "padding": "valid"}),
    "same": ({"padding": "same"}, {"padding": "SAME", "strides": (1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_arguments(way):
    x, kernel, *_ = CASES["resnet"].arrays()
    one, other = (jax.make_jaxpr(functools.partial(jax_mps.conv, **call))(x, kernel) for call in WAYS[way])
    assert str(one) == str(other)


# --- bias ---------------------------------------------------------------------------------------------

BIASED = {
    "conv": (jax_mps.conv, {"strides": 2, "padding": 1}),
    "conv, input dilation": (jax_mps.conv, {"strides": 2, "input_dilation": 3, "padding": 1}),
    "conv_transpose": (jax_mps.conv_transpose, {"strides": 2, "padding": 1}),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BIASED)
def test_bias(name: str, dtype: str, data_format: str, implementation: str) -> None:
    """Beside the same in float32: values, first and second derivatives, maps."""
    function, options = BIASED[name]
    shape = (2, 5, 4, 3) if data_format == "channels_last" else (2, 3, 5, 4)
    arrays = [oracle.normal(s, seed=i) for i, s in enumerate([shape, (3, 2, 3, 4), (4,)])]
    narrow = [jnp.asarray(a, dtype) for a in arrays]
    wide = [a.astype(jnp.float32) for a in narrow]
    spread = (4,) if data_format == "channels_last" else (4, 1, 1)

    def call(x: Any, kernel: Any, *bias: Any) -> Any:
        return function(x, kernel, *bias, data_format=data_format, implementation=implementation, **options)

    def expected(x: Any, kernel: Any, bias: Any) -> Any:
        return call(x, kernel) + bias.reshape((1,) * (4 - len(spread)) + spread)

    def all_of(f: Any, arrays: Any) -> Any:
        y, pull_back = jax.vjp(f, *arrays)
        g = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
        second = jax.vjp(lambda *a: jax.vjp(f, *a)[1](g)[1], *arrays)[1](arrays[1])
        mapped = jax.vmap(f, (None, None, 0))(*arrays[:2], jnp.stack([arrays[2], -arrays[2]]))
        return y, pull_back(g), second[0], jax.jvp(f, arrays, arrays)[1], mapped

    results = [all_of(call, narrow), jax.jit(functools.partial(all_of, call))(narrow)]
    reference = all_of(expected, wide)
    step = float(jnp.finfo(jnp.dtype(dtype)).eps)
    for result in results:
        for a, e in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True):
            assert a.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(
                a.astype(jnp.float32), e, rtol=4 * step, atol=4 * step * np.abs(e).max()
            )


@pytest.mark.parametrize("platform", ["cuda", "METAL", "mps"])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_biased_convolutions_stay_in_half_precision_on_matrix_units(name: str, platform: str) -> None:
    function, options = BIASED[name]
    x, kernel, bias = (jnp.ones(s, jnp.bfloat16) for s in [(2, 8, 8, 16), (3, 3, 16, 16), (16,)])
    step = jax.jit(lambda *a: jax.vjp(functools.partial(function, **options), *a)[1](function(*a, **options)))
    text = step.trace(x, kernel, bias).lower(lowering_platforms=(platform,)).as_text()
    heavy = [
        line
        for line in text.splitlines()
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert heavy
    assert all("xbf16>, tensor<" in line.partition(" : (")[2] for line in heavy), heavy
    # The bias is added, and its gradient summed, in float32.
    assert re.search(r"stablehlo.add .* : tensor<2x\d+x\d+x16xf32>", text)
    assert re.search(
        r"stablehlo.reduce\(.*applies stablehlo.add .*xf32>, tensor<f32>\) -> tensor<16xf32>", text
    )


@pytest.mark.parametrize("function", [jax_mps.conv, jax_mps.conv_transpose])
def test_wrong_biases(function: Any) -> None:
    x, kernel = jnp.ones((1, 4, 3), jnp.bfloat16), jnp.ones((2, 3, 5), jnp.bfloat16)
    for bias in (jnp.ones(3), jnp.ones((1, 5)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
            function(x, kernel, bias)
    with pytest.raises(TypeError, match="bias must have a dtype of float32"):
        function(x, kernel, jnp.ones(5, jnp.int32))
    assert function(x, kernel, jnp.ones(5)).dtype == jnp.bfloat16


def test_a_bias_wider_than_the_sums_is_refused(x64: None) -> None:
    with pytest.raises(TypeError, match="bias must be no wider than the sums, float32, got float64"):
        jax_mps.conv(jnp.ones((1, 4, 3), jnp.float32), jnp.ones((2, 3, 5), jnp.float32), jnp.ones(5))
