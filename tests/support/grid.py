"""Windows of every kind on small images, and the three pooling functions, for the tests to run through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import jax_mps
import oracle

FORMATS = ("channels_last", "channels_first")
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")


class Case(NamedTuple):
    """A call of a pooling function but for its image."""

    sizes: tuple[int, ...]
    window_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any = "VALID"
    window_dilation: tuple[int, ...] | int = 1
    ceil_mode: bool = False

    @property
    def rank(self) -> int:
        return len(self.window_shape)

    @property
    def taps(self) -> int:
        return math.prod(self.window_shape)

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("strides", "padding", "window_dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def shape(self, data_format: str, batch: tuple[int, ...] = (2,), channels: int = 3) -> tuple[int, ...]:
        if data_format == "channels_last":
            return (*batch, *self.sizes, channels)
        return (*batch, channels, *self.sizes)


CASES = {
    # one axis
    "halves": Case((13,), (2,), (2,)),
    "same": Case((13,), (3,), (2,), "SAME"),
    "padded": Case((13,), (3,), (1,), 1),
    "uneven": Case((13,), (4,), (3,), ((2, 1),), (2,)),
    "nine": Case((13,), (9,), (1,), 4),
    "nine-s2": Case((13,), (9,), (2,), ((3, 5),)),
    "nine-dilated": Case((29,), (9,), (2,), ((3, 5),), (3,)),
    "long": Case((40,), (33,), (1,), ((7, 0),)),
    "blocks": Case((23,), (10,), (12,), ((3, 9),)),
    "blocks-ragged": Case((29,), (11,), (11,)),
    "gaps": Case((13,), (3,), (5,), 2),
    "skips": Case((13,), (1,), (3,)),
    "identity": Case((5,), (1,), (1,)),
    "cropped": Case((13,), (2,), (2,), ((-2, -3),)),
    "crop-and-pad": Case((13,), (3,), (2,), ((-1, 2),)),
    "crop-ceil": Case((13,), (3,), (3,), ((1, -2),), 1, True),
    "ceil": Case((13,), (2,), (3,), 0, 1, True),
    "ceil-padded": Case((10,), (3,), (2,), 1, 1, True),
    "ceil-dropped": Case((4,), (2,), (3,), 1, 1, True),
    "ceil-dilated": Case((12,), (2,), (3,), 1, (3,), True),
    "larger-than-image": Case((4,), (9,), (1,), 5),
    "larger-once": Case((3,), (7,), (2,), ((2, 4),)),
    "dilated-holes": Case((5,), (2,), (1,), 2, (3,)),
    "whole": Case((13,), (13,), (1,)),
    # two axes
    "stem": Case((9, 8), (3, 3), (2, 2), 1),
    "stem-same": Case((9, 8), (3, 3), (2, 2), "SAME"),
    "inception": Case((5, 6), (3, 3), (1, 1), 1),
    "aspp": Case((8, 9), (3, 3), (1, 1), ((3, 3), (4, 4)), (3, 4)),
    "sevens": Case((14, 13), (7, 7), (1, 1), 3),
    "tiles-ragged": Case((14, 13), (3, 4), (4, 4), ((1, 1), (0, 2))),
    "dilated": Case((9, 8), (2, 3), (2, 1), ((1, 0), (2, 3)), (3, 2)),
    "rectangle": Case((9, 8), (1, 4), (1, 3)),
    "wide": Case((9, 14), (2, 9), (2, 2), ((0, 1), (4, 2))),
    "five": Case((11, 11), (5, 5), (1, 1), 2),
    "global": Case((7, 7), (7, 7), (7, 7)),
    "mixed": Case((9, 8), (3, 2), (1, 3), ((2, 0), (-1, 1)), (1, 2)),
    "crops": Case((9, 8), (2, 2), (2, 2), ((-1, -2), (-3, 0))),
    "ceil-2d": Case((9, 8), (3, 3), (2, 2), ((1, 1), (0, 0)), 1, True),
    "ceil-crop-2d": Case((9, 8), (3, 3), (2, 2), ((0, -1), (-1, 1)), 1, True),
    "gaps-2d": Case((9, 8), (2, 1), (4, 3), 0),
    # three axes
    "volume": Case((6, 5, 7), (2, 2, 2), (2, 2, 2)),
    "volume-padded": Case((6, 5, 7), (3, 3, 3), (2, 2, 2), 1),
    "volume-same": Case((4, 5, 3), (2, 3, 2), (1, 2, 3), "SAME"),
    "volume-dilated": Case((6, 5, 7), (2, 2, 3), (1, 2, 1), ((1, 1), (0, 2), (2, 2)), (2, 1, 3)),
    "volume-ceil": Case((6, 5, 7), (2, 3, 2), (3, 2, 3), 1, 1, True),
    "volume-crop": Case((6, 5, 7), (2, 2, 2), (1, 2, 2), ((-1, 0), (0, 1), (-2, -1))),
    "volume-long": Case((3, 4, 17), (1, 2, 10), (1, 2, 3), ((0, 0), (0, 0), (2, 5))),
}


# Every case runs on every path. Where channels come first the native kernels are others, and XLA's are not,
# so that there some cases do.
BOTH_LAYOUTS = ("uneven", "nine", "blocks", "stem", "mixed", "ceil-crop-2d", "volume-padded", "volume-crop")
PATHS = [
    (implementation, name, data_format)
    for implementation in ("native", "xla")
    for name in CASES
    for data_format in FORMATS
    if implementation == "native" or data_format == "channels_last" or name in BOTH_LAYOUTS
]
_PATH = ("implementation", "name", "data_format")
each_path = pytest.mark.parametrize(_PATH, PATHS, indirect=["implementation"])
each_case = pytest.mark.parametrize(
    _PATH,
    [(path, name, FORMATS[i % 2]) for path in ("native", "xla") for i, name in enumerate(CASES)],
    indirect=["implementation"],
)
"""Both paths of every case, in the one or the other layout."""


class Op(NamedTuple):
    """A pooling function, its gradient kernel, and what the oracle says about them.

    The gradient functions are called alike, as `gradient(g, x, ...)`.
    """

    name: str
    pool: Callable[..., Any]
    gradient: Callable[..., Any]
    oracle_pool: Callable[..., Any]
    oracle_gradient: Callable[..., Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def image(self, shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
        """An image with what matters to the function: for a maximum, ties and mostly negative numbers."""
        x = np.random.default_rng(seed).normal(size=shape)
        return (np.round(2 * x) / 2 - 1 if self.name == "max" else x).astype(dtype)

    def pool_error(self, x: Any, window_shape: Any, **call: Any) -> float:
        """The size of the terms of a result: what its rounding error is relative to."""
        return float(
            np.abs(self.oracle_pool(np.abs(np.asarray(x, np.float64)), window_shape, **call)).max(initial=0)
        )

    def gradient_error(self, g: Any, x: Any, window_shape: Any, **call: Any) -> float:
        g, x = np.abs(np.asarray(g, np.float64)), np.asarray(x, np.float64)
        x = x if self.name == "max" else np.abs(x)
        return float(np.abs(self.oracle_gradient(g, x, window_shape, **call)).max(initial=0))


def _average(name: str, **options: Any) -> Op:
    return Op(
        name,
        jax_mps.avg_pool,
        lambda g, x, *window, **call: jax_mps.avg_pool_gradient(g, x.shape, *window, **call),
        oracle.avg_pool,
        lambda g, x, *window, **call: oracle.avg_pool_gradient(g, x.shape, *window, **call),
        options,
    )


MAX = Op(
    "max",
    jax_mps.max_pool,
    jax_mps.max_pool_gradient,
    lambda *args, **call: oracle.max_pool(*args, **call)[0],
    oracle.max_pool_gradient,
    {},
)
AVERAGE = _average("average")
EXCLUDING = _average("average-excluding", count_include_pad=False)
OVERRIDDEN = _average("average-override", divisor_override=-3)
L2 = Op("l2", jax_mps.l2_pool, jax_mps.l2_pool_gradient, oracle.l2_pool, oracle.l2_pool_gradient, {})
OPS = (MAX, AVERAGE, EXCLUDING, OVERRIDDEN, L2)
FAMILIES = (MAX, AVERAGE, L2)
