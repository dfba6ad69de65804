"""The MPS classes run on random cases, and their results compared with the loops of the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mps_cases
import mps_oracle
import mps_random
from mps_random import Case, Random

Outputs = dict[str, Any]

# Compiling takes most of the time: many cases share a program, and it is compiled in haste.
CHUNK = 20
HASTE: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def compare(name: str, indices: Iterable[int], implementation: str) -> None:
    """Runs cases of a class through it and through the loops; reports every case that differs."""
    randoms = sorted((mps_random.draw(name, i) for i in indices), key=lambda r: r.dtype)
    wrong = []
    for dtype, group in itertools.groupby(randoms, key=lambda r: r.dtype):
        for chunk in _batched(group):
            outputs = _run([r.case for r in chunk], dtype, implementation)
            for random, actual in zip(chunk, outputs, strict=True):
                wrong += _differences(random, actual, implementation)
    assert not wrong, "\n".join(wrong)


def _batched(items: Iterable[Random]) -> Iterator[list[Random]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _run(cases: Sequence[Case], dtype: str, implementation: str) -> Sequence[Outputs]:
    """The outputs of many cases, computed by one program."""
    kernels = [mps_cases.build(case, implementation, dtype) for case in cases]
    array_type = mps_random.DTYPES[dtype]
    images = [
        {
            name: value.astype(array_type)
            for name, value in case["inputs"].items()
            if name in ("source", "source_gradient")
        }
        for case in cases
    ]
    for case, arrays in zip(cases, images, strict=True):
        if "destination_shape" in case["params"]:
            shape, fill = case["params"]["destination_shape"], case["params"]["destination_fill"]
            arrays["destination"] = np.full(shape, fill, array_type)

    def program(kernels: Any, images: Any) -> list[Outputs]:
        ops = (case["op"] for case in cases)
        return [_encode(op, k, **arrays) for op, k, arrays in zip(ops, kernels, images, strict=True)]

    lowered = jax.jit(program).lower(kernels, images)
    try:
        compiled = lowered.compile(compiler_options=HASTE)
    except jax.errors.JaxRuntimeError:  # a version without one of the options
        compiled = lowered.compile()
    return compiled(kernels, images)


def _encode(
    op: str, kernel: Any, source: Any, source_gradient: Any = None, destination: Any = None
) -> Outputs:
    if op == "conv_transpose_gradient":
        data, state = kernel.encode(source_gradient, source)
        return {
            "gradient_data": data,
            "gradient_weights": state.gradient_for_weights,
            "gradient_biases": state.gradient_for_biases,
        }
    if op == "pool_gradient":
        return {"destination": kernel.encode(source_gradient, source, destination_gradient=destination)}
    return {"destination": kernel.encode(source, destination)}


def _differences(random: Random, actual: Outputs, implementation: str) -> list[str]:
    """What is wrong with the outputs of a case, in words."""
    expected = mps_oracle.run(random.case)
    wrong: list[str] = []
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        if right is None or actual[name] is None:
            if right is not actual[name]:
                wrong.append(f"{random.case['id']} {name}: one is None")
            continue
        # Sums run in float32 at least and are rounded once; so does every other output but the results.
        assert actual[name].dtype == (
            random.dtype if name in ("destination", "gradient_data") else _sums(random.dtype)
        )
        got = np.asarray(actual[name], np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(got - right) <= _tolerance(random, name, right)
        bad = ~((got == right) | (np.isnan(got) & np.isnan(right)) | near)
        if implementation == "xla" and random.case["op"].startswith("conv"):
            # There zeros around the image are multiplied too, and NaN and infinities spread through them.
            bad &= ~(np.isnan(got) & _spoilt(random))
        if got.shape != right.shape or bad.any():
            at = tuple(np.argwhere(bad)[0]) if got.shape == right.shape else ()
            wrong.append(
                f"{random.case['id']} {random.dtype} {name}{list(at)}: {got[at] if at else got.shape}, "
                f"not {right[at] if at else right.shape}; {int(bad.sum())} of {bad.size} differ"
            )
    return wrong


def _spoilt(random: Random) -> bool:
    return not all(np.isfinite(x).all() for x in random.case["inputs"].values() if x is not None)


def _sums(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _tolerance(random: Random, name: str, right: np.ndarray) -> Any:
    """Half a unit in the last place for rounding once, and what may get lost in the sums before."""
    out = jnp.finfo(random.dtype if name in ("destination", "gradient_data") else _sums(random.dtype))
    inputs = [x for x in random.case["inputs"].values() if x is not None]
    largest = [np.abs(x[np.isfinite(x)]).max(initial=0) for x in inputs]
    terms = np.prod([max(1.0, x) for x in largest]) if random.case["op"].startswith("conv") else max(largest)
    return 0.51 * float(out.eps) * np.abs(right) + 64 * float(jnp.finfo(_sums(random.dtype)).eps) * terms
