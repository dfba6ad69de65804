"""Windows so large, or so small, that on the CPU the StableHLO is faster than the native kernel.

The kernels combine the taps of a window one after the other, along each axis by itself. The StableHLO
combines runs of 1, 2, 4, ... taps, at every pixel. So the number of taps decides, and how many windows there
are for each pixel.

Time of the kernel over that of the StableHLO, two cores of an EPYC (Zen 5), float32, JAX 0.10.2, stride 1:

| taps | maximum | with index | gradient of the average | of the norm |
|---|---|---|---|---|
| 9 x 9, channels last | 0.5, 0.7 | 0.2 | 0.2, 0.5 | 0.8, 0.9 |
| 9 x 9, channels first | 0.7, 0.5 | 0.5 | 1.6, 1.1 | 3.2, 1.5 |
| 21 x 21, channels last | 0.6, 1.2 | 0.3 | 0.4, 0.4 | 1.1, 0.9 |
| 21 x 21, channels first | 1.4, 1.5 | 0.6 | 1.6, 1.1 | 3.1, 2.3 |
| 101, one channel and 64 | 2.4 to 3.8 | 1.2 to 1.6 | 1.7 to 2.7 | 3.9 to 12 |
| 7 x 7 x 7, last and first | 1.2, 2.5 | 0.1, 0.2 | 0.6, 5.0 | 3.0, 4.6 |

Maxima in half precision are slow in XLA (0.03 to 0.6), the forward pass of norms has three sums there (0.1 to
0.9), and values are put at taps in the same time whatever the window (0.01 to 0.6): they stay native.

Channels first, windows of one tap read every n-th pixel of a row. Compilers write that as a slice, which
takes a fifth to an eighth of the kernels' time (strides 2 and 4, maxima and averages).
"""

from __future__ import annotations

import math
from typing import Any

from jax_mps.geometry import Window


def of_maxima(x: Any, *, window: Window, start: int, **_: Any) -> bool:
    """For `max_pool`."""
    line = _is_line(x, window, start)
    return (line and window.taps == 1) or (
        x.dtype.itemsize >= 4 and _along_axes(window) > (40 if line else 60)
    )


def of_indices(x: Any, *, window: Window, start: int, **_: Any) -> bool:
    """For `max_pool_with_tap_index` and `max_pool_tap_index`."""
    line = _is_line(x, window, start)
    return (line and window.taps == 1) or _along_axes(window) > (60 if line else 90)


def of_selected_indices(x: Any, *, window: Window, start: int, **_: Any) -> bool:
    """For `max_pool_selected_tap_index`."""
    return x.dtype.itemsize >= 4 and _is_line(x, window, start) and _of_all(window) > 120


def of_averages(x: Any, *, window: Window, start: int, **_: Any) -> bool:
    """For `avg_pool` and `avg_pool_gradient`."""
    line = _is_line(x, window, start)
    return (line and window.taps == 1) or _along_axes(window) > (40 if line else 90)


def of_gradients_of_norms(g: Any, *, window: Window, start: int, **_: Any) -> bool:
    """For `l2_pool_gradient`. The StableHLO of strides above 1 writes zeros between windows, and is slow."""
    return all(axis.stride == 1 for axis in window.axes) and sum(window.shape) * _windows(window) > 12


def _along_axes(window: Window) -> float:
    """Taps that are combined for a pixel, an axis after the other; more axes are more passes."""
    return window.rank * sum(window.shape) * _windows(window)


def _of_all(window: Window) -> float:
    """Taps that are combined for a pixel, all of them."""
    return window.taps * _windows(window)


def _windows(window: Window) -> float:
    """How many windows there are for each pixel."""
    return math.prod(window.counts) / max(math.prod(window.sizes), 1)


def _is_line(x: Any, window: Window, start: int) -> bool:
    """Whether pixels of a row are neighbours in memory: channels first, or one channel."""
    return math.prod(x.shape[start + window.rank :]) == 1
