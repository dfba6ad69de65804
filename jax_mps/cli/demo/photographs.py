"""Photographs: a U-Net that removes noise, with max pooling on its way down and transposed convolutions up.

The same network runs on this library's layers and on stock JAX's. Before it is trained, the two gradients
are compared; afterwards it must have removed most of the noise from parts of the photographs that it has
not seen.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_sample_images

from jax_mps.cli import networks
from jax_mps.cli.demo.part import Outcome, median_milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_SIZE = 64  # pixels of a patch
_BATCH = 8
_STEPS = 200
_NOISE = 0.15
_SEEN = 0.75  # the left part of every photograph; the rest is for the test
_DEMANDED_GAIN = 4.0  # decibels
_TIMED_ROUNDS = 5


def loss(layers: networks.Layers, params: Any, noisy: Any, clean: Any) -> jax.Array:
    """The mean square of what is left of the noise."""
    return jnp.mean(jnp.square(networks.unet(layers, params, noisy) - clean))


def run(console: Console, seed: int) -> Outcome:
    """Checks, trains, tests and times the network."""
    console.rule("photographs")
    photographs = [image.astype(np.float32) / 255 for image in load_sample_images().images]
    rng = np.random.default_rng(seed)
    params = networks.denoiser_init(jax.random.key(seed))

    noisy, clean = patches(photographs, rng, 2, seen=True)
    off = compare_gradients(params, noisy, clean)
    console.print(f"gradient  off that of stock layers by {off:.1e}")
    assert off < 1e-4, "the gradient is not that of the stock network"

    params, losses = train(params, photographs, rng, console)
    start, end = (statistics.fmean(part) for part in (losses[:10], losses[-10:]))
    console.print(f"loss      {start:.4f} in the first ten steps, {end:.4f} in the last")

    noisy, clean = patches(photographs, rng, 16, seen=False)
    cleaned = np.asarray(jax.jit(functools.partial(networks.unet, networks.ours()))(params, noisy))
    before, after = (decibels(image, clean) for image in (noisy, cleaned))
    console.print(
        f"noise     {before:.1f} dB of signal before, {after:.1f} dB after, in parts it has not seen"
    )

    ours, stock = time_steps(params, *patches(photographs, rng, _BATCH, seen=True))
    console.print(
        f"time      {ours:.1f} ms a gradient, {stock:.1f} ms on stock layers ({stock / ours:.2f} times ours)"
    )
    passed = end < start / 2 and after >= before + _DEMANDED_GAIN
    if not passed:
        console.print(f"[red]half the loss and {_DEMANDED_GAIN:.0f} dB more were expected")
    return Outcome(passed, functools.partial(draw, noisy, cleaned, clean, losses, after - before))


def patches(
    photographs: Sequence[np.ndarray], rng: np.random.Generator, count: int, *, seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Random squares of the photographs, with noise and without."""
    clean = np.empty((count, _SIZE, _SIZE, 3), np.float32)
    for patch in clean:
        image = photographs[int(rng.integers(len(photographs)))]
        border = int(_SEEN * image.shape[1])
        columns = (0, border - _SIZE) if seen else (border, image.shape[1] - _SIZE)
        y, x = rng.integers(image.shape[0] - _SIZE + 1), rng.integers(columns[0], columns[1] + 1)
        patch[...] = image[y : y + _SIZE, x : x + _SIZE]
    return clean + _NOISE * rng.standard_normal(clean.shape, np.float32), clean


def compare_gradients(params: Any, noisy: np.ndarray, clean: np.ndarray) -> float:
    """The greatest difference to the gradient on stock layers, beside the greatest entry."""
    gradients = [
        jax.flatten_util.ravel_pytree(
            jax.jit(jax.grad(functools.partial(loss, layers)))(params, noisy, clean)
        )[0]
        for layers in (networks.ours(), networks.STOCK)
    ]
    return float(jnp.max(jnp.abs(gradients[0] - gradients[1])) / jnp.max(jnp.abs(gradients[1])))


def train(
    params: Any, photographs: Sequence[np.ndarray], rng: np.random.Generator, console: Console
) -> tuple[Any, list[float]]:
    """The weights after training, and the loss of each step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, _STEPS))

    @jax.jit
    def update(params: Any, state: Any, noisy: Any, clean: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(functools.partial(loss, networks.ours()))(params, noisy, clean)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    columns = (TextColumn("training, loss {task.fields[loss]:.4f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=_STEPS, loss=float("nan"))
        for _ in range(_STEPS):
            params, state, value = update(params, state, *patches(photographs, rng, _BATCH, seen=True))
            losses.append(float(value))
            progress.update(task, advance=1, loss=losses[-1])
    return params, losses


def decibels(image: np.ndarray, clean: np.ndarray) -> float:
    """The peak signal-to-noise ratio."""
    return float(-10 * np.log10(np.mean(np.square(image - clean))))


def time_steps(params: Any, noisy: np.ndarray, clean: np.ndarray) -> list[float]:
    """The median milliseconds of a gradient of the network, on our layers and on stock layers."""
    gradients = [
        jax.jit(jax.grad(functools.partial(loss, layers))) for layers in (networks.ours(), networks.STOCK)
    ]
    return median_milliseconds(gradients, (params, noisy, clean), _TIMED_ROUNDS)


def draw(
    noisy: np.ndarray,
    cleaned: np.ndarray,
    clean: np.ndarray,
    losses: Sequence[float],
    gain: float,
    panel: SubFigure,
) -> None:
    """Input, output and target of some patches, and the loss."""
    top, bottom = panel.subfigures(2, squeeze=False, height_ratios=(3, 2))[:, 0]
    top.suptitle(f"Parts of the photographs that it has not seen ({gain:.1f} dB less noise)")
    chosen = np.argsort(-clean.var(axis=(1, 2, 3)))[:6]  # those with most to see
    for row, (title, images) in zip(
        top.subplots(3, len(chosen)),
        {"input": noisy, "output": cleaned, "target": clean}.items(),
        strict=True,
    ):
        for axes, image in zip(row, images[chosen], strict=True):
            axes.imshow(np.clip(image, 0, 1))
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    axes = bottom.subplots()
    axes.semilogy(losses, linewidth=0.8)
    axes.set(title="Training", xlabel="step", ylabel="mean square error")
