"""Networks that make images: U-Net in two and three dimensions, DCGAN."""

from __future__ import annotations

from jax_mps.cli.bench.models.layers import Array, Layers

__all__ = ["dcgan", "unet"]


def unet(
    layers: Layers,
    x: Array,
    *,
    width: int = 32,
    levels: int = 4,
    up: int = 2,
    normal: bool = False,
    outputs: int = 3,
) -> Array:
    """A U-Net (Ronneberger and others, 2015) of as many dimensions as its input.

    Its up-convolutions have `up` taps along an axis. With `normal` batch normalisation follows every
    convolution, as in 3-D U-Net (Çiçek and others, 2016).
    """

    def block(x: Array, features: int) -> Array:
        for _ in range(2):
            x = layers.conv(x, features, 3, bias=not normal)
            x = layers.relu(layers.batch_norm(x) if normal else x)
        return x

    skips = []
    for level in range(levels):
        x = block(layers.max_pool(x, 2, 2) if level else x, width * 2**level)
        skips.append(x)
    for level in reversed(range(levels - 1)):
        x = layers.conv_transpose(x, width * 2**level, up, 2, up // 2 - 1)
        x = block(layers.concatenate(skips[level], x), width * 2**level)
    return layers.conv(x, outputs, 1)


def dcgan(layers: Layers, noise: Array, images: Array, *, width: int = 64) -> Array:
    """What the discriminator of a DCGAN (Radford and others, 2015) says of its generator's images and others.

    The generator makes 64 x 64 pixels in three colours of noise of one pixel.
    """
    x = layers.conv_transpose(noise, 8 * width, 4, 1, bias=False)
    for features in (4 * width, 2 * width, width):
        x = layers.conv_transpose(layers.relu(layers.batch_norm(x)), features, 4, 2, 1, bias=False)
    x = layers.tanh(layers.conv_transpose(layers.relu(layers.batch_norm(x)), 3, 4, 2, 1, bias=False))

    x = layers.leaky_relu(layers.conv(layers.stack(x, images), width, 4, 2, 1, bias=False), 0.2)
    for features in (2 * width, 4 * width, 8 * width):
        x = layers.leaky_relu(layers.batch_norm(layers.conv(x, features, 4, 2, 1, bias=False)), 0.2)
    return layers.conv(x, 1, 4, 1, 0, bias=False)
