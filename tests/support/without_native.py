"""What a process checks that runs without the native library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import pytest

import jax_mps


def check_refused(calls: Iterable[Callable[[str], Any]]) -> None:
    """Calls, eager and abstract, say why the native implementation cannot be had."""
    assert not jax_mps.native_available()
    message = "^implementation='native' cannot be had: JAX_MPS_NATIVE=off"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call("native")
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda call=call: call("native"))
