"""Adaptive, fractional and p-norm pooling as loops over boxes of pixels, and random calls beside PyTorch's.

Arrays are channels first here: `(batch, channels, *spatial)`. Nothing is shared with the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_mps
import oracle

Boxes = Sequence[Sequence[range]]
"""For every spatial axis, the pixels of every window."""


def first(x: Any, data_format: str) -> np.ndarray:
    """With the channels first."""
    return np.moveaxis(np.asarray(x), -1, 1) if data_format == "channels_last" else np.asarray(x)


def last(x: Any, data_format: str) -> np.ndarray:
    """From channels first to `data_format`."""
    return np.moveaxis(np.asarray(x), 1, -1) if data_format == "channels_last" else np.asarray(x)


def adaptive(sizes: Sequence[int], counts: Sequence[int]) -> Boxes:
    return [
        [range(math.floor(i * n / o), math.ceil((i + 1) * n / o)) for i in range(o)]
        for n, o in zip(sizes, counts, strict=True)
    ]


def each_box(boxes: Boxes) -> Any:
    """For every window its number and the index of its pixels."""
    for number in itertools.product(*(range(len(axis)) for axis in boxes)):
        pixels = [axis[i] for i, axis in zip(number, boxes, strict=True)]
        yield number, np.ix_(*pixels)


def averages(x: np.ndarray, boxes: Boxes) -> np.ndarray:
    y = np.zeros((*x.shape[:2], *map(len, boxes)))
    for number, box in each_box(boxes):
        y[(..., *number)] = x[(..., *box)].mean(tuple(range(2, x.ndim)))
    return y


def averages_gradient(g: np.ndarray, sizes: Sequence[int], boxes: Boxes) -> np.ndarray:
    dx = np.zeros((*g.shape[:2], *sizes))
    for number, box in each_box(boxes):
        share = g[(..., *number)] / math.prod(len(axis[i]) for i, axis in zip(number, boxes, strict=True))
        dx[(..., *box)] += share[(..., *[None] * len(sizes))]
    return dx


def maxima(x: np.ndarray, boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Values and flat positions of the first maxima, or first NaN."""
    plane = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    y = np.zeros((*x.shape[:2], *map(len, boxes)), x.dtype)
    at = np.zeros(y.shape, np.int32)
    for number, box in each_box(boxes):
        taps = x[(..., *box)].reshape(*x.shape[:2], -1)
        best = np.argmax(taps, -1)
        y[(..., *number)] = np.take_along_axis(taps, best[..., None], -1)[..., 0]
        at[(..., *number)] = plane[box].ravel()[best]
    return y, at


def put(g: np.ndarray, at: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Every gradient added to the pixel at its position."""
    dx = np.zeros((*g.shape[:2], math.prod(sizes)))
    for b, c in np.ndindex(g.shape[:2]):
        np.add.at(dx[b, c], at[b, c].ravel(), g[b, c].ravel())
    return dx.reshape(*g.shape[:2], *sizes)


def starts(sample: Any, size: int, taps: int, count: int) -> list[int]:
    """PyTorch's sequence, rounded after every step to the type of `sample`."""
    kind = sample.dtype.type
    found = []
    for i in range(count - 1):
        alpha = kind(kind(size - taps) / kind(count - 1))
        found.append(int(kind(kind(kind(i) + sample) * alpha)) - int(kind(sample * alpha)))
    return [*found, size - taps]


def fractional(
    x: np.ndarray, window: Sequence[int], counts: Sequence[int], samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values and positions of fractional pooling."""
    rank = x.ndim - 2
    y = np.zeros((*x.shape[:2], *counts), x.dtype)
    at = np.zeros(y.shape, np.int32)
    for b, c in np.ndindex(x.shape[:2]):
        sample = samples[b, c][::-1] if rank == 2 else samples[b, c]
        boxes = [
            [range(s, s + k) for s in starts(u, n, k, o)]
            for u, n, k, o in zip(sample, x.shape[2:], window, counts, strict=True)
        ]
        one, place = maxima(x[b : b + 1, c : c + 1], boxes)
        y[b, c], at[b, c] = one[0, 0], place[0, 0]
    return y, at


def taps_of(x: Any, window: Sequence[int], call: dict[str, Any], zero: Any) -> list[Any]:
    """For every tap, what all windows read there, from slices of `zero(shape)` with the image in it."""
    lines = oracle.lines(tuple(x.shape[2:]), window, **call)
    lows = [max(a.low, 0) for a in lines]
    ends = [max(a.tap(a.windows - 1, a.taps - 1) + 1, a.size) for a in lines]
    big = zero((*x.shape[:2], *(low + end for low, end in zip(lows, ends, strict=True))))
    inside = tuple(slice(low + a.first, low + a.last) for low, a in zip(lows, lines, strict=True))
    big[(..., *inside)] = x[(..., *(slice(a.first, a.last) for a in lines))]
    found = []
    for tap in itertools.product(*map(range, window)):
        begins = [low + a.tap(0, k) for low, a, k in zip(lows, lines, tap, strict=True)]
        slices = (
            slice(b, b + (a.windows - 1) * a.stride + 1, a.stride) for b, a in zip(begins, lines, strict=True)
        )
        found.append(big[(..., *slices)])
    return found


def norms(x: np.ndarray, window: Sequence[int], p: float, **call: Any) -> np.ndarray:
    """p-norms, scaled by the greatest tap."""
    taps = np.abs(np.stack(taps_of(x.astype(np.float64), window, call, np.zeros)))
    largest = taps.max(0)
    if p == math.inf:
        return largest
    scale = np.where((largest == 0) | np.isinf(largest), 1.0, largest)
    return scale * ((taps / scale) ** p).sum(0) ** (1 / p)


# --- random calls beside PyTorch's --------------------------------------------------------------------


class Case(NamedTuple):
    """A function of an image in channels first, what PyTorch says of it in float64, and how it was called."""

    call: Callable[..., Any]
    x: np.ndarray
    g: np.ndarray
    value: np.ndarray
    indices: np.ndarray | None
    gradient: np.ndarray
    terms: int
    description: str


DTYPES = (*["float32"] * 4, "float64", "float16", "bfloat16")
NAMES = ("adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "lp_pool")


def draw(number: int) -> Case:
    """The case of a number, always the same one."""
    rng = np.random.default_rng(number)
    name, dtype = NAMES[number % len(NAMES)], DTYPES[number // len(NAMES) % len(DTYPES)]
    rank = int(rng.integers(2, 4) if name == "fractional_max_pool" else rng.integers(1, 4))
    implementation = str(rng.choice(["native", "xla"]))
    data_format = str(rng.choice(["channels_last", "channels_first"]))
    outer = tuple(int(n) for n in rng.integers(1, 4, 2))

    def ints(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high + 1, rank))

    largest = (12, 9, 6)[rank - 1]
    options: dict[str, Any] = {}
    if name == "fractional_max_pool":
        window, counts = ints(1, 3), ints(1, 4)
        more = ints(1, 4)  # PyTorch refuses 0 in three dimensions
        sizes = tuple(k + o - 1 + m for k, o, m in zip(window, counts, more, strict=True))
        samples = jnp.asarray(rng.uniform(0, 0.99, (*outer, rank)), dtype)
        positional: tuple[Any, ...] = (window, counts, samples)
    elif name == "lp_pool":
        sizes, window = ints(1, largest), ints(1, 3)
        while not options or not readable(sizes, window, options):
            pads = tuple((int(low), int(high)) for low, high in rng.integers(-1, 4, (rank, 2)))
            options = {"strides": ints(1, 3), "padding": pads, "window_dilation": ints(1, 2)}
            options["ceil_mode"] = bool(rng.integers(2))
        order = float(rng.choice([1, 1.5, 2, 2.5, 3, 4, 7, 30, math.inf]))
        positional = (window,)
    else:
        sizes, positional = ints(1, largest), (ints(1, largest + 2),)
    x = np.asarray(jnp.asarray(rng.normal(size=(*outer, *sizes)), dtype))
    if name.endswith("max_pool"):
        x = np.asarray(jnp.asarray(np.round(2 * rng.normal(size=x.shape)) / 2, dtype))  # ties
    value, indices, pull_back, terms = reference(
        name, x, positional, options | ({"p": order} if name == "lp_pool" else {})
    )
    g = np.asarray(jnp.asarray(rng.normal(size=value.shape), dtype))
    keywords = options | {"data_format": data_format, "implementation": implementation}
    if name == "lp_pool":
        keywords["p"] = order
    if indices is not None:
        keywords["return_indices"] = True

    def call(x: Any) -> Any:
        last = data_format == "channels_last"
        result = getattr(jax_mps, name)(jnp.moveaxis(x, 1, -1) if last else x, *positional, **keywords)
        return jax.tree.map(lambda y: jnp.moveaxis(y, -1, 1), result) if last else result

    described = f"{number}: {name}{(x.shape, dtype, positional, keywords)}"
    return Case(call, x, g, value, indices, pull_back(np.asarray(g, np.float64)), terms, described)


def readable(sizes: Sequence[int], window: Sequence[int], call: dict[str, Any]) -> bool:
    """Whether there are windows, and all of them have a tap in the image."""
    lines = oracle.lines(sizes, window, **call)
    return all(a.windows > 0 and all(a.counted(i, (0, 0)) for i in range(a.windows)) for a in lines)


def reference(name: str, x: np.ndarray, positional: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """PyTorch's value, indices, pull-back and how many terms a result or a gradient has."""
    import torch

    rank = x.ndim - 2
    image = torch.tensor(x.astype(np.float64), requires_grad=True)
    indices = None
    functional = torch.nn.functional
    terms = math.prod(x.shape[2:])
    if name == "adaptive_avg_pool":
        y = getattr(functional, f"adaptive_avg_pool{rank}d")(image, *positional)
        terms = max(terms, y[0, 0].numel())
    elif name == "adaptive_max_pool":
        y, indices = getattr(functional, f"adaptive_max_pool{rank}d")(image, *positional, return_indices=True)
        terms = y[0, 0].numel()
    elif name == "fractional_max_pool":
        window, counts, samples = positional
        kind = getattr(torch, samples.dtype.name)  # in which PyTorch computes where windows start
        _, indices = getattr(functional, f"fractional_max_pool{rank}d")(
            image.detach().to(kind),
            window,
            counts,
            return_indices=True,
            _random_samples=torch.tensor(np.asarray(samples, np.float64)).to(kind),
        )
        y = image.flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape)
        terms = y[0, 0].numel()
    else:
        options = dict(options)
        p = options.pop("p")
        taps = taps_of(image, positional[0], options, lambda n: torch.zeros(n, dtype=torch.float64))
        stacked = torch.stack(taps)
        if p == math.inf:  # of equal taps PyTorch's norm gives each a part of the gradient
            best = np.argmax(np.abs(stacked.detach().numpy()), 0)
            y = stacked.abs().gather(0, torch.tensor(best)[None])[0]
        else:
            y = torch.linalg.vector_norm(stacked, p, 0)
        terms = 8 * len(taps) * (1 if math.isinf(p) else math.ceil(p))  # errors of a power grow with it
    at = None if indices is None else indices.numpy()

    def pull_back(g: np.ndarray) -> np.ndarray:
        return torch.autograd.grad(y, image, torch.tensor(g))[0].numpy()

    return y.detach().numpy(), at, pull_back, terms


def differences(numbers: Sequence[int]) -> list[str]:
    """Runs cases in one program, and says which of them are not PyTorch's."""
    cases = [draw(i) for i in numbers]

    def run(operands: Any) -> Any:
        results = []
        for case, (x, g) in zip(cases, operands, strict=True):
            found, pull_back = jax.vjp(lambda x, case=case: jax.tree.leaves(case.call(x))[0], x)
            results.append((found, pull_back(g)[0], jax.tree.leaves(case.call(x))[1:]))
        return results

    wrong = []
    results = jax.jit(run)([(case.x, case.g) for case in cases])
    for case, (y, dx, indices) in zip(cases, results, strict=True):
        try:
            assert y.dtype == dx.dtype == case.x.dtype
            oracle.assert_close(y, case.value, length=case.terms)
            oracle.assert_close(dx, case.gradient, length=case.terms)
            assert len(indices) == (case.indices is not None)
            for at in indices:
                oracle.assert_same(at, case.indices)
        except AssertionError as error:
            wrong.append(f"{case.description}\n{error}")
    return wrong
