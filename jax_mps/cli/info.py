"""Prints versions, devices, and which path serves each platform; where it is not the native one, why."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import jax

from jax_mps import _compat
from jax_mps.cli import plugins
from jax_mps.lowering import library

__all__ = ["add_arguments", "machine", "run", "versions"]

_DISTRIBUTIONS = ("jax-mps-primitives", "jax", "jaxlib", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--require-native",
        action="store_true",
        help="exit with status 1 where the native kernels are not available",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the report."""
    try:
        status = library.status()
    except RuntimeError as error:  # the environment demands what cannot be had
        print(f"jax_mps: {error}", file=sys.stderr)
        return 1
    _print_table("versions", {**versions(), "machine": machine()})
    _print_table("devices", _devices())
    if apple := plugins.report():
        _print_table("plugins for Apple GPUs", apple)
    _print_table("paths", _paths(status.available))
    native = {"library": status.path, "FFI API of jaxlib": f"0.{_compat.ffi_api_minor()}"}
    if status.available:
        native |= {
            "FFI API of library": status.api_version,
            "instruction set": status.instruction_set,
            "threads": str(status.threads),
        }
    else:
        native["not used"] = f"{status.reason}; the StableHLO path serves"
    _print_table("native kernels", native)
    return 1 if options.require_native and not status.available else 0


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, this library, what it stands on, and those of `more` that are installed."""
    found = {"Python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The processor and the operating system, in words."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # `platform.processor` knows no model on Linux
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _devices() -> dict[str, str]:
    try:
        return {str(device): _kind(device) for device in jax.devices()}
    except RuntimeError as error:  # a plugin that does not fit the installed JAX
        return {"none": str(error).splitlines()[0]}


def _kind(device: jax.Device) -> str:
    return f"platform {device.platform}, {device.device_kind}"


def _paths(native: bool) -> dict[str, str]:
    kernels = "native kernels" if native else "StableHLO"
    return {
        "cpu, one device or shard_map": kernels,
        "cpu, sharded arrays under jit": kernels if _compat.HAS_SHARDING_RULES else "StableHLO",
        "cpu, exported or symbolic shapes": "StableHLO",
        "cuda": "StableHLO",
        "METAL (jax-metal)": "StableHLO; never run on Apple hardware by us",
        "mps (jax-mps)": "StableHLO; never run on Apple hardware by us",
        "any other": "StableHLO",
    }


def _print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    print()
