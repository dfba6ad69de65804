"""Networks of sequences: a HiFi-GAN generator, a TCN, state-space blocks without their scan."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mps.cli.bench.models.layers import Array, Layers

__all__ = ["hifigan", "state_space", "tcn"]


def hifigan(
    layers: Layers,
    x: Array,
    *,
    width: int = 128,
    ups: Sequence[tuple[int, int]] = ((16, 8), (16, 8), (4, 2), (4, 2)),
    windows: Sequence[int] = (3, 7, 11),
    dilations: Sequence[int] = (1, 3, 5),
) -> Array:
    """The generator of HiFi-GAN (Kong and others, 2020), version 2: frames of a spectrum become samples."""

    def residual(x: Array, features: int, window: int) -> Array:
        for dilation in dilations:
            y = layers.conv(layers.leaky_relu(x, 0.1), features, window, dilation=dilation)
            x = x + layers.conv(layers.leaky_relu(y, 0.1), features, window)
        return x

    x = layers.conv(x, width, 7)
    for level, (window, stride) in enumerate(ups):
        features = width // 2 ** (level + 1)
        x = layers.leaky_relu(x, 0.1)
        x = layers.conv_transpose(x, features, window, stride, (window - stride) // 2)
        x = sum(residual(x, features, taps) for taps in windows) / len(windows)
    return layers.tanh(layers.conv(layers.leaky_relu(x, 0.01), 1, 7))


def tcn(layers: Layers, x: Array, *, width: int = 64, levels: int = 7, window: int = 3) -> Array:
    """A temporal convolutional network (Bai and others, 2018): residual dilated causal convolutions."""
    for level in range(levels):
        y = x
        for _ in range(2):
            y = layers.relu(layers.conv(y, width, window, padding="causal", dilation=2**level))
        x = layers.relu(y + (x if level else layers.conv(x, width, 1)))
    return layers.dense(x, 1)


def state_space(layers: Layers, x: Array, *, width: int = 192, blocks: int = 4) -> Array:
    """Mamba's blocks (Gu and Dao, 2023) without their scan: projection, depthwise convolution, gate."""
    for _ in range(blocks):
        inner, gate = layers.split(layers.dense(layers.layer_norm(x), 4 * width))
        inner = layers.silu(layers.conv(inner, 2 * width, 4, padding="causal", groups=2 * width))
        x = x + layers.dense(inner * layers.silu(gate), width)
    return x
