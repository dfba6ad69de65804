"""Every JAX transformation of every public function equals a Python loop, or differences of plain calls."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps

# An even and an odd window, asymmetric padding, windows that overlap along one axis only.
WINDOW = {
    "window_shape": (3, 2),
    "strides": (2, 2),
    "padding": ((1, 0), (0, 1)),
    "window_dilation": (1, 2),
}


# What a transposed convolution adds to the high ends, so that it returns the image: see `pooled_sizes`.
OUTPUT_PADDING = (1, 0)


def image_shape(data_format: str, sizes: tuple[int, int], batch: int, channels: int) -> tuple[int, ...]:
    return (batch, *sizes, channels) if data_format == "channels_last" else (batch, channels, *sizes)


def pooled_sizes(sizes: tuple[int, int]) -> tuple[int, ...]:
    columns = (WINDOW[name] for name in ("window_shape", "strides", "padding", "window_dilation"))
    return tuple(
        (n + sum(pads) - (k - 1) * d - 1) // s + 1 for n, k, s, pads, d in zip(sizes, *columns, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A public function with everything fixed but its operands.

    Attributes:
      make: the function of the operands, from (spatial sizes, keywords).
      operands: what they are, in order.
      differentiable: the operands that have a derivative.
      linear: the operands that it is linear in.
    """

    make: Callable[..., Callable[..., Any]]
    operands: tuple[str, ...]
    linear: tuple[int, ...] = ()

    @property
    def differentiable(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.operands) if kind != "indices")


def _windowed(function: Callable[..., Any], **more: Any) -> Callable[..., Callable[..., Any]]:
    return lambda sizes, **keywords: lambda *operands: function(*operands, **WINDOW, **more, **keywords)


def _average_gradient(sizes: tuple[int, int], **keywords: Any) -> Callable[..., Any]:
    def function(g: Any) -> Any:
        last = keywords["data_format"] == "channels_last"
        batch, channels = g.shape[0], g.shape[-1 if last else 1]
        shape = image_shape(keywords["data_format"], sizes, batch, channels)
        return jax_mps.avg_pool_gradient(g, shape, **WINDOW, count_include_pad=False, **keywords)

    return function


def _transposed(function: Callable[..., Any], third: str = "") -> Callable[..., Callable[..., Any]]:
    """A function of transposed convolution, which takes "pooled" arrays to "image" arrays.

    Its gradients also take the shape of a third array, which is `third`.
    """
    window_shape, strides, padding, dilation = (
        WINDOW[name] for name in ("window_shape", "strides", "padding", "window_dilation")
    )

    def make(sizes: tuple[int, int], **keywords: Any) -> Callable[..., Any]:
        data_format = keywords["data_format"]

        def call(a: Any, b: Any) -> Any:
            channels = b.shape[-1 if data_format == "channels_last" or third == "pooled" else 1]
            shapes = {
                "pooled": image_shape(data_format, pooled_sizes(sizes), a.shape[0], channels),
                "kernel": (*window_shape, channels, channels),
            }
            return function(
                a,
                b,
                *([shapes[third]] if third else []),
                strides=strides,
                padding=padding,
                kernel_dilation=dilation,
                output_padding=OUTPUT_PADDING,
                transpose_kernel=True,
                **keywords,
            )

        return call

    return make


CALLS = {
    "max_pool": Call(_windowed(jax_mps.max_pool), ("image",)),
    "max_pool_with_indices": Call(_windowed(jax_mps.max_pool, return_indices=True), ("image",)),
    "avg_pool": Call(_windowed(jax_mps.avg_pool, count_include_pad=False), ("image",), linear=(0,)),
    "l2_pool": Call(_windowed(jax_mps.l2_pool), ("image",)),
    "max_unpool": Call(
        lambda sizes, **keywords: lambda y, at: jax_mps.max_unpool(y, at, sizes, **keywords),
        ("pooled", "indices"),
        linear=(0,),
    ),
    "max_pool_gradient": Call(_windowed(jax_mps.max_pool_gradient), ("pooled", "image"), linear=(0,)),
    "avg_pool_gradient": Call(_average_gradient, ("pooled",), linear=(0,)),
    "l2_pool_gradient": Call(_windowed(jax_mps.l2_pool_gradient), ("pooled", "image"), linear=(0,)),
    "conv_transpose": Call(_transposed(jax_mps.conv_transpose), ("pooled", "kernel"), linear=(0, 1)),
    "conv_transpose_gradient_data": Call(
        _transposed(jax_mps.conv_transpose_gradient_data, "pooled"), ("image", "kernel"), linear=(0, 1)
    ),
    "conv_transpose_gradient_weights": Call(
        _transposed(jax_mps.conv_transpose_gradient_weights, "kernel"), ("image", "pooled"), linear=(0, 1)
    ),
}


def on_paths(argnames: str, values: Sequence[tuple[Any, ...]], *, alternate: bool = False) -> Any:
    """Parametrises a test over values, the name of a call first, and over both implementations.

    Transposed convolutions run natively alone here: their rules know nothing of implementations, and XLA
    takes long to compile its own. For the same reasons tests of what JAX does around a call `alternate`
    between the implementations; the rest runs in the whole grids.
    """
    paths = []
    for i, value in enumerate(values):
        for j, implementation in enumerate(("native", "xla")):
            if value[0].startswith("conv_transpose"):
                marks = [] if implementation == "native" else None
            else:
                marks = [pytest.mark.full] if alternate and (i + j) % 2 else []
            if marks is not None:
                paths.append(pytest.param(implementation, *value, marks=marks))
    return pytest.mark.parametrize(f"implementation, {argnames}", paths, indirect=["implementation"])


NAMES = [(name,) for name in CALLS]
OPERANDS = [(name, i) for name, call in CALLS.items() for i in call.differentiable]
SOME_OPERANDS = [(name, i) for name, i in OPERANDS if i == 0 or CALLS[name].linear != (0, 1)]

every_call = on_paths("name", NAMES)
every_call_once = on_paths("name", NAMES, alternate=True)
every_operand = on_paths("name, operand", OPERANDS)
every_operand_once = on_paths("name, operand", OPERANDS, alternate=True)
some_operands_once = on_paths("name, operand", SOME_OPERANDS, alternate=True)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call with operands: `f(*operands)`; `first` is its only, or its first, result."""

    f: Callable[..., Any]
    operands: tuple[np.ndarray, ...]
    call: Call

    def first(self, *operands: Any) -> Any:
        return jax.tree.leaves(self.f(*operands))[0]

    def along(self, operand: int) -> Callable[[Any], Any]:
        """`first` as a function of one operand."""

        def function(x: Any) -> Any:
            return self.first(*self.operands[:operand], x, *self.operands[operand + 1 :])

        return function


def problem(
    name: str,
    implementation: str,
    *,
    data_format: str = "channels_last",
    sizes: tuple[int, int] = (5, 6),
    batch: int = 2,
    channels: int = 3,
    dtype: Any = np.float32,
    stack: int | None = None,
) -> Problem:
    """A problem with fixed operands; with `stack`, each of that many along a new first axis."""
    call = CALLS[name]
    rng = np.random.default_rng(list(name.encode()))
    image = image_shape(data_format, sizes, batch, channels)
    keywords = {"data_format": data_format, "implementation": implementation}
    shapes = {
        "image": image,
        "pooled": image_shape(data_format, pooled_sizes(sizes), batch, channels),
        "kernel": (*WINDOW["window_shape"], channels, channels),
    }

    def operand(kind: str) -> np.ndarray:
        lead = () if stack is None else (stack,)
        if kind == "indices":
            # Some positions are named twice, some lie outside the plane.
            return rng.integers(-1, sizes[0] * sizes[1] + 1, (*lead, *shapes["pooled"]), np.int32)
        shape = (*lead, *shapes[kind])
        # Distinct, so that no window has a tie, and not close to 0, where a norm has no derivative.
        values = rng.permutation(np.arange(1, 1 + int(np.prod(shape)))) * rng.choice(
            [-1, 1], int(np.prod(shape))
        )
        return (values.reshape(shape) / 32).astype(dtype)

    return Problem(call.make(sizes, **keywords), tuple(map(operand, call.operands)), call)


def check_equal(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Equal types, and equal values up to rounding in the order of a sum."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, e)
        else:
            np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * max(1.0, np.abs(e).max(initial=0)))


def loop(f: Callable[..., Any], *stacked: np.ndarray) -> Any:
    """`f` of every element of the first axis, in a Python loop, stacked again."""
    f = jax.jit(f)
    results = [f(*arrays) for arrays in zip(*stacked, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *results)


def scalar(f: Callable[..., Any]) -> Callable[..., Any]:
    """A nonlinear scalar function of the result of `f`, that weighs every element differently."""

    def function(*operands: Any) -> Any:
        y = f(*operands)
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(weights * y * (1 + y / 8))

    return function


def differences(f: Callable[[Any], Any], x: np.ndarray, step: float = 2.0**-16) -> np.ndarray:
    """The Jacobian of `f` by central differences: the axes of `f(x)`, then those of `x`."""
    f = jax.jit(f)
    columns = []
    for i in range(x.size):
        ahead, back = x.copy(), x.copy()
        ahead.flat[i] += step
        back.flat[i] -= step
        columns.append((np.asarray(f(ahead)) - np.asarray(f(back))) / (2 * step))
    return np.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """These tests are about JAX's rules: machine code that is optimised would double their time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# --- jit ----------------------------------------------------------------------------------------------


@every_call
def test_eager_jit_and_disable_jit_agree(name, implementation):
    p = problem(name, implementation)
    eager = p.f(*p.operands)
    check_equal(jax.jit(p.f)(*p.operands), eager)
    with jax.disable_jit():
        check_equal(p.f(*p.operands), eager)


@every_operand_once
def test_gradient_is_the_same_eager_jitted_and_without_jit(name, operand, implementation):
    p = problem(name, implementation)
    gradient, x = jax.grad(scalar(p.along(operand))), p.operands[operand]
    eager = gradient(x)
    check_equal(jax.jit(gradient)(x), eager)
    with jax.disable_jit():
        check_equal(gradient(x), eager)


@every_call
def test_result_types_are_strong_and_known_without_running(name, implementation):
    p = problem(name, implementation)
    shapes = jax.eval_shape(p.f, *p.operands)
    results = p.f(*p.operands)
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [
        (r.shape, r.dtype) for r in jax.tree.leaves(results)
    ]
    assert not any(r.aval.weak_type for r in jax.tree.leaves(results))


# --- vmap ---------------------------------------------------------------------------------------------


def _mappings(call: Call) -> list[tuple[int | None, ...]]:
    """Every operand mapped alone over every axis, and all of them over axes of their own."""
    positions = range(5)
    if len(call.operands) == 1:
        return [(i,) for i in positions]
    return [
        *((i, None) for i in positions),
        *((None, i) for i in positions),
        *((i, (2 * i + 1) % 5) for i in positions),
    ]


def check_vmap(stacked: Problem) -> None:
    for number, in_axes in enumerate(_mappings(stacked.call)):
        out_axes = (number + 3) % 5
        operands, rows = [], []
        for x, axis in zip(stacked.operands, in_axes, strict=True):
            operands.append(x[1] if axis is None else np.moveaxis(x, 0, axis))
            rows.append(x[[1, 1, 1]] if axis is None else x)
        actual = jax.jit(jax.vmap(stacked.f, in_axes, out_axes))(*operands)
        expected = jax.tree.map(lambda a: np.moveaxis(a, 0, out_axes), loop(stacked.f, *rows))  # noqa: B023
        check_equal(actual, expected)


@every_call_once
def test_vmap_over_every_operand_and_axis(name, implementation):
    check_vmap(problem(name, implementation, stack=3))


# The same rule serves both layouts, and knows nothing of implementations.
@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_every_operand_and_axis_channels_first(name, implementation):
    check_vmap(problem(name, implementation, data_format="channels_first", stack=3))


@every_call_once
def test_vmap_of_vmap_with_axes_from_the_end(name, implementation):
    stacked = problem(name, implementation, stack=6)
    expected = loop(stacked.f, *stacked.operands)
    operands = [np.moveaxis(x.reshape(2, 3, *x.shape[1:]), (0, 1), (-1, 2)) for x in stacked.operands]
    f = jax.vmap(jax.vmap(stacked.f, in_axes=2, out_axes=-2), in_axes=-1, out_axes=0)
    actual = jax.tree.map(
        lambda a: np.moveaxis(a, -2, 1).reshape(6, *np.delete(a.shape, [0, -2])), f(*operands)
    )
    check_equal(actual, expected)


@every_operand_once
def test_vmap_of_grad(name, operand, implementation):
    stacked = problem(name, implementation, stack=3)
    gradient = jax.grad(scalar(stacked.first), operand)
    expected = loop(gradient, *stacked.operands)
    for axis in range(5):
        operands = [np.moveaxis(x, 0, axis) for x in stacked.operands]
        check_equal(jax.jit(jax.vmap(gradient, in_axes=axis))(*operands), expected)


@every_operand_once
def test_grad_of_vmap(name, operand, implementation):
    stacked = problem(name, implementation, stack=3)
    expected = loop(jax.grad(scalar(stacked.first), operand), *stacked.operands)
    for axis in (0, 2, 4):
        operands = [np.moveaxis(x, 0, axis) for x in stacked.operands]
        f = jax.vmap(scalar(stacked.first), in_axes=axis)
        actual = jax.jit(jax.grad(lambda *x: f(*x).sum(), operand))(*operands)  # noqa: B023
        check_equal(np.moveaxis(actual, axis, 0), expected)


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
@every_operand_once
def test_vmap_over_tangents_alone(name, operand, mode, implementation):
    # The image and what was saved of it are not mapped, the tangents are.
    p = problem(name, implementation)
    f, x = p.along(operand), p.operands[operand]
    if mode == "jvp":
        apply, like = (lambda t: jax.jvp(f, (x,), (t,))[1]), x
    else:
        y, pull_back = jax.vjp(f, x)
        apply, like = (lambda t: pull_back(t)[0]), y
    tangents = np.random.default_rng(7).standard_normal((3, *like.shape), np.float32)
    expected = loop(apply, tangents)
    for axis in range(5):
        check_equal(jax.jit(jax.vmap(apply, in_axes=axis))(np.moveaxis(tangents, 0, axis)), expected)


@pytest.mark.parametrize("spatial", [(7,), (4, 3, 5)])
@pytest.mark.parametrize("function", [jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool])
def test_vmap_over_every_axis_of_lines_and_volumes(function, spatial, implementation):
    window = {"window_shape": (2,) * len(spatial), "strides": 1, "implementation": implementation}
    gradient = jax.grad(scalar(functools.partial(function, **window)))
    size = 3 * 2 * int(np.prod(spatial)) * 2
    x = (np.random.default_rng(3).permutation(size) - size / 2 + 0.25).astype(np.float32) / 16
    x = x.reshape(3, 2, *spatial, 2)
    expected = loop(gradient, x)
    for axis in range(x.ndim):
        check_equal(jax.jit(jax.vmap(gradient, in_axes=axis))(np.moveaxis(x, 0, axis)), expected)


# --- derivatives --------------------------------------------------------------------------------------


def small(name: str, implementation: str) -> Problem:
    return problem(name, implementation, sizes=(3, 4), batch=1, channels=1, dtype=np.float64)


@every_operand_once
@pytest.mark.usefixtures("x64")
def test_first_derivatives_in_every_way(name, operand, implementation):
    p = problem(name, implementation, batch=1, channels=2, dtype=np.float64)
    f, x = p.along(operand), p.operands[operand]
    jacobian = differences(f, x)
    close = functools.partial(check_equal, rtol=1e-8)
    close(jax.jacfwd(f)(x), jacobian)
    close(jax.jacrev(f)(x), jacobian)

    rng = np.random.default_rng(1)
    y, tangent = f(x), rng.standard_normal(x.shape)
    cotangent = rng.standard_normal(y.shape)
    pushed = np.tensordot(jacobian, tangent, x.ndim)
    pulled = np.tensordot(cotangent, jacobian, y.ndim)
    close(jax.jvp(f, (x,), (tangent,)), (y, pushed))
    primal, pull_back = jax.vjp(f, x)
    close((primal, pull_back(cotangent)), (y, pulled))
    primal, push = jax.linearize(f, x)
    close((primal, push(tangent)), (y, pushed))
    close(jax.linear_transpose(push, x)(cotangent), pulled)


@on_paths("name, operand", [(name, i) for name, call in CALLS.items() for i in call.linear])
@pytest.mark.usefixtures("x64")
def test_linear_transpose_of_what_is_linear(name, operand, implementation):
    p = problem(name, implementation, batch=1, channels=2, dtype=np.float64)
    f, x = p.along(operand), p.operands[operand]
    cotangent = np.random.default_rng(2).standard_normal(jax.eval_shape(f, x).shape)
    (pulled,) = jax.linear_transpose(f, x)(cotangent)
    check_equal(pulled, np.tensordot(cotangent, differences(f, x), cotangent.ndim), rtol=1e-8)
    # ... and its transpose is the function again.
    (again,) = jax.linear_transpose(lambda c: jax.linear_transpose(f, x)(c)[0], cotangent)(x)
    check_equal(again, f(x), rtol=1e-12)


@every_operand_once
@pytest.mark.usefixtures("x64")
def test_second_derivatives_in_every_way(name, operand, implementation):
    p = small(name, implementation)
    f, x = scalar(p.along(operand)), p.operands[operand]
    hessian = differences(jax.grad(f), x)
    for second in (
        jax.hessian(f),
        jax.jacfwd(jax.jacfwd(f)),
        jax.jacrev(jax.jacfwd(f)),
        jax.jacrev(jax.jacrev(f)),
    ):
        check_equal(jax.jit(second)(x), hessian, rtol=1e-7)


@on_paths("name", [(name,) for name, call in CALLS.items() if len(call.differentiable) == 2])
@pytest.mark.usefixtures("x64")
def test_mixed_second_derivatives(name, implementation):
    p = small(name, implementation)
    f, (a, b) = scalar(p.first), p.operands
    blocks = jax.jit(jax.hessian(f, (0, 1)))(a, b)
    mixed = differences(lambda b: jax.grad(f)(a, b), b)
    check_equal(blocks[0][1], mixed, rtol=1e-7)
    check_equal(blocks[1][0], np.moveaxis(mixed, range(a.ndim), range(-a.ndim, 0)), rtol=1e-7)


@every_operand_once
@pytest.mark.usefixtures("x64")
def test_third_derivatives(name, operand, implementation):
    p = small(name, implementation)
    f, x = scalar(p.along(operand)), p.operands[operand]
    third = differences(jax.hessian(f), x)
    check_equal(jax.jit(jax.jacfwd(jax.hessian(f)))(x), third, rtol=1e-7)
    check_equal(jax.jit(jax.jacrev(jax.hessian(f)))(x), third, rtol=1e-7)


def test_indices_have_no_tangent(implementation):
    p = problem("max_pool_with_indices", implementation)
    (x,) = p.operands
    _, (tangent, of_indices) = jax.jvp(p.f, (x,), (np.ones_like(x),))
    assert of_indices.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(tangent, 1)  # every window has a pixel of the image
    _, pull_back = jax.vjp(CALLS["max_unpool"].make((5, 6)), *p.f(x))
    cotangent, of_indices = pull_back(np.ones(x.shape, np.float32))
    assert of_indices.dtype == jax.dtypes.float0
    assert cotangent.shape == p.f(x)[0].shape


def test_gradient_of_unpooled_maxima_is_the_identity_on_them(implementation):
    # max_unpool after max_pool is a projection, so the gradient of half its square is itself.
    (x,) = problem("max_pool", implementation).operands

    def kept(x):
        window = {"window_shape": (2, 2), "strides": 2, "implementation": implementation}
        y, at = jax_mps.max_pool(x, return_indices=True, **window)
        return jax_mps.max_unpool(y, at, x.shape[1:3], implementation=implementation)

    gradient = jax.grad(lambda x: jnp.sum(kept(x) ** 2) / 2)(x)
    np.testing.assert_array_equal(gradient, kept(x))
    largest = x[:, :4].reshape(2, 2, 2, 3, 2, 3).max((2, 4))
    np.testing.assert_array_equal(np.sort(gradient[gradient != 0].ravel()), np.sort(largest.ravel()))


# --- control flow and rematerialisation ---------------------------------------------------------------


@every_call_once
def test_scan(name, implementation):
    stacked = problem(name, implementation, stack=3)
    _, actual = lax.scan(lambda carry, operands: (carry, stacked.f(*operands)), 0, stacked.operands)
    check_equal(actual, loop(stacked.f, *stacked.operands))


@some_operands_once
def test_gradient_through_scan(name, operand, implementation):
    stacked = problem(name, implementation, stack=3)

    def step(total, operands):
        return total + scalar(stacked.first)(*operands), None

    def total(*operands):
        return lax.scan(step, jnp.float32(0), operands)[0]

    actual = jax.jit(jax.grad(total, operand))(*stacked.operands)
    check_equal(actual, loop(jax.grad(scalar(stacked.first), operand), *stacked.operands))


@some_operands_once
def test_cond(name, operand, implementation):
    p = problem(name, implementation)
    f, x = scalar(p.along(operand)), p.operands[operand]

    def chosen(flag, x):
        return lax.cond(flag, f, lambda x: 3 * jnp.sum(x), x)

    plain = jax.jit(jax.value_and_grad(f))(x)
    other = jax.jit(jax.value_and_grad(lambda x: 3 * jnp.sum(x)))(x)
    run = jax.jit(jax.value_and_grad(chosen, 1))
    check_equal(run(True, x), plain)
    check_equal(run(False, x), other)
    # Under vmap the condition becomes a selection between both.
    value, gradient = jax.jit(jax.vmap(run, (0, None)))(np.array([True, False]), x)
    check_equal((value[0], gradient[0]), plain)
    check_equal((value[1], gradient[1]), other)


@every_call_once
def test_while_loop(name, implementation):
    stacked = problem(name, implementation, stack=3)

    @jax.jit
    def add_up(count, *operands):
        def body(state):
            i, total = state
            return i + 1, total + stacked.first(*(x[i] for x in operands))

        like = jax.eval_shape(stacked.first, *(x[0] for x in operands))
        return lax.while_loop(lambda state: state[0] < count, body, (0, jnp.zeros(like.shape, like.dtype)))[1]

    parts = loop(stacked.first, *stacked.operands)
    check_equal(add_up(3, *stacked.operands), parts[0] + parts[1] + parts[2])
    check_equal(add_up(1, *stacked.operands), parts[0])


@some_operands_once
def test_checkpoint(name, operand, implementation):
    p = problem(name, implementation)
    f, x = p.along(operand), p.operands[operand]
    plain = jax.jit(jax.value_and_grad(scalar(lambda x: f(jnp.sin(x)))))(x)
    policies = jax.checkpoint_policies
    for policy in (None, policies.everything_saveable, policies.dots_saveable):
        repeated = scalar(jax.checkpoint(lambda x: f(jnp.sin(x)), policy=policy))
        check_equal(jax.jit(jax.value_and_grad(repeated))(x), plain)


# --- what a derivative keeps --------------------------------------------------------------------------


def _residuals(f: Callable[..., Any], *operands: Any) -> list[Any]:
    """The types of the arrays that the pull-back of `f` holds."""
    _, pull_back = jax.eval_shape(lambda *x: jax.vjp(f, *x), *operands)
    return [leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape]


@pytest.mark.parametrize("return_indices", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "window", "stride", "kept"),
    [
        (16, (3, 3), 2, np.int8),
        (16, (3, 3), 1, np.int8),
        (50, (16, 8), 4, np.int8),  # 128 taps
        (50, (3, 43), 2, np.int16),  # 129 taps
        (260, (128, 256), 1, np.int16),  # 32,768 taps
        (260, (129, 255), 4, np.int32),  # 32,895 taps
    ],
)
def test_max_pool_keeps_one_tap_number_per_output(
    size, window, stride, kept, dtype, return_indices, implementation
):
    f = functools.partial(
        jax_mps.max_pool,
        window_shape=window,
        strides=stride,
        padding=((0, 0), (window[1] // 2, 0)),
        return_indices=return_indices,
        implementation=implementation,
    )
    x = jnp.zeros((1, size, size, 1), dtype)
    first = lambda x: jax.tree.leaves(f(x))[0]  # noqa: E731
    (tap,) = _residuals(first, x)
    assert tap.shape == jax.eval_shape(first, x).shape
    assert tap.dtype == kept


def test_max_pool_gradient_keeps_tap_numbers_and_not_the_source(implementation):
    f = functools.partial(
        jax_mps.max_pool_gradient, window_shape=3, strides=2, padding=1, implementation=implementation
    )
    (tap,) = _residuals(f, jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 16, 16, 3)))
    assert (tap.shape, tap.dtype) == ((2, 8, 8, 3), np.int8)


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool_keeps_nothing(count_include_pad, implementation):
    f = functools.partial(
        jax_mps.avg_pool,
        window_shape=3,
        strides=2,
        padding=1,
        count_include_pad=count_include_pad,
        implementation=implementation,
    )
    assert _residuals(f, jnp.zeros((2, 16, 16, 3))) == []


def test_l2_pool_keeps_the_image_and_the_norms(implementation):
    f = functools.partial(
        jax_mps.l2_pool, window_shape=3, strides=2, padding=1, implementation=implementation
    )
    shapes = [r.shape for r in _residuals(f, jnp.ones((2, 16, 16, 3)))]
    assert sorted(shapes) == [(2, 8, 8, 3), (2, 16, 16, 3)]
