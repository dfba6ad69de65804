"""What the portable path is made of: operations that every platform has, in programs of bounded size."""

import collections
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grid
import jax_mps
import oracle
from jax_mps.cli.bench.shapes import POOLING
from programs import lower, operations, size

PLATFORMS = ("cuda", "METAL", "mps", "tpu")

FORBIDDEN = {
    "stablehlo.reduce_window",
    "stablehlo.select_and_scatter",
    "stablehlo.gather",
    "stablehlo.dynamic_gather",
    "stablehlo.scatter",
    "stablehlo.dynamic_slice",
    "stablehlo.dynamic_update_slice",
    "stablehlo.while",
    "stablehlo.case",
    "stablehlo.if",
    "stablehlo.sort",
    "stablehlo.custom_call",
    "stablehlo.reverse",
}

POOLS = {"max": jax_mps.max_pool, "avg": jax_mps.avg_pool, "l2": jax_mps.l2_pool}


# --- reading programs ---------------------------------------------------------------------------------


def check_is_portable(lowered: Any, platform: str = "") -> None:
    found = operations(lowered)
    names = {operation.name for operation in found}
    assert any(name.startswith("stablehlo.") for name in names), names
    assert not names & FORBIDDEN - ({"stablehlo.gather"} if platform == "cuda" else set())
    assert not {name for name in names if name.startswith(("chlo.", "mhlo."))}
    for operation in found:
        if operation.name == "stablehlo.pad":
            attributes = operation.attributes
            for side in ("edge_padding_low", "edge_padding_high"):
                assert min(attributes[side]) >= 0, str(operation)
            assert set(attributes["interior_padding"]) == {0}, str(operation)
        if operation.name == "stablehlo.slice":
            assert min(operation.attributes["strides"]) >= 1, str(operation)


# --- the programs -------------------------------------------------------------------------------------


class Program(NamedTuple):
    f: Callable[..., Any]
    operands: tuple[Any, ...]

    def lower(self, platform: str) -> Any:
        return lower(self.f, *self.operands, platform=platform)


def programs(
    pool: Callable[[Any], Any], shape: tuple[int, ...], dtype: Any = np.float32
) -> dict[str, Program]:
    """What a training step runs: forward, tangent with value, and the pull-back without the forward pass."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    y, pull_back = jax.eval_shape(lambda x: jax.vjp(pool, x), x)
    return {
        "forward": Program(pool, (x,)),
        "jvp": Program(lambda x, t: jax.jvp(pool, (x,), (t,)), (x, x)),
        "vjp": Program(lambda pull_back, g: pull_back(g), (pull_back, y)),
    }


def named_pool(kind: str, **keywords: Any) -> Callable[[Any], Any]:
    return functools.partial(POOLS[kind], **keywords)


WINDOWS = {
    "k2 s2": {"window_shape": (2, 2), "strides": 2},
    "k3 s2 p1": {"window_shape": (3, 3), "strides": 2, "padding": 1},
    "k3 s1 p1": {"window_shape": (3, 3), "strides": 1, "padding": 1},
    "k3 s1 d6 p6": {"window_shape": (3, 3), "strides": 1, "padding": 6, "window_dilation": 6},
    "k3 s5": {"window_shape": (3, 3), "strides": 5},
    "k5x2 s3x1 SAME": {"window_shape": (5, 2), "strides": (3, 1), "padding": "SAME"},
    "k3 s2 crops": {"window_shape": (3, 3), "strides": 2, "padding": ((-2, -1), (-1, -3))},
    "k3 s2 p1 ceil": {"window_shape": (3, 3), "strides": 2, "padding": 1, "ceil_mode": True},
    "k12 s4 p5": {"window_shape": (12, 12), "strides": 4, "padding": 5},
    "k11x9 s2 d2": {"window_shape": (11, 9), "strides": 2, "window_dilation": 2},
    "k1 s1": {"window_shape": (1, 1), "strides": 1},
    "k1 s3": {"window_shape": (1, 1), "strides": 3},
    "1-D k4 s2 p1": {"window_shape": (4,), "strides": 2, "padding": 1},
    "3-D k2 s2": {"window_shape": (2, 2, 2), "strides": 2},
    "3-D k3 s2 p1": {"window_shape": (3, 3, 3), "strides": 2, "padding": 1},
}


@pytest.mark.parametrize(
    ("window", "platform"),
    # One rule serves all platforms, so one window shows it for all; Apple's is the most particular.
    [
        *((window, "METAL") for window in WINDOWS),
        *(("k3 s2 p1", other) for other in ("cuda", "mps", "tpu")),
        ("k3 s1 d6 p6", "cuda"),  # has a form of its own
    ],
)
@pytest.mark.parametrize("kind", ["max", "max with indices", "avg", "avg without padding", "l2"])
def test_every_platform_gets_only_operations_that_all_have(kind, window, platform):
    keywords = dict(WINDOWS[window])
    if kind == "max with indices":
        keywords["return_indices"] = True
    if kind == "avg without padding":
        keywords["count_include_pad"] = False
    function = named_pool(kind.split(maxsplit=1)[0], **keywords)
    pool = lambda x: jax.tree.leaves(function(x))[0]  # noqa: E731
    spatial = {1: (40,), 2: (25, 26), 3: (7, 8, 9)}[len(keywords["window_shape"])]
    forward = Program(function, (jax.ShapeDtypeStruct((2, *spatial, 3), np.float32),))
    for program in ({"both results": forward} | programs(pool, (2, *spatial, 3))).values():
        check_is_portable(program.lower(platform), platform)


@pytest.mark.parametrize(
    ("name", "data_format"), [(n, grid.FORMATS[i % 2]) for i, n in enumerate(grid.CASES)]
)
def test_indices_and_gradients_of_cuda_have_the_same_values(name, data_format, monkeypatch):
    """All taps in one pass, and values that every pixel reads, run on the CPU."""
    monkeypatch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: "cuda")
    case = grid.CASES[name]
    shape = case.shape(data_format)
    call = {**case.geometry, "data_format": data_format}
    x = oracle.tied(shape, np.dtype("float32"))
    x.flat[::7], x.flat[3::11], x.flat[5::13] = np.nan, -np.inf, np.inf
    pool = functools.partial(
        jax_mps.max_pool, window_shape=case.window_shape, return_indices=True, implementation="xla", **call
    )

    @jax.jit
    def run(x: Any, g: Any) -> Any:
        y, pull_back, at = jax.vjp(pool, x, has_aux=True)
        return y, at, *pull_back(g)

    value, at = oracle.max_pool(x, case.window_shape, **call)
    g = oracle.normal(value.shape, seed=1)
    found = run(x, g)
    for a, e in zip(found[:2], (value, at), strict=True):
        oracle.assert_same(a, e)
    expected = grid.MAX.oracle_gradient(g, x, case.window_shape, **call)
    oracle.assert_close(found[2], expected, length=case.taps)
    for op in grid.OPS:
        if op is not grid.MAX:
            x, more = op.image(shape, np.float32), {**call, **op.options}
            expected = op.oracle_gradient(g, x, case.window_shape, **more)
            scale = op.gradient_error(g, x, case.window_shape, **more)
            dx = op.gradient(g, x, case.window_shape, **more, implementation="xla")
            oracle.assert_close(dx, expected, length=case.taps, scale=scale)


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize(
    "window",
    [
        {"window_shape": (3, 3), "padding": 6, "window_dilation": 6},
        {"window_shape": (2, 4), "padding": ((1, -2), (3, 0)), "window_dilation": (3, 1)},
        {"window_shape": (2, 2, 2), "padding": 1},
        {"window_shape": (9,), "padding": "SAME"},
    ],
    ids=lambda window: "x".join(map(str, window["window_shape"])),
)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_max_pool_of_cuda_has_the_same_values(dtype, window, data_format, monkeypatch):
    """What CUDA gets where it has a form of its own, run on the CPU."""
    rank = len(window["window_shape"])
    x = oracle.tied(oracle.images(rank, data_format), np.dtype(dtype))
    if dtype == "float32":
        x.flat[[3, 50, 51]] = np.nan, np.inf, -np.inf
    pool = functools.partial(jax_mps.max_pool, **window, strides=1, data_format=data_format)
    slices = {p: lower(pool, x, platform=p).as_text().count("stablehlo.slice") for p in ("cuda", "tpu")}
    assert slices["cuda"] != slices["tpu"]
    monkeypatch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: "cuda")
    lowered = jax.jit(functools.partial(pool, implementation="xla")).lower(x)
    assert lowered.as_text().count("stablehlo.slice") == slices["cuda"]
    expected, _ = oracle.max_pool(x, **window, strides=1, data_format=data_format)
    oracle.assert_same(lowered.compile()(x), expected)


@pytest.mark.parametrize("platform", ["cuda", "METAL"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "int32", "uint8", "bool"])
def test_every_dtype_gets_only_operations_that_all_have(dtype, platform):
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.dtype(dtype))
    window = {"window_shape": 3, "strides": 2, "padding": 1}
    check_is_portable(lower(functools.partial(jax_mps.max_pool, **window), x, platform=platform))
    check_is_portable(
        lower(functools.partial(jax_mps.max_pool, return_indices=True, **window), x, platform=platform)
    )
    if jnp.issubdtype(x.dtype, jnp.floating):
        for pool in POOLS.values():
            for program in programs(functools.partial(pool, **window), x.shape, x.dtype).values():
                check_is_portable(program.lower(platform), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_kernels_get_only_operations_that_all_have(platform):
    window = {"window_shape": 3, "strides": 2, "padding": 1}
    x, g = (jax.ShapeDtypeStruct((2, n, n, 3), np.float32) for n in (16, 8))
    for kernel in (jax_mps.max_pool_gradient, jax_mps.l2_pool_gradient):
        check_is_portable(lower(functools.partial(kernel, **window), g, x, platform=platform), platform)
    average = lower(lambda g: jax_mps.avg_pool_gradient(g, x.shape, **window), g, platform=platform)
    check_is_portable(average, platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_apple_needs_no_unsigned_and_no_64_bit_integers(platform):
    # Apple's plugins have neither; the residual is signed and positions are int32.
    function = functools.partial(jax_mps.max_pool, window_shape=3, strides=2, padding=1, return_indices=True)
    program = programs(lambda x: function(x)[0], (2, 16, 16, 3)) | {
        "both results": Program(function, (jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32),))
    }
    for each in program.values():
        text = each.lower(platform).as_text()
        assert not re.search(r"tensor<[^>]*x?(ui\d+|i64|f64)>", re.sub(r"dense<[^>]*>", "", text))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_unpooling_lowers_everywhere_without_a_kernel_of_ours(platform):
    y, at = (jax.ShapeDtypeStruct((2, 4, 4, 3), t) for t in (np.float32, np.int32))
    f = functools.partial(jax_mps.max_unpool, output_shape=(8, 8))
    names = {o.name for o in operations(lower(f, y, at, platform=platform))}
    assert "stablehlo.custom_call" not in names


def test_forcing_the_native_path_elsewhere_is_an_error(implementation):
    f = functools.partial(jax_mps.max_pool, window_shape=2, strides=2, implementation=implementation)
    x = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32)
    if implementation == "native":
        with pytest.raises(ValueError, match=r"implementation='native' cannot be had on cuda"):
            lower(f, x, platform="cuda")
    else:
        check_is_portable(lower(f, x, platform="cuda"), "cuda")


def test_implementation_xla_keeps_kernels_out_of_the_cpu():
    for kind, pool in POOLS.items():
        f = functools.partial(pool, window_shape=3, strides=2, implementation="xla")
        for program in programs(f, (2, 16, 16, 3)).values():
            names = collections.Counter(o.name for o in operations(program.lower("cpu")))
            assert "stablehlo.custom_call" not in names, kind


# --- sizes --------------------------------------------------------------------------------------------

LARGE = {
    f"{kind} {text}": (kind.split()[0], {"window_shape": (64, 64), **window, **options})
    for kind, options in {
        "max": {},
        "avg": {},
        "avg excluding": {"count_include_pad": False},
        "l2": {},
    }.items()
    for text, window in {
        "s1": {"strides": 1},
        "s1 p31": {"strides": 1, "padding": 31},
        "s2": {"strides": 2},
        "s2 p3": {"strides": 2, "padding": 3},
        "s64": {"strides": 64},
        "s64 p20": {"strides": 64, "padding": 20},
    }.items()
}


@pytest.mark.parametrize("mode", ["forward", "jvp", "vjp"])
@pytest.mark.parametrize("case", LARGE)
def test_programs_of_64x64_windows_are_short_whatever_the_image(case, mode):
    kind, keywords = LARGE[case]
    pool = named_pool(kind, **keywords)
    small, large = (size(programs(pool, (2, n, n + 30, 3))[mode].lower("cuda")) for n in (140, 520))
    assert small == large
    assert large < 400


@pytest.mark.parametrize("mode", ["forward", "jvp", "vjp"])
@pytest.mark.parametrize("shape", POOLING, ids=lambda shape: shape.name)
def test_programs_of_named_shapes_are_short(shape, mode):
    pool = named_pool(
        shape.kind,
        window_shape=(shape.window,) * shape.ndim,
        strides=shape.stride,
        padding=shape.padding,
        window_dilation=shape.dilation,
    )
    assert size(programs(pool, shape.source_shape)[mode].lower("cuda")) < 600


def test_program_does_not_depend_on_the_image_for_small_windows():
    for kind in POOLS:
        pool = named_pool(kind, window_shape=(3, 3), strides=2, padding=1)
        for mode in ("forward", "jvp", "vjp"):
            a, b = (size(programs(pool, (1, n, n, 1))[mode].lower("tpu")) for n in (16, 1024))
            assert a == b, (kind, mode)


def test_no_constant_is_as_large_as_the_image():
    # A divisor that counts pixels must not be folded into a picture of numbers.
    pool = named_pool("avg", window_shape=(3, 3), strides=1, padding=1, count_include_pad=False)
    for program in programs(pool, (2, 64, 64, 3)).values():
        for operation in operations(program.lower("cuda")):
            if operation.name == "stablehlo.constant":
                assert np.prod(operation.results[0].type.shape, dtype=int) <= 64


# --- compiling on the CPU -----------------------------------------------------------------------------


def _compile(program: Program) -> None:
    jax.jit(program.f).lower(*program.operands).compile()


@pytest.mark.parametrize("mode", ["forward", "jvp", "vjp"])
@pytest.mark.parametrize("shape", POOLING, ids=lambda shape: shape.name)
def test_named_shapes_compile(shape, mode):
    pool = named_pool(
        shape.kind,
        window_shape=(shape.window,) * shape.ndim,
        strides=shape.stride,
        padding=shape.padding,
        window_dilation=shape.dilation,
        implementation="xla",
    )
    _compile(programs(pool, shape.source_shape)[mode])


@pytest.mark.parametrize("mode", ["forward", "jvp", "vjp"])
@pytest.mark.parametrize("kind", ["max", "avg", "l2"])
def test_64x64_windows_compile(kind, mode):
    pool = named_pool(kind, window_shape=(64, 64), strides=2, padding=3, implementation="xla")
    _compile(programs(pool, (2, 256, 256, 3))[mode])


@pytest.mark.parametrize("mode", ["forward", "vjp"])
def test_large_volume_without_padding_in_the_average_compiles(mode):
    # The stock form folds the divisor of 128**3 windows at compile time, for more than half a minute.
    pool = named_pool(
        "avg", window_shape=(3, 3, 3), strides=1, padding=1, count_include_pad=False, implementation="xla"
    )
    _compile(programs(pool, (1, 128, 128, 128, 1))[mode])


def test_small_volume_without_padding_in_the_average_has_the_right_values():
    x = oracle.normal((1, 6, 5, 7, 2))
    keywords = {"strides": 1, "padding": 1, "count_include_pad": False}
    y, pull_back = jax.vjp(
        lambda x: jax_mps.avg_pool(x, (3, 3, 3), implementation="xla", **keywords), jnp.asarray(x)
    )
    oracle.assert_close(y, oracle.avg_pool(x, (3, 3, 3), **keywords), length=27)
    g = oracle.normal(y.shape, seed=1)
    expected = oracle.avg_pool_gradient(g, x.shape, (3, 3, 3), **keywords)
    oracle.assert_close(pull_back(jnp.asarray(g))[0], expected, length=27)


@pytest.mark.parametrize("stride", [1, 2, 64])
@pytest.mark.parametrize("kind", ["max", "avg", "l2"])
def test_64x64_windows_have_the_right_values(kind, stride):
    x = oracle.distinct((1, 65, 63, 1))
    keywords = {"window_shape": (64, 64), "strides": stride, "padding": ((2, 0), (1, 1))}
    y, pull_back = jax.vjp(named_pool(kind, implementation="xla", **keywords), jnp.asarray(x))
    g = oracle.normal(y.shape, seed=1)
    dx = pull_back(jnp.asarray(g))[0]
    if kind == "max":
        np.testing.assert_array_equal(y, oracle.max_pool(x, **keywords)[0])
        oracle.assert_close(dx, oracle.max_pool_gradient(g, x, **keywords), length=64)
    elif kind == "avg":
        scale = float(np.abs(x).max())
        oracle.assert_close(y, oracle.avg_pool(x, **keywords), length=64**2, scale=scale)
        oracle.assert_close(dx, oracle.avg_pool_gradient(g, x.shape, **keywords), length=64**2)
    else:
        oracle.assert_close(y, oracle.l2_pool(x, **keywords), length=64**2)
        oracle.assert_close(dx, oracle.l2_pool_gradient(g, x, **keywords), length=64**2)
