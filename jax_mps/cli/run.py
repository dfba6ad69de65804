"""Runs an unmodified program with `jax_mps.accelerate()` turned on before its first line.

For instance: `run --report train.py --epochs 3`, or `run -m my_package.train --epochs 3`. Options after the
program are the program's own. Arguments, module search path, messages and exit status are those of
`python train.py --epochs 3`. JAX is imported before the program begins: set the variables of the
environment that JAX reads then, such as JAX_PLATFORMS, outside of the program.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import importlib.util
import pkgutil
import runpy
import sys
import types
from pathlib import Path

import jax_mps

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.usage = f"{parser.prog} [-h] [--report] (program | -m module) ..."
    parser.add_argument(
        "--report",
        action="store_true",
        help="at the end, list on standard error which operations were replaced, and why others were not",
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, default=[], help="a module to run, and its arguments"
    )
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="a script, a folder or a zip file, and its arguments"
    )
    parser.set_defaults(wrong_use=parser.error)


def run(options: argparse.Namespace) -> int:
    """Runs the program to its end; what it raises passes through, `SystemExit` too."""
    if not options.module and not options.program:
        options.wrong_use("a program is required, or -m and a module")
    try:
        handle = jax_mps.accelerate()  # until the process ends: threads may outlive the program's last line
    except RuntimeError as error:  # the environment demands what cannot be had
        print(f"jax_mps: {error}", file=sys.stderr)
        return 1
    if options.report:
        atexit.register(lambda: print(handle.report(), file=sys.stderr))
    if options.module:
        return _run_module(*options.module, *options.program)
    path, *arguments = options.program
    sys.argv = [path, *arguments]
    whole = str(Path(path).absolute())
    if pkgutil.get_importer(whole) is None:
        return _run_script(path, whole)
    if not sys.flags.safe_path:  # then the first entry is where `python -m jax_mps` was started
        del sys.path[0]
    runpy.run_path(whole, run_name="__main__")  # which puts the folder or zip file in front
    return 0


def _run_module(name: str, *arguments: str) -> int:
    sys.argv = [name, *arguments]
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # a package fails on its own
            raise
        found = False
    if not found:
        print(f"{sys.executable}: No module named {name}", file=sys.stderr)
        return 1
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _run_script(path: str, whole: str) -> int:
    """Runs a file as Python does, whose `sys.argv[0]` is not `__file__`; `runpy.run_path` makes them one."""
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {whole!r}: {reason}", file=sys.stderr)
        return 2
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(path).resolve().parent)
    main = types.ModuleType("__main__")
    vars(main).update(__file__=whole, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    exec(compile(source, whole, "exec", dont_inherit=True), vars(main))
    return 0
