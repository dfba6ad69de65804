"""Imports go downwards: no circle of modules, and no room knows one above it.

Every import counts: those in functions, those for types alone, and `importlib.import_module` of a name.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_mps

ROOT = Path(jax_mps.__file__).parent

# From the bottom up. Rooms of one line may not import each other.
ROOMS = (
    ("jax_mps._version", "jax_mps._compat", "jax_mps._files"),
    ("jax_mps.geometry",),
    ("jax_mps.conventions",),
    ("jax_mps.lowering.library",),  # it loads the native kernels
    ("jax_mps.lowering",),
    ("jax_mps.ops",),
    ("jax_mps.mps", "jax_mps.stock"),
    ("jax_mps",),  # the public functions, and the rooms below on first use
    ("jax_mps.flax",),
    ("jax_mps.cli",),
    ("jax_mps.__main__",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def name_of(path: Path) -> str:
    names = ("jax_mps", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a module imports, wherever it does so."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in TREES)
            case ast.ImportFrom(level=0, module=str(module), names=names) if module in TREES:
                for alias in names:
                    inner = f"{module}.{alias.name}"
                    yield inner if inner in TREES else module
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=name), *_],
            ) if name in TREES:
                yield name


GRAPH = {name: sorted(set(imported(tree))) for name, tree in TREES.items()}


def room_of(module: str) -> str:
    """The longest room that the module is in; in that of the package itself is only `jax_mps/__init__.py`."""
    inner = [room for room in LEVELS if module == room or module.startswith(f"{room}.")]
    room = max(inner, key=len)
    assert room != "jax_mps" or module == "jax_mps", f"{module} is in no room: name its room in ROOMS"
    return room


def test_every_import_is_seen() -> None:
    source = """
import jax_mps.geometry
from jax_mps import mps, max_pool
from jax_mps.ops import operands as other
if TYPE_CHECKING:
    from jax_mps.lowering.rule import Platform
def f():
    from jax_mps.cli import info
    importlib.import_module("jax_mps.conventions")
"""
    assert sorted(imported(ast.parse(source))) == [
        "jax_mps",
        "jax_mps.cli.info",
        "jax_mps.conventions",
        "jax_mps.geometry",
        "jax_mps.lowering.rule",
        "jax_mps.mps",
        "jax_mps.ops.operands",
    ]


def test_no_relative_imports() -> None:
    for name, tree in TREES.items():
        relative = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, f"{name} has relative imports in lines {relative}, which this file does not see"


def test_no_circle_of_modules() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    wrong = [
        other for other in GRAPH[module] if room_of(other) != room and LEVELS[room_of(other)] >= LEVELS[room]
    ]
    assert not wrong, f"{module} is in {room}, which must not import {wrong}"


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name


def test_only_ops_and_what_is_below_know_primitives() -> None:
    primitives = {
        target.id
        for module, tree in TREES.items()
        if room_of(module) == "jax_mps.ops"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.endswith("_p")
    }
    assert {"max_pool_p", "avg_pool_gradient_p"} <= primitives
    for module, tree in TREES.items():
        if room_of(module) in ("jax_mps.mps", "jax_mps.flax", "jax_mps.stock"):
            assert not primitives & set(identifiers(tree)), f"{module} knows primitives"
