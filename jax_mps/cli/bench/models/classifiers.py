"""Classifiers of images: ResNet, MobileNetV2, EfficientNet, ConvNeXt."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mps.cli.bench.models.layers import Array, Layers

__all__ = ["convnext", "efficientnet", "mobilenet", "resnet"]


def resnet(
    layers: Layers, x: Array, *, depths: Sequence[int], bottleneck: bool, width: int = 64, classes: int = 1000
) -> Array:
    """A ResNet (He and others, 2015), with the stride of a bottleneck at its 3 x 3 convolution."""

    def normal(x: Array, features: int, window: int, stride: int = 1) -> Array:
        return layers.batch_norm(layers.conv(x, features, window, stride, bias=False))

    def block(x: Array, features: int, stride: int, *, project: bool) -> Array:
        wide = 4 * features if bottleneck else features
        if bottleneck:
            y = layers.relu(normal(x, features, 1))
            y = layers.relu(normal(y, features, 3, stride))
            y = normal(y, wide, 1)
        else:
            y = layers.relu(normal(x, features, 3, stride))
            y = normal(y, wide, 3)
        return layers.relu(y + (normal(x, wide, 1, stride) if project else x))

    x = layers.relu(normal(x, width, 7, 2))
    x = layers.max_pool(x, 3, 2, 1)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            project = i == 0 and (stage > 0 or bottleneck)
            x = block(x, width * 2**stage, 2 if i == 0 and stage else 1, project=project)
    return layers.dense(layers.mean(x), classes)


def mobilenet(
    layers: Layers, x: Array, *, stages: Sequence[Sequence[int]], head: int = 1280, classes: int = 1000
) -> Array:
    """A MobileNetV2 (Sandler and others, 2018); a stage is its expansion, channels, blocks, and stride."""

    def normal(x: Array, features: int, window: int, stride: int = 1, groups: int = 1) -> Array:
        return layers.batch_norm(layers.conv(x, features, window, stride, groups=groups, bias=False))

    x, before = layers.relu6(normal(x, 32, 3, 2)), 32
    for expansion, features, blocks, stride in stages:
        for i in range(blocks):
            inner, y = expansion * before, x
            if expansion > 1:
                y = layers.relu6(normal(y, inner, 1))
            y = layers.relu6(normal(y, inner, 3, 1 if i else stride, inner))
            y = normal(y, features, 1)
            x = x + y if i else y
            before = features
    x = layers.relu6(normal(x, head, 1))
    return layers.dense(layers.mean(x), classes)


def efficientnet(
    layers: Layers, x: Array, *, stages: Sequence[Sequence[int]], head: int = 1280, classes: int = 1000
) -> Array:
    """An EfficientNet (Tan and Le, 2019); a stage is its expansion, channels, blocks, stride, and taps."""

    def normal(x: Array, features: int, window: int, stride: int = 1, groups: int = 1) -> Array:
        return layers.batch_norm(layers.conv(x, features, window, stride, groups=groups, bias=False))

    def excited(x: Array, inner: int, squeezed: int) -> Array:
        """Every channel times a number that is made of the means of all of them."""
        weights = layers.silu(layers.conv(layers.mean(x), squeezed, 1))
        return x * layers.sigmoid(layers.conv(weights, inner, 1))

    x, before = layers.silu(normal(x, 32, 3, 2)), 32
    for expansion, features, blocks, stride, window in stages:
        for i in range(blocks):
            inner, y = expansion * before, x
            if expansion > 1:
                y = layers.silu(normal(y, inner, 1))
            y = layers.silu(normal(y, inner, window, 1 if i else stride, inner))
            y = normal(excited(y, inner, max(1, before // 4)), features, 1)
            x = x + y if i else y
            before = features
    x = layers.silu(normal(x, head, 1))
    return layers.dense(layers.mean(x), classes)


def convnext(
    layers: Layers, x: Array, *, depths: Sequence[int], widths: Sequence[int], classes: int = 1000
) -> Array:
    """A ConvNeXt (Liu and others, 2022), without the scales that train from 1e-6."""
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage == 0:
            x = layers.layer_norm(layers.conv(x, width, 4, 4, 0))
        else:
            x = layers.conv(layers.layer_norm(x), width, 2, 2, 0)
        for _ in range(depth):
            y = layers.layer_norm(layers.conv(x, width, 7, groups=width))
            x = x + layers.dense(layers.gelu(layers.dense(y, 4 * width)), width)
    return layers.dense(layers.layer_norm(layers.mean(x)), classes)
