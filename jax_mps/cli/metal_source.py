"""Programs compiled by IREE, a compiler for Apple's and other GPUs, and what it makes of them for Metal."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MODULES", "compile_program", "metal_source"]

MODULES = ("iree.compiler",)
"""What has to be installed; the distribution is `iree-base-compiler`."""


def compile_program(program: str, backend: str, flags: Sequence[str] = ()) -> bytes:
    """Compiles StableHLO for one of IREE's backends, such as `llvm-cpu`, `vmvx` or `vulkan-spirv`.

    The compiler is a process of its own, so that a fault in it does not end this one.

    Returns:
      The module for IREE's runtime.

    Raises:
      RuntimeError: the compiler failed; the message is its own.
    """
    from iree.compiler import tools

    try:
        return tools.compile_str(
            program,
            target_backends=[backend],
            input_type="stablehlo",
            extra_args=["--mlir-disable-threading", *flags],
        )
    except tools.CompilerToolError as error:
        raise RuntimeError(str(error)) from error


def metal_source(program: str) -> str:
    """The kernels of a StableHLO program in Metal Shading Language, in the order of their dispatch.

    Empty for a program that only copies, which needs no kernel.

    Raises:
      RuntimeError: the compiler failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Apple's own compiler, which would make a binary of the source, is on a Mac only.
        flags = ("--iree-metal-compile-to-metallib=false", f"--iree-hal-dump-executable-binaries-to={folder}")
        compile_program(program, "metal-spirv", flags)
        files = sorted(Path(folder).glob("*.metal"), key=_dispatch)
        return "\n".join(file.read_text() for file in files)


def _dispatch(file: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", file.name))
