"""Programs for Apple's plugins: what they are made of, and what they compute on stand-ins for a Mac's GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import apple
import convs
import grid
import jax_mps
import oracle
from jax_mps.lowering import apple as checker


def mainly(sample, cases):
    """Parametrises over cases, of which all but a few run in the whole grids alone."""
    assert set(sample) <= set(cases)
    return [c if c in sample else pytest.param(*c, marks=pytest.mark.full) for c in cases]


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# --- what programs are made of ------------------------------------------------------------------------

LOWERED = [(*case, grid.FORMATS[i % 2]) for i, case in enumerate(apple.CASES)]
SAMPLED = [
    ("pool", "mixed", "channels_first"),
    ("conv", "groups-dilated", "channels_last"),
    ("conv", "volume-head", "channels_last"),
    ("conv", "hifigan", "channels_last"),
]


@pytest.mark.parametrize("mode", apple.MODES)
@pytest.mark.parametrize(("family", "name", "data_format"), mainly(SAMPLED, LOWERED))
def test_only_operations_that_the_plugins_have(family, name, data_format, mode):
    """Every function, rank, layout, dilation, group and padding, with its derivatives and maps."""
    platform, found = {"jvp": "mps", "vjp of vjp": "mps"}.get(mode, "METAL"), {}
    for function in apple.functions(family, name, data_format):
        for variant in apple.in_mode(function, mode):
            found[variant.name] = checker.violations(variant.lower(platform))
    assert found
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_grid_is_large_enough():
    """The number of programs that the test above lowers, from cases of each family."""
    counts = {
        case: sum(
            len(apple.in_mode(function, mode)) for function in apple.functions(*case) for mode in apple.MODES
        )
        for case in SAMPLED[:2]
    }
    per_pool, per_conv = counts.values()
    assert sum(per_pool if family == "pool" else per_conv for family, _, _ in LOWERED) >= 3000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [("pool", "stem"), ("conv", "groups")])
def test_half_precision_needs_no_other_operations(case, dtype):
    for function in apple.functions(*case, "channels_last", jnp.dtype(dtype)):
        for mode in ("forward", "vjp"):
            for variant in apple.in_mode(function, mode):
                assert checker.violations(variant.lower("METAL")) == []


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32", "bool"])
@pytest.mark.parametrize("window", [{"window_shape": 2, "strides": 2}, {"window_shape": 3, "strides": 1}])
def test_integers_need_no_other_operations(dtype, window):
    x = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.dtype(dtype))
    at = jax.ShapeDtypeStruct((2, 6, 6, 3), np.int32)
    for f, operands in (
        (functools.partial(jax_mps.max_pool, return_indices=True, **window), (x,)),
        (lambda y, at: jax_mps.max_unpool(y, at, (12, 12)), (x, at)),
    ):
        assert checker.violations(jax.jit(f).trace(*operands).lower(lowering_platforms=("METAL",))) == []


def test_64_bit_mode_brings_no_64_bit_integers(x64):
    for case in (("pool", "volume-padded"), ("conv", "fcn")):
        for function in apple.functions(*case, "channels_last"):
            for variant in apple.in_mode(function, "vjp"):
                assert checker.violations(variant.lower("METAL")) == []


@pytest.mark.parametrize("window", [(64, 64), (20, 9), (7, 8), (8, 8, 8), (1, 31), (30,)])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_windows_are_taken_apart(window, stride):
    """So that no kernel reads more arrays than Metal binds to one."""
    x = jax.ShapeDtypeStruct((1, *(70 if n > 8 else 20 for n in window), 2), np.float32)
    padding = tuple((min(n - 1, 1), 0) for n in window)
    call = {"window_shape": window, "strides": (stride,) * len(window), "padding": padding}
    for pool in (
        functools.partial(jax_mps.max_pool, **call),
        functools.partial(jax_mps.avg_pool, count_include_pad=False, **call),
        functools.partial(jax_mps.l2_pool, **call),
    ):

        def both(x, t, pool=pool):
            y, pull_back = jax.vjp(pool, x)
            return y, pull_back(y), jax.jvp(pool, (x,), (t,))

        assert checker.violations(jax.jit(both).trace(x, x).lower(lowering_platforms=("mps",))) == []


# --- what the checker finds ---------------------------------------------------------------------------

IMAGE, KERNEL = np.ones((2, 6, 6, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)


def convolve(x, kernel, strides=(1, 1), padding="VALID", numbers=("NHWC", "HWIO", "NHWC"), **more):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, **more)


def window_max(x):
    return lax.reduce_window(x, -np.float32(np.inf), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def many_arrays(count):
    return lambda x: functools.reduce(lax.add, [lax.slice(x, (i,), (i + 4,)) for i in range(count)])


LINE, VOLUME = np.ones(64, np.float32), np.ones((1, 4, 4, 4, 4), np.float32)
OUTSIDE = {
    "stablehlo.reduce_window": (window_max, IMAGE),
    "stablehlo.select_and_scatter": (jax.grad(lambda x: window_max(x).sum()), IMAGE),
    "stablehlo.reverse": (lambda x: lax.rev(x, (0,)), LINE),
    "stablehlo.iota": (lambda x: x + lax.iota(np.float32, 64), LINE),
    "stablehlo.sort": (lax.sort, LINE),
    "stablehlo.gather": (lambda x: jnp.take(x, np.array([3, 1])), LINE),
    "stablehlo.scatter": (lambda x: x.at[np.array([3, 1])].add(1.0), LINE),
    "stablehlo.dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i,), (3,)), LINE, np.int32(1)),
    "stablehlo.while": (lambda x: lax.fori_loop(0, 9, lambda _, x: x + x, x), LINE),
    "stablehlo.case": (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), LINE),
    "stablehlo.cholesky": (lax.linalg.cholesky, KERNEL[0, 0]),
    "chlo.": (lax.erf_inv, LINE),
    "padding must not be negative": (lambda x: lax.pad(x, np.float32(0), [(-1, 2, 0)]), LINE),
    "padding must be at the edges": (lambda x: lax.pad(x, np.float32(0), [(0, 0, 1)]), LINE),
    "broadcasts must keep the order": (
        lambda a: lax.broadcast_in_dim(a, (4, 2, 3), (2, 0)), np.ones((3, 4), np.float32)
    ),
    "not LT": (lambda x: lax.lt(x, 2 * x), LINE),
    "stablehlo.divide must be of floating": (lambda x: lax.div(x, x + 1), LINE.astype(np.int32)),
    "reductions must be by add or maximum": (lambda x: x.min(), LINE),
    "reductions must be of one array": (jnp.argmax, LINE),
    "stablehlo.reduce must be of floating": (
        lambda x: lax.reduce(x, np.int32(0), lax.add, (0,)), LINE.astype(np.int32)
    ),
    "stablehlo.and must be of booleans": (lambda x: x & (x + 1), LINE.astype(np.int32)),
    "at most 8 axes, not 9": (lambda x: x.reshape((2,) * 6 + (1,) * 3) + 1, LINE),
    "not complex<f32>": (lambda x: lax.complex(x, x), LINE),
    "not ui8": (lambda x: lax.convert_element_type(x, np.uint8), LINE),
    "at most 24 arrays may feed one elementwise chain, not 25": (many_arrays(25), LINE),
    "must not have lhs_dilation": (
        functools.partial(convolve, padding=((1, 1), (1, 1)), lhs_dilation=(2, 1)), IMAGE, KERNEL
    ),
    "convolutions must not be negative": (
        functools.partial(convolve, padding=((-1, 1), (0, 0))), IMAGE, KERNEL
    ),
    "must not have groups of the batch": (functools.partial(convolve, batch_group_count=2), IMAGE, KERNEL),
    "must have the layout": (
        functools.partial(convolve, numbers=("NHWC", "HWOI", "NHWC")), IMAGE, KERNEL
    ),
    "must have 2 or 3 spatial axes, not 1": (
        lambda x, k: lax.conv(x, k, (1,), "SAME"), IMAGE[0], np.ones((5, 6, 3), np.float32)
    ),
    "must not have groups, but along two": (
        lambda x, k: convolve(x, k, (1,) * 3, numbers=("NDHWC", "DHWIO", "NDHWC"), feature_group_count=2),
        VOLUME, np.ones((2, 2, 2, 2, 4), np.float32),
    ),
    "products must contract one axis": (lambda a: jnp.tensordot(a, a, 2), KERNEL[0, 0]),
    "operands of products must have 2 or 3 axes, not 1": (jnp.dot, LINE, LINE),
    "batch axes of products must be the first": (
        lambda a: lax.dot_general(a, a, (((0,), (0,)), ((1,), (1,)))), KERNEL[0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", OUTSIDE)
def test_what_is_outside_is_named(rule):
    f, *operands = OUTSIDE[rule]
    try:
        traced = jax.jit(f).trace(*operands)
    except TypeError as error:
        if jax.__version_info__ >= (0, 10, 2) or "must be strictly increasing" not in str(error):
            raise
        pytest.skip("this JAX has no broadcasts that change the order")
    found = checker.violations(traced.lower(lowering_platforms=("METAL",)))
    assert any(rule in line for line in found), found


def test_native_kernels_are_named(native):
    f = jax.jit(functools.partial(jax_mps.max_pool, window_shape=2, strides=2))
    (line,) = checker.violations(f.trace(IMAGE).lower(lowering_platforms=("cpu",)))
    assert line.startswith("stablehlo.custom_call is not among")


def test_64_bit_numbers_are_named(x64):
    lowered = jax.jit(lambda x: x + 1).trace(LINE.astype(np.float64)).lower(lowering_platforms=("METAL",))
    assert any("not f64" in line for line in checker.violations(lowered))


def test_reversed_windows_and_dynamic_shapes_are_named():
    text = jax.jit(convolve).trace(IMAGE, KERNEL).lower(lowering_platforms=("mps",)).as_text()
    assert checker.violations(text) == []
    found = checker.violations(text.replace("reverse = [false, false]", "reverse = [true, false]"))
    assert any("reversed window" in line for line in found)
    (shape,) = export.symbolic_shape("n")
    exported = export.export(jax.jit(lax.neg), platforms=["METAL"])(
        jax.ShapeDtypeStruct((shape,), np.float32)
    )
    assert any("shapes must be static" in line for line in checker.violations(exported.mlir_module()))


def test_what_is_counted_as_an_array_of_a_chain():
    def violations(f, *operands):
        return checker.violations(jax.jit(f).trace(*operands).lower(lowering_platforms=("mps",)))

    assert violations(many_arrays(24), LINE) == []
    # One array through many operations, numbers, and sums that a reduction keeps apart.
    assert violations(lambda x: functools.reduce(lax.add, [x * np.float32(i) for i in range(40)]), LINE) == []
    assert violations(lambda x: many_arrays(20)(x).sum() + many_arrays(20)(x).sum(), LINE) == []
    # Functions that the program calls are part of it.
    inner = jax.jit(many_arrays(13))
    found = violations(lambda x, z: inner(x) + inner(z), LINE, LINE)
    assert any("not 26" in line for line in found), found


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["METAL", "mps"])
def test_float64_is_refused_when_lowered(platform, x64):
    x = jax.ShapeDtypeStruct((1, 4, 4, 2), np.float64)
    kernel = jax.ShapeDtypeStruct((2, 2, 2, 2), np.float64)
    at = jax.ShapeDtypeStruct(x.shape, np.int32)
    for f, operands in (
        (lambda x: jax_mps.max_pool(x, 2, strides=2), (x,)),
        (lambda x: jax_mps.avg_pool(x, 2, strides=2), (x,)),
        (lambda x: jax_mps.l2_pool(x, 2, strides=2), (x,)),
        (lambda y, at: jax_mps.max_unpool(y, at, (8, 8)), (x, at)),
        (lambda x, k: jax_mps.conv_transpose(x, k, strides=2), (x, kernel)),
    ):
        with pytest.raises(TypeError, match="cannot be lowered for Apple's GPUs with an array of float64"):
            jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,))
        jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",))


def test_float64_sums_are_refused_when_lowered(x64):
    arrays = convs.CASES["fcn"].arrays()
    f = functools.partial(jax_mps.conv_transpose, strides=2, preferred_element_type=np.float64)
    with pytest.raises(TypeError, match="conv_transpose cannot be lowered for Apple's GPUs"):
        jax.jit(f).trace(arrays.x, arrays.kernel).lower(lowering_platforms=("METAL",))


def test_complex_numbers_are_refused():
    x = jax.ShapeDtypeStruct((1, 4, 4, 2), np.complex64)
    for pool in (jax_mps.max_pool, jax_mps.l2_pool):
        with pytest.raises(TypeError, match=r"x must have a dtype of float32.* got complex64"):
            jax.jit(functools.partial(pool, window_shape=2, strides=2)).trace(x)
    average = jax.jit(functools.partial(jax_mps.avg_pool, window_shape=2, strides=2))
    found = checker.violations(average.trace(x).lower(lowering_platforms=("METAL",)))
    assert any("complex" in line for line in found)


def test_unpooling_of_large_planes_is_refused():
    y, at = (jax.ShapeDtypeStruct((1, 112, 112, 64), t) for t in (np.float32, np.int32))
    f = jax.jit(lambda y, at: jax_mps.max_unpool(y, at, (224, 224)))
    with pytest.raises(ValueError, match=r"max_unpool from \(112, 112\) to \(224, 224\) cannot be lowered"):
        f.trace(y, at).lower(lowering_platforms=("mps",))


# --- what they compute --------------------------------------------------------------------------------


def run_exported(function):
    """Exports for METAL, and runs that program on the CPU."""
    exported = export.export(
        jax.jit(function.call), platforms=["METAL"], disabled_checks=[export.DisabledSafetyCheck.platform()]
    )(*function.operands)
    assert exported.platforms == ("METAL",)
    assert "custom_call" not in exported.mlir_module()
    return jax.tree.leaves(jax.jit(exported.call)(*function.operands))


def run_replayed(function, **options):
    """Lowers for mps, and runs that program on MLX."""
    pytest.importorskip("mlx.core", reason="MLX is missing; the extra `test` has it for Linux on x86-64")
    from mlx_replay import replay

    return replay(function.lower("mps"), *function.operands, **options)


RUNS = {"METAL on XLA": run_exported, "mps on MLX": run_replayed}
EXECUTED = [(*case, grid.FORMATS[i % 2]) for i, case in enumerate(apple.CASES)]
EXECUTED_SAMPLE = [
    c for c in EXECUTED if c[:2] in (("pool", "halves"), ("conv", "dcgan"), ("conv", "volume-groups"))
]


@pytest.mark.parametrize(("family", "name", "data_format"), mainly(EXECUTED_SAMPLE, EXECUTED))
def test_programs_agree_with_the_native_kernels(family, name, data_format, native):
    """Derivatives and maps included, all in one program, on MLX."""
    for function in apple.functions(family, name, data_format):
        whole = apple.in_modes(function)
        expected = jax.tree.leaves(jax.jit(whole.call)(*whole.operands))
        apple.check_close(run_replayed(whole), expected, function.name)


@pytest.mark.parametrize(("family", "name", "data_format"), EXECUTED_SAMPLE)
def test_programs_agree_on_xla(family, name, data_format, native):
    """Of the sample, for XLA compiles them for many seconds, second derivatives above all."""
    for function in apple.functions(family, name, data_format):
        whole = apple.in_modes(function, ("forward", "vjp", "vmap"))
        expected = jax.tree.leaves(jax.jit(whole.call)(*whole.operands))
        apple.check_close(run_exported(whole), expected, function.name)


@pytest.mark.parametrize("how", RUNS)
def test_special_values(how, native):
    """NaN, infinities and ties, at which comparisons and maxima are not alike everywhere."""
    x = grid.MAX.image((2, 9, 8, 3), np.float32)
    x.flat[::7], x.flat[3::11], x.flat[5::13] = np.nan, -np.inf, np.inf
    x[0, :4, :4] = -np.inf
    g = oracle.normal((2, 5, 4, 3), seed=1)
    for name in ("stem", "crops", "gaps-2d"):
        case = grid.CASES[name]
        call = {"window_shape": case.window_shape, **case.geometry}

        def f(x, call=call):
            return jax_mps.max_pool(x, return_indices=True, **call), jax_mps.l2_pool(x, **call)

        function = apple.Function(name, f, (x,))
        for a, e in zip(RUNS[how](function), jax.tree.leaves(jax.jit(f)(x)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5)
    kernel = functools.partial(jax_mps.max_pool_gradient, window_shape=(3, 3), strides=(2, 2), padding=1)
    function = apple.Function("gradient", kernel, (g, x))
    apple.check_close(RUNS[how](function), [jax.jit(kernel)(g, x)], "gradient")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8", "bool"])
@pytest.mark.parametrize("how", RUNS)
def test_other_types(how, dtype, native):
    x = (2 * grid.MAX.image((2, 9, 8, 3), np.float32)).astype(jnp.dtype(dtype))

    def f(x):
        y, at = jax_mps.max_pool(x, (3, 2), strides=(2, 2), return_indices=True)
        results = [y, at, jax_mps.max_unpool(y, at, (9, 8))]
        if jnp.issubdtype(x.dtype, jnp.floating):
            results += [jax.vjp(pool, x)[1](y)[0] for pool in pools]
            results.append(jax_mps.conv_transpose(x, jnp.ones((3, 3, 3, 2), x.dtype), strides=2))
        return results

    call = {"window_shape": (3, 2), "strides": (2, 2)}
    pools = [functools.partial(p, **call) for p in (jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool)]
    apple.check_close(RUNS[how](apple.Function(dtype, f, (x,))), jax.tree.leaves(jax.jit(f)(x)), how)


def test_unpooling_of_entries_that_name_a_pixel_twice_or_none(native):
    y, at = (
        oracle.normal((2, 4, 3, 2)),
        np.random.default_rng(0).integers(-3, 20, (2, 4, 3, 2)).astype(np.int32),
    )

    def f(y, at):
        unpool = functools.partial(jax_mps.max_unpool, output_shape=(5, 3))
        result, pull_back = jax.vjp(lambda y: unpool(y, at), y)
        return result, pull_back(result * result)

    for how, run in RUNS.items():
        apple.check_close(run(apple.Function("unpool", f, (y, at))), jax.tree.leaves(jax.jit(f)(y, at)), how)


@pytest.mark.full
@pytest.mark.parametrize("case", [("pool", "stem"), ("conv", "upsample")])
def test_programs_agree_when_mlx_fuses_them(case, native):
    """Through `mx.compile`, as the plugin does; on the CPU that takes a C++ compiler, and long."""
    for function in apple.functions(*case, "channels_last"):
        for variant in (*apple.in_mode(function, "forward"), *apple.in_mode(function, "vjp")):
            actual = run_replayed(variant, compiled=True)
            apple.check_close(actual, jax.tree.leaves(jax.jit(variant.call)(*variant.operands)), variant.name)


# For each pooling: PyTorch's function, its arguments behind the window, and ours.
TORCH = {
    "max": ("max_pool{}d", (3, 2, 1), {}, jax_mps.max_pool, (3, 2, 1), {}),
    "average": (
        "avg_pool{}d", (3, 2, 1), {"count_include_pad": False},
        jax_mps.avg_pool, (3, 2, 1), {"count_include_pad": False},
    ),
    "l2": ("lp_pool{}d", (2.0, 2, 2), {}, jax_mps.l2_pool, (2, 2, 0), {}),
}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", TORCH)
def test_poolings_agree_with_pytorch(name, rank):
    torch = pytest.importorskip("torch")
    theirs, arguments, options, pool, (kernel, stride, pad), more = TORCH[name]
    call = {"strides": (stride,) * rank, "padding": ((pad, pad),) * rank, "data_format": "channels_first"}
    ours = functools.partial(pool, window_shape=(kernel,) * rank, **call, **more)
    x = oracle.normal((2, 3, *(6, 8, 7)[:rank]))

    def f(x, g):
        y, pull_back = jax.vjp(ours, x)
        return y, *pull_back(g)

    tensor = torch.tensor(x, requires_grad=True)
    y = getattr(torch.nn.functional, theirs.format(rank))(tensor, *arguments, **options)
    g = oracle.normal(tuple(y.shape), seed=1)
    y.backward(torch.tensor(g))
    for how, run in RUNS.items():
        actual = run(apple.Function(name, f, (x, g)))
        apple.check_close(actual, [y.detach().numpy(), tensor.grad.numpy()], how)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_agree_with_pytorch(groups, rank):
    torch = pytest.importorskip("torch")
    x, weight = (
        oracle.normal((2, 4, *(4, 3, 5)[:rank])),
        oracle.normal((4, 6 // groups, *(3,) * rank), seed=1),
    )

    def f(x, weight, g):
        def forward(x, weight):
            kernel = jax_mps.kernel_from_torch(weight, groups, transpose_kernel=True)
            call = {"strides": (2,) * rank, "padding": ((1, 1),) * rank, "output_padding": (1,) * rank}
            call |= {"groups": groups, "transpose_kernel": True, "data_format": "channels_first"}
            return jax_mps.conv_transpose(x, kernel, **call)

        y, pull_back = jax.vjp(forward, x, weight)
        return y, *pull_back(g)

    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weight)]
    y = getattr(torch.nn.functional, f"conv_transpose{rank}d")(*tensors, None, 2, 1, 1, groups)
    g = oracle.normal(tuple(y.shape), seed=2)
    y.backward(torch.tensor(g))
    for how, run in RUNS.items():
        actual = run(apple.Function("torch", f, (x, weight, g)))
        apple.check_close(actual, [y.detach().numpy(), *(t.grad.numpy() for t in tensors)], how)
