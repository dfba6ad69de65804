"""`accelerate()`: on, off, nested, from threads, refused; and nothing changes without it."""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import mlir

import jax_mps
import processes
from jax_mps import _compat
from jax_mps.lowering import library
from jax_mps.stock import choices, convolution, switch, windows

IMAGE = np.random.default_rng(0).standard_normal((2, 12, 12, 8)).astype(np.float32)
KERNEL = np.random.default_rng(1).standard_normal((3, 3, 8, 16)).astype(np.float32)


def convolve(x: Any, kernel: Any) -> Any:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def text() -> str:
    """A new program each time: a fresh function, lowered."""
    return jax.jit(functools.partial(convolve)).lower(IMAGE, KERNEL).as_text()


@pytest.mark.usefixtures("native")
def test_on_and_off() -> None:
    stock = text()
    handle = jax_mps.accelerate()
    assert "jax_mps." in text()
    (row,) = handle.report()
    assert row.ours
    assert row.operation == "conv_general_dilated"
    assert row.operands == ("float32[2,12,12,8]", "float32[3,3,8,16]")
    head, line, total = str(handle.report()).splitlines()
    assert head.split() == ["times", "operation", "operands", "result", "code", "why"]
    assert line.split(maxsplit=6) == ["1", row.operation, *row.operands, row.result, "jax_mps", row.why]
    assert total == "1 of 1 by jax_mps"
    handle.restore()
    handle.restore()
    assert text() == stock


@pytest.mark.usefixtures("native")
def test_nested_handles_restore_in_any_order() -> None:
    outer, inner = jax_mps.accelerate(), jax_mps.accelerate()
    outer.restore()
    assert "jax_mps." in text()
    inner.restore()
    assert "jax_mps." not in text()


@pytest.mark.usefixtures("native")
def test_every_handle_reports_what_is_lowered_while_it_is_active() -> None:
    with jax_mps.accelerate() as outer:
        text()
        with jax_mps.accelerate() as inner:
            text()
        text()
    assert (len(outer.report()), len(inner.report())) == (3, 1)


@pytest.mark.usefixtures("native")
def test_jax_is_left_as_it_was() -> None:
    uncacheable = getattr(mlir, "_uncacheable_primitives", None)  # newer versions have it

    def rules() -> list[Any]:
        if uncacheable is not None:
            assert bool(uncacheable & set(switch._READERS)) == bool(switch._active)
        tables = _compat.StockRules()._tables.values()
        return [table.get(primitive) for primitive in switch._READERS for table in tables]

    before = rules()
    with jax_mps.accelerate():
        assert all(a is not b for a, b in zip(rules(), before, strict=True))
    assert rules() == before


@pytest.mark.usefixtures("native")
def test_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), jax_mps.accelerate():
        _ = 1 // 0
    assert "jax_mps." not in text()


@pytest.mark.usefixtures("native")
def test_a_compiled_function_is_compiled_again() -> None:
    function = jax.jit(convolve)
    before = function(IMAGE, KERNEL)
    with jax_mps.accelerate() as handle:
        during = function(IMAGE, KERNEL)
        assert len(handle.report()) == 1
    np.testing.assert_allclose(during, before, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(function(IMAGE, KERNEL), before)


@pytest.mark.usefixtures("native")
def test_eager_and_without_jit() -> None:
    before = convolve(IMAGE, KERNEL)
    with jax_mps.accelerate() as handle:
        np.testing.assert_allclose(convolve(IMAGE, KERNEL), before, rtol=1e-5, atol=1e-5)
        with jax.disable_jit():
            np.testing.assert_allclose(jax.jit(convolve)(IMAGE, KERNEL), before, rtol=1e-5, atol=1e-5)
    assert all(row.ours for row in handle.report())


@pytest.mark.usefixtures("native")
def test_from_threads() -> None:
    def one(number: int) -> bool:
        with jax_mps.accelerate():
            return "jax_mps." in text()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(16)))
    assert "jax_mps." not in text()


@pytest.mark.usefixtures("native")
def test_a_thread_that_lowers_while_another_turns_the_switch() -> None:
    # Rules are in place before the switch is on, and a program is what the switch was when it began.
    with jax_mps.accelerate() as handle:
        assert switch._switch is not None
        switch._switch.set(False)
        assert "jax_mps." not in text()
        switch._switch.set(True)
        assert "jax_mps." in text()
    assert len(handle.report()) == 1


@pytest.mark.usefixtures("native")
def test_refused_while_tracing() -> None:
    def traced(x: Any) -> Any:
        jax_mps.accelerate()
        return x

    with pytest.raises(RuntimeError, match="while JAX traces a function"):
        jax.jit(traced)(1.0)
    assert "jax_mps." not in text()


def test_without_the_library_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "status", lambda: library.Status(False, "it was not built", ""))
    with pytest.warns(UserWarning, match=r"accelerate\(\) replaces nothing on the CPU: it was not built"):
        handle = jax_mps.accelerate()
    assert "jax_mps." not in text()
    assert str(handle.report()) == "nothing that accelerate() knows was lowered"
    handle.restore()


@pytest.mark.usefixtures("native")
def test_refused_by_a_jax_that_keeps_its_rules_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("accelerate() does not know JAX 99")

    monkeypatch.setattr(_compat.StockRules, "__init__", refuse)
    with pytest.raises(RuntimeError, match="does not know JAX 99"):
        jax_mps.accelerate()
    assert "jax_mps." not in text()


@pytest.mark.usefixtures("native")
def test_what_stays_stock() -> None:
    def of(dtype: Any) -> Any:
        return convolve(IMAGE.astype(dtype), KERNEL.astype(dtype))

    with jax_mps.accelerate() as handle:
        of(np.complex64)
        of(np.int32)
        lax.reduce_window(jnp.ones((4, 4)), 0.0, lax.add, (1, 1), (1, 1), "VALID")
    rows = handle.report().rows
    assert rows[0].why.startswith("dtype complex64")
    assert all(row.ours for row in rows[1:-2])  # the real convolutions that JAX makes of a complex one
    assert [row.ours for row in rows[-2:]] == [False, False]
    assert rows[-2].why.startswith("dtype int32")
    assert rows[-1].why == "no axis is windowed"


@pytest.mark.usefixtures("native")
def test_export_stays_stock() -> None:
    export = pytest.importorskip("jax.export")
    with jax_mps.accelerate():
        program = export.export(jax.jit(functools.partial(convolve)))(IMAGE, KERNEL)
    assert "jax_mps." not in program.mlir_module()


@pytest.mark.parametrize("table", [choices.CPU, choices.CUDA])
def test_every_reading_has_a_row(table: tuple[choices.Choice, ...]) -> None:
    names = {row.operation for row in table}
    assert names == {*convolution._MAPS, "maximum", "minimum", "sum", "spread sum", "scatter", "gather"}
    assert set(switch._READERS) >= {lax.conv_general_dilated_p, lax.select_and_scatter_add_p}
    assert all(row.why for row in table)
    assert windows.Reading is not convolution.Reading


IMPORT_ALONE = """
import functools, jax, jax.numpy as jnp
from jax import lax
def f(x, k):
    y = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum()
def text():
    function = jax.jit(jax.grad(functools.partial(f)))
    return function.lower(jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))).as_text()
before = text()
import jax_mps
assert text() == before
with jax_mps.accelerate():
    assert text() != before
assert text() == before
print("same")
"""


@pytest.mark.usefixtures("native")
def test_nothing_changes_without_it() -> None:
    assert processes.finish(processes.start(IMPORT_ALONE)).strip() == "same"
