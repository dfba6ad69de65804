"""The native library: found, checked and registered, once, when a CPU lowering first asks for it."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

from jax_mps import _compat

# The generation of our own calling convention: a second copy of the library with another one can live
# in the same process.
_PREFIX = "jax_mps.1."

_HANDLERS = {
    "max_pool": "JaxMpsMaxPool",
    "max_pool_index": "JaxMpsMaxPoolIndex",
    "max_pool_with_index": "JaxMpsMaxPoolWithIndex",
    "max_pool_take": "JaxMpsMaxPoolTake",
    "max_pool_put": "JaxMpsMaxPoolPut",
    "avg_pool": "JaxMpsAvgPool",
    "avg_pool_spread": "JaxMpsAvgPoolSpread",
    "l2_pool": "JaxMpsL2Pool",
    "l2_pool_tangent": "JaxMpsL2PoolTangent",
    "l2_pool_gradient": "JaxMpsL2PoolGradient",
    "max_unpool": "JaxMpsMaxUnpool",
    "max_unpool_take": "JaxMpsMaxUnpoolTake",
    "conv_transpose": "JaxMpsConvTranspose",
    "conv_transpose_gradient_data": "JaxMpsConvTransposeGradientData",
    "conv_transpose_gradient_weights": "JaxMpsConvTransposeGradientWeights",
}


@dataclasses.dataclass(frozen=True)
class Status:
    """What is known of the native library.

    Attributes:
      available: whether CPU lowerings use it.
      reason: why not, or an empty string.
      path: the library's file, or where it was looked for.
      instruction_set: the one chosen for this processor.
      threads: how many threads share the work of a call.
      api_version: the version of XLA's FFI API that it was compiled for.
    """

    available: bool
    reason: str
    path: str
    instruction_set: str = ""
    threads: int = 0
    api_version: str = ""


def target(name: str) -> str:
    """The name under which XLA knows the handler `name`."""
    return _PREFIX + name


def native_available() -> bool:
    """Whether the operations run on the native kernels on the CPU.

    Where it is false, everything works through StableHLO; `python -m jax_mps info` says why.

    Returns:
      True if the library was built, loads, and speaks an FFI version that the installed jaxlib knows.

    Raises:
      RuntimeError: the environment says `JAX_MPS_NATIVE=required` and the library cannot be used.

    Examples:
      >>> import jax_mps
      >>> jax_mps.native_available() in (True, False)
      True
    """
    return status().available


@functools.cache
def status() -> Status:
    """Loads and registers the library on the first call.

    The environment variable `JAX_MPS_NATIVE` may say `off` (never use it) or `required` (raise a
    `RuntimeError` where it cannot be used, for continuous integration).
    """
    switch = os.environ.get("JAX_MPS_NATIVE", "auto")
    if switch not in ("auto", "off", "required"):
        raise ValueError(f"JAX_MPS_NATIVE must be 'auto', 'off' or 'required', got {switch!r}")
    found = _load("JAX_MPS_NATIVE=off" if switch == "off" else "")
    if switch == "required" and not found.available:
        raise RuntimeError(f"JAX_MPS_NATIVE=required, but {found.reason} ({found.path})")
    return found


def _load(refusal: str) -> Status:
    suffix: Literal[".dylib", ".so"] = ".dylib" if sys.platform == "darwin" else ".so"
    path = Path(__file__).parents[1] / "native" / f"libjax_mps_native{suffix}"
    if refusal:
        return Status(False, refusal, str(path))
    if not path.exists():
        return Status(False, "the native library was not built (no C++ compiler at installation)", str(path))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return _refuse(f"the native library does not load: {error}", path)
    # A handler compiled for a newer API than jaxlib's would stop the whole CPU backend.
    minor = library.JaxMpsFfiApiMinor()
    if minor > _compat.ffi_api_minor():
        return _refuse(
            f"the native library speaks FFI API 0.{minor}, the installed jaxlib 0.{_compat.ffi_api_minor()}",
            path,
        )
    try:
        for name, symbol in _HANDLERS.items():
            _compat.register_target(target(name), getattr(library, symbol))
    except Exception as error:
        return _refuse(f"XLA refused the native library: {error}", path)
    library.JaxMpsInstructionSet.restype = ctypes.c_char_p
    return Status(
        available=True,
        reason="",
        path=str(path),
        instruction_set=library.JaxMpsInstructionSet().decode(),
        threads=library.JaxMpsThreads(),
        api_version=f"0.{minor}",
    )


def _refuse(reason: str, path: Path) -> Status:
    warnings.warn(f"jax_mps uses its StableHLO path on the CPU: {reason}", stacklevel=3)
    return Status(False, reason, str(path))
