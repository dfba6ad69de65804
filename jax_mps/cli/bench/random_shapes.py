"""Random poolings: what a claim of speed is measured on, lest kernels be made for the named shapes alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from jax_mps.cli.bench.shapes import PoolingShape

__all__ = ["random_pooling"]

_KINDS = ("max", "avg", "l2")
_LAYOUTS = ("channels_last", "channels_first")
_RANKS = (1, 2, 2, 3)  # half of them are images
_BATCHES, _CHANNELS, _SIZES, _STRIDES = (1, 64), (1, 512), (5, 200), (1, 4)
_WINDOWS = {1: (1, 15), 2: (1, 15), 3: (1, 6)}  # more taps than 256 would tie in the data of `pooling`
_SOURCE_SIZES = (2**17, 2**23)
_MOST_READS = 2**26


def random_pooling(count: int, seed: int) -> list[tuple[PoolingShape, str]]:
    """Poolings and the layouts of their operands, the same for the same seed everywhere.

    They have one to three axes, each of 5 to 200 pixels, 1 to 512 channels and 1 to 64 images: numbers whose
    logarithms are uniform. Uniform are the kind, the layout, strides of 1 to 4, windows of 1 to 15 taps along
    an axis (6 in volumes), and padding of up to half a window, which is what PyTorch takes. Work is bounded,
    so that a call takes milliseconds: the source has 2^17 to 2^23 numbers, and all windows together have at
    most 2^26 taps, for which the slowest gradient of stock JAX takes about half a second.

    Args:
      count: how many. The first are the same for every count.
      seed: of the generator.
    """
    draw = random.Random(seed)
    return [_pooling(draw) for _ in range(count)]


def _pooling(draw: random.Random) -> tuple[PoolingShape, str]:
    kind, layout, rank = _one_of(draw, _KINDS), _one_of(draw, _LAYOUTS), _one_of(draw, _RANKS)
    while True:  # the rank is drawn once, or signals and volumes, which fit less often, would be rarer
        window = _between(draw, _WINDOWS[rank])
        shape = PoolingShape(
            "",
            kind,
            _logarithmic(draw, _BATCHES),
            tuple(_logarithmic(draw, _SIZES) for _ in range(rank)),
            _logarithmic(draw, _CHANNELS),
            window,
            _between(draw, _STRIDES),
            _between(draw, (0, window // 2)),
        )
        if _fits(shape):
            return dataclasses.replace(shape, name=str(shape)), layout


def _fits(shape: PoolingShape) -> bool:
    least, most = _SOURCE_SIZES
    return (
        min(shape.pooled) >= 1
        and least <= shape.source_size <= most
        and shape.result_size * shape.taps <= _MOST_READS
    )


# Of the methods of `Random`, only `random()` promises the same numbers in every version of Python.


def _one_of(draw: random.Random, choices: Sequence[Any]) -> Any:
    return choices[int(draw.random() * len(choices))]


def _between(draw: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return low + int(draw.random() * (high - low + 1))


def _logarithmic(draw: random.Random, bounds: tuple[int, int]) -> int:
    """An integer whose logarithm is uniform: as many from 5 to 10 as from 100 to 200."""
    low, high = bounds
    return int(low * ((high + 1) / low) ** draw.random())
