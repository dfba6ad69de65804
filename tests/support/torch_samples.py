"""PyTorch's own samples of poolings and convolutions (`OpInfo`, `ModuleInfo`) as calls of this library.

A sample has operands, which are differentiated, and constants: indices and random numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_mps import conventions
from jax_mps.geometry import Ints

Array = Any
Tensor = Any


class Call(NamedTuple):
    """A call of one of our functions but for its arrays; what a program depends on."""

    name: str
    positional: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()


class Sample(NamedTuple):
    """Arrays for a call, and what PyTorch says of them."""

    call: Call
    channels_last: bool
    """How PyTorch has its image in memory."""
    operands: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    reference: Callable[..., Any]
    """PyTorch's result as a function of the operands, of any type, and the constants."""


# --- PyTorch's arguments ------------------------------------------------------------------------------
#
# Functions with its signatures make our calls.


def _each(rank: int, value: Ints) -> tuple[int, ...]:
    """PyTorch takes an int or one number for all axes."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def _call(name: str, *positional: Any, **keywords: Any) -> Call:
    return Call(name, positional, tuple(keywords.items()))


def _windows(
    rank: int, kernel_size: Ints, stride: Any, padding: Ints, ceil_mode: bool
) -> tuple[Any, dict[str, Any]]:
    window = _each(rank, kernel_size)
    strides = window if stride in (None, ()) else _each(rank, stride)
    pairs = tuple((p, p) for p in _each(rank, padding))
    return window, {"strides": strides, "padding": pairs, "ceil_mode": ceil_mode}


def _max_pool(
    rank: int,
    x: Tensor,
    kernel_size: Ints,
    stride: Any = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Call:
    window, call = _windows(rank, kernel_size, stride, padding, ceil_mode)
    return _call("max_pool", window, **call, window_dilation=_each(rank, dilation), return_indices=True)


def _max_pool_backward(rank: int, x: Tensor, **arguments: Any) -> Call:
    call = _max_pool(rank, x, **arguments)
    return call._replace(name="max_pool_gradient", keywords=call.keywords[:-1])


def _avg_pool(
    rank: int,
    x: Tensor,
    kernel_size: Ints,
    stride: Any = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Call:
    window, call = _windows(rank, kernel_size, stride, padding, ceil_mode)
    more = {"count_include_pad": count_include_pad, "divisor_override": divisor_override}
    return _call("avg_pool", window, **call, window_dilation=(1,) * rank, **more)


def _lp_pool(
    rank: int, x: Tensor, norm_type: float, kernel_size: Ints, stride: Any = None, ceil_mode: bool = False
) -> Call:
    window, call = _windows(rank, kernel_size, stride, 0, ceil_mode)
    return _call("lp_pool", window, p=norm_type, **call)


def _outputs(rank: int, x: Tensor, output_size: Any) -> tuple[int, ...]:
    counts: Any = (None,) * rank if output_size is None else _each(rank, output_size)
    return tuple(n if count is None else count for n, count in zip(x.shape[-rank:], counts, strict=False))


def _adaptive_avg_pool(rank: int, x: Tensor, output_size: Any) -> Call:
    return _call("adaptive_avg_pool", _outputs(rank, x, output_size))


def _adaptive_max_pool(rank: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Call:
    return _call("adaptive_max_pool", _outputs(rank, x, output_size), return_indices=True)


def _fractional_max_pool(
    rank: int,
    x: Tensor,
    kernel_size: Ints,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor = None,
) -> Call:
    if output_size is None:
        output_size = [int(n * r) for n, r in zip(x.shape[-rank:], output_ratio, strict=True)]
    window, counts = _each(rank, kernel_size), _each(rank, output_size)
    return _call("fractional_max_pool", window, counts, return_indices=True)


def _max_unpool(
    rank: int,
    x: Tensor,
    indices: Tensor,
    kernel_size: Ints,
    stride: Any = None,
    padding: Ints = 0,
    output_size: Any = None,
) -> Call:
    window, call = _windows(rank, kernel_size, stride, padding, False)
    if output_size is None:
        axes = zip(x.shape[-rank:], window, call["strides"], call["padding"], strict=True)
        output_size = [(n - 1) * s + k - low - high for n, k, s, (low, high) in axes]
    return _call("max_unpool", tuple(output_size)[-rank:])


def _conv(
    rank: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor = None,
    stride: Ints = 1,
    padding: Any = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Call:
    pads = padding.upper() if isinstance(padding, str) else tuple((p, p) for p in _each(rank, padding))
    strides, dilations = _each(rank, stride), _each(rank, dilation)
    return _call("conv", strides=strides, padding=pads, kernel_dilation=dilations, groups=groups)


def _conv_transpose(
    rank: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Call:
    return _call(
        "conv_transpose",
        strides=_each(rank, stride),
        padding=tuple((p, p) for p in _each(rank, padding)),
        output_padding=_each(rank, output_padding),
        groups=groups,
        kernel_dilation=_each(rank, dilation),
    )


TRANSLATIONS: dict[str, Callable[..., Call]] = {
    "max_pool": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "avg_pool": _avg_pool,
    "lp_pool": _lp_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    "fractional_max_pool": _fractional_max_pool,
    "max_unpool": _max_unpool,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
}
"""By PyTorch's names without the rank."""


# --- our calls ----------------------------------------------------------------------------------------


def apply(
    call: Call, functions: Any, operands: Sequence[Array], constants: Sequence[Array]
) -> tuple[Array, ...]:
    """The results of a call, with functions of channels first: ours, or those of `stock_calls`."""
    function = functools.partial(getattr(functions, call.name), **dict(call.keywords))
    x, *weights = operands
    if call.name == "max_pool_gradient":
        pooled = jax.eval_shape(lambda x: apply(call._replace(name="max_pool"), functions, [x], ())[0], x)
        result = function(jnp.ones(pooled.shape, pooled.dtype), x, *call.positional)
    elif call.name == "max_unpool":
        result = function(x, *constants, *call.positional)
    elif call.name == "conv":
        weight, *bias = weights
        result = function(x, jnp.moveaxis(weight, (0, 1), (-1, -2)), *bias)
    elif call.name == "conv_transpose":
        weight, *bias = weights
        kernel = conventions.kernel_from_torch(weight, dict(call.keywords)["groups"])
        result = function(x, kernel, *bias)
    else:
        result = function(x, *call.positional, *constants)
    return result if isinstance(result, tuple) else (result,)


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array of NumPy, of the same type."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(jnp.bfloat16)
    return np.array(tensor.numpy())


# --- the samples --------------------------------------------------------------------------------------


class Op(NamedTuple):
    """An entry of PyTorch's table."""

    info: Any
    name: str
    """Without the rank."""
    rank: int

    def __str__(self) -> str:
        name = self.name if self.name == self.info.name else f"{self.name}{self.rank}d"
        return "-".join(filter(None, (name, getattr(self.info, "variant_test_name", ""))))

    @property
    def dtypes(self) -> list[str]:
        return sorted(str(dtype).removeprefix("torch.") for dtype in self.info.supported_dtypes("cpu"))

    def samples(self, dtype: str) -> list[Sample]:
        """Always the same ones."""
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        if self.name == "lp_pool":
            modules = self.info.module_inputs_func(self.info, "cpu", kind, False, True)
            return [self._norm(m.forward_input.args[0], *m.constructor_input.args) for m in modules]
        # Without the wrapper, which seeds before each sample: images of one shape are not all the same.
        inputs = self.info.sample_inputs_func(self.info, "cpu", kind, False)
        return [self._sample(sample.input, sample.args, sample.kwargs) for sample in inputs]

    def call(self, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """How we are called where PyTorch is called so."""
        return TRANSLATIONS[self.name](self.rank, x, *args, **kwargs)

    def wrong_call(self, sample: Any) -> tuple[Call, list[np.ndarray], list[np.ndarray]]:
        """A call that PyTorch refuses, with its operands and constants."""
        call = self.call(sample.input, sample.args, sample.kwargs)
        others = [array(a) for a in sample.args if isinstance(a, torch.Tensor)]
        operands = [array(sample.input), *(others if self.name.startswith("conv") else [])]
        return call, operands, others if self.name == "max_unpool" else []

    def _sample(self, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Sample:
        call = self.call(x, args, kwargs)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        operands: list[Tensor] = [x]
        constants: tuple[Tensor, ...] = ()
        if self.name.startswith("conv"):
            operands += [a for a in args if a is not None]
            args = ()
        elif self.name == "fractional_max_pool":
            numbers = kwargs.get("_random_samples")
            if numbers is None:
                numbers = torch.rand((*x.shape[:2], self.rank), dtype=x.dtype)
            constants = (
                numbers.remainder(1),
            )  # a sample has numbers that are not below 1, as they have to be
            options = kwargs | {"return_indices": True}
            return Sample(
                call, last, (x,), constants, functools.partial(_fractional, self.info.op, args, options)
            )
        elif self.name == "max_unpool":
            constants, args = (args[0],), ()
            kwargs = kwargs | {"output_size": call.positional[0]}
        elif self.name == "adaptive_max_pool":
            args = (args[0], True)
        elif self.name == "max_pool":
            kwargs = kwargs | {"return_indices": True}

        def reference(*arrays: Tensor) -> Any:
            return self.info.op(*arrays, *args, **kwargs)

        return Sample(call, last, tuple(operands), constants, reference)

    def _norm(self, x: Tensor, order: float, *args: Any) -> Sample:
        """PyTorch adds up x ** p, and we |x| ** p, which is the same for even p."""
        function = getattr(torch.nn.functional, f"lp_pool{self.rank}d")

        def reference(x: Tensor) -> Tensor:
            return function(x if order == 2 else x.abs(), order, *args)

        return Sample(self.call(x, (order, *args), {}), False, (x,), (), reference)


def _fractional(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], x: Tensor, numbers: Tensor
) -> Any:
    """Fractional pooling of an image at the places that PyTorch finds in the type of the random numbers."""
    _, at = function(x.to(numbers.dtype), *args, **kwargs | {"_random_samples": numbers})
    return x.flatten(2).gather(2, at.flatten(2)).reshape(at.shape), at


def ops() -> list[Op]:
    """Poolings and convolutions in PyTorch's tables; norms are in that of modules alone."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    found = []
    for info in op_db:
        name, rank = re.sub(r"^nn\.functional\.|(\d)d$", "", info.name), info.name[-2:-1]
        if info.name in TRANSLATIONS:
            found.append(Op(info, info.name, 2))
        elif name in TRANSLATIONS:
            found.append(Op(info, name, int(rank)))
    norms = [Op(info, "lp_pool", int(info.name[-2])) for info in module_db if "LPPool" in info.name]
    return found + norms
