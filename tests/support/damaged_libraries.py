"""Copies of the native library that nobody can use, and what a process says that finds one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jax_mps
from jax_mps.lowering import library
from processes import finish, start

Damage = Callable[[bytes, np.random.Generator], bytes]


def _cut_off(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _zeros(data: bytes, rng: np.random.Generator) -> bytes:
    """As a download leaves it that had its room reserved."""
    length = int(rng.integers(len(data) - 2**12))
    return data[:length] + bytes(len(data) - length)


def _noise(data: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(1, 2**16)))


def _noise_that_looks_like_one(data: bytes, rng: np.random.Generator) -> bytes:
    return data[:20] + rng.bytes(int(rng.integers(1, 2**16)))


def _other_processor(data: bytes, rng: np.random.Generator) -> bytes:
    machine = int(rng.choice([3, 8, 21, 22, 40, 243, 258]))  # none that JAX is for
    return data[:18] + machine.to_bytes(2, "little") + data[20:]


def _text(data: bytes, rng: np.random.Generator) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 0\n"


DAMAGES: dict[str, Damage] = {
    "cut off": _cut_off,
    "zeros": _zeros,
    "noise": _noise,
    "noise that looks like one": _noise_that_looks_like_one,
    "other processor": _other_processor,
    "text": _text,
    "empty": lambda data, rng: b"",
}

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import jax.numpy as jnp, jax_mps
    y = jax_mps.max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, strides=2)
assert y.ravel().tolist() == [5, 7, 13, 15]
print("used" if jax_mps.native_available() else caught[0].message)
"""


def outcome(damage: str, seed: int, folder: Path) -> str:
    """What a process says that finds the damaged library: its warning, or that it is used."""
    source = Path(library.status().path)
    package = folder / "jax_mps_native"
    package.mkdir()
    shutil.copy(source.with_name("__init__.py"), package)
    (package / source.name).write_bytes(DAMAGES[damage](source.read_bytes(), np.random.default_rng(seed)))
    places = [str(folder), str(Path(jax_mps.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return finish(start(USE, PYTHONPATH=os.pathsep.join(places), JAX_MPS_NATIVE="auto"))
