"""`accelerate()` beyond the CPU: what is replaced for CUDA and for Apple's plugins, what that computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps
import stock_random
from jax_mps.lowering import apple

pytestmark = pytest.mark.filterwarnings(r"ignore:accelerate\(\) replaces nothing on the CPU")

GROUP = 10


def lower(platform: str, f: Callable[..., Any], *operands: Any) -> tuple[Any, Any]:
    """A program under `accelerate()`, and the report's rows."""
    with jax_mps.accelerate() as handle:
        lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,))
    return lowered, handle.report().rows


def with_gradients(f: Callable[..., Any], *operands: Any) -> Any:
    y, pull_back = jax.vjp(f, *operands)
    cotangent = np.random.default_rng(1).standard_normal(y.shape)
    return y, pull_back(jnp.asarray(cotangent, y.dtype))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


# --- CUDA ---------------------------------------------------------------------------------------------


def convolve(x: Any, k: Any, strides: Any = 1, groups: int = 1, dilation: int = 1, expand: int = 1) -> Any:
    letters = "DHW"[5 - x.ndim :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    rank = x.ndim - 2
    pads = [((n - 1) // 2 * dilation + expand - 1,) * 2 for n in k.shape[:-2]]
    return lax.conv_general_dilated(
        x, k, (strides,) * rank, pads, (expand,) * rank, (dilation,) * rank, numbers, groups
    )


def largest(x: Any, window: int = 2, stride: int = 2) -> Any:
    return lax.reduce_window(x, -np.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID")


def sums(x: Any) -> Any:
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


IMAGE, LINE, VOLUME = (2, 16, 16, 8), (2, 64, 8), (1, 8, 8, 8, 4)
# A function with its gradients, the shapes of its operands, and for each stock operation whether it is ours.
ON_CUDA: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], list[bool]]] = {
    "dense": (convolve, (IMAGE, (3, 3, 8, 8)), [False, False, False]),
    "1 x 1": (convolve, (IMAGE, (1, 1, 8, 16)), [False, False, False]),
    "strided": (functools.partial(convolve, strides=2), (IMAGE, (3, 3, 8, 8)), [False, True, False]),
    "depthwise": (functools.partial(convolve, groups=8), (IMAGE, (3, 3, 1, 8)), [False, False, False]),
    "7 x 7 depthwise": (functools.partial(convolve, groups=8), (IMAGE, (7, 7, 1, 8)), [False, False, True]),
    "1-D depthwise": (functools.partial(convolve, groups=8), (LINE, (4, 1, 8)), [True, True, True]),
    "1-D dilated": (functools.partial(convolve, dilation=4), (LINE, (3, 8, 8)), [False, False, True]),
    "transposed": (functools.partial(convolve, expand=2), (IMAGE, (4, 4, 8, 8)), [True, False, True]),
    "3-D transposed": (functools.partial(convolve, expand=2), (VOLUME, (2, 2, 2, 4, 4)), [True, False, True]),
    "maximum": (largest, (IMAGE,), [False, True]),
    "large maximum": (functools.partial(largest, window=5, stride=1), (IMAGE,), [False, False]),
    "sum": (sums, (IMAGE,), [False, True]),
}


@pytest.mark.parametrize("name", ON_CUDA)
def test_what_is_replaced_on_cuda(name: str) -> None:
    f, shapes, expected = ON_CUDA[name]
    _, rows = lower("cuda", functools.partial(with_gradients, f), *(array(*shape) for shape in shapes))
    assert sorted(row.ours for row in rows) == sorted(expected), [row.why for row in rows]


def test_half_precision_keeps_large_depthwise_gradients_stock_on_cuda() -> None:
    f = functools.partial(with_gradients, functools.partial(convolve, groups=8))
    _, rows = lower("cuda", f, array(*IMAGE, dtype=jnp.bfloat16), array(7, 7, 1, 8, dtype=jnp.bfloat16))
    assert not any(row.ours for row in rows)


def test_half_precision_replaces_gradients_of_large_maxima_on_cuda() -> None:
    f = functools.partial(with_gradients, functools.partial(largest, window=5, stride=1))
    _, rows = lower("cuda", f, array(*IMAGE, dtype=jnp.bfloat16))
    assert [row.ours for row in rows if row.operation == "select_and_scatter_add"] == [True]


def test_other_platforms_stay_stock() -> None:
    step = functools.partial(with_gradients, functools.partial(convolve, expand=2))
    operands = (array(*IMAGE), array(4, 4, 8, 8))
    for platform in ("tpu", "rocm"):
        _, rows = lower(platform, step, *operands)
        assert rows == ()


# --- Apple's plugins ----------------------------------------------------------------------------------


def on_mlx(lowered: Any, *operands: Any) -> list[Any]:
    pytest.importorskip("mlx.core", reason="MLX is missing; the extra `test` has it for Linux on x86-64")
    from mlx_replay import replay

    return replay(lowered, *operands)


def check_on_apple(cases: list[stock_random.Case], platform: str) -> int:
    """Programs of what is recognised have nothing outside the list, and compute what stock JAX does."""
    count = 0
    for case in cases:
        f = functools.partial(with_gradients, case.function) if case.differentiable else case.function
        lowered, rows = lower(platform, f, *case.operands)
        if not all(row.ours or row.operation == "pad" for row in rows):
            continue
        assert apple.violations(lowered) == [], case.note
        # In float32 XLA's CPU compiler reads beside the array where a gradient's padding is negative.
        wide = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
        expected = jax.tree.leaves(jax.jit(f)(*(x.astype(wide) for x in case.operands)))
        for a, e in zip(on_mlx(lowered, *case.operands), expected, strict=True):
            scale = np.abs(e[np.isfinite(e)]).max(initial=1)
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * scale, err_msg=case.note)
        count += 1
    return count


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A tenth of `--random N`: these operations are interpreted."""
    if "first" in metafunc.fixturenames:
        count = max(metafunc.config.getoption("--random") // 10, GROUP)
        metafunc.parametrize("first", range(0, count, GROUP))


@pytest.mark.parametrize("platform", ["METAL", "mps"])
def test_random_convolutions_on_apple(x64: None, first: int, platform: str) -> None:
    cases = [stock_random.convolution(seed) for seed in range(first, first + GROUP)]
    assert check_on_apple(cases, platform) >= GROUP // 2


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
def test_random_windows_on_apple(first: int, kind: str) -> None:
    seeds = range(first, first + GROUP)
    cases = [stock_random.reduction(seed, kind, special=seed % 2 == 0) for seed in seeds]
    assert check_on_apple(cases, "METAL") >= 1


@pytest.mark.parametrize("window", [(3, 3), (5, 5), (2, 2, 2), (11,), (7, 7)])
def test_gradients_of_large_maxima_on_apple(window: tuple[int, ...]) -> None:
    """Their chains are cut."""
    pads = ((0, 0), *(((n - 1) // 2, n // 2) for n in window), (0, 0))

    def pool(x: Any) -> Any:
        strides = (1,) * x.ndim
        return lax.reduce_window(x, -np.inf, lax.max, (1, *window, 1), strides, pads)

    x = array(1, *(12,) * len(window), 2)
    x = x.at[0, 3].set(jnp.nan).at[0, 5].set(-jnp.inf)
    case = stock_random.Case(pool, (np.asarray(x),), f"maxima over {window}")
    assert check_on_apple([case], "METAL") == 1


def test_rev_and_pad_on_apple() -> None:
    def f(x: Any) -> Any:
        y = lax.pad(lax.rev(x, (0, 2)), np.float32(7), [(-1, 2, 1), (0, -2, 0), (3, -4, 2)])
        return y, lax.rev(lax.pad(x, np.float32(0), [(1, 1, 0)] * 3), (1,))

    x = array(3, 4, 5)
    lowered, rows = lower("mps", f, x)
    assert [row.ours for row in rows] == [True, True, False, True]
    assert apple.violations(lowered) == []
    for a, e in zip(on_mlx(lowered, x), jax.jit(f)(x), strict=True):
        np.testing.assert_array_equal(a, e)


def test_what_has_no_way_on_apple_is_named() -> None:
    _, rows = lower("METAL", lambda x: lax.rev(x, (0,)), array(64))
    assert [(row.ours, row.why) for row in rows] == [(False, "more than 24 elements along an axis")]


# Of normalisation, activations and dense layers, with which the plugins are left alone.
OTHERS = (
    "chlo.square", "stablehlo.rsqrt", "stablehlo.tanh", "products must", "operands of products",
    "comparisons must", "arrays may feed",
)  # fmt: skip


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("platform", ["METAL", "mps"])
@pytest.mark.parametrize(
    "name",
    ["unet_2x2", *(pytest.param(n, marks=pytest.mark.full) for n in ("gan", "resnet18", "tcn", "unet_3d"))],
)
def test_training_steps_of_flax_models_on_apple(name: str, platform: str, optimiser: str) -> None:
    """No convolution and no pooling of an unmodified model is outside the list."""
    pytest.importorskip("optax")
    import training

    step = training.step(name, optimiser)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lowered, rows = lower(platform, step.call, *step.operands)
    assert all(row.ours or row.operation == "pad" for row in rows)
    others = (*OTHERS, "stablehlo.power") if optimiser == "adam" else OTHERS
    assert [line for line in apple.violations(lowered) if not any(name in line for name in others)] == []
