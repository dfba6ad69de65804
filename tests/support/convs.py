"""Transposed convolutions of every kind on small images, and their three functions, for the tests to run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
import oracle


class Conv(NamedTuple):
    """A call of `conv_transpose` but for its arrays."""

    lengths: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...] | int = 1
    padding: Any = "VALID"
    output_padding: tuple[int, ...] | int = 0
    kernel_dilation: tuple[int, ...] | int = 1
    inputs: int = 3
    outputs: int = 2
    groups: int = 1
    transpose_kernel: bool = False

    @property
    def rank(self) -> int:
        return len(self.window)

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def call(self) -> dict[str, Any]:
        """The keywords of all three functions."""
        names = ("strides", "padding", "output_padding", "kernel_dilation", "groups", "transpose_kernel")
        return {name: getattr(self, name) for name in names}

    @property
    def lines(self) -> tuple[oracle.Line, ...]:
        return oracle.transposed_lines(
            self.lengths, self.window, self.strides, self.padding, self.output_padding, self.kernel_dilation
        )

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        if self.transpose_kernel:
            return (*self.window, self.outputs // self.groups, self.inputs)
        return (*self.window, self.inputs // self.groups, self.outputs)

    def shape(self, data_format: str, batch: tuple[int, ...] = (2,)) -> tuple[int, ...]:
        return image(batch, self.lengths, self.inputs, data_format)

    def result_shape(self, data_format: str, batch: tuple[int, ...] = (2,)) -> tuple[int, ...]:
        return image(batch, tuple(a.size for a in self.lines), self.outputs, data_format)

    def arrays(
        self, data_format: str = "channels_last", batch: tuple[int, ...] = (2,), dtype: Any = np.float32
    ) -> Arrays:
        """An image, a kernel, and a gradient of the result."""
        shapes = (self.shape(data_format, batch), self.kernel_shape, self.result_shape(data_format, batch))
        return Arrays(*(oracle.normal(s, jnp.dtype(dtype), seed) for seed, s in enumerate(shapes)))


class Arrays(NamedTuple):
    x: np.ndarray
    kernel: np.ndarray
    g: np.ndarray


def image(batch: tuple[int, ...], sizes: tuple[int, ...], channels: int, data_format: str) -> tuple[int, ...]:
    if data_format == "channels_last":
        return (*batch, *sizes, channels)
    return (*batch, channels, *sizes)


CASES = {
    # one axis
    "halves": Conv((5,), (2,), 2),
    "same": Conv((5,), (3,), 2, "SAME", transpose_kernel=True),
    "padded": Conv((6,), (4,), 2, 1),
    "uneven": Conv((5,), (3,), 2, ((2, 0),), 1),
    "cut": Conv((5,), (3,), 2, ((-1, -2),), transpose_kernel=True),
    "cut-and-pad": Conv((5,), (4,), 3, ((3, -2),), 2),
    "gaps": Conv((4,), (2,), 5),
    "gaps-wide": Conv((4,), (2,), 4, ((-3, 0),), 3),
    "skips": Conv((4,), (1,), 3, 0, 2, transpose_kernel=True),
    "identity": Conv((5,), (1,)),
    "one-tap-dilated": Conv((4,), (1,), 2, 0, 1, 3),
    "dilated": Conv((6,), (3,), 1, 2, 0, 2),
    "dilated-output-padding": Conv((5,), (3,), 2, 2, 2, 3),
    "dilated-gaps": Conv((5,), (2,), 3, 1, 1, 2),
    "dilated-one-phase": Conv((5,), (3,), 2, ((3, 1),), 3, 4),
    "hifigan": Conv((6,), (16,), 8, 4, inputs=4, outputs=3),
    "larger-than-image": Conv((2,), (9,), 1, 3),
    "first-pixels-cut": Conv((9,), (3,), 1, ((5, 0),)),
    "last-pixels-cut": Conv((7,), (3,), 2, ((0, 7),), transpose_kernel=True),
    "one-pixel": Conv((1,), (4,), 2, 1, 1),
    "one-of-each": Conv((1,), (1,), 1, inputs=1, outputs=1),
    "ordinary": Conv((8,), (5,), 1, 2),
    "vocoder": Conv((7,), (12,), 2, 5, inputs=4, outputs=4, groups=4),
    "many-taps": Conv((5,), (23,), 1, 7),
    "many-taps-depthwise": Conv((4,), (66,), 33, 20, inputs=2, outputs=2, groups=2),
    # two axes
    "dcgan": Conv((3, 4), (4, 4), 2, 1, inputs=5, outputs=4),
    "unet": Conv((3, 4), (2, 2), 2, transpose_kernel=True),
    "fcn": Conv((4, 3), (3, 3), 2, 1, 1, inputs=4),
    "upsample": Conv((4, 3), (4, 4), 2, 1, inputs=3, outputs=3, groups=3),
    "depthwise-dilated": Conv((4, 5), (3, 2), 2, 1, 1, 2, 4, 4, 4, True),
    "depthwise-disjoint": Conv((3, 2), (2, 2), (2, 3), 0, (0, 1), 1, 3, 3, 3, True),
    "multiplier": Conv((3, 4), (3, 3), 2, 1, 0, 1, 3, 6, 3, True),
    "one-output-a-group": Conv((3, 4), (3, 3), 2, 1, 1, 1, 6, 3, 3),
    "groups": Conv((4, 3), (4, 3), 2, 1, 0, 1, 4, 6, 2),
    "groups-disjoint": Conv((4, 3), (2, 2), 2, 0, 0, 1, 4, 6, 2, True),
    "groups-dilated": Conv((4, 3), (3, 2), (1, 2), ((1, 2), (0, 1)), 0, (2, 3), 6, 4, 2),
    "rectangle": Conv((4, 3), (1, 4), (1, 3), transpose_kernel=True),
    "mixed": Conv((4, 3), (3, 2), (2, 3), ((1, 0), (-1, 1)), (1, 2), (1, 2)),
    "same-2d": Conv((3, 4), (4, 3), (3, 2), "SAME"),
    "same-gaps": Conv((3, 4), (2, 1), (3, 2), "SAME", transpose_kernel=True),
    "image-head": Conv((3, 4), (4, 4), 2, 1, inputs=4, outputs=3),
    "one-channel": Conv((3, 4), (3, 4), 2, 1, inputs=1, outputs=1),
    "from-one-channel": Conv((3, 4), (3, 3), 1, 1, inputs=1, outputs=4, transpose_kernel=True),
    "global": Conv((1, 1), (5, 3), inputs=4),
    "larger-than-plane": Conv((2, 1), (7, 5), (2, 1), ((3, 2), (1, 3)), inputs=4),
    "only-padding": Conv((3, 4), (2, 2), 3, ((2, 5), (0, 0))),
    # three axes
    "nnunet": Conv((2, 3, 2), (2, 2, 2), 2, transpose_kernel=True),
    "volume-head": Conv((3, 2, 2), (3, 3, 3), 2, 1, 1, outputs=1),
    "volume-groups": Conv((3, 2, 2), (2, 3, 2), (1, 2, 3), ((0, 1), (1, 1), (-1, 0)), 0, 1, 4, 2, 2),
    "volume-depthwise": Conv((2, 3, 2), (3, 2, 3), 2, 1, (1, 0, 1), 1, 3, 3, 3, True),
    "volume-dilated": Conv((3, 2, 3), (2, 2, 3), (1, 2, 1), ((1, 0), (0, 1), (2, 2)), 0, (2, 1, 2)),
    "volume-same": Conv((2, 3, 2), (2, 3, 2), (1, 2, 3), "SAME", transpose_kernel=True),
    # so few weights for long lines that the native kernel reads its operands where they lie
    "few-weights": Conv((40,), (4,), 2, 1, inputs=20, outputs=3),
    "few-weights-groups": Conv((3, 22), (2, 3), 2, ((1, 0), (3, 2)), 0, (1, 2), 36, 4, 2),
    # small groups that fill whole vectors, whose channels the native kernel picks in registers
    "groups-of-two": Conv((6,), (3,), 2, 1, 1, 1, 32, 32, 16),
    "groups-of-four": Conv((3, 4), (3, 2), 2, ((1, 1), (0, 1)), 0, 1, 32, 32, 8, True),
    "groups-of-eight": Conv((2, 3, 2), (2, 1, 2), 1, ((0, 0), (0, 0), (1, 0)), 0, (1, 1, 2), 32, 32, 4),
    "groups-to-more": Conv((5,), (3,), 2, 1, 0, 1, 16, 32, 8),
}


# Every case runs natively, in both layouts. XLA's path is the same code for both, and takes long to compile:
# there some cases run channels first, and not those that differ little from others.
BOTH_LAYOUTS = (
    "cut-and-pad", "dilated-output-padding", "dcgan", "unet", "upsample", "groups", "groups-dilated", "mixed",
)  # fmt: skip
NATIVE_ALONE = (
    "same", "skips", "one-tap-dilated", "gaps", "rectangle", "image-head", "one-channel", "volume-same",
    "groups-of-two", "groups-of-four", "groups-of-eight", "groups-to-more",
)  # fmt: skip
PATHS = [
    (implementation, name, data_format)
    for implementation in ("native", "xla")
    for name in CASES
    for data_format in ("channels_last", "channels_first")
    if implementation == "native"
    or name in BOTH_LAYOUTS
    or (data_format == "channels_last" and name not in NATIVE_ALONE)
]
each_path = pytest.mark.parametrize(
    ("implementation", "name", "data_format"), PATHS, indirect=["implementation"]
)


def on_both_paths(argnames: str | tuple[str, ...], values: Iterable[Any], xla: Callable[..., bool]) -> Any:
    """Parametrises a test over values, natively all of them, and on XLA's path those that `xla` is true of.

    The compiler takes most of the time there, and the native kernels are more.
    """
    names = (argnames,) if isinstance(argnames, str) else argnames
    rows = [(v,) if isinstance(argnames, str) else tuple(v) for v in values]
    paths = [(i, *row) for i in ("native", "xla") for row in rows if i == "native" or xla(*row)]
    return pytest.mark.parametrize(("implementation", *names), paths, indirect=["implementation"], ids=str)


class Op(NamedTuple):
    """One of the three functions, as a function of two arrays, and what the oracle says of it."""

    name: str
    operands: tuple[str, str]
    function: Callable[..., Any]
    reference: Callable[..., Any]

    def __str__(self) -> str:
        return self.name

    def of(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        return tuple(getattr(arrays, name) for name in self.operands)

    def apply(self, arrays: Arrays, **call: Any) -> Any:
        third = [getattr(arrays, name).shape for name in ("x", "kernel", "g") if name not in self.operands]
        return self.function(*self.of(arrays), *third * (self.name != "forward"), **call)

    def expect(self, arrays: Arrays, **call: Any) -> np.ndarray:
        third = [getattr(arrays, name).shape for name in ("x", "kernel", "g") if name not in self.operands]
        return self.reference(*self.of(arrays), *third * (self.name != "forward"), **call)

    def scale(self, arrays: Arrays, **call: Any) -> float:
        """The size of the sums of absolute values, which rounding errors are relative to."""
        sizes = Arrays(*(np.abs(np.asarray(a, np.float64)) for a in arrays))
        return float(self.expect(sizes, **call).max(initial=0))


FORWARD = Op("forward", ("x", "kernel"), jax_mps.conv_transpose, oracle.conv_transpose)
DATA = Op("data", ("g", "kernel"), jax_mps.conv_transpose_gradient_data, oracle.conv_transpose_gradient_data)
WEIGHTS = Op(
    "weights", ("g", "x"), jax_mps.conv_transpose_gradient_weights, oracle.conv_transpose_gradient_weights
)
OPS = (FORWARD, DATA, WEIGHTS)


def run_all(call: dict[str, Any]) -> Callable[[Arrays], dict[str, Any]]:
    """All three functions of a call in one compiled program."""

    @jax.jit
    def run(arrays: Arrays) -> dict[str, Any]:
        return {op.name: op.apply(arrays, **call) for op in OPS}

    return run


@functools.cache
def expected(name: str, data_format: str) -> dict[str, tuple[np.ndarray, float]]:
    """For each function the values of a case, in float64, and the size of their terms."""
    case = CASES[name]
    call, arrays = {**case.call, "data_format": data_format}, case.arrays(data_format)
    return {op.name: (op.expect(arrays, **call), op.scale(arrays, **call)) for op in OPS}


def check(op: Op, actual: Any, arrays: Arrays, **call: Any) -> None:
    """Compares the result of a function with the oracle."""
    oracle.assert_close(
        actual, op.expect(arrays, **call), length=terms(op, arrays), scale=op.scale(arrays, **call)
    )


def terms(op: Op, arrays: Arrays) -> int:
    """How many products are summed for one element, at the most."""
    if op is WEIGHTS:
        return max(arrays.x.size, 1)
    return max(arrays.kernel.size, 1)
