"""Operations with their derivatives in float64, to compare the library with.

A reference is asked for results by name, all with the same arguments: the operands `x`, their tangents `t`
and the cotangent `g` of the value.

    value       f(x)
    tangent     the derivative of f along t
    gradient    for every operand, the pull-back of g
    second      for every operand, the derivative of its gradient along t

Second derivatives are symmetric, so `second` is also what reverse mode gives for the cotangents t of the
gradient. `magnitude` says how large the terms of a result are: its rounding errors are relative to that.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import oracle
import other_poolings as other

Arrays = Sequence[np.ndarray]


def absolute(arrays: Arrays) -> list[np.ndarray]:
    return [np.abs(a) for a in arrays]


class Reference:
    """What all references have."""

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        raise NotImplementedError

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        raise NotImplementedError

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        raise NotImplementedError

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        raise NotImplementedError

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        """The sum of the absolute values of the terms of a result."""
        return getattr(self, name)(x, absolute(t), np.abs(g))


class Multilinear(Reference):
    """A function that is linear in each of its operands.

    `transposes` has for each operand the function of a cotangent and all operands that gives its gradient; of
    the operand itself only the shape matters.
    """

    def __init__(self, f: Callable[..., Any], *transposes: Callable[..., Any]) -> None:
        self.f, self.transposes = f, transposes

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.f(*x)

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return sum(self.f(*x[:i], ti, *x[i + 1 :]) for i, ti in enumerate(t))

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return [transpose(g, *x) for transpose in self.transposes]

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return [
            sum(
                (back(g, *x[:j], tj, *x[j + 1 :]) for j, tj in enumerate(t) if j != i),
                np.zeros(np.shape(x[i])),
            )
            for i, back in enumerate(self.transposes)
        ]

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        return super().magnitude(name, absolute(x), t, g)


class Around(Reference):
    """A reference made of another one."""

    def __init__(self, inner: Reference) -> None:
        self.inner = inner

    def of(self, name: str, x: Arrays, t: Arrays, g: Any, found: Callable[..., Any]) -> Any:
        """A result, where `found` gives those of the inner reference."""
        raise NotImplementedError

    def _plain(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.of(name, x, t, g, getattr(self.inner, name))

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._plain("value", x, t, g)

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._plain("tangent", x, t, g)

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._plain("gradient", x, t, g)

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._plain("second", x, t, g)

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.of(name, x, t, g, lambda *arguments: self.inner.magnitude(name, *arguments))


class Constant(Around):
    """A reference as a function of one more operand, the last one, whose derivatives are 0."""

    def of(self, name: str, x: Arrays, t: Arrays, g: Any, found: Callable[..., Any]) -> Any:
        result = found(x[:-1], t[:-1], g)
        return [*result, np.zeros(x[-1].shape)] if name in ("gradient", "second") else result


class WithIndices(Around):
    """A maximum with positions: its value is a pair."""

    def __init__(self, inner: Reference, indices: np.ndarray) -> None:
        super().__init__(inner)
        self.indices = indices

    def of(self, name: str, x: Arrays, t: Arrays, g: Any, found: Callable[..., Any]) -> Any:
        result = found(x, t, g)
        return (result, self.indices) if name == "value" else result


class ByParts(Around):
    """Values and tangents of a multilinear function of complex numbers, by those of real numbers."""

    def of(self, name: str, x: Arrays, t: Arrays, g: Any, found: Callable[..., Any]) -> Any:
        if name == "value":
            return self._product(x)
        return sum(self._product([*x[:i], ti, *x[i + 1 :]]) for i, ti in enumerate(t))

    def _product(self, x: Arrays) -> Any:
        terms = []
        for parts in itertools.product((0, 1), repeat=len(x)):
            real = [a.imag if part else a.real for a, part in zip(x, parts, strict=True)]
            terms.append(1j ** sum(parts) * self.inner.value(real, (), None))
        return sum(terms)

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        sizes, tangents = ([np.abs(a.real) + np.abs(a.imag) for a in arrays] for arrays in (x, t))
        return self.inner.magnitude(name, sizes, tangents, g)


class Layout:
    """Arrays of images as `(batch, channels, *spatial)` and back, NumPy's or PyTorch's."""

    def __init__(self, shape: Sequence[int], rank: int, data_format: str) -> None:
        self.rank, self.last = rank, data_format == "channels_last" or data_format.endswith("C")
        self.batch = tuple(shape[: len(shape) - rank - 1])

    def planes(self, x: Any) -> Any:
        if self.last:
            x = _moved(x, -1, -1 - self.rank)
        return x.reshape(math.prod(self.batch), *x.shape[-1 - self.rank :])

    def back(self, y: Any) -> Any:
        y = y.reshape(*self.batch, *y.shape[1:])
        return _moved(y, -1 - self.rank, -1) if self.last else y


def _moved(x: Any, source: int, target: int) -> Any:
    return np.moveaxis(x, source, target) if isinstance(x, np.ndarray) else x.movedim(source, target)


def chosen(positions: np.ndarray, sizes: Sequence[int], layout: Layout) -> Multilinear:
    """What takes the pixels at flat positions of every plane, and its transpose; -1 is no pixel."""
    at = layout.planes(np.asarray(positions))
    flat = at.reshape(*at.shape[:2], -1)

    def take(x: np.ndarray) -> np.ndarray:
        pixels = layout.planes(x).reshape(*at.shape[:2], -1)
        return layout.back(np.where(at < 0, 0, np.take_along_axis(pixels, flat, 2).reshape(at.shape)))

    def put(g: np.ndarray, x: Any = None) -> np.ndarray:
        return layout.back(other.put(np.where(at < 0, 0, layout.planes(g)), np.maximum(at, 0), sizes))

    return Multilinear(take, put)


def put_at(positions: np.ndarray, sizes: Sequence[int], layout: Layout) -> Multilinear:
    """The transpose of `chosen`, as a function."""
    transposed = chosen(positions, sizes, layout)
    return Multilinear(transposed.transposes[0], lambda c, g: transposed.f(c))


class Norm(Reference):
    """The p-norms of windows: y, with the weights w = sign(r) |r| ** (p - 1) of tangents, r = x / y.

    Windows of zeros have no derivatives, and neither has a tap of 0 where its weight has none.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[oracle.Line], p: float, start: int) -> None:
        self.shape, self.axes, self.p, self.start = shape, axes, p, start
        sizes = [a.size for a in axes]
        self.reads = np.array(
            [
                [math.prod(sizes) if r is None else np.ravel_multi_index(r, sizes) for r in reads]
                for _, reads in oracle.windows(axes, "zero")
            ]
        )
        self.absolute = False

    def _taps(self, x: np.ndarray) -> np.ndarray:
        x = oracle.spatial_first(x, self.start, len(self.axes)).reshape(-1, self._channels())
        return np.concatenate([x, np.zeros((1, x.shape[1]))])[self.reads]

    def _channels(self) -> int:
        return math.prod(self.shape[: self.start]) * math.prod(self.shape[self.start + len(self.axes) :])

    def _pooled(self, y: np.ndarray) -> np.ndarray:
        y = y.reshape(*(a.windows for a in self.axes), -1)
        return oracle.back(y, self.shape, self.start, len(self.axes))

    def _windows(self, g: np.ndarray) -> np.ndarray:
        return oracle.spatial_first(g, self.start, len(self.axes)).reshape(len(self.reads), 1, -1)

    def _image(self, taps: np.ndarray) -> np.ndarray:
        sizes = [a.size for a in self.axes]
        dx = np.zeros((math.prod(sizes) + 1, self._channels()))
        np.add.at(dx, self.reads, taps)
        return oracle.back(dx[:-1].reshape(*sizes, -1), self.shape, self.start, len(self.axes))

    def _norms(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Norms, as `(windows, 1, vector)`, and taps over them."""
        taps = self._taps(x)
        largest = np.abs(taps).max(1, keepdims=True)
        scale = np.where((largest == 0) | np.isinf(largest), 1, largest)
        y = (
            scale
            if self.p == math.inf
            else scale * ((np.abs(taps) / scale) ** self.p).sum(1, keepdims=True) ** (1 / self.p)
        )
        y = np.where((largest == 0) | np.isinf(largest), largest, y)
        return y, taps if self.p in (1, math.inf) else taps / np.where(y == 0, 1, y)

    def _weights(self, r: np.ndarray) -> np.ndarray:
        if self.p in (1, math.inf):  # as in PyTorch, 0 at NaN
            first = np.abs(r).argmax(1)[:, None]
            chosen = self.p == 1 or np.arange(r.shape[1])[None, :, None] == first
            return np.nan_to_num(np.sign(r)) * chosen
        return np.sign(r) * np.abs(r) ** (self.p - 1)

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._pooled(self._norms(x[0])[0])

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._pooled((self._signed(self._weights(self._norms(x[0])[1])) * self._taps(t[0])).sum(1))

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        y, r = self._norms(x[0])
        return [self._image(np.where(y == 0, 0, self._signed(self._weights(r)) * self._windows(g)))]

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        y, r = self._norms(x[0])
        if self.p in (1, math.inf):
            return [np.zeros(self.shape)]
        weights, taps = self._signed(self._weights(r)), self._taps(t[0])
        turned = self._signed(r) * (weights * taps).sum(1, keepdims=True)
        slope = np.abs(np.where(r == 0, 1, r)) ** (self.p - 2) * (self.p - 1)
        slope = np.where((r == 0) & (self.p != 2), 0, slope) / np.where(y == 0, np.inf, y)
        return [self._image(slope * (taps + turned if self.absolute else taps - turned) * self._windows(g))]

    def torch_gradient(self, g: Any, x: Any) -> Any:
        """The gradient of the Euclidean norm, of PyTorch's tensors."""
        import torch

        start, rank = self.start, len(self.axes)
        ends = tuple(range(start, start + rank)), tuple(range(rank))

        def pool(x: Any) -> Any:
            pixels = x.movedim(*ends).reshape(math.prod(a.size for a in self.axes), -1)
            taps = torch.cat([pixels, torch.zeros(1, pixels.shape[1], dtype=x.dtype)])[
                torch.from_numpy(self.reads)
            ]
            squares = (taps * taps).sum(1)
            nowhere = squares == 0
            y = torch.where(nowhere, 0.0, torch.where(nowhere, 1.0, squares).sqrt())
            rest = (*x.shape[:start], *x.shape[start + rank :])
            return y.reshape(*(a.windows for a in self.axes), *rest).movedim(*reversed(ends))

        return torch.func.vjp(pool, x)[1](g)[0]

    def _signed(self, weights: np.ndarray) -> np.ndarray:
        return np.abs(weights) if self.absolute else weights

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        sizes = copy.copy(self)
        sizes.absolute = True
        return getattr(sizes, name)(x, absolute(t), np.abs(g))


class NormGradient(Reference):
    """The gradient of a Euclidean norm as a function of a cotangent and the image."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.norm.gradient(x[1:], (), x[0])[0]

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.norm.gradient(x[1:], (), t[0])[0] + self.norm.second(x[1:], t[1:], x[0])[0]

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return [self.norm.tangent(x[1:], (g,), None), *self.norm.second(x[1:], (g,), x[0])]

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return Torch(self.norm.torch_gradient).second(x, t, g)

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        if name == "second":
            return self._largest(x, t, g)
        sizes = copy.copy(self.norm)
        sizes.absolute = True
        return getattr(NormGradient(sizes), name)([np.abs(x[0]), x[1]], absolute(t), np.abs(g))

    def _largest(self, x: Arrays, t: Arrays, g: Any) -> list[np.ndarray]:
        """A bound on the terms of second derivatives: PyTorch does not say what is added up."""
        y = self.norm.value(x[1:], (), None)
        least = y[y > 0].min(initial=np.inf)
        (u, v), w = (np.abs(a).max(initial=0) for a in t), np.abs(g).max(initial=0)
        taps = self.norm.reads.shape[1]
        return [
            np.full_like(x[0], taps**2 * v * w / least),
            np.full_like(x[1], taps**2 * w * (u + np.abs(x[0]).max(initial=0) * v / least) / least),
        ]


class Torch(Reference):
    """A function of PyTorch's tensors; `multilinear` where it is linear in each operand."""

    def __init__(self, f: Callable[..., Any], *, multilinear: bool = False) -> None:
        self.f, self.multilinear = f, multilinear

    def _tensors(self, arrays: Arrays) -> tuple[Any, ...]:
        import torch

        return tuple(torch.from_numpy(np.array(a, np.float64)) for a in arrays)

    def _pulled(self, *x_and_g: Any) -> tuple[Any, ...]:
        import torch

        return torch.func.vjp(self.f, *x_and_g[:-1])[1](x_and_g[-1])

    def _derivatives_of_gradient(self, x: Arrays, t: Arrays, g: Any) -> tuple[Any, ...]:
        """In the operands, and last in the cotangent, in which it is linear: that is the tangent."""
        import torch

        return torch.func.vjp(self._pulled, *self._tensors([*x, g]))[1](self._tensors(t))

    def value(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self.f(*self._tensors(x)).numpy()

    def tangent(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return self._derivatives_of_gradient(x, t, g)[-1].numpy()

    def gradient(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return [dx.numpy() for dx in self._pulled(*self._tensors([*x, g]))]

    def second(self, x: Arrays, t: Arrays, g: Any) -> Any:
        return [dx.numpy() for dx in self._derivatives_of_gradient(x, t, g)[:-1]]

    def magnitude(self, name: str, x: Arrays, t: Arrays, g: Any) -> Any:
        found = super().magnitude(name, absolute(x) if self.multilinear else x, t, g)
        return np.abs(found) if isinstance(found, np.ndarray) else absolute(found)
