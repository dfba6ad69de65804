"""The native library as a file: what it shows, what it needs, and how it is hardened."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_mps.lowering import library

elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is missing")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other files")

SAYS = {"JaxMpsFfiApiMinor", "JaxMpsInstructionSet", "JaxMpsInterface", "JaxMpsThreads", "JaxMpsVersion"}
"""What the library says of itself, beside the handlers."""

C_LIBRARY = re.compile(r"(libc|libm|libpthread|libdl|librt|ld-linux[\w-]*)\.so\.\d+")
WRITABLE, EXECUTABLE = 2, 1


@pytest.fixture
def elf(native: None) -> Iterator[Any]:
    with Path(library.status().path).open("rb") as file:
        parsed = elffile.ELFFile(file)
        if any("san" in name for name in needed(parsed)):
            pytest.skip("this library was built with a sanitizer, and not for a release")
        yield parsed


def dynamic(elf: Any, tag: str) -> list[Any]:
    """The entries of the dynamic section with a tag."""
    return list(elf.get_section_by_name(".dynamic").iter_tags(tag))


def needed(elf: Any) -> list[str]:
    return [entry.needed for entry in dynamic(elf, "DT_NEEDED")]


def symbols(elf: Any, *, defined: bool) -> set[str]:
    """The names that the library shows, or those that it takes from others."""
    table = elf.get_section_by_name(".dynsym").iter_symbols()
    return {s.name for s in table if s.name and (s["st_shndx"] != "SHN_UNDEF") == defined}


def test_it_shows_the_handlers_alone(elf):
    assert symbols(elf, defined=True) == SAYS | set(library._HANDLERS.values())


def test_it_needs_the_c_library_alone(elf):
    assert needed(elf)
    assert all(map(C_LIBRARY.fullmatch, needed(elf))), needed(elf)
    assert not dynamic(elf, "DT_RPATH")
    assert not dynamic(elf, "DT_RUNPATH")


def test_no_memory_is_writable_and_executable(elf):
    segments = {segment["p_type"]: segment["p_flags"] for segment in elf.iter_segments()}
    assert not segments["PT_GNU_STACK"] & EXECUTABLE
    for segment in elf.iter_segments("PT_LOAD"):
        assert segment["p_flags"] & (WRITABLE | EXECUTABLE) != WRITABLE | EXECUTABLE
    assert not dynamic(elf, "DT_TEXTREL")


def test_addresses_are_read_only_once_it_is_loaded(elf):
    assert list(elf.iter_segments("PT_GNU_RELRO"))
    (flags,) = dynamic(elf, "DT_FLAGS")
    assert flags["d_val"] & 8  # DF_BIND_NOW: every address is found when it is loaded


def test_arrays_on_the_stack_are_guarded(elf):
    assert "__stack_chk_fail" in symbols(elf, defined=False)


def test_it_names_no_folder_of_the_machine_that_built_it(elf):
    content = Path(library.status().path).read_bytes()
    assert not re.findall(rb"/[\w.+/-]+\.(?:cc|h|cpp|hpp)\b", content)
