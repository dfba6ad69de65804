"""A U-Net and a DCGAN in Flax NNX. On Flax's own layers they differ in one import line alone."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jax_mps.flax import nnx

__all__ = ["Discriminator", "Generator", "UNet"]


class _Block(nnx.Module):
    """Ordinary convolutions in a row."""

    def __init__(self, before: int, after: int, depth: int, rngs: nnx.Rngs) -> None:
        self.convolutions = nnx.List(
            [nnx.Conv(after if i else before, after, (3, 3), rngs=rngs) for i in range(depth)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        return x


class UNet(nnx.Module):
    """A U-Net that adds something to an image, whose sizes are multiples of `2 ** (levels - 1)`.

    Its transposed convolutions have 4 x 4 taps and stride 2, which leave no checkerboard: every pixel is
    reached by as many taps.

    Args:
      colors: channels of the image.
      channels: channels of the highest level; every level below has twice as many.
      levels: how many there are.
      depth: ordinary convolutions in a row.
      window: taps of the transposed convolutions along an axis.
      rngs: the random numbers of the initialisers.
    """

    def __init__(
        self,
        colors: int = 3,
        channels: int = 32,
        levels: int = 3,
        depth: int = 2,
        window: int = 4,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        widths = [channels * 2**level for level in range(levels)]
        pairs = list(itertools.pairwise(widths))
        self.first = _Block(colors, channels, depth, rngs)
        self.down = nnx.List([_Block(above, below, depth, rngs) for above, below in pairs])
        self.up = nnx.List(
            [
                nnx.ConvTranspose(below, above, (window, window), strides=(2, 2), rngs=rngs)
                for above, below in pairs
            ]
        )
        self.merge = nnx.List([_Block(2 * above, above, depth, rngs) for above, _ in pairs])
        self.last = nnx.Conv(channels, colors, (1, 1), rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The image plus what the network adds to it."""
        x, skips = self.first(image), []
        for block in self.down:
            skips.append(x)
            x = block(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        for skip, up, block in reversed(list(zip(skips, self.up, self.merge, strict=True))):
            x = block(jnp.concatenate([skip, up(x)], axis=-1))
        return image + self.last(x)


class Generator(nnx.Module):
    """The generator of a DCGAN: from noise of shape `(batch, noise)` to images of 64 x 64 pixels in -1 to 1.

    Args:
      noise: length of the noise.
      colors: channels of the images.
      channels: channels before the last layer; every layer before has twice as many.
      rngs: the random numbers of the initialisers.
    """

    def __init__(self, noise: int = 100, colors: int = 3, channels: int = 64, *, rngs: nnx.Rngs) -> None:
        widths = [8 * channels, 4 * channels, 2 * channels, channels, colors]
        self.first = nnx.ConvTranspose(noise, widths[0], (4, 4), padding="VALID", use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths[:-1]])
        self.ups = nnx.List(
            [
                nnx.ConvTranspose(before, after, (4, 4), strides=(2, 2), use_bias=False, rngs=rngs)
                for before, after in itertools.pairwise(widths)
            ]
        )

    def __call__(self, noise: jax.Array) -> jax.Array:
        """Images for a batch of noise."""
        x = self.first(noise[:, None, None, :])
        for norm, up in zip(self.norms, self.ups, strict=True):
            x = up(nnx.relu(norm(x)))
        return nnx.tanh(x)


class Discriminator(nnx.Module):
    """The discriminator of a DCGAN: a number for every image of 64 x 64 pixels, high for a real one.

    Args:
      colors: channels of the images.
      channels: channels after the first layer; every layer after has twice as many.
      rngs: the random numbers of the initialisers.
    """

    def __init__(self, colors: int = 3, channels: int = 64, *, rngs: nnx.Rngs) -> None:
        widths = [colors, *(channels * 2**layer for layer in range(4))]
        self.downs = nnx.List(
            [
                nnx.Conv(before, after, (4, 4), strides=(2, 2), use_bias=False, rngs=rngs)
                for before, after in itertools.pairwise(widths)
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths[2:]])
        self.last = nnx.Conv(widths[-1], 1, (4, 4), padding="VALID", use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape `(batch,)`."""
        first, *others = self.downs
        x = nnx.leaky_relu(first(images), 0.2)
        for down, norm in zip(others, self.norms, strict=True):
            x = nnx.leaky_relu(norm(down(x)), 0.2)
        return self.last(x)[:, 0, 0, 0]
