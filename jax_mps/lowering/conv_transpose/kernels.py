"""Kernels: from the two public layouts to the one of all forms, and back.

All forms use `(*window, groups, out / groups, in / groups)`. With `transpose_kernel` the public kernel is
that of the ordinary convolution, `(*window, out / groups, in)`. Without, it is `(*window, in / groups, out)`,
and mirrored along every axis of the window.
"""

from __future__ import annotations

from typing import Any

from jax import lax

from jax_mps.lowering.axes import concatenate, cut
from jax_mps.lowering.conv_transpose.description import Conv

Array = Any


def from_public(conv: Conv, kernel: Array) -> Array:
    """From either public layout to `(*window, groups, out / groups, in / groups)`."""
    if conv.transpose_kernel:
        return from_ordinary(conv, kernel)
    rank, per_group = conv.rank, conv.outputs // conv.groups
    kernel = mirrored(conv, kernel)
    kernel = lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.groups, per_group))
    return lax.transpose(kernel, (*range(rank), rank + 1, rank + 2, rank))


def to_public(conv: Conv, kernel: Array) -> Array:
    """The inverse of `from_public`."""
    if conv.transpose_kernel:
        return to_ordinary(conv, kernel)
    rank = conv.rank
    kernel = lax.transpose(kernel, (*range(rank), rank + 2, rank, rank + 1))
    kernel = lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.outputs))
    return mirrored(conv, kernel)


def from_ordinary(conv: Conv, kernel: Array) -> Array:
    """From `(*window, out / groups, in)`, the kernel of the convolution that is transposed."""
    rank, per_group = conv.rank, conv.inputs // conv.groups
    kernel = lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.groups, per_group))
    return lax.transpose(kernel, (*range(rank), rank + 1, rank, rank + 2))


def to_ordinary(conv: Conv, kernel: Array) -> Array:
    """The inverse of `from_ordinary`."""
    rank = conv.rank
    kernel = lax.transpose(kernel, (*range(rank), rank + 1, rank, rank + 2))
    return lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.inputs))


def mirrored(conv: Conv, kernel: Array) -> Array:
    """Turned by 180 degrees. Apple's plugins do not all have `reverse`, and kernels are small."""
    for dim in range(conv.rank):
        if conv.platform == "apple":
            slices = [cut(kernel, dim, k, k + 1) for k in reversed(range(kernel.shape[dim]))]
            kernel = concatenate(slices, dim)
        else:
            kernel = lax.rev(kernel, (dim,))
    return kernel
