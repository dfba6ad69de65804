"""Where ours is used: one table, read from the top; the first row that fits decides.

The numbers are stock JAX's time divided by ours: float32, two cores of a Xeon (Emerald Rapids) with
AVX-512, JAX 0.11.2, 2026-11-28, over the convolutions of ResNet, MobileNet, ConvNeXt, U-Net and GAN models,
8 or 4 images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax_mps.stock import convolution, windows

Reading = convolution.Reading | windows.Reading


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row of the table.

    Attributes:
      operation: a map of convolution, or the name of a pooling.
      condition: when the row fits.
      ours: whether ours is used then.
      why: the measurement.
    """

    operation: str
    condition: Callable[[Reading], bool]
    ours: bool
    why: str


def _always(reading: Reading) -> bool:
    return True


def _single_sums(reading: Reading) -> bool:
    """Sums over the channels of a pixel alone, which fill no vectors of channels."""
    return (
        isinstance(reading, convolution.Reading)
        and reading.window.taps == 1
        and reading.inputs == 1
        and reading.outputs > 1
    )


CHOICES: tuple[Choice, ...] = (
    Choice("gradient_data", _single_sums, False, "1 x 1, 32 channels to 1, 128 x 128 pixels: 0.85"),
    Choice("gradient_data", _always, True, "1.1 to 4 dense, 11 to 95 depthwise, 11 to 38 along three axes"),
    Choice("forward", _always, True, "1.2 to 3.7 dense, 15 to 180 depthwise, 11 to 16 along three axes"),
    Choice("gradient_weights", _always, True, "1.3 to 13 dense, 16 to 2300 in groups, 11 to 26 in 3-D"),
    Choice("maximum", _always, True, "1.2 to 17 on the named shapes (docs/benchmarks.md)"),
    Choice("minimum", _always, True, "as the maximum, with two negations"),
    Choice("sum", _always, True, "1.9 to 13 on the named shapes of averages"),
    Choice("spread sum", _always, True, "1.1 to 14 on the named shapes of averages, gradients"),
    Choice("scatter", _always, True, "22 to 234 on the named shapes of maxima, gradients"),
    Choice("gather", _always, True, "stock reduces pairs of numbers; ours finds the tap and reads there"),
)


def choose(reading: Reading) -> tuple[bool, str]:
    """Whether ours is used for a reading, and the measurement that says so."""
    name = reading.map if isinstance(reading, convolution.Reading) else reading.name
    row = next(row for row in CHOICES if row.operation == name and row.condition(reading))
    return row.ours, f"{name}: {row.why}"
