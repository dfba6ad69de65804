"""Every public name has an entry in the reference.

That the pages can be built is tested by building them, see `.ci/run`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "reference"
ENTRY = re.compile(r"^::: (jax_mps\.\S+)$", re.MULTILINE)
ENTRIES = [path for page in sorted(PAGES.rglob("*.md")) for path in ENTRY.findall(page.read_text())]

# What users import from. The rest of the package is internal, or a command line.
PUBLIC = [
    "jax_mps",
    "jax_mps.conventions",
    "jax_mps.flax.from_torch",
    "jax_mps.flax.linen",
    "jax_mps.flax.models",
    "jax_mps.flax.nnx",
    "jax_mps.mps",
]


def resolve(path: str) -> Any:
    """What a dotted path names, where modules go before other attributes of the same name."""
    names = path.split(".")
    found: Any = importlib.import_module(names[0])
    for i, name in enumerate(names[1:], 2):
        try:
            found = importlib.import_module(".".join(names[:i]))
        except ModuleNotFoundError:
            found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", ENTRIES)
def test_entry_names_something(path: str) -> None:
    assert resolve(path) is not None


def test_nothing_is_described_twice() -> None:
    assert sorted(set(ENTRIES)) == sorted(ENTRIES)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_entry(module: str) -> None:
    # A function may be described where it is defined, or under another name that it is imported as.
    described = {id(resolve(path)) for path in ENTRIES}
    public = importlib.import_module(module)
    missing = [
        name
        for name in public.__all__
        if f"{module}.{name}" not in ENTRIES and id(getattr(public, name)) not in described
    ]
    assert missing == []
