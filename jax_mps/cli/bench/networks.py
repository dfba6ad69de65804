"""Training steps of whole networks: this library's layers beside stock JAX's or Flax's, all else the same."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import jax_mps
from jax_mps.cli import networks
from jax_mps.cli.bench.runner import Case, Contender, compiled

__all__ = ["Networks"]


_FLAX = importlib.util.find_spec("flax") is not None


class Networks:
    """Networks written in JAX, and the example models of `jax_mps.flax.models`, Linen, beside stock Flax.

    | shape | network |
    |---|---|
    | unet | the U-Net of the demonstration, 8 images of 64 x 64 |
    | dcgan_gan | a DCGAN, 32 images of 64 x 64 |
    | flax_unet | a U-Net with 32 channels at the top and three levels, 4 images of 128 x 128 |
    | flax_dcgan | a DCGAN, 32 images of 64 x 64 |

    | operation | what is timed |
    |---|---|
    | train_step | the gradient of the loss to all weights; of both losses, for the DCGAN |
    """

    ops = ("train_step",)
    shapes = ("unet", "dcgan_gan") + ("flax_unet", "flax_dcgan") * _FLAX

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names; networks are channels last."""
        make = {"unet": _unet, "dcgan_gan": _dcgan, "flax_unet": _flax_unet, "flax_dcgan": _flax_dcgan}[shape]
        step, operands = make(batch)
        return Case(
            shape=shape,
            description=", ".join(str(a.shape) for a in operands[1:]),
            op=op,
            dtype=dtype,
            layout=layout,
            bytes_moved=0,
            # Rounding errors pass through many layers, and through maxima that almost tie.
            tolerances=(300 * float(jnp.finfo(dtype).eps) ** 0.75,),
            contenders={
                name: functools.partial(_contender, name, step, operands, dtype, layout)
                for name in contenders
            },
        )


Step = Callable[[str], Callable[..., Any]]
"""Gives the gradient to its first operand, on the layers of a contender."""


def _layers(contender: str) -> networks.Layers:
    return networks.STOCK if contender == "lax" else networks.ours(contender)


def _unet(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    def step(contender: str) -> Callable[..., Any]:
        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(networks.unet(_layers(contender), params, x) - y))

        return jax.grad(loss)

    x, y = jax.random.uniform(jax.random.key(1), (2, batch or 8, 64, 64, 3))
    return step, (networks.denoiser_init(jax.random.key(0)), x, y)


def _dcgan(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    def step(contender: str) -> Callable[..., Any]:
        def loss(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
            generator, discriminator = params
            losses = networks.dcgan_losses(_layers(contender), generator, discriminator, images, noise)
            return sum(losses, jnp.zeros(()))

        return jax.grad(loss)

    images = jax.random.uniform(jax.random.key(1), (batch or 32, 64, 64, 3))
    noise = jax.random.normal(jax.random.key(2), (batch or 32, 100))
    return step, (networks.dcgan_init(jax.random.key(0)), images, noise)


def _flax_models(contender: str) -> Any:
    """The example models on the contender's layers."""
    from jax_mps.flax import models
    from jax_mps.flax.models import linen

    on_cpu = jax.default_backend() == "cpu"
    if contender == ("native" if on_cpu and jax_mps.native_available() else "xla"):
        return linen
    if contender == "lax":
        return models.with_stock_flax(linen)
    raise NotImplementedError("the Flax models take the path that the library chooses")


def _flax_parameters(model: Any, operand: jax.Array) -> Any:
    """Parameters that keep the variance; Flax's initialisers take seconds to compile for every shape."""
    random = np.random.default_rng(0)

    def fill(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "kernel":
            scale = math.sqrt(2 / math.prod(like.shape[:-1]))
            return jnp.asarray(scale * random.standard_normal(like.shape), jnp.float32)
        return jnp.full(like.shape, path[-1].key == "scale", jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), operand)["params"]
    return jax.tree_util.tree_map_with_path(fill, shapes)


def _flax_unet(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    from jax_mps.flax.models import linen

    def step(contender: str) -> Callable[..., Any]:
        model = _flax_models(contender).UNet()

        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(model.apply({"params": params}, x) - y))

        return jax.grad(loss)

    x, y = jax.random.uniform(jax.random.key(1), (2, batch or 4, 128, 128, 3))
    return step, (_flax_parameters(linen.UNet(), x), x, y)


def _flax_dcgan(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    from jax_mps.flax.models import linen

    def step(contender: str) -> Callable[..., Any]:
        models = _flax_models(contender)

        def run(model: Any, params: Any, operand: jax.Array) -> jax.Array:
            return model.apply({"params": params}, operand, train=True, mutable="batch_stats")[0]

        def loss(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
            generator, discriminator = params
            made = run(models.Generator(), generator, noise)
            judge = functools.partial(run, models.Discriminator())
            fooled = jax.nn.softplus(-judge(jax.lax.stop_gradient(discriminator), made))
            told = jax.nn.softplus(-judge(discriminator, images)) + jax.nn.softplus(
                judge(discriminator, jax.lax.stop_gradient(made))
            )
            return fooled.mean() + told.mean()

        return jax.grad(loss)

    images = jax.random.uniform(jax.random.key(1), (batch or 32, 64, 64, 3), minval=-1)
    noise = jax.random.normal(jax.random.key(2), (batch or 32, 100))
    params = (
        _flax_parameters(linen.Generator(), noise),
        _flax_parameters(linen.Discriminator(), images),
    )
    return step, (params, images, noise)


def _contender(name: str, step: Step, operands: tuple[Any, ...], dtype: str, layout: str) -> Contender:
    if name.startswith("torch"):
        raise NotImplementedError("the networks are written in JAX")
    if layout == "channels_first":
        raise NotImplementedError("the networks are channels last")
    gradient = step(name)
    data = jax.tree.map(lambda a: a.astype(dtype), operands)

    def fetch(outputs: Any) -> list[np.ndarray]:
        return [np.asarray(jax.flatten_util.ravel_pytree(outputs)[0], np.float64)]

    return compiled(gradient, data, fetch)
