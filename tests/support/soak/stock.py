"""Random stock operations, accelerated against stock: values, tangents, gradients and their tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import haste  # noqa: F401
import stock_random
from soak.record import Case
from wide_types import enable_x64

OPERATIONS = 20
"""Cases of a step."""

KINDS = ("convolution", "convolution", "max", "min", "sum")


def step(seed: int, number: int, check: Callable[[Case], None], operations: int = OPERATIONS) -> None:
    """Checks random operations. They are small, and each is the only one of its case."""
    for place in range(operations):
        rng = np.random.default_rng([seed, number, place])
        check(
            {
                "kind": str(rng.choice(KINDS)),
                "dtype": str(rng.choice(stock_random.DTYPES)),
                "special": bool(rng.integers(2)),
                "mapped": None if rng.integers(2) else [int(n) for n in rng.integers(0, 16, 2)],
                "jit": bool(rng.random() < 0.9),
                "seed": int(rng.integers(2**32)),
            }
        )
    jax.clear_caches()


def check(case: Case) -> None:
    """Compares an operation of a seed with itself when it is accelerated."""
    kind, seed = case["kind"], case["seed"]
    with enable_x64(), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        if kind == "convolution":
            drawn = mapped(stock_random.convolution(seed, case["dtype"]), case)
            rows = stock_random.compare(drawn, seed, jit=case["jit"])
            known: Any = stock_random.REFUSED_CONVOLUTIONS
            understood = all(row.ours or any(why in row.why for why in known) for row in rows)
        else:
            plain = stock_random.reduction(seed, kind, case["dtype"], special=case["special"])
            if not plain.differentiable:
                return
            rows = stock_random.compare_windows(
                mapped(plain, case), seed, kind, case["special"], jit=case["jit"]
            )
            understood = all(row.ours or row.why.startswith(stock_random.REFUSED_WINDOWS) for row in rows)
        assert understood, [row.why for row in rows if not row.ours]


def mapped(drawn: stock_random.Case, case: Case) -> stock_random.Case:
    """The operation over an axis more of one operand.

    Of both it would have groups, in which XLA's CPU backend ends the process where padding is negative.
    """
    if case["mapped"] is None:
        return drawn
    which, axis = (n % m for n, m in zip(case["mapped"], (len(drawn.operands), 16), strict=True))
    operands = list(drawn.operands)
    axis %= operands[which].ndim + 1
    rng = np.random.default_rng([case["seed"], 3])
    lanes = [operands[which], rng.permutation(operands[which].ravel()).reshape(operands[which].shape)]
    operands[which] = np.stack(lanes, axis).astype(jnp.dtype(case["dtype"]))
    axes = [axis if i == which else None for i in range(len(operands))]
    function = jax.vmap(drawn.function, in_axes=tuple(axes))
    return drawn._replace(
        function=function, operands=tuple(operands), note=f"{drawn.note}, mapped over {axes}"
    )
