"""What a training step runs of an operation: the calls of JAX and of PyTorch that the rows time.

| operation | what is timed |
|---|---|
| forward | the operation alone |
| keep | the operation, and what its gradient needs of it; in PyTorch, with gradients enabled |
| pull_back | the gradient to all operands from that of the result, with what `keep` left |
| step | `keep` and `pull_back` in one program |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["OPS", "jax_call", "torch_call"]

OPS = ("forward", "keep", "pull_back", "step")


def jax_call(
    op: str, function: Callable[..., Any], operands: Sequence[Any], gradient: Any
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The function to compile for a row, and its operands.

    `keep` returns the result and what else its pull-back needs, but for the operands, which are there
    anyway: as outputs they would be copied. Of `step` the result is an output too, as the next layer would
    use it.
    """

    def keep(*operands: Any) -> Any:
        return jax.vjp(function, *operands)

    def pull_back(kept: Any, gradient: Any) -> Any:
        return kept(gradient)

    def step(gradient: Any, *operands: Any) -> Any:
        result, kept = keep(*operands)
        return result, *pull_back(kept, gradient)

    if op == "forward":
        return function, operands

    def result_and_kept(*operands: Any) -> Any:
        result, kept = keep(*operands)
        return result, [x for x in jax.tree.leaves(kept) if all(x is not y for y in (result, *operands))]

    if op == "keep":
        return result_and_kept, operands
    if op == "pull_back":
        return pull_back, (jax.jit(keep)(*operands)[1], gradient)
    return step, (gradient, *operands)


def torch_call(
    torch: Any, op: str, function: Callable[..., Any], operands: Sequence[Any], gradient: Any
) -> Callable[[], tuple[Any, ...]]:
    """The call of PyTorch that a row times; turns gradients of the operands on where it needs them."""
    grad = torch.autograd.grad
    for operand in operands:
        operand.requires_grad_(op != "forward")
    if op in ("forward", "keep"):
        return lambda: (function(*operands),)
    if op == "pull_back":
        result = function(*operands)
        return lambda: grad(result, operands, gradient, retain_graph=True)

    def step() -> tuple[Any, ...]:
        result = function(*operands)
        return result, *grad(result, operands, gradient)

    return step
