"""The native library as a library: threads, instruction sets, wrong use, and when it is not there."""

import concurrent.futures
import ctypes
import functools
import inspect
import json
import os
import pathlib
import platform
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convs
import jax_mps
import oracle
from jax_mps import _compat
from jax_mps.lowering import library

# --- other processes ----------------------------------------------------------------------------------


def start(code: str, **environment: str) -> subprocess.Popen:
    """Starts Python on `code`, which can import this file as `test_native`, on one CPU device."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    here = pathlib.Path(__file__).parent
    tests = [str(here), str(here.parent / "support")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path += {tests!r}\n{code}"],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """What the process printed; it fails the test if it crashes or does not come to an end."""
    return finish_all([process], timeout)[0]


def finish_all(processes: Sequence[subprocess.Popen], timeout: float = 240) -> list[str]:
    """The same of several, none of which is left behind where another fails."""
    outputs, complaints = [], []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=timeout)
            complaint = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            complaint = f"no end after {timeout} s"
        outputs.append(output)
        if complaint:
            complaints.append(f"{complaint}\n{output}\n{errors}")
    assert not complaints, "\n".join(complaints)
    return outputs


# --- the same results everywhere ----------------------------------------------------------------------

# (image, keywords): odd sizes and channels around the widths of vectors, and images large enough to be
# shared among threads, where windows cross the borders between the shares.
GEOMETRIES = (
    ((2, 64, 65, 33), {"window_shape": (3, 3), "strides": 1, "padding": 1}),
    ((2, 97, 63, 16), {"window_shape": (3, 2), "strides": 2, "padding": ((1, 1), (0, 1))}),
    ((3, 70, 71, 5), {"window_shape": (2, 2), "strides": 2}),
    ((1, 60, 59, 7), {"window_shape": (3, 3), "strides": 1, "padding": 6, "window_dilation": 6}),
    ((2, 33, 47, 49), {"window_shape": (3, 3), "strides": 2, "data_format": "channels_first"}),
    ((1, 50, 51, 3), {"window_shape": (40, 33), "strides": (1, 3), "padding": ((0, 0), (5, 5))}),
    ((2, 4099, 9), {"window_shape": (4,), "strides": 2, "padding": 1}),
    ((1, 31, 1, 1), {"window_shape": (5, 1), "strides": 3}),
    ((1, 90, 61, 18), {"window_shape": 9, "strides": 1, "padding": 4}),
    ((2, 6, 72, 71), {"window_shape": 4, "strides": (4, 5), "data_format": "channels_first"}),
    ((2, 18, 19, 20, 24), {"window_shape": (2, 3, 2), "strides": (2, 4, 3)}),
    ((1, 17, 16, 15, 6), {"window_shape": (2, 3, 2), "strides": (2, 1, 2), "padding": ((0, 0), (1, 1), (1, 0))}),  # noqa: E501
)  # fmt: skip


# Transposed convolutions that take different ways through the kernels: many channels, few channels on either
# side, depthwise, groups, windows that do not overlap, each large enough to be shared among threads.
CONVOLUTIONS = (
    (convs.Conv((33, 31), (4, 4), 2, 1, 0, 1, 40, 24), "channels_last"),
    (convs.Conv((21, 19), (3, 3), 2, 1, 1, 1, 35, 18, 1, True), "channels_first"),
    (convs.Conv((40, 41), (3, 4), 2, 1, 1, 1, 37, 37, 37), "channels_last"),
    (convs.Conv((40, 41), (3, 3), (1, 2), 1, 0, 2, 9, 9, 9), "channels_first"),
    (convs.Conv((33, 30), (2, 2), 2, 0, 0, 1, 24, 19), "channels_last"),
    (convs.Conv((61, 58), (4, 4), 2, 1, 0, 1, 16, 3), "channels_last"),
    (convs.Conv((45, 44), (3, 3), 1, 1, 0, 1, 1, 17, 1, True), "channels_first"),
    (convs.Conv((431,), (16,), 8, 4, 0, 1, 48, 32, 4), "channels_last"),
    (convs.Conv((9, 10, 11), (3, 3, 3), 2, 1, 1, 1, 16, 1), "channels_last"),
)


def results() -> dict[str, np.ndarray]:
    """The results of every native kernel on every geometry, and of every type on some."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # it is not XLA's code that is examined
    found = {}

    def store(name: str, f: Callable[..., Any], x: Any) -> None:
        for i, leaf in enumerate(jax.tree.leaves(jax.jit(f)(x))):
            found[f"{name} {i}"] = np.asarray(leaf)

    def derivatives(f: Callable[..., Any]) -> Callable[..., Any]:
        """Forward, reverse, and the reverse of that, which runs the kernels of the forward derivative."""

        def function(x: Any) -> Any:
            y, pull_back = jax.vjp(f, x)
            dx, push = jax.vjp(lambda g: pull_back(g)[0], y)
            return y, dx, push(dx)

        return function

    types = ("float64", "float16", "bfloat16")
    integers = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")
    for number, (shape, keywords) in enumerate(GEOMETRIES):
        native = {"implementation": "native"} | keywords
        data_format = keywords.get("data_format", "channels_last")
        sizes = shape[1:-1] if data_format == "channels_last" else shape[2:]

        def unpool(x: Any, native: Any = native, sizes: Any = sizes, data_format: Any = data_format) -> Any:
            y, at = jax_mps.max_pool(x, return_indices=True, **native)
            return jax_mps.max_unpool(y, at, sizes, data_format=data_format, implementation="native")

        functions = {
            "max": functools.partial(jax_mps.max_pool, **native),
            "unpool": unpool,
            "avg": functools.partial(jax_mps.avg_pool, **native),
            "avg excluding": functools.partial(jax_mps.avg_pool, count_include_pad=False, **native),
            "l2": functools.partial(jax_mps.l2_pool, **native),
        }
        rng = np.random.default_rng(number)
        normal = rng.standard_normal(shape)
        normal[rng.random(shape) < 0.3] = 0  # ties, and norms of 0
        for dtype in ("float32", types[number % 3]):
            for name, f in functions.items():
                store(f"{name} {number} {dtype}", derivatives(f), normal.astype(jnp.dtype(dtype)))
        dtype = integers[number % 7]
        x = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
        store(f"max {number} {dtype}", functions["max"], x)
        store(f"max index {number} {dtype}", functools.partial(functions["max"], return_indices=True), x)
    for number, (case, data_format) in enumerate(CONVOLUTIONS):
        run = convs.run_all({**case.call, "data_format": data_format, "implementation": "native"})
        for dtype in ("float32", types[number % 3]):
            # Of one sign, so that sums do not cancel and all their digits mean something.
            arrays = case.arrays(data_format, dtype=dtype)
            store(f"conv {number} {dtype}", run, convs.Arrays(*map(np.abs, arrays)))
    return found


SAVE_RESULTS = """
import numpy, test_native
from jax_mps.lowering import library
arrays = test_native.results()
is_known = lambda array: array.dtype.kind in "fiub"
numpy.savez({path!r}, **{{k: v if is_known(v) else v.view(numpy.uint16) for k, v in arrays.items()}})
print(library.status().instruction_set, library.status().threads)
"""


def read(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    counts = ("1", "2", "8")
    paths = [str(tmp_path / f"{n}.npz") for n in counts]
    running = [start(SAVE_RESULTS.format(path=path), NPROC=n) for n, path in zip(counts, paths, strict=True)]
    assert [output.split()[1] for output in finish_all(running)] == list(counts)
    first, *others = map(read, paths)
    assert len(first) > 200
    for other in others:
        for name, array in first.items():
            assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64"
)
@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_the_instruction_set(tmp_path):
    sets = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
    paths = [str(tmp_path / f"{name}.npz") for name in sets]
    running = [
        start(SAVE_RESULTS.format(path=path), JAX_MPS_INSTRUCTION_SET=name)
        for name, path in zip(sets, paths, strict=True)
    ]
    chosen = [output.split()[0] for output in finish_all(running)]
    assert chosen[0] == sets[0]
    # A processor without the newest one uses the next.
    assert chosen == sorted(chosen)
    assert all(got <= asked for got, asked in zip(chosen, sets, strict=True))
    first, *others = map(read, paths)
    for other in others:
        for name, a in first.items():
            b = other[name]
            if a.dtype.kind in "iub" and "max" in name:
                np.testing.assert_array_equal(a, b, err_msg=name)
            elif a.dtype == np.uint16:  # bfloat16, whose neighbours are neighbouring numbers
                assert np.abs(a.astype(int) - b.astype(int)).max(initial=0) <= 1, name
            else:
                eps = float(np.finfo(a.dtype).eps)
                exact = name.startswith("max") and name.endswith(" 0")
                rtol = 0 if exact else (32 if name.startswith("conv") else 4) * eps
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max(), err_msg=name)


POISONED = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
fresh = {ctypes.string_at(libc.malloc(size), size) for size in (1 << 12, 1 << 22)}
print(all(len(set(content)) == 1 and content[0] for content in fresh))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's allocator can fill what it hands out")
@pytest.mark.usefixtures("native")
def test_every_byte_of_every_result_is_written(tmp_path):
    # Results live in memory that the allocator fills with one byte or its complement.
    paths = [str(tmp_path / f"{byte}.npz") for byte in (1, 254)]
    running = [
        start(POISONED + SAVE_RESULTS.format(path=path), MALLOC_PERTURB_=byte, NPROC="2")
        for byte, path in zip(("1", "254"), paths, strict=True)
    ]
    for output in finish_all(running):
        assert output.split()[0] == "True", "this allocator does not fill memory"
    one, two = map(read, paths)
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


# --- threads ------------------------------------------------------------------------------------------

CHAINS = """
import jax, jax.numpy as jnp, numpy as np, jax_mps
pools = [jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool]

def chain(i, x):
    x = jnp.sin(x + i)
    x = jnp.einsum("bhwc,wv->bhvc", x, jnp.cos(x[0, :, :, 0]))
    return jax.grad(lambda x: pools[i % 3](x, 3, strides=1, padding=1, implementation="native").sum())(x)

x = np.random.default_rng(0).standard_normal((4, 128, 128, 8)).astype(np.float32)
chains = jax.jit(lambda x: [chain(i, x) for i in range(8)])
first = [np.asarray(y) for y in chains(x)]
assert all(np.isfinite(y).all() for y in first)
for _ in range(20):
    for a, b in zip(first, chains(x)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("done")
"""


@pytest.mark.parametrize("threads", ["1", "2", "8"])
@pytest.mark.usefixtures("native")
def test_independent_calls_in_one_program_do_not_wait_for_each_other(threads):
    # A kernel that waits for tasks that wait for its own thread hangs here, with 8 chains on 2 threads.
    assert finish(start(CHAINS, NPROC=threads), timeout=120) == "done\n"


NEW_MEMORY = """
import jax, numpy as np, jax_mps

pool = dict(window_shape=3, strides=3, implementation="native")
x = np.random.default_rng(0).permutation(2 * 387 * 381 * 33).astype(np.float32).reshape(2, 387, 381, 33)
spread = jax.jit(lambda g: jax_mps.avg_pool_gradient(g, x.shape, **pool))
y, pull_back = jax.vjp(lambda x: jax_mps.max_pool(x, **pool), x)
pull_back = jax.jit(pull_back)
stretched = lambda a: a.repeat(3, axis=1).repeat(3, axis=2)
largest = x == stretched(np.asarray(y))
kept = []
for seed in range(3):
    g = np.random.default_rng(seed).standard_normal(y.shape).astype(np.float32)
    for _ in range(3):
        spread(g).block_until_ready()
        put, = pull_back(g)
    kept += [(spread(g), stretched(g / 9)), (put, np.where(largest, stretched(g), 0))]
for got, want in kept:
    np.testing.assert_array_equal(got, want)
print("done")
"""


@pytest.mark.usefixtures("native")
def test_results_in_memory_that_the_system_supplies_meanwhile():
    # 39 MB are new at every call, and in part again what an earlier call gave back.
    assert finish(start(NEW_MEMORY, NPROC="2")) == "done\n"


@pytest.mark.usefixtures("native")
def test_python_threads_may_share_a_function():
    @jax.jit
    def f(x):
        return jax.value_and_grad(
            lambda x: (
                jax_mps.max_pool(x, 3, strides=2, padding=1, implementation="native").sum()
                + jax_mps.l2_pool(x, 3, strides=2, padding=1, implementation="native").sum()
            )
        )(x)

    images = [oracle.distinct((2, 65, 64, 16), seed=seed) for seed in range(8)]
    expected = [jax.tree.map(np.asarray, f(x)) for x in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(f, images), expected, strict=True):
                np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
                np.testing.assert_array_equal(got[1], want[1])


# --- that it is used, and when not --------------------------------------------------------------------


def compiled_text(f: Callable[..., Any], *operands: Any) -> str:
    return jax.jit(f).lower(*operands).compile().as_text()


@pytest.mark.usefixtures("native")
def test_every_kernel_is_used():
    x, g = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 4, 3))
    window = {"window_shape": 2, "strides": 2}
    at = jax_mps.max_pool(x, **window, return_indices=True)[1]

    def unpool(y: Any) -> Any:
        return jax_mps.max_unpool(y, at, (8, 8))

    def pull(f: Callable[..., Any], x: Any, g: Any) -> Any:
        return jax.vjp(f, x)[1](g)

    def push(f: Callable[..., Any], x: Any, t: Any) -> Any:
        return jax.jvp(f, (x,), (t,))

    max_pool, avg_pool, l2_pool = (
        functools.partial(f, **window) for f in (jax_mps.max_pool, jax_mps.avg_pool, jax_mps.l2_pool)
    )
    uses = {
        "max_pool": compiled_text(max_pool, x),
        "max_pool_with_tap_index": compiled_text(functools.partial(max_pool, return_indices=True), x),
        "max_pool_tap_index": compiled_text(functools.partial(jax_mps.max_pool_gradient, **window), g, x),
        "max_pool_put": compiled_text(functools.partial(pull, max_pool), x, g),
        "max_pool_take": compiled_text(functools.partial(push, max_pool), x, x),
        "avg_pool": compiled_text(avg_pool, x),
        "avg_pool_gradient": compiled_text(functools.partial(pull, avg_pool), x, g),
        "l2_pool": compiled_text(l2_pool, x),
        "l2_pool_gradient": compiled_text(functools.partial(pull, l2_pool), x, g),
        "l2_pool_tangent": compiled_text(functools.partial(push, l2_pool), x, x),
        "max_unpool": compiled_text(unpool, g),
        "max_unpool_take": compiled_text(functools.partial(pull, unpool), g, x),
    }
    case = convs.CASES["fcn"]
    small, kernel, large = case.arrays()
    conv_transpose = functools.partial(jax_mps.conv_transpose, **case.call)

    def pull_one(operand: int, *primals: Any) -> Any:
        return jax.vjp(conv_transpose, *primals)[1](large)[operand]

    uses |= {
        "conv_transpose": compiled_text(conv_transpose, small, kernel),
        "conv_transpose_gradient_data": compiled_text(functools.partial(pull_one, 0), small, kernel),
        "conv_transpose_gradient_weights": compiled_text(functools.partial(pull_one, 1), small, kernel),
    }
    assert set(uses) == set(library._HANDLERS)
    for name, text in uses.items():
        assert f'custom_call_target="jax_mps.1.{name}"' in text, name


@pytest.mark.usefixtures("native")
def test_the_layout_costs_no_transposition():
    for data_format, shape in (("channels_last", (2, 16, 16, 8)), ("channels_first", (2, 8, 16, 16))):
        f = functools.partial(jax_mps.max_pool, window_shape=3, strides=2, data_format=data_format)
        text = compiled_text(jax.grad(lambda x: f(x).sum()), jnp.ones(shape))  # noqa: B023
        assert "jax_mps.1.max_pool_put" in text
        assert " transpose(" not in text
        assert " copy(" not in text
    for data_format in ("channels_last", "channels_first"):
        case = convs.CASES["groups"]
        run = convs.run_all({**case.call, "data_format": data_format})
        text = run.lower(case.arrays(data_format)).compile().as_text()
        assert text.count(" custom-call(") == 3
        assert " transpose(" not in text
        assert " copy(" not in text


SWITCH = """
import numpy as np, jax, jax.numpy as jnp, jax_mps
x = jnp.arange(16.0).reshape(1, 4, 4, 1)
y = jax.jit(lambda x: jax_mps.max_pool(x, 2, strides=2))(x)
np.testing.assert_array_equal(y.ravel(), [5, 7, 13, 15])
print(jax_mps.native_available())
try:
    jax_mps.max_pool(x, 2, strides=2, implementation="native")
except ValueError as error:
    print(error)
"""


def test_switched_off_it_is_not_used():
    first, second = finish(start(SWITCH, JAX_MPS_NATIVE="off")).splitlines()
    assert first == "False"
    assert second == "implementation='native' cannot be had: JAX_MPS_NATIVE=off"


@pytest.mark.parametrize("switch", ["auto", "required"])
@pytest.mark.usefixtures("native")
def test_switched_on_it_is_used(switch):
    assert finish(start(SWITCH, JAX_MPS_NATIVE=switch)) == "True\n"


def test_an_unknown_switch_is_an_error():
    process = start(SWITCH, JAX_MPS_NATIVE="yes")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ValueError: JAX_MPS_NATIVE must be 'auto', 'off' or 'required', got 'yes'" in errors


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Makes the loader look for the library in an empty folder; yields where the file would be."""
    path = tmp_path / "libjax_mps_native.so"
    monkeypatch.setitem(sys.modules, "jax_mps_native", types.SimpleNamespace(LIBRARY=path))
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)
    return path


def load() -> library.Status:
    """Looks for the library anew, and leaves what the process already knows of it alone."""
    return library.status.__wrapped__()


@pytest.fixture
def not_built(monkeypatch):
    """A clone without a compiler: the package `jax_mps_native` is not there."""
    monkeypatch.setitem(sys.modules, "jax_mps_native", None)
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)


@pytest.mark.usefixtures("not_built")
def test_without_the_library_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = load()
    assert not status.available
    assert status.reason.startswith("the native library was not built")
    assert status.path == ""


@pytest.mark.usefixtures("not_built")
def test_without_the_library_required_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_MPS_NATIVE", "required")
    with pytest.raises(RuntimeError, match="JAX_MPS_NATIVE=required, but the native library was not built"):
        load()


def test_a_broken_library_is_refused_with_a_warning(elsewhere):
    elsewhere.write_text("not a library")
    with pytest.warns(UserWarning, match="StableHLO path on the CPU: the native library does not load"):
        assert not load().available


@pytest.mark.usefixtures("native")
def test_a_library_that_xla_refuses_is_not_used(monkeypatch):
    def refuse(name: str, function: Any) -> None:
        raise RuntimeError(f"no room for {name}")

    monkeypatch.setattr(_compat, "register_target", refuse)
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)
    with pytest.warns(UserWarning, match="XLA refused the native library: no room for jax_mps.2.max_pool"):
        assert not load().available


NEWER = """
import warnings
from jax_mps import _compat
_compat.ffi_api_minor = lambda: 0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np, jax, jax.numpy as jnp, jax_mps
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    for _ in range(3):
        y, dx = jax.value_and_grad(lambda x: jax_mps.max_pool(x, 2, strides=2).sum())(x)
        jax_mps.avg_pool(x, 2, strides=2), jnp.sum(x)
print(jax_mps.native_available(), float(y), float(dx.sum()), len(caught))
print(caught[0].message)
"""


@pytest.mark.usefixtures("native")
def test_a_library_newer_than_jaxlib_is_refused_with_one_warning():
    first, second = finish(start(NEWER, JAX_MPS_NATIVE="auto")).splitlines()
    assert first == "False 40.0 4.0 1"
    assert second.startswith(
        "jax_mps uses its StableHLO path on the CPU: the native library speaks FFI API 0."
    )


@pytest.mark.usefixtures("native")
def test_the_library_speaks_the_oldest_api_and_shows_only_our_symbols():
    shared = ctypes.CDLL(library.status().path)
    assert shared.JaxMpsFfiApiMinor() == 1  # that of jaxlib 0.4.34: every later one takes it
    for symbol in library._HANDLERS.values():
        assert getattr(shared, symbol)


# --- wrong use ----------------------------------------------------------------------------------------


def wrong_calls() -> dict[str, tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls that no public function makes: (handler, results, operands, attributes)."""
    like = jax.ShapeDtypeStruct
    f32, i8 = jnp.float32, jnp.int8
    image, pooled = jnp.ones((1, 8, 8, 2)), like((1, 4, 4, 2), f32)
    tap = jnp.zeros((1, 4, 4, 2), i8)

    def window(**changes: Any) -> dict[str, Any]:
        columns = {
            "window_shape": [2, 2],
            "strides": [2, 2],
            "window_dilation": [1, 1],
            "low": [0, 0],
        } | changes
        start = columns.pop("start", 1)
        arrays = {k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in columns.items()}
        return {"start": np.int64(start)} | arrays

    def average(**changes: Any) -> dict[str, Any]:
        more = {"divisor": np.int64(0), "band_low": np.zeros(2, np.int64), "band_high": np.zeros(2, np.int64)}
        return window() | more | changes

    def of(dtype: Any, x: Any = image) -> Any:
        return jnp.ones(x.shape, dtype)

    calls = {
        f"max_pool of {dtype}": ("max_pool", like(pooled.shape, dtype), (of(dtype),), window())
        for dtype in ("int4", "uint4", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "uint64")
        if hasattr(jnp, dtype)
    }
    calls |= {
        f"avg_pool of {dtype}": ("avg_pool", like(pooled.shape, dtype), (of(dtype),), average())
        for dtype in ("int4", "int32", "bool", "float8_e4m3fn", "complex64")
        if hasattr(jnp, dtype)
    }
    calls |= {
        "another result type": ("max_pool", like(pooled.shape, jnp.bfloat16), (image,), window()),
        "unsigned tap": ("max_pool_tap_index", like(pooled.shape, jnp.uint8), (image,), window()),
        "float tap": ("max_pool_tap_index", like(pooled.shape, f32), (image,), window()),
        "integer tangent": ("max_pool_take", like(pooled.shape, i8), (of(i8), tap), window()),
        "scalar": ("max_pool", like((), f32), (jnp.float32(1),), window()),
        "too few axes": ("max_pool", like((4,), f32), (jnp.ones(8),), window()),
        "too many spatial axes": (
            "max_pool",
            like((1, 4, 4, 4, 4, 2), f32),
            (jnp.ones((1, 8, 8, 8, 8, 2)),),
            window(window_shape=[2] * 4, strides=[2] * 4, window_dilation=[1] * 4, low=[0] * 4),
        ),
        "no spatial axes": (
            "max_pool",
            like(image.shape, f32),
            (image,),
            window(window_shape=[], strides=[], window_dilation=[], low=[]),
        ),
        "results of another rank": ("max_pool", like((1, 4, 4), f32), (image,), window()),
        "other channels": ("max_pool", like((1, 4, 4, 3), f32), (image,), window()),
        "other batch": ("max_pool", like((2, 4, 4, 2), f32), (image,), window()),
        "start behind the end": ("max_pool", pooled, (image,), window(start=3)),
        "start far behind the end": ("max_pool", pooled, (image,), window(start=2**62)),
        "negative start": ("max_pool", pooled, (image,), window(start=-1)),
        "kernel of 0": ("max_pool", pooled, (image,), window(window_shape=[0, 2])),
        "negative kernel": ("max_pool", pooled, (image,), window(window_shape=[-3, 2])),
        "stride of 0": ("max_pool", pooled, (image,), window(strides=[2, 0])),
        "dilation of 0": ("max_pool", pooled, (image,), window(window_dilation=[0, 1])),
        "negative lo": ("max_pool", pooled, (image,), window(low=[0, -1])),
        "short stride": ("max_pool", pooled, (image,), window(strides=[2])),
        "short lo": ("max_pool", pooled, (image,), window(low=[0])),
        "long dilation": ("max_pool", pooled, (image,), window(window_dilation=[1, 1, 1])),
        "missing attribute": ("max_pool", pooled, (image,), dict(list(window().items())[:-1])),
        "extra attribute": ("max_pool", pooled, (image,), window() | {"edge": np.int64(1)}),
        "attribute of another type": ("max_pool", pooled, (image,), window(strides=np.int32([2, 2]))),
        "float attribute": ("max_pool", pooled, (image,), window(strides=np.float32([2, 2]))),
        "short band": ("avg_pool", pooled, (image,), average(band_low=np.zeros(1, np.int64))),
        "window's attributes for an average": ("avg_pool", pooled, (image,), window()),
        "no operand": ("max_pool", pooled, (), window()),
        "an operand too many": ("max_pool", pooled, (image, image), window()),
        "a result too many": ("max_pool", [pooled, pooled], (image,), window()),
        "a result too few": ("max_pool_with_tap_index", [pooled], (image,), window()),
        "taps of another shape": ("max_pool_take", pooled, (image, tap[:, :3]), window()),
        "taps of another shape than gradients": (
            "max_pool_put",
            like(image.shape, f32),
            (jnp.ones((1, 4, 4, 2)), tap[:, :3]),
            window(),
        ),
        "index of another shape than values": (
            "max_pool_with_tap_index",
            [pooled, like((1, 3, 4, 2), i8)],
            (image,),
            window(),
        ),
        "norms in half precision": (
            "l2_pool_tangent",
            like(pooled.shape, jnp.float16),
            (of(jnp.float16), of(jnp.float16), jnp.ones((1, 4, 4, 2), jnp.float16)),
            window(),
        ),
        "norm in an integer": ("l2_pool", like(pooled.shape, jnp.int32), (image,), window()),
        "norms of another shape": (
            "l2_pool_gradient",
            like(image.shape, f32),
            (jnp.ones((1, 4, 4, 2)), image, jnp.ones((1, 3, 4, 2))),
            window(),
        ),
        "image of another shape": (
            "l2_pool_tangent",
            pooled,
            (image, image[:, :7], jnp.ones((1, 4, 4, 2))),
            window(),
        ),
        "indices of another type": (
            "max_unpool",
            like(image.shape, f32),
            (jnp.ones((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 2), jnp.int16)),
            {"start": np.int64(1), "rank": np.int64(2)},
        ),
        "indices of another shape": (
            "max_unpool",
            like(image.shape, f32),
            (jnp.ones((1, 4, 4, 2)), jnp.zeros((1, 4, 3, 2), jnp.int32)),
            {"start": np.int64(1), "rank": np.int64(2)},
        ),
        "rank of 0": (
            "max_unpool",
            like(image.shape, f32),
            (jnp.ones((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 2), jnp.int32)),
            {"start": np.int64(1), "rank": np.int64(0)},
        ),
        "rank of 4": (
            "max_unpool_take",
            like((1, 4, 4, 2), f32),
            (image, jnp.zeros((1, 4, 4, 2), jnp.int32)),
            {"start": np.int64(0), "rank": np.int64(4)},
        ),
    }  # fmt: skip
    return calls | wrong_convolutions()


def wrong_convolutions() -> dict[str, tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    like = jax.ShapeDtypeStruct
    x, kernel, g = jnp.ones((1, 4, 4, 6)), jnp.ones((2, 2, 6, 4)), jnp.ones((1, 8, 8, 4))
    columns = {"window_shape": [2, 2], "strides": [2, 2], "window_dilation": [1, 1], "low": [0, 0]}
    scalars = {"start": 1, "channel": 3, "groups": 1, "transpose_kernel": 0}

    def of(dtype: Any, x: Any) -> Any:
        return jnp.ones(x.shape, dtype)

    def attributes(**changes: Any) -> dict[str, Any]:
        numbers = {k: np.int64(changes.pop(k, v)) for k, v in scalars.items()}
        return numbers | {k: np.array(v, np.int64) for k, v in (columns | changes).items()}

    good = like(g.shape, np.float32), (x, kernel)
    changes = {
        "kernel of another start": {"start": 2},
        "negative start": {"start": -1, "channel": 1},
        "start far behind the end": {"start": 2**62, "channel": 2**62 + 2},
        "channel among the pixels": {"channel": 2},
        "channel behind the end": {"channel": 4},
        "channel before the beginning": {"start": 0, "channel": -1},
        "no groups": {"groups": 0},
        "negative groups": {"groups": -1},
        "groups that do not divide": {"groups": 4},
        "groups of another kernel": {"groups": 2},
        "another window than the kernel's": {"window_shape": [2, 3]},
        "short window": {"window_shape": [2]},
        "another kind of kernel": {"transpose_kernel": 1},
        "stride of 0": {"strides": [0, 2]},
        "dilation of 0": {"window_dilation": [1, 0]},
        "stride beyond 32 bits": {"strides": [2, 2**31]},
        "lo beyond 32 bits": {"low": [-(2**40), 0]},
        "short stride": {"strides": [2]},
        "short lo": {"low": [0]},
        "long dilation": {"window_dilation": [1, 1, 1]},
        "no axes": {"window_shape": [], "strides": [], "window_dilation": [], "low": []},
        "four axes": {
            "window_shape": [2] * 4,
            "strides": [2] * 4,
            "window_dilation": [1] * 4,
            "low": [0] * 4,
        },
    }
    calls = {name: ("conv_transpose", *good, attributes(**change)) for name, change in changes.items()}
    some = list(attributes().items())
    operands = {
        "integers": (good[0], (of(np.int32, x), of(np.int32, kernel))),
        "complex numbers": (like(g.shape, np.complex64), (of(np.complex64, x), of(np.complex64, kernel))),
        "two types": (good[0], (x, kernel.astype(np.float16))),
        "a narrower result": (like(g.shape, np.float16), (x, kernel)),
        "a result of another half": (
            like(g.shape, jnp.bfloat16),
            (of(np.float16, x), of(np.float16, kernel)),
        ),
        "scalars": (like((), np.float32), (jnp.float32(1), jnp.float32(1))),
        "kernel of another rank": (good[0], (x, kernel[0])),
        "kernel of no taps": (good[0], (x, kernel[:0])),
        "kernel of other inputs": (good[0], (x, kernel[:, :, :5])),
        "kernel of other outputs": (good[0], (x, kernel[..., :3])),
        "result of another batch": (like((2, 8, 8, 4), np.float32), (x, kernel)),
        "result of another rank": (like((8, 8, 4), np.float32), (x, kernel)),
        "no operand": (good[0], ()),
        "one operand": (good[0], (x,)),
        "three operands": (good[0], (x, kernel, kernel)),
    }
    calls |= {name: ("conv_transpose", *pair, attributes()) for name, pair in operands.items()}
    calls |= {
        "missing attribute": ("conv_transpose", *good, dict(some[:-1])),
        "extra attribute": ("conv_transpose", *good, attributes() | {"kernel": np.array([2, 2], np.int64)}),
        "attribute of another type": ("conv_transpose", *good, attributes() | {"groups": np.int32(1)}),
        "image of another batch": (
            "conv_transpose_gradient_data", like((2, 4, 4, 6), np.float32), (g, kernel), attributes(),
        ),
        "image of other channels": (
            "conv_transpose_gradient_data", like((1, 4, 4, 5), np.float32), (g, kernel), attributes(),
        ),
        "source of another batch": (
            "conv_transpose_gradient_weights", like(kernel.shape, np.float32), (g, jnp.ones((2, 4, 4, 6))),
            attributes(),
        ),
        "weights of other channels": (
            "conv_transpose_gradient_weights", like((2, 2, 6, 3), np.float32), (g, x), attributes(),
        ),
        "weights of another rank": (
            "conv_transpose_gradient_weights", like((2, 6, 4), np.float32), (g, x), attributes(),
        ),
    }  # fmt: skip
    return {f"convolution: {name}": call for name, call in calls.items()}


def call_wrongly() -> None:
    """Makes every wrong call and prints the kind of error, or that there was none; then a right call."""
    jax.config.update("jax_enable_x64", True)
    assert library.status().available
    outcomes = {}
    for name, (handler, shapes, operands, attributes) in wrong_calls().items():
        call = _compat.ffi.ffi_call
        try:
            if "args" in inspect.signature(call).parameters:  # JAX < 0.5
                result = call(library.target(handler), shapes, *operands, **attributes)
            else:
                result = call(library.target(handler), shapes)(*operands, **attributes)
            jax.block_until_ready(result)
            outcomes[name] = "accepted"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    y = jax_mps.max_pool(x, 2, strides=2, implementation="native")
    np.testing.assert_array_equal(np.ravel(y), [5, 7, 13, 15])
    print(json.dumps(outcomes))


@pytest.mark.usefixtures("native")
def test_wrong_use_of_the_handlers_is_an_error_and_never_a_crash():
    outcomes = json.loads(finish(start("import test_native; test_native.call_wrongly()")))
    assert len(outcomes) > 90
    accepted = [name for name, outcome in outcomes.items() if "INVALID_ARGUMENT" not in outcome]
    assert not accepted, {name: outcomes[name] for name in accepted}


ODD_CALLS = """
import jax, jax.numpy as jnp, numpy as np
from jax_mps import _compat
from jax_mps.lowering import library
import inspect
assert library.status().available

def call(handler, shape, *operands, **attributes):
    attributes = {k: (np.array if isinstance(v, list) else np.int64)(v) for k, v in attributes.items()}
    call = _compat.ffi.ffi_call
    if "args" in inspect.signature(call).parameters:
        return call(library.target(handler), shape, *operands, **attributes)
    return call(library.target(handler), shape)(*operands, **attributes)

def window(**changes):
    pairs = {"window_shape": [2, 2], "strides": [2, 2], "window_dilation": [1, 1], "low": [0, 0]}
    return {"start": 1} | pairs | changes

like = jax.ShapeDtypeStruct
image, pooled = jnp.ones((1, 8, 8, 2)), like((1, 4, 4, 2), jnp.float32)
# Windows that lie in the padding, or reach far behind the image: every tap is checked against the image.
far = {"low": [100, 0]}, {"strides": [50, 50]}, {"window_dilation": [99, 1]}, {"window_shape": [9, 40]}
for changes in far:
    for handler in ("max_pool", "l2_pool"):
        jax.block_until_ready(call(handler, pooled, image, **window(**changes)))
    taps = like(pooled.shape, jnp.int16)
    jax.block_until_ready(call("max_pool_tap_index", taps, image, **window(**changes)))
# Images without pixels.
for shape, out in (((0, 8, 8, 2), (0, 4, 4, 2)), ((1, 8, 8, 0), (1, 4, 4, 0)), ((1, 0, 8, 2), (1, 1, 4, 2))):
    jax.block_until_ready(call("max_pool", like(out, jnp.float32), jnp.ones(shape), **window(low=[1, 0])))
# Indices that lie nowhere.
at = jnp.array([-1, -(2**31), 2**31 - 1, 64], jnp.int32).reshape(1, 2, 2, 1)
y = call("max_unpool", like((1, 8, 8, 1), jnp.float32), jnp.ones(at.shape), at, start=1, rank=2)
assert not np.any(y)
y = call("max_unpool_take", like(at.shape, jnp.float32), jnp.ones((1, 8, 8, 1)), at, start=1, rank=2)
assert not np.any(y)
# Convolutions whose taps lie anywhere, and images without pixels.
kernel = jnp.ones((2, 2, 2, 3))
windows = dict(window_shape=[2, 2], strides=[2, 2], window_dilation=[1, 1], low=[0, 0])
attributes = dict(start=1, channel=3, groups=1, transpose_kernel=0, **windows)
def all_three(x, g, **changes):
    shapes = [like(a.shape, jnp.float32) for a in (g, x, kernel)]
    operands = [(x, kernel), (g, kernel), (g, x)]
    for name, shape, pair in zip(("", "_gradient_data", "_gradient_weights"), shapes, operands):
        yield float(call("conv_transpose" + name, shape, *pair, **attributes | changes).sum())
for changes in ({"low": [1000, 0]}, {"low": [0, -1000]}, {"strides": [99, 50]}, {"window_dilation": [99, 1]}):
    # Sums of ones, over the same pairs of pixels and taps.
    y, dx, dk = all_three(image, jnp.ones((1, 5, 9, 3)), **changes)
    assert y == dx == dk, changes
for shape in ((0, 8, 8, 2), (1, 0, 8, 2), (1, 8, 0, 2)):
    assert set(all_three(jnp.ones(shape), jnp.ones((shape[0], 5, 9, 3)))) == {0}
for shape in ((1, 0, 9, 3), (1, 5, 0, 3)):
    assert set(all_three(image, jnp.ones(shape))) == {0}
print("done")
"""


@pytest.mark.usefixtures("native")
def test_odd_windows_and_positions_do_not_crash():
    assert finish(start(ODD_CALLS)) == "done\n"
