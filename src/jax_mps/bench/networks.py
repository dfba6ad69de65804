"""Training steps of whole networks: this library's layers beside stock JAX's, all else the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from jax_mps import networks
from jax_mps.bench.runner import Case, Contender, compiled

__all__ = ["Networks"]


class Networks:
    """The U-Net of the demonstration (images of 64 x 64), and a DCGAN (64 x 64).

    | operation | what is timed |
    |---|---|
    | train_step | the gradient of the loss to all weights; of both losses, for the DCGAN |
    """

    ops = ("train_step",)
    shapes = ("unet", "dcgan_gan")

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names; networks are channels last."""
        make = {"unet": _unet, "dcgan_gan": _dcgan}[shape]
        step, operands = make(batch)
        return Case(
            shape=shape,
            description=", ".join(str(a.shape) for a in operands[1:]),
            op=op,
            dtype=dtype,
            layout=layout,
            bytes_moved=0,
            # Rounding errors pass through many layers, and through maxima that almost tie.
            tolerances=(100 * float(jnp.finfo(dtype).eps) ** 0.75,),
            contenders={
                name: functools.partial(_contender, name, step, operands, dtype, layout)
                for name in contenders
            },
        )


Step = Callable[[networks.Layers], Callable[..., Any]]


def _unet(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    def step(layers: networks.Layers) -> Callable[..., Any]:
        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(networks.unet(layers, params, x) - y))

        return jax.grad(loss)

    x, y = jax.random.uniform(jax.random.key(1), (2, batch or 8, 64, 64, 3))
    return step, (networks.denoiser_init(jax.random.key(0)), x, y)


def _dcgan(batch: int | None) -> tuple[Step, tuple[Any, ...]]:
    def step(layers: networks.Layers) -> Callable[..., Any]:
        def loss(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
            generator, discriminator = params
            return sum(networks.dcgan_losses(layers, generator, discriminator, images, noise), jnp.zeros(()))

        return jax.grad(loss)

    images = jax.random.uniform(jax.random.key(1), (batch or 32, 64, 64, 3))
    noise = jax.random.normal(jax.random.key(2), (batch or 32, 100))
    return step, (networks.dcgan_init(jax.random.key(0)), images, noise)


def _contender(name: str, step: Step, operands: tuple[Any, ...], dtype: str, layout: str) -> Contender:
    if name.startswith("torch"):
        raise NotImplementedError("the networks are written in JAX")
    if layout == "channels_first":
        raise NotImplementedError("the networks are channels last")
    gradient = step(networks.STOCK if name == "lax" else networks.ours(name))
    data = jax.tree.map(lambda a: a.astype(dtype), operands)

    def fetch(outputs: Any) -> list[np.ndarray]:
        return [np.asarray(jax.flatten_util.ravel_pytree(outputs)[0], np.float64)]

    return compiled(gradient, data, fetch)
