"""Handwritten digits again: a classifier in stock Flax, with `jax_mps.accelerate()` and without.

The network is like MobileNet: convolutions of each channel by itself, then of single pixels. Nothing in it
is of this library. The same training runs twice: its losses must be the same, its time is not.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import jax_mps
from jax_mps.cli.demo.part import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from rich.console import Console

__all__ = ["run"]

_MAGNIFIED = 4  # the images have 8 x 8 pixels
_BLOCKS = ((32, 1), (64, 2), (64, 1))  # channels and strides
_STEPS = 40
_BATCH = 32
_COMPARED = 10  # steps; training enlarges differences of rounding little by little
_ALLOWED = 1e-4


# --- the network, in which nothing is ours ------------------------------------------------------------


class MobileNet(nn.Module):
    """The scores of the ten digits."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Images with their channels last."""
        x = nn.relu6(nn.Conv(16, (3, 3), strides=2)(x))
        for channels, strides in _BLOCKS:
            x = nn.Conv(x.shape[-1], (3, 3), strides, feature_group_count=x.shape[-1])(x)
            x = nn.relu6(nn.GroupNorm(4)(x))
            x = nn.Conv(channels, (1, 1))(x)
            x = nn.relu6(nn.GroupNorm(4)(x))
        x = nn.avg_pool(x, (4, 4), strides=(4, 4))  # type: ignore[no-untyped-call]
        return nn.Dense(10)(x.reshape(len(x), -1))


_MODEL = MobileNet()
_OPTIMIZER = optax.adam(5e-3)


@jax.jit
def _update(variables: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
    def loss(variables: Any) -> jax.Array:
        logits = _MODEL.apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(variables)
    updates, state = _OPTIMIZER.update(gradient, state)
    return optax.apply_updates(variables, updates), state, value


# --- the run ------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """The loss of each step, and the median milliseconds of a step."""

    losses: np.ndarray
    milliseconds: float


def run(console: Console, seed: int) -> Outcome:
    """Trains the network twice and compares."""
    console.rule("handwritten digits, in stock Flax")
    digits = load_digits()
    images = np.kron(digits.images / 16, np.ones((_MAGNIFIED, _MAGNIFIED)))[..., None].astype(np.float32)
    labels = digits.target.astype(np.int32)
    # The generator compiles much faster than the default one.
    variables = jax.jit(_MODEL.init)(jax.random.key(seed, impl="rbg"), images[:1])

    stock = train(variables, images, labels, seed)
    with jax_mps.accelerate() as acceleration:
        ours = train(variables, images, labels, seed)
    report = acceleration.report()
    console.print(f"report    {sum(row.ours for row in report)} of {len(report)} operations were replaced")
    off = float(np.max(np.abs(ours.losses / stock.losses - 1)[:_COMPARED]))
    start, end = ours.losses[0], float(np.mean(ours.losses[-5:]))
    console.print(f"loss      {start:.2f} -> {end:.2f}, off stock JAX's by {off:.1e} in {_COMPARED} steps")
    console.print(
        f"time      {ours.milliseconds:.1f} ms a step, {stock.milliseconds:.1f} ms without accelerate() "
        f"({stock.milliseconds / ours.milliseconds:.2f} times ours)"
    )
    passed = off < _ALLOWED and end < start / 2
    if not passed:
        console.print(f"[red]half the loss, and a difference below {_ALLOWED:g} were expected")
    return Outcome(passed, functools.partial(draw, stock, ours))


def train(variables: Any, images: np.ndarray, labels: np.ndarray, seed: int) -> Training:
    """Some steps of training."""
    rng = np.random.default_rng(seed)
    state, losses, times = _OPTIMIZER.init(variables), [], []
    for _ in range(_STEPS):
        batch = rng.integers(len(images), size=_BATCH)
        start = time.perf_counter()
        variables, state, value = _update(variables, state, images[batch], labels[batch])
        losses.append(float(value))
        times.append(1e3 * (time.perf_counter() - start))
    return Training(np.array(losses), float(np.median(times[1:])))  # the first compiles


def draw(stock: Training, ours: Training, panel: SubFigure) -> None:
    """The losses of both, and the times."""
    panel.suptitle("A network in stock Flax, with accelerate() and without")
    left, right = panel.subplots(1, 2, width_ratios=(2, 1))
    for name, training, style in (
        ("stock JAX", stock, {"linewidth": 3, "color": "C1"}),
        ("accelerate()", ours, {"linewidth": 1, "color": "C0"}),
    ):
        left.plot(training.losses, label=name, **style)
        right.bar_label(right.bar(name, training.milliseconds, 0.6, color=style["color"]), fmt="%.1f")
    left.set(title="The same losses", xlabel="step", ylabel="cross entropy")
    left.legend()
    right.set(title="Milliseconds a step")
