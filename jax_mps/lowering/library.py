"""The native library: found, checked and registered, once, when the package is imported."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import struct
import warnings
from pathlib import Path

from jax_mps import _compat
from jax_mps._version import __version__

INTERFACE = 3
"""The number of the calling convention: names and attributes of the handlers. CMake compiles it in."""

# A second copy of the library with another convention can live in the same process.
_PREFIX = f"jax_mps.{INTERFACE}."

_HANDLERS = {
    "max_pool": "JaxMpsMaxPool",
    "max_pool_tap_index": "JaxMpsMaxPoolTapIndex",
    "max_pool_with_tap_index": "JaxMpsMaxPoolWithTapIndex",
    "max_pool_selected_tap_index": "JaxMpsMaxPoolSelectedTapIndex",
    "max_pool_take": "JaxMpsMaxPoolTake",
    "max_pool_put": "JaxMpsMaxPoolPut",
    "avg_pool": "JaxMpsAvgPool",
    "avg_pool_gradient": "JaxMpsAvgPoolGradient",
    "l2_pool": "JaxMpsL2Pool",
    "l2_pool_tangent": "JaxMpsL2PoolTangent",
    "l2_pool_gradient": "JaxMpsL2PoolGradient",
    "max_unpool": "JaxMpsMaxUnpool",
    "max_unpool_take": "JaxMpsMaxUnpoolTake",
    "conv_transpose": "JaxMpsConvTranspose",
    "conv_transpose_gradient_data": "JaxMpsConvTransposeGradientData",
    "conv_transpose_gradient_weights": "JaxMpsConvTransposeGradientWeights",
}


_SYMBOLS = ("JaxMpsFfiApiMinor", "JaxMpsInstructionSet", "JaxMpsThreads")
"""What else the library shows, beside its version and interface."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What is known of the native library.

    Attributes:
      available: whether CPU lowerings use it.
      reason: why not, or an empty string.
      path: the library's file; empty if there is none.
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


def register() -> None:
    """Registers the kernels, if they can be had, for executables that were serialised in another process.

    Whoever needs the kernels asks `status`, which says what is wrong.
    """
    with contextlib.suppress(RuntimeError, ValueError):
        status()


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
        raise RuntimeError(
            f"JAX_MPS_NATIVE=required, but {found.reason} {f' ({found.path})' if found.path else ''}"
        )
    return found


def _load(refusal: str) -> Status:
    if refusal:
        return Status(False, refusal, "")
    try:
        import jax_mps_native  # in the same wheel
    except ImportError:
        return Status(False, "the native library was not built (no C++ compiler at installation)", "")
    path = jax_mps_native.LIBRARY
    try:
        if damage := _damage(path):
            return _refuse(f"the native library does not load: {damage}", path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return _refuse(f"the native library does not load: {error}", path)
    # Of an older installation, say, while the package comes from a newer clone.
    found = _interface(library)
    if found != (INTERFACE, __version__):
        return _refuse(
            f"the native library is stale: it has interface {found[0]} of version {found[1]}, this jax_mps "
            f"interface {INTERFACE} of version {__version__}; install again",
            path,
        )
    missing = [symbol for symbol in (*_SYMBOLS, *_HANDLERS.values()) if not hasattr(library, symbol)]
    if missing:
        return _refuse(f"the native library lacks {', '.join(missing)}", path)
    # A handler compiled for a newer API than jaxlib's would stop the whole CPU backend.
    minor = library.JaxMpsFfiApiMinor()
    if minor > _compat.ffi_api_minor():
        return _refuse(
            f"the native library speaks FFI API 0.{minor}, the installed jaxlib 0.{_compat.ffi_api_minor()}",
            path,
        )
    library.JaxMpsInstructionSet.restype = ctypes.c_char_p
    instruction_set = library.JaxMpsInstructionSet().decode()
    if not instruction_set:
        return _refuse("the native library has no kernels for the instruction sets of this processor", path)
    try:
        for name, symbol in _HANDLERS.items():
            _compat.register_target(target(name), getattr(library, symbol))
    except Exception as error:
        return _refuse(f"XLA refused the native library: {error}", path)
    return Status(
        available=True,
        reason="",
        path=str(path),
        instruction_set=instruction_set,
        threads=library.JaxMpsThreads(),
        api_version=f"0.{minor}",
    )


def _damage(path: Path) -> str:
    """Why an ELF file of 64 bits is none for this process; empty where the loader can tell.

    The loader maps a file that is cut off, or that ends in zeros, and crashes. It cannot say what is wrong
    with one for another processor. The table of the sections, their names among them, is the end of a file.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\2\1":
            return ""
        with contextlib.suppress(OSError), Path("/proc/self/exe").open("rb") as interpreter:
            if interpreter.read(20)[18:] != header[18:20]:
                return "it is for another processor"
        (table,) = struct.unpack_from("<Q", header, 40)
        size, count, names = struct.unpack_from("<3H", header, 58)
        file.seek(min(table + size * names, 2**62))
        kind = file.read(8)[4:]
        if count and (path.stat().st_size < table + size * count or kind != b"\3\0\0\0"):
            return "it is cut off or damaged"
    return ""


def _interface(library: ctypes.CDLL) -> tuple[int, str]:
    """The number of its calling convention, and its version; 0 of one that does not say."""
    try:
        library.JaxMpsVersion.restype = ctypes.c_char_p
        return library.JaxMpsInterface(), library.JaxMpsVersion().decode()
    except AttributeError:
        return 0, "unknown"


def _refuse(reason: str, path: Path) -> Status:
    warnings.warn(f"jax_mps uses its StableHLO path on the CPU: {reason}", stacklevel=3)
    return Status(False, reason, str(path))
