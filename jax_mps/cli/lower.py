"""Prints the program that an operation becomes on a platform, and names what Apple's plugins could not run.

For instance: `lower max_pool --shape 2,16,16,3 --window 3,3 --strides 2 --padding 1 --vjp --platform METAL`.
The platform need not be there. The program goes to standard output; what is outside the list of
`jax_mps.lowering.apple` to standard error, a line each, and the exit status is then 1. `--msl` prints the
kernels that IREE's compiler makes of the program, in Metal Shading Language. Apple's plugins make others.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

import jax_mps
from jax_mps import geometry
from jax_mps.cli import extras, metal_source
from jax_mps.lowering import apple

__all__ = ["add_arguments", "run"]

_POOLS: dict[str, Callable[..., Any]] = {
    "max_pool": jax_mps.max_pool,
    "avg_pool": jax_mps.avg_pool,
    "l2_pool": jax_mps.l2_pool,
}
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu", "METAL", "mps")
_OPERATIONS = (*_POOLS, "max_unpool", "conv", "conv_transpose")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("operation", choices=_OPERATIONS, help="a public function")
    parser.add_argument(
        "--platform", type=_platform, default="METAL", help=f"{', '.join(_PLATFORMS)} (default: METAL)"
    )
    parser.add_argument("--shape", type=_integers, required=True, help="of the image, such as 2,16,16,3")
    parser.add_argument("--window", type=_integers, default=(2, 2), help="its shape (default: 2,2)")
    parser.add_argument("--strides", type=_integers, default=(2,), help="for all axes or each (default: 2)")
    parser.add_argument(
        "--padding",
        type=_padding,
        default="VALID",
        help="VALID, SAME, SAME_LOWER, 1, or low:high for each axis as 1:2,0:1",
    )
    parser.add_argument("--dilation", type=_integers, default=(1,), help="of the window (default: 1)")
    parser.add_argument("--ceil-mode", action="store_true", help="of a pooling")
    parser.add_argument("--indices", action="store_true", help="of max_pool: where the maxima are, too")
    parser.add_argument("--output-shape", type=_integers, help="of max_unpool (default: twice the image)")
    parser.add_argument(
        "--features", type=int, help="channels of a convolution's result (default: the image's)"
    )
    parser.add_argument("--groups", type=int, default=1, help="of a convolution (default: 1)")
    parser.add_argument("--input-dilation", type=_integers, default=(1,), help="of conv (default: 1)")
    parser.add_argument(
        "--output-padding", type=_integers, default=(0,), help="of conv_transpose (default: 0)"
    )
    parser.add_argument(
        "--data-format", choices=get_args(geometry.DataFormat), default="channels_last", metavar="NAME",
        help="channels_last (default), channels_first, NHWC, NCHW, ...",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", help="of the arrays (default: float32)")
    derivative = parser.add_mutually_exclusive_group()
    derivative.add_argument("--jvp", action="store_true", help="with its tangent")
    derivative.add_argument("--vjp", action="store_true", help="its gradient")
    derivative.add_argument("--second", action="store_true", help="the tangent of its gradient")
    parser.add_argument(
        "--msl", action="store_true", help="print the Metal source that IREE makes of it (extra `msl`)"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the program; returns 1 if some of it is outside the list, or IREE cannot compile it."""
    if options.msl and extras.missing("msl", *metal_source.MODULES):
        return 2
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    try:
        f, operands = _function(options)
        if options.vjp or options.second:
            f, operands = _pull_back(f, operands)
        if options.jvp or options.second:
            f, operands = _with_tangents(f, operands)
        lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=(options.platform,))
    except (TypeError, ValueError) as error:
        print(f"jax_mps: {error}", file=sys.stderr)
        return 2
    found = apple.violations(lowered)
    try:
        print(_metal(lowered) if options.msl else lowered.as_text())
    except RuntimeError as error:
        found.append(str(error))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def _metal(lowered: Any) -> str:
    return metal_source.metal_source(lowered.as_text()) or "// The program only copies: it needs no kernel."


def _function(options: argparse.Namespace) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The operation as a function of arrays, and their types."""
    rank, shape = len(options.window), geometry.shape("--shape", options.shape)
    image = jax.ShapeDtypeStruct(shape, jnp.dtype(options.dtype))
    call: dict[str, Any] = {"strides": _each(options.strides, rank), "padding": options.padding}
    dilation = _each(options.dilation, rank)
    if options.operation in _POOLS:
        call |= {"window_dilation": dilation, "ceil_mode": options.ceil_mode}
        if options.indices:
            call["return_indices"] = True
        f = functools.partial(_POOLS[options.operation], window_shape=options.window, **call)
        return functools.partial(f, data_format=options.data_format), (image,)
    last = geometry.channels_last(options.data_format, rank)
    sizes = shape[-rank - 1 : -1] if last else shape[-rank:]
    if options.operation == "max_unpool":
        target = options.output_shape or tuple(2 * n for n in sizes)
        f = functools.partial(jax_mps.max_unpool, output_shape=target, data_format=options.data_format)
        return f, (image, jax.ShapeDtypeStruct(shape, jnp.int32))
    channels = shape[-1] if last else shape[-rank - 1]
    features = geometry.integer("--features", channels if options.features is None else options.features)
    window = (*options.window, channels // max(options.groups, 1), features)
    call |= {"kernel_dilation": dilation, "groups": options.groups, "data_format": options.data_format}
    kernel = jax.ShapeDtypeStruct(window, image.dtype)
    if options.operation == "conv":
        more = _each(options.input_dilation, rank)
        return functools.partial(jax_mps.conv, input_dilation=more, **call), (image, kernel)
    more = _each(options.output_padding, rank)
    return functools.partial(jax_mps.conv_transpose, output_padding=more, **call), (image, kernel)


def _pull_back(
    f: Callable[..., Any], operands: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of the first result to the operands that have one, of its cotangent and the operands."""

    def first(*arrays: Any) -> Any:
        return jax.tree.leaves(f(*arrays))[0]

    def pull_back(cotangent: Any, *arrays: Any) -> Any:
        fixed = arrays[len(floats) :]
        return jax.vjp(lambda *a: first(*a, *fixed), *arrays[: len(floats)])[1](cotangent)

    floats = [x for x in operands if jnp.issubdtype(x.dtype, jnp.floating)]
    return pull_back, (jax.eval_shape(first, *operands), *operands)


def _with_tangents(
    f: Callable[..., Any], operands: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The results and their tangents, of the operands and tangents of those that have one."""

    def both(*arrays: Any) -> Any:
        fixed, tangents = arrays[len(floats) : len(operands)], arrays[len(operands) :]
        return jax.jvp(lambda *a: f(*a, *fixed), arrays[: len(floats)], tangents)

    floats = [x for x in operands if jnp.issubdtype(x.dtype, jnp.floating)]
    return both, (*operands, *floats)


def _each(values: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return values * rank if len(values) == 1 else values


def _platform(text: str) -> str:
    # JAX writes the general program for any name.
    for name in _PLATFORMS:
        if name.lower() == text.lower():
            return name
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(_PLATFORMS)}, got {text!r}")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _padding(text: str) -> Any:
    if text in ("SAME", "SAME_LOWER", "VALID"):
        return text
    if ":" in text:
        return tuple(_integers(part.replace(":", ",")) for part in text.split(","))
    return int(text)
