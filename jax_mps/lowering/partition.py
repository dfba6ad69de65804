"""Native kernels over several devices: which part of an operation each device computes.

XLA cannot cut a custom call, so JAX's `custom_partitioning` asks `plan` how to. Every axis of an array is a
factor of the operation, or a product of factors; devices that share a factor share the work:

| factor | a device computes | devices exchange |
|---|---|---|
| `batch*`, `group`; `in` and `out`, where the result has them | its own part | nothing |
| any that the result lacks | the sum over its own part | the sum of the results |
| `image*` and `pooled*`, the spatial axes | its own windows, or its own pixels | what lies at the borders |
| `tap*`, and `tap_plane*`, whose pixels have numbers in the whole plane | all of it | whatever is sharded |

A part of the windows, or of the pixels, is again windows over an image, which `Axis` describes exactly. So a
device calls the same primitive as if it were alone, and positions that differ (the first, the last) are
branches of one program.

Where the shardings of arrays disagree, that of the largest image stays, then those of smaller ones, then that
of the kernel: the others follow it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Window

Array = Any
Names = tuple[str, ...]

IMAGE, POOLED, TAP, PLANE = "image", "pooled", "tap", "tap_plane"


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of each axis of the arrays of a primitive.

    Attributes:
      operands: of each operand, of each of its axes: the factors whose product it is, major first.
      results: the same of each result.
      sizes: of factors that share an axis with others.
    """

    operands: tuple[tuple[Names, ...], ...]
    results: tuple[tuple[Names, ...], ...]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> tuple[tuple[Names, ...], ...]:
        """Of operands and results."""
        return self.operands + self.results

    def sharding_rule(self) -> tuple[str, dict[str, Any]]:
        """As JAX writes such rules: an `einsum` of factors, and which of them are special."""

        def text(arrays: Sequence[Sequence[Names]]) -> str:
            axes = [
                [f"({' '.join(names)})" if len(names) > 1 else _shared(names[0]) for names in array]
                for array in arrays
            ]
            return ", ".join(map(" ".join, axes))

        alone = {names[0] for array in self.arrays for names in array if len(names) == 1}
        order = list(dict.fromkeys(_shared(f) for array in self.arrays for names in array for f in names))
        exchanged = {f for f in order if f.startswith("space")} - self.summed
        return f"{text(self.operands)} -> {text(self.results)}", {
            "reduction_factors": tuple(f for f in order if f in self.summed),
            # Of planes a device needs all, too, but that is large: `plan` says so.
            "need_replication_factors": tuple(
                f for f in order if f.startswith(TAP) and not f.startswith(PLANE)
            ),
            "permutation_factors": tuple(f for f in order if f in exchanged),
            **{f: n for f, n in self.sizes.items() if f in order and f not in alone},
        }

    @property
    def summed(self) -> set[str]:
        """The factors that the results lack."""
        inside, outside = (
            {_shared(f) for array in arrays for names in array for f in names if not f.startswith(TAP)}
            for arrays in (self.operands, self.results)
        )
        return inside - outside


def of_images(ndim: int, start: int, rank: int, kind: str) -> tuple[Names, ...]:
    """The factors of an image, or of a pooled array, by the names of its spatial axes."""
    spatial = range(start, start + rank)
    return tuple((f"{kind}{i - start}" if i in spatial else f"batch{i}",) for i in range(ndim))


def _shared(factor: str) -> str:
    """The name under which pixels and windows are one factor: devices share both, or none."""
    return factor.replace(IMAGE, "space").replace(POOLED, "space")


class Sharded(NamedTuple):
    """An array over a mesh: for each axis the names of the mesh axes that cut it, major first."""

    shape: tuple[int, ...]
    dtype: Any
    spec: tuple[Names, ...]


class Plan(NamedTuple):
    """What every device computes, and how the arrays have to lie for it."""

    function: Callable[..., list[Array]]
    operands: list[tuple[Names, ...]]
    results: list[tuple[Names, ...]]


def plan(
    factors: Factors,
    params: dict[str, Any],
    compute: Callable[..., Sequence[Array]],
    mesh: dict[str, int],
    operands: Sequence[Sharded],
    results: Sequence[Sharded],
) -> Plan:
    """Decides who computes what.

    Args:
      factors: of the primitive.
      params: its parameters.
      compute: the primitive as a function of (operands, **params) that gives the list of its results.
      mesh: the length of each mesh axis.
      operands: where the operands are. results: where the results are wanted.
    """
    arrays = [*operands, *results]
    shares, lost = _shares(factors, mesh, arrays)
    window: Window | None = params.get("window")
    cuts: dict[int, _Cut] = {}
    for k, axis in enumerate(window.axes if window else ()):
        names = shares.get(f"space{k}", ())
        if not names:
            continue
        cut = _Cut.of(axis, math.prod(mesh[name] for name in names), names, _by_image(factors, k))
        if cut is None:
            lost = lost or f"space{k}"
            del shares[f"space{k}"]
        else:
            cuts[k] = cut
    specs = [
        tuple(tuple(n for f in names for n in shares.get(_shared(f), ())) for names in array)
        for array in factors.arrays
    ]
    whole = next((k for k, cut in cuts.items() if cut.fetches_all), None)
    if lost or whole is not None:
        warnings.warn(
            "jax_mps: an array that is sharded along an axis which the native kernel cannot share has to be "
            "gathered on every device; implementation='xla' may need less "
            f"(shapes {[a.shape for a in operands]}, {lost or f'spatial axis {whole}'})",
            stacklevel=2,
        )
    blocks = [_block(a.shape, spec, mesh) for a, spec in zip(arrays, specs, strict=True)]
    summed = tuple(name for f in sorted(factors.summed) for name in shares.get(f, ()))
    groups = math.prod(mesh[name] for name in shares.get("group", ()))
    wide = _with_sums(params, bool(summed))
    if groups > 1:
        wide = wide | {"groups": params["groups"] // groups}

    def function(*parts: Array) -> list[Array]:
        outs = _on_pieces(factors, cuts, wide, compute, list(parts), blocks[len(operands) :], mesh)
        if summed:
            outs = [lax.psum(out, summed) for out in outs]
        return [lax.convert_element_type(out, a.dtype) for out, a in zip(outs, results, strict=True)]

    return Plan(function, specs[: len(operands)], specs[len(operands) :])


def _with_sums(params: dict[str, Any], summed: bool) -> dict[str, Any]:
    """The parameters of a device's part; sums that others are added to are not rounded yet."""
    if summed and "out_dtype" in params:
        out = np.dtype(params["out_dtype"])
        return params | {"out_dtype": np.dtype(np.float32) if out.itemsize < 4 else out}
    return params


def _block(shape: Sequence[int], spec: Sequence[Names], mesh: dict[str, int]) -> tuple[int, ...]:
    return tuple(-(-n // math.prod(mesh[a] for a in names)) for n, names in zip(shape, spec, strict=True))


def _by_image(factors: Factors, k: int) -> bool:
    """Whether devices share the pixels of a spatial axis, and not its windows: the result has them."""
    return any(names == (f"{IMAGE}{k}",) for array in factors.results for names in array)


# --- which mesh axes share which factor ---------------------------------------------------------------


def _shares(
    factors: Factors, mesh: dict[str, int], arrays: Sequence[Sharded]
) -> tuple[dict[str, Names], str]:
    """The mesh axes that share each factor; and a factor of an image that fewer share than it was given."""
    sizes = dict(factors.sizes)
    for array, each in zip(arrays, factors.arrays, strict=True):
        sizes |= {names[0]: n for names, n in zip(each, array.shape, strict=True) if len(names) == 1}

    def weight(i: int) -> tuple[bool, int]:
        taps = any(f.startswith(TAP) for names in factors.arrays[i] for f in names)
        return taps, -math.prod(arrays[i].shape) * np.dtype(arrays[i].dtype).itemsize

    shares: dict[str, Names] = {}
    lost = ""
    for i in sorted(range(len(arrays)), key=weight):
        for names, axes in zip(factors.arrays[i], arrays[i].spec, strict=True):
            taken = set(itertools.chain(*shares.values()))
            rest = tuple(axis for axis in axes if axis not in taken)
            for factor in names:
                shared = _shared(factor)
                if shared not in shares:
                    exactly = len(names) > 1 or shared in factors.summed
                    mine = _fitting(factor, rest, mesh, sizes[factor], exactly)
                    shares |= {shared: mine} if mine else {}
                    rest = rest[len(mine) :]
                if math.prod(mesh[axis] for axis in shares.get(shared, ())) != sizes[factor]:
                    break  # a minor factor is cut only where the major one is cut to the end
            follows = i >= len(factors.operands) or (weight(i)[0] and not names[0].startswith(PLANE))
            if not follows and not taken.union(*shares.values()).issuperset(axes):
                lost = lost or names[0]
    return shares, lost


def _fitting(factor: str, axes: Names, mesh: dict[str, int], size: int, exactly: bool) -> Names:
    """The first of some mesh axes that can share a factor."""
    if factor.startswith(TAP):
        return ()
    if not exactly or _shared(factor).startswith("space"):
        return axes
    fitting: list[str] = []
    for axis in axes:
        if size % math.prod(mesh[a] for a in (*fitting, axis)):
            break
        fitting.append(axis)
    return tuple(fitting)


# --- spatial axes -------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """One device's part of a spatial axis.

    Attributes:
      axis: its windows over its pixels.
      image: which pixels, from and to. pooled: which windows.
      place: where the result lies in the device's block of the result's axis.
    """

    axis: Axis
    image: tuple[int, int]
    pooled: tuple[int, int]
    place: int

    def range(self, factor: str) -> tuple[int, int]:
        return self.image if factor.startswith(IMAGE) else self.pooled


class _Cut(NamedTuple):
    """A spatial axis over devices: the piece of each, or None for a device whose result is 0."""

    whole: Axis
    mesh_axes: Names
    pieces: list[_Piece | None]

    @classmethod
    def of(cls, axis: Axis, n: int, mesh_axes: Names, by_image: bool) -> _Cut | None:
        """Cuts an axis for `n` devices; None where some part is not windows over an image."""
        piece = _of_pixels if by_image else _of_windows
        pieces = [piece(axis, n, j) for j in range(n)]
        if axis.low >= 0 and any(p.axis.low < 0 for p in pieces if p):
            return None
        return cls(axis, mesh_axes, pieces)

    def block(self, factor: str) -> int:
        size = self.whole.size if factor.startswith(IMAGE) else self.whole.windows
        return -(-size // len(self.pieces))

    def halo(self, factor: str) -> tuple[int, int]:
        """How many pixels or windows of other devices some device reads, before and after its own."""
        block = self.block(factor)
        ranges = [(j, p.range(factor)) for j, p in enumerate(self.pieces) if p]
        before = max((j * block - begin for j, (begin, _) in ranges), default=0)
        after = max((end - (j + 1) * block for j, (_, end) in ranges), default=0)
        return max(before, 0), max(after, 0)

    @property
    def fetches_all(self) -> bool:
        """Whether a device gets the whole image from the others."""
        return sum(self.halo(IMAGE)) + self.block(IMAGE) >= self.whole.size > self.block(IMAGE) + 1


def _of_windows(axis: Axis, n: int, j: int) -> _Piece | None:
    """The windows of device `j`, and the pixels that they read."""
    block = -(-axis.windows // n)
    begin, end = min(j * block, axis.windows), min((j + 1) * block, axis.windows)
    if begin == end:
        return None
    first = min(max(axis.stride * begin - axis.low, 0), axis.size - 1)
    last = min(max(axis.stride * (end - 1) - axis.low + axis.extent, first + 1), axis.size)
    part = axis.select(begin, end - begin).cropped(first, axis.size - last)
    return _Piece(part, (first, last), (begin, end), 0)


def _of_pixels(axis: Axis, n: int, j: int) -> _Piece | None:
    """The pixels of device `j`, and the windows that reach them."""
    block = -(-axis.size // n)
    first, last = min(j * block, axis.size), min((j + 1) * block, axis.size)
    begin = max(-(-(first + axis.low - axis.extent + 1) // axis.stride), 0)
    end = min((last - 1 + axis.low) // axis.stride + 1, axis.windows)
    # Pixels before the first window of all, or between two of them, get nothing.
    first = max(first, axis.stride * begin - axis.low)
    if first >= last or begin >= end:
        return None
    part = axis.select(begin, end - begin).cropped(first, axis.size - last)
    return _Piece(part, (first, last), (begin, end), first - j * block)


def _on_pieces(
    factors: Factors,
    cuts: dict[int, _Cut],
    params: dict[str, Any],
    compute: Callable[..., Sequence[Array]],
    parts: list[Array],
    blocks: Sequence[tuple[int, ...]],
    mesh: dict[str, int],
) -> list[Array]:
    """The results of a device's part, whichever device it is."""
    if not cuts:
        return list(compute(*parts, **params))
    for i, names in enumerate(factors.operands):
        for dim, k, factor in _spatial(names, cuts):
            before, after = cuts[k].halo(factor)
            parts[i] = _with_halo(parts[i], dim, before, after, cuts[k], mesh)

    def branch(place: tuple[int, ...]) -> Callable[..., list[Array]] | None:
        at = dict(zip(cuts, place, strict=True))
        pieces = {k: cut.pieces[at[k]] for k, cut in cuts.items()}
        return _Branch.of(factors, cuts, at, pieces, params, compute, blocks)

    branches: list[Any] = []
    table: list[int] = []
    for place in itertools.product(*(range(len(cut.pieces)) for cut in cuts.values())):
        found = branch(place)
        if found not in branches:
            branches.append(found)
        table.append(branches.index(found))
    if len(branches) == 1:
        return branches[0](*parts)
    index: Any = 0
    for cut in cuts.values():
        for name in cut.mesh_axes:
            index = index * mesh[name] + lax.axis_index(name)
    chosen = lax.dynamic_index_in_dim(jnp.asarray(table, np.int32), index, keepdims=False)
    return lax.switch(chosen, branches, *parts)


def _spatial(names: Sequence[Names], cuts: dict[int, _Cut]) -> Iterator[tuple[int, int, str]]:
    """The axes of an array that are cut: their numbers in the array and in the window, and factors."""
    for dim, (factor, *_) in enumerate(names):
        for k in cuts:
            if factor in (f"{IMAGE}{k}", f"{POOLED}{k}"):
                yield dim, k, factor


def _with_halo(x: Array, dim: int, before: int, after: int, cut: _Cut, mesh: dict[str, int]) -> Array:
    """A device's block with that many pixels of the devices before and after it."""
    n, block = math.prod(mesh[a] for a in cut.mesh_axes), x.shape[dim]

    def fetch(distance: int, begin: int, end: int) -> Array:
        pairs = [(j, j + distance) for j in range(n) if 0 <= j + distance < n]
        return lax.ppermute(lax.slice_in_dim(x, begin, end, axis=dim), cut.mesh_axes, pairs)

    # Device j gets from device j - q what is missing before, and from j + q what is missing after.
    left = [(q, min(block, before - (q - 1) * block)) for q in range(1, -(-before // block) + 1)]
    right = [(q, min(block, after - (q - 1) * block)) for q in range(1, -(-after // block) + 1)]
    parts = [fetch(q, block - length, block) for q, length in reversed(left)]
    parts += [x, *(fetch(-q, 0, length) for q, length in right)]
    return lax.concatenate(parts, dim) if len(parts) > 1 else x


@dataclasses.dataclass(frozen=True)
class _Branch:
    """What devices at some positions compute of their blocks with halos: equal ones are one branch."""

    slices: tuple[tuple[tuple[int, int, int], ...], ...]  # of each operand: axis, from, to
    params: tuple[tuple[str, Any], ...]
    pads: tuple[tuple[tuple[int, int, int], ...], ...]  # of each result: of each axis
    blocks: tuple[tuple[int, ...], ...]
    empty: bool
    compute: Callable[..., Sequence[Array]] = dataclasses.field(compare=False)
    dtypes: tuple[Any, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        factors: Factors,
        cuts: dict[int, _Cut],
        at: dict[int, int],
        pieces: dict[int, _Piece | None],
        params: dict[str, Any],
        compute: Callable[..., Sequence[Array]],
        blocks: Sequence[tuple[int, ...]],
    ) -> _Branch:
        found = {k: p for k, p in pieces.items() if p is not None}
        if len(found) < len(pieces):
            # The shape of the call does not matter; any device's will do.
            found = {k: next(p for p in cut.pieces if p is not None) for k, cut in cuts.items()}
            at, empty = {k: cuts[k].pieces.index(p) for k, p in found.items()}, True
        else:
            empty = False
        slices = tuple(
            tuple(
                (dim, begin - at[k] * cuts[k].block(f) + cuts[k].halo(f)[0], end - begin)
                for dim, k, f in _spatial(names, cuts)
                for begin, end in [found[k].range(f)]
            )
            for names in factors.operands
        )
        pads = []
        for names, block in zip(factors.results, blocks, strict=True):
            pad = [(0, 0, 0)] * len(block)
            for dim, k, f in _spatial(names, cuts):
                begin, end = found[k].range(f)
                pad[dim] = (found[k].place, block[dim] - found[k].place - (end - begin), 0)
            pads.append(tuple(pad))
        return cls(
            slices, tuple(_restricted(params, found).items()), tuple(pads), tuple(blocks), empty, compute
        )

    def __call__(self, *parts: Array) -> list[Array]:
        cut = []
        for x, places in zip(parts, self.slices, strict=True):
            for dim, begin, length in places:
                x = lax.slice_in_dim(x, begin, begin + length, axis=dim)
            cut.append(x)
        outs = self.compute(*cut, **dict(self.params))
        outs = [
            lax.pad(out, np.zeros((), out.dtype), pad) if any(map(any, pad)) else out
            for out, pad in zip(outs, self.pads, strict=True)
        ]
        return [lax.full_like(out, 0) for out in outs] if self.empty else outs


def _restricted(params: dict[str, Any], pieces: dict[int, _Piece]) -> dict[str, Any]:
    """The parameters of a part: its windows, and where the image ends that averages count."""
    window = params["window"]
    axes = tuple(pieces[k].axis if k in pieces else axis for k, axis in enumerate(window.axes))
    params = params | {"window": Window(axes)}
    divisor = params.get("divisor")
    if divisor is not None and not divisor.number:
        band = tuple(
            (low + pieces[k].image[0], high + window.axes[k].size - pieces[k].image[1])
            if k in pieces
            else (low, high)
            for k, (low, high) in enumerate(divisor.band)
        )
        params = params | {"divisor": divisor._replace(band=band)}
    return params
