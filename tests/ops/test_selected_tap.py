"""Which tap stock gradients of maxima select, against a plain loop: with ties, NaN and infinities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from jax_mps.geometry import Axis, Window
from jax_mps.ops import max_pooling

WINDOWS = {
    "k2 s2": ((7, 6), (Axis(7, 2, 2, 1, 0, 3), Axis(6, 2, 2, 1, 0, 3))),
    "k3 s2 p1": ((7, 6), (Axis(7, 3, 2, 1, 1, 4), Axis(6, 3, 2, 1, 1, 3))),
    "k3 s1 dilated": ((7, 6), (Axis(7, 3, 1, 2, 1, 5), Axis(6, 2, 1, 1, 1, 7))),
    "1-D k5": ((19,), (Axis(19, 5, 3, 1, 2, 7),)),
}


def check(name: str, dtype: Any, implementation: str, with_padding: bool) -> None:
    sizes, axes = WINDOWS[name]
    rng = np.random.default_rng(0)
    params: Any = {"window": Window(axes), "start": 1, "implementation": implementation}

    @jax.jit
    def found(x: Any) -> Any:
        bind = max_pooling.max_pool_selected_tap_index_p.bind
        return bind(x, with_padding=with_padding, **params)

    for channels in (1, 3, 9, 40):
        x = np.round(rng.standard_normal((3, *sizes, channels)))
        x[rng.random(x.shape) < 0.2] = np.nan
        x[rng.random(x.shape) < 0.3] = -np.inf
        x[rng.random(x.shape) < 0.1] = np.inf
        expected = oracle.selected_taps(x, axes, with_padding=with_padding)
        np.testing.assert_array_equal(found(np.asarray(x, jnp.dtype(dtype))), expected)


@pytest.mark.parametrize("with_padding", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", WINDOWS)
def test_selected_tap(x64: None, implementation: str, name: str, dtype: str, with_padding: bool) -> None:
    check(name, dtype, implementation, with_padding)


@pytest.mark.parametrize("with_padding", [True, False])
@pytest.mark.parametrize("name", WINDOWS)
def test_selected_tap_of_cuda(monkeypatch: pytest.MonkeyPatch, name: str, with_padding: bool) -> None:
    """What CUDA gets, run on the CPU."""
    monkeypatch.setattr("jax_mps.lowering.rule.platform_of", lambda ctx: "cuda")
    check(name, np.float32, "xla", with_padding)
