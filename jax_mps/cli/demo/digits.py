"""Handwritten digits: a classifier that uses max, average and L2 pooling.

The same network runs on this library's pooling and on stock `lax.reduce_window`. Before it is trained
its gradient is compared with finite differences and with the stock network's; afterwards it must
recognise at least 95 of 100 digits that it has not seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_mps
from jax_mps.cli.demo.part import Outcome, median_milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from rich.console import Console

__all__ = ["run"]

_EPOCHS = 30
_BATCH = 64
_TIMED_BATCH = 256
_TIMED_ROUNDS = 31
_DEMANDED_ACCURACY = 0.95

Params = dict[str, jax.Array]


# --- the network --------------------------------------------------------------------------------------


class Poolings(NamedTuple):
    """The three poolings of the network."""

    max: Callable[[jax.Array], jax.Array]
    average: Callable[[jax.Array], jax.Array]
    l2: Callable[[jax.Array], jax.Array]


OURS = Poolings(
    max=lambda x: jax_mps.max_pool(x, (3, 3), strides=2, padding=1),
    average=lambda x: jax_mps.avg_pool(x, (2, 2), strides=2),
    l2=lambda x: jax_mps.l2_pool(x, (2, 2), strides=2),
)


def _stock_sum(x: jax.Array) -> Any:
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


STOCK = Poolings(
    max=lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    ),
    average=lambda x: _stock_sum(x) / 4,
    l2=lambda x: jnp.sqrt(_stock_sum(jnp.square(x))),
)


def init(key: jax.Array) -> Params:
    """The initial weights."""
    keys = jax.random.split(key, 3)
    initializer = jax.nn.initializers.he_normal()
    return {
        "stem": initializer(keys[0], (3, 3, 1, 24)),
        "stem_bias": jnp.zeros(24),
        "body": initializer(keys[1], (3, 3, 24, 48)),
        "body_bias": jnp.zeros(48),
        "head": initializer(keys[2], (48, 10)),
        "head_bias": jnp.zeros(10),
    }


def logits(pool: Poolings, params: Params, images: jax.Array) -> jax.Array:
    """The scores of the ten digits for images of 8 x 8 pixels."""
    x = jax.nn.silu(_convolution(images, params["stem"]) + params["stem_bias"])
    x = pool.max(x)  # 4 x 4
    x = jax.nn.silu(_convolution(x, params["body"]) + params["body_bias"])
    x = pool.l2(pool.average(x))  # 2 x 2, then 1 x 1
    return x.reshape(len(x), -1) @ params["head"] + params["head_bias"]


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss(pool: Poolings, params: Params, images: jax.Array, labels: Any) -> jax.Array:
    """The mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(pool, params, images), labels).mean()


# --- the run ------------------------------------------------------------------------------------------


def run(console: Console, seed: int) -> Outcome:
    """Checks, trains, tests and times the network."""
    console.rule("handwritten digits")
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, random_state=seed, stratify=digits.target
    )
    params = init(jax.random.key(seed))

    off_differences, off_stock = check_gradient(params, train_x[:8], train_y[:8], seed)
    console.print(
        f"gradient  off finite differences by {off_differences:.1e}, off stock pooling's by {off_stock:.1e}"
    )
    assert off_differences < 1e-6, "the gradient is not that of the network"
    assert off_stock < 1e-12, "the gradient is not that of the stock network"

    params, losses = train(params, train_x, train_y, seed, console)
    predicted = np.asarray(jnp.argmax(logits(OURS, params, test_x), axis=-1))
    accuracy = float(np.mean(predicted == test_y))
    console.print(f"accuracy  {accuracy:.1%} of {len(test_y)} digits that it has not seen")

    ours, stock = time_steps(params, train_x[:_TIMED_BATCH], train_y[:_TIMED_BATCH])
    console.print(
        f"time      {ours:.2f} ms a gradient, {stock:.2f} ms on stock pooling ({stock / ours:.2f} times ours)"
    )
    passed = accuracy >= _DEMANDED_ACCURACY
    if not passed:
        console.print(f"[red]at least {_DEMANDED_ACCURACY:.0%} were expected")
    return Outcome(passed, functools.partial(draw, test_x, test_y, predicted, losses, accuracy))


def check_gradient(params: Params, images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """The relative errors of the gradient beside finite differences and beside the stock network.

    In double precision, to weights and images. Noise on the images keeps max pooling away from the ties
    of their empty background, where there is no derivative to compare with.
    """
    rng = np.random.default_rng(seed)
    with _double_precision():
        noisy = images.astype(np.float64) + 0.1 * rng.random(images.shape)
        point = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, noisy))
        direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), point)

        @jax.jit
        def value(step: float) -> jax.Array:
            moved = jax.tree.map(lambda a, d: a + step * d, point, direction)
            return loss(OURS, moved[0], moved[1], labels)

        step = 1e-7  # small, lest some window change its maximum on the way
        difference = (value(step) - value(-step)) / (2 * step)
        gradients = [
            jax.jit(jax.grad(lambda p, pool=pool: loss(pool, p[0], p[1], labels)))(point)
            for pool in (OURS, STOCK)
        ]
        ours, stock = (jax.flatten_util.ravel_pytree(g)[0] for g in gradients)
        along = ours @ jax.flatten_util.ravel_pytree(direction)[0]
        return (
            float(abs(along - difference) / abs(difference)),
            float(jnp.max(jnp.abs(ours - stock)) / jnp.max(jnp.abs(stock))),
        )


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def train(
    params: Params, images: np.ndarray, labels: np.ndarray, seed: int, console: Console
) -> tuple[Params, list[float]]:
    """The weights after training, and the loss of each step."""
    steps = len(images) // _BATCH
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, _EPOCHS * steps))

    @jax.jit
    def update(params: Params, state: Any, images: Any, labels: Any) -> tuple[Params, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss, argnums=1)(OURS, params, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    rng = np.random.default_rng(seed)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for _ in progress.track(range(_EPOCHS), description="training"):
            for batch in rng.permutation(len(images))[: steps * _BATCH].reshape(steps, _BATCH):
                params, state, value = update(params, state, images[batch], labels[batch])
                losses.append(value)
    return params, [float(value) for value in losses]


def time_steps(params: Params, images: np.ndarray, labels: np.ndarray) -> list[float]:
    """The median milliseconds of a gradient of the network, on our pooling and on stock pooling."""
    gradients = [jax.jit(jax.grad(functools.partial(loss, pool))) for pool in (OURS, STOCK)]
    return median_milliseconds(gradients, (params, images, labels), _TIMED_ROUNDS)


# --- the picture --------------------------------------------------------------------------------------


def draw(
    images: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    losses: Sequence[float],
    accuracy: float,
    panel: SubFigure,
) -> None:
    """Some digits with what was read, the loss, and where each pooling sends a gradient."""
    top, middle, bottom = panel.subfigures(3, squeeze=False, height_ratios=(1, 2, 1.6))[:, 0]
    right, wrong = (np.flatnonzero((predicted == labels) == truth) for truth in (True, False))
    chosen = [*wrong[:3], *right][:10]
    top.suptitle(f"Digits that it has not seen, misread ones in red ({accuracy:.1%} are right)")
    for axes, index in zip(top.subplots(1, 10), chosen, strict=True):
        axes.imshow(images[index, ..., 0], cmap="gray_r")
        axes.set_title(str(predicted[index]), color="red" if index in wrong else "black")
        axes.set_axis_off()

    axes = middle.subplots()
    axes.semilogy(losses, linewidth=0.8)
    axes.set(title="Training", xlabel="step", ylabel="cross entropy")

    bottom.suptitle("Where a gradient of one for every window goes, windows of 3 x 3, stride 2")
    image = jnp.asarray(images[:1])
    window: dict[str, Any] = {"window_shape": (3, 3), "strides": 2, "padding": 1}
    ones = jnp.ones((1, 4, 4, 1))
    pictures = {
        "digit": image,
        "max": jax_mps.max_pool_gradient(ones, image, **window),
        "average": jax_mps.avg_pool_gradient(ones, image.shape, **window),
        "L2": jax_mps.l2_pool_gradient(ones, image, **window),
    }
    for axes, (title, picture) in zip(bottom.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(np.asarray(picture)[0, ..., 0], cmap="gray_r" if title == "digit" else "viridis")
        axes.set_title(title)
        axes.set_axis_off()
