"""libFuzzer on the Python of `jax_mps.mps`: `python -m soak.guided CORPUS [options of libFuzzer]`.

The first byte of an input chooses the class and what the rest is: a file, or the text of a document, to
which a digest and tensors are made that fit. A file alone would hardly ever get past the digest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["jax_mps.mps"]):
    import hostile_bytes

from soak.hostile import check

NAMES = list(hostile_bytes.KERNELS)


def case(data: bytes) -> dict[str, str]:
    """What an input stands for."""
    number, rest = data[0], data[1:]
    name = NAMES[number // 2 % len(NAMES)]
    if number % 2:
        return {"class": name, "file": rest.hex()}
    return {"class": name, "text": rest.decode("utf-8", "replace")}


def one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    if not data:
        return
    try:
        check(case(data))
    except BaseException:
        print(f"the case is {json.dumps(case(data))}", flush=True)
        raise


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """What libFuzzer tries next: of documents, every second time another one and not other bytes."""
    if data and data[0] % 2 == 0 and seed % 2:
        try:
            document = json.loads(data[1:])
        except (ValueError, RecursionError):
            return atheris.Mutate(data, most)
        other = json.dumps(hostile_bytes.changed(np.random.default_rng(seed), document)).encode()
        if len(other) < most:
            return data[:1] + other
    return atheris.Mutate(data, most)


def plant(corpus: Path) -> None:
    """The files and documents of all classes, to begin with."""
    for number, (name, kernel) in enumerate(hostile_bytes.KERNELS.items()):
        data = kernel.to_bytes()
        text = json.dumps(hostile_bytes.document(data)).encode()
        (corpus / f"{name}.file").write_bytes(bytes([2 * number + 1]) + data)
        (corpus / f"{name}.text").write_bytes(bytes([2 * number]) + text)


if __name__ == "__main__":
    plant(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()
