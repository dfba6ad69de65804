"""A U-Net and a DCGAN in Flax Linen. On Flax's own layers they differ in one import line alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_mps.flax import linen as nn

__all__ = ["Discriminator", "Generator", "UNet"]


class UNet(nn.Module):
    """A U-Net that adds something to an image, whose sizes are multiples of `2 ** (levels - 1)`.

    Its transposed convolutions have 4 x 4 taps and stride 2, which leave no checkerboard: every pixel is
    reached by as many taps.

    Attributes:
      colors: channels of the image.
      channels: channels of the highest level; every level below has twice as many.
      levels: how many there are.
      depth: ordinary convolutions in a row.
      window: taps of the transposed convolutions along an axis.
    """

    colors: int = 3
    channels: int = 32
    levels: int = 3
    depth: int = 2
    window: int = 4

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """The image plus what the network adds to it."""

        def block(x: jax.Array, level: int) -> jax.Array:
            for _ in range(self.depth):
                x = nn.relu(nn.Conv(self.channels * 2**level, (3, 3))(x))
            return x

        x, skips = block(image, 0), []
        for level in range(1, self.levels):
            skips.append(x)
            x = block(nn.max_pool(x, (2, 2), strides=(2, 2)), level)
        for level in reversed(range(self.levels - 1)):
            x = nn.ConvTranspose(self.channels * 2**level, (self.window,) * 2, strides=(2, 2))(x)
            x = block(jnp.concatenate([skips[level], x], axis=-1), level)
        return image + nn.Conv(self.colors, (1, 1))(x)


class Generator(nn.Module):
    """The generator of a DCGAN: from noise of shape `(batch, n)` to images of 64 x 64 pixels in -1 to 1.

    Attributes:
      colors: channels of the images.
      channels: channels before the last layer; every layer before has twice as many.
    """

    colors: int = 3
    channels: int = 64

    @nn.compact
    def __call__(self, noise: jax.Array, train: bool = False) -> jax.Array:
        """Images for a batch of noise."""
        x = noise[:, None, None, :]
        x = nn.ConvTranspose(8 * self.channels, (4, 4), padding="VALID", use_bias=False)(x)
        for width in (4 * self.channels, 2 * self.channels, self.channels, self.colors):
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.ConvTranspose(width, (4, 4), strides=(2, 2), use_bias=False)(x)
        return nn.tanh(x)


class Discriminator(nn.Module):
    """The discriminator of a DCGAN: a number for every image of 64 x 64 pixels, high for a real one.

    Attributes:
      channels: channels after the first layer; every layer after has twice as many.
    """

    channels: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of shape `(batch,)`."""
        x = images
        for layer in range(4):
            x = nn.Conv(self.channels * 2**layer, (4, 4), strides=(2, 2), use_bias=False)(x)
            if layer > 0:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (4, 4), padding="VALID", use_bias=False)(x)[:, 0, 0, 0]
