"""Where ours is used: a table for each platform, read from the top; the first row that fits decides.

The numbers are stock JAX's time divided by ours.

CPU: float32, two cores of a Xeon (Emerald Rapids) with AVX-512, JAX 0.11.2, 2026-11-28, over the convolutions
of ResNet, MobileNet, ConvNeXt, U-Net and GAN models, 8 or 4 images.

CUDA: float32 and bfloat16, an H200, JAX 0.11.2, 2026-11-29, over 652 operations of training steps of ResNet,
MobileNet, ConvNeXt, U-Net, GAN, HiFi-GAN, TCN, state-space and 3-D U-Net models, 2 to 256 images; of
poolings, 7 shapes of 64 to 256 images in both types.

Apple's plugins have no other way: stock JAX lowers to operations that they do not all have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jax_mps.lowering.axes import blocks_reached
from jax_mps.lowering.rule import Platform
from jax_mps.stock import apple, convolution, windows

Reading = convolution.Reading | windows.Reading | apple.Reading


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
    condition: Callable[..., bool]
    ours: bool
    why: str


def _always(reading: Reading) -> bool:
    return True


def _single_sums(reading: convolution.Reading) -> bool:
    """Sums over the channels of a pixel alone, which fill no vectors of channels."""
    return reading.window.taps == 1 and reading.inputs == 1 and reading.outputs > 1


def _grouped_line(reading: convolution.Reading) -> bool:
    return reading.window.rank == 1 and reading.groups > 1


def _dense_line(reading: convolution.Reading) -> bool:
    return reading.window.rank == 1 and reading.groups == 1


def _of_transposed(reading: convolution.Reading) -> bool:
    """The gradient to the kernel of a transposed convolution."""
    return reading.swapped


def _dilated(reading: convolution.Reading) -> bool:
    return any(axis.dilation > 1 for axis in reading.window.axes)


def _large_depthwise(reading: convolution.Reading) -> bool:
    depthwise = reading.groups > 1 and reading.groups == reading.inputs
    return depthwise and reading.window.taps >= 25 and reading.params["out_dtype"] == np.float32


def _many_windows(reading: windows.Reading) -> bool:
    """More than nine windows that have a pixel, in float32."""
    found = math.prod(blocks_reached(axis).size for axis in reading.window.axes)
    return found > 9 and reading.dtype == np.float32


CPU: tuple[Choice, ...] = (
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

CUDA: tuple[Choice, ...] = (
    Choice("gradient_data", _grouped_line, True, "1-D depthwise: 4.9 to 8.6"),
    Choice("gradient_data", _always, False, "cuDNN computes both; 1 x 1 alone 1.4, in a ResNet-50 0.97"),
    Choice("forward", _dense_line, False, "cuDNN computes both: 0.9 to 1.2"),
    Choice("forward", _always, True, "1.2 to 3.8 transposed, 1.0 to 2.5 as a gradient to the image"),
    Choice("gradient_weights", _of_transposed, True, "1.05 to 13, in the mean 4 to 6.5"),
    Choice("gradient_weights", _dilated, True, "1-D: 1.9 to 16"),
    Choice("gradient_weights", _grouped_line, True, "1-D depthwise: 1.9 to 4.5"),
    Choice("gradient_weights", _large_depthwise, True, "7 x 7 in float32: 1.0 to 2.3; in bfloat16 0.48"),
    Choice("gradient_weights", _always, False, "cuDNN computes both; 1 x 1 as above"),
    Choice("maximum", _always, False, "1.0"),
    Choice("minimum", _always, False, "as the maximum, with two negations"),
    Choice("sum", _always, False, "0.7 to 1.8, of float32 with small windows 1.0"),
    Choice("spread sum", _always, True, "1.5 to 4.3"),
    Choice("scatter", _many_windows, False, "of float32, 25 windows a pixel 0.8, 81 windows 0.1"),
    Choice("scatter", _always, True, "1.15 to 3.7"),
    Choice("gather", _always, False, "0.2 to 0.55"),
)


def choose(reading: Reading, platform: Platform) -> tuple[bool, str]:
    """Whether ours is used for a reading, and the measurement that says so."""
    name = reading.map if isinstance(reading, convolution.Reading) else reading.name
    if platform == "apple":
        return True, f"{name}: in operations that all of Apple's plugins have"
    table = CPU if platform == "cpu" else CUDA
    row = next(row for row in table if row.operation == name and row.condition(reading))
    return row.ours, f"{name}: {row.why}"
