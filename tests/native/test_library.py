"""The native library as a library: that it is used, when not, and when it is refused."""

import _ctypes
import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import convs
import damaged_libraries
import jax_mps
from jax_mps import _compat
from jax_mps.lowering import library
from processes import finish, start

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

    def stock(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    with jax_mps.accelerate():
        accelerated = compiled_text(functools.partial(pull, stock), x, g)
    uses = {
        "max_pool": compiled_text(max_pool, x),
        "max_pool_with_tap_index": compiled_text(functools.partial(max_pool, return_indices=True), x),
        "max_pool_tap_index": compiled_text(functools.partial(jax_mps.max_pool_gradient, **window), g, x),
        "max_pool_selected_tap_index": accelerated,
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
        assert f'custom_call_target="{library.target(name)}"' in text, name


LARGE: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "maximum": (jax_mps.max_pool, (1, 500, 1), {"window_shape": 101, "strides": 1}),
    "average": (jax_mps.avg_pool, (2, 3, 64, 64), {"window_shape": 31, "strides": 1, "padding": 15}),
    "norm": (jax_mps.l2_pool, (2, 24, 24, 24, 4), {"window_shape": 9, "strides": 1, "padding": 4}),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.usefixtures("native")
def test_large_windows_are_left_to_stablehlo(name):
    pool, shape, options = LARGE[name]
    rank = len(shape) - 2
    data_format = "channels_first" if shape[1] < shape[-1] and rank > 1 else "channels_last"
    call = options | {"window_shape": (options["window_shape"],) * rank, "data_format": data_format}
    x = jnp.sin(jnp.arange(float(math.prod(shape)))).reshape(shape)
    calls, results = [], []
    for implementation in (None, "native", "xla"):
        f = functools.partial(pool, **call, implementation=implementation)
        step = lambda x, f=f: jax.vjp(f, x)[1](jnp.cos(f(x)))  # noqa: E731
        calls.append(compiled_text(step, x).count("custom_call_target"))
        results.append(jax.jit(step)(x)[0])
    assert calls[2] <= calls[0] < calls[1]
    for result in results:
        np.testing.assert_allclose(result, results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_a_large_window_that_is_the_whole_image_is_not():
    for pool in (jax_mps.max_pool, jax_mps.avg_pool):
        f = functools.partial(pool, window_shape=(112, 112), strides=1)
        assert library.target("") in compiled_text(f, jnp.ones((1, 112, 112, 3)))


@pytest.mark.usefixtures("native")
def test_the_layout_costs_no_transposition():
    for data_format, shape in (("channels_last", (2, 16, 16, 8)), ("channels_first", (2, 8, 16, 16))):
        f = functools.partial(jax_mps.max_pool, window_shape=3, strides=2, data_format=data_format)
        text = compiled_text(jax.grad(lambda x: f(x).sum()), jnp.ones(shape))  # noqa: B023
        assert library.target("max_pool_put") in text
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


REASONS = {
    "cut off": "it is cut off or damaged",
    "zeros": "it is cut off or damaged",
    "noise": ".*",
    "noise that looks like one": ".*",
    "other processor": "it is for another processor",
    "text": ".*",
    "empty": ".*",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of another system looks at other files")
@pytest.mark.parametrize("damage", damaged_libraries.DAMAGES)
def test_a_damaged_library_is_refused_with_the_reason(damage, native, elsewhere):
    # The system's loader would crash this process on one that is cut off in the middle, or ends in zeros.
    whole = Path(library.status().path).read_bytes()
    for seed in range(20):
        changed = damaged_libraries.DAMAGES[damage](whole, np.random.default_rng(seed))
        elsewhere.write_bytes(changed)
        reason = REASONS[damage] if changed[:6] == whole[:6] and len(changed) >= 64 else ".*"
        with pytest.warns(UserWarning, match=f"the native library does not load: {reason}"):
            assert not load().available


@pytest.mark.usefixtures("native")
def test_a_library_without_some_handler_is_refused(monkeypatch):
    monkeypatch.setitem(library._HANDLERS, "novel", "JaxMpsNovel")
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)
    with pytest.warns(UserWarning, match="the native library lacks JaxMpsNovel"):
        assert not load().available


@pytest.mark.usefixtures("native")
def test_a_library_that_xla_refuses_is_not_used(monkeypatch):
    def refuse(name: str, function: Any) -> None:
        raise RuntimeError(f"no room for {name}")

    monkeypatch.setattr(_compat, "register_target", refuse)
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)
    with pytest.warns(UserWarning, match="XLA refused the native library: no room for jax_mps.*max_pool"):
        assert not load().available


USE = """
import warnings
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
# A jaxlib whose headers say that it speaks API 0.0.
NEWER = """
import pathlib
try:
    from jax import ffi
except ImportError:
    from jax.extend import ffi
header = pathlib.Path({folder!r}, "xla", "ffi", "api", "c_api.h")
header.parent.mkdir(parents=True)
header.write_text("#define XLA_FFI_API_MINOR 0")
ffi.include_dir = lambda: {folder!r}
"""


@pytest.mark.usefixtures("native")
def test_a_library_newer_than_jaxlib_is_refused_with_one_warning(tmp_path):
    newer = NEWER.format(folder=str(tmp_path))
    first, second = finish(start(f"{newer}\n{USE}", JAX_MPS_NATIVE="auto")).splitlines()
    assert first == "False 40.0 4.0 1"
    assert second.startswith(
        "jax_mps uses its StableHLO path on the CPU: the native library speaks FFI API 0."
    )


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64"
)
@pytest.mark.usefixtures("native")
def test_an_older_processor_takes_stablehlo():
    environment = {"JAX_MPS_NATIVE": "auto", "JAX_MPS_INSTRUCTION_SET": "x86-64-v2"}
    first, second = finish(start(USE, **environment)).splitlines()
    assert first == "False 40.0 4.0 1"
    assert "has no kernels for the instruction sets of this processor" in second


SAVED = """
import pickle
import jax, jax.numpy as jnp, jax_mps
from jax.experimental import serialize_executable
step = jax.jit(jax.grad(lambda x: jax_mps.max_pool(x, 2, strides=2, implementation="native").sum()))
compiled = step.lower(jnp.ones((1, 8, 8, 3))).compile()
pickle.dump(serialize_executable.serialize(compiled), open({path!r}, "wb"))
"""
LOADED = """
import pickle
import jax.numpy as jnp, jax_mps
from jax.experimental import serialize_executable
step = serialize_executable.deserialize_and_load(*pickle.load(open({path!r}, "rb")))
print(step(jnp.ones((1, 8, 8, 3))).sum())
"""


@pytest.mark.usefixtures("native")
def test_a_serialised_executable_runs_where_the_package_is_imported(tmp_path):
    path = str(tmp_path / "step")
    finish(start(SAVED.format(path=path)))
    assert finish(start(LOADED.format(path=path))) == "48.0\n"


@pytest.mark.usefixtures("native")
def test_the_import_starts_no_devices():
    # There is no such platform: to start the devices raises an error.
    code = """
import jax, jax_mps
print(jax_mps.native_available())
try:
    jax.devices()
except RuntimeError:
    print("started now")
"""
    assert finish(start(code, JAX_PLATFORMS="nowhere")) == "True\nstarted now\n"


# --- source and library from different installations --------------------------------------------------


@pytest.fixture
def clone(native, tmp_path):
    """A folder with the package as it is in a clone: Python files alone, and no library."""
    source = Path(jax_mps.__file__).parent
    ignored = shutil.ignore_patterns("native", "__pycache__")
    shutil.copytree(source, tmp_path / "jax_mps", ignore=ignored)
    return tmp_path


def start_in(clone: Path, code: str, **environment: str) -> Any:
    """Starts Python where the clone comes first, before what is installed."""
    path = os.pathsep.join([str(clone), os.environ.get("PYTHONPATH", "")])
    return start(code, PYTHONPATH=path, **environment)


def make_older(clone: Path) -> None:
    if finish(start_in(clone, "import jax_mps; print(jax_mps.__file__)")).strip().startswith(str(clone)):
        (clone / "jax_mps" / "_version.py").write_text('__version__ = "0.0.1"\n')
    else:
        pytest.skip("an editable installation comes before every path")


def test_a_clone_takes_the_installed_library(clone):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "jax_mps", "info", "--require-native"]
    run = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert library.status().path in run.stdout


def test_a_clone_of_another_version_is_told_to_install_again(clone):
    make_older(clone)
    first, second = finish(start_in(clone, USE, JAX_MPS_NATIVE="auto")).splitlines()
    assert first == "False 40.0 4.0 1"
    assert second == (
        "jax_mps uses its StableHLO path on the CPU: the native library is stale: it has interface "
        f"{library.INTERFACE} of version {jax_mps.__version__}, this jax_mps interface {library.INTERFACE} "
        "of version 0.0.1; install again"
    )


def test_a_clone_of_another_version_does_not_do_where_the_library_is_required(clone):
    make_older(clone)
    process = start_in(clone, USE, JAX_MPS_NATIVE="required")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    refusal = r"^RuntimeError: JAX_MPS_NATIVE=required, but the native library is stale: .*; install again"
    assert re.search(refusal, errors, re.MULTILINE), errors


@pytest.mark.parametrize(("name", "value"), [("INTERFACE", 1000), ("__version__", "1000.0")])
@pytest.mark.usefixtures("native")
def test_another_interface_or_version_is_refused(monkeypatch, name, value):
    monkeypatch.delenv("JAX_MPS_NATIVE", raising=False)
    monkeypatch.setattr(library, name, value)
    stale = rf"the native library is stale: .*\b{value}.*; install again"
    with pytest.warns(UserWarning, match=stale):
        assert not load().available
    monkeypatch.setenv("JAX_MPS_NATIVE", "required")
    with pytest.warns(UserWarning, match=stale), pytest.raises(RuntimeError, match=stale):
        load()


def test_a_library_that_names_no_interface_is_refused(elsewhere):
    elsewhere.symlink_to(_ctypes.__file__)
    with pytest.warns(UserWarning, match="interface 0 of version unknown, this jax_mps .*; install again"):
        assert not load().available


@pytest.mark.usefixtures("native")
def test_the_library_speaks_the_oldest_api_and_shows_only_our_symbols():
    shared = ctypes.CDLL(library.status().path)
    assert shared.JaxMpsFfiApiMinor() == 1  # that of jaxlib 0.4.34: every later one takes it
    for symbol in library._HANDLERS.values():
        assert getattr(shared, symbol)
