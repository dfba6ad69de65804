"""The StableHLO of every pooling primitive, from operations that every platform has.

No `reduce_window`, `select_and_scatter`, gather, scatter, reverse or interior padding: they are slow,
wrong or missing somewhere. What is left are slices, edge pads, reshapes, selects and elementwise
arithmetic. The size of a program depends on the window alone, and at most on its logarithm:

* Windows that do not touch each other are rows of a reshaped array.
* Few taps of an axis are strided slices.
* More taps are combined by doubling: the result for 2m neighbouring taps is the combination of two
  results for m taps, one shifted by m.

Axes are taken one after the other, but for some maxima on CUDA. An argmax survives that, because the
innermost axis is reduced first and every combination prefers its left side. The routing of values to and
from the argmax survives it too, because windows that choose their maximum inside a common part of the image
choose the same pixel.

Apple's plugins get the same, with four differences: arrays with few axes, sums and choices of many taps in
parts that one kernel can read, no quotients of integers, and no scatter and gather in unpooling.

| file | what is in it |
|---|---|
| `max.py`, `average.py`, `l2.py` | the poolings; the gradients of the last two |
| `tap_index.py` | which tap a maximum has, and where that tap lies in the plane |
| `selected_tap_index.py` | which tap stock JAX selects |
| `take_put.py`, `tap_routes.py` | values from and to the chosen taps |
| `unpool.py` | values to any positions |
| `fold.py`, `sums.py`, `taps.py` | taps combined axis by axis, added up, or seen one by one |
| `slow_windows.py` | windows that the kernels of the CPU leave to this |
| `few_axes.py`, `values.py` | what Apple's plugins need before all else; constants and reductions |
"""

from jax_mps.lowering.pooling.average import avg_pool, avg_pool_gradient
from jax_mps.lowering.pooling.l2 import l2_pool, l2_pool_gradient, l2_pool_tangent
from jax_mps.lowering.pooling.max import max_pool
from jax_mps.lowering.pooling.selected_tap_index import max_pool_selected_tap_index
from jax_mps.lowering.pooling.take_put import max_pool_put, max_pool_take
from jax_mps.lowering.pooling.tap_index import max_pool_tap_index, max_pool_with_tap_index, positions
from jax_mps.lowering.pooling.unpool import max_unpool, max_unpool_take

__all__ = [
    "avg_pool",
    "avg_pool_gradient",
    "l2_pool",
    "l2_pool_gradient",
    "l2_pool_tangent",
    "max_pool",
    "max_pool_put",
    "max_pool_selected_tap_index",
    "max_pool_take",
    "max_pool_tap_index",
    "max_pool_with_tap_index",
    "max_unpool",
    "max_unpool_take",
    "positions",
]
