"""The networks by name. Sizes are such that a training step takes 0.1 to 1 s in stock JAX on two cores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax_mps.cli.bench.models import classifiers, images, sequences

__all__ = ["MODELS", "Model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and its inputs.

    Attributes:
      function: of the layers and the inputs.
      inputs: the shapes of the inputs, channels last.
    """

    function: Callable[..., Any]
    inputs: tuple[tuple[int, ...], ...]

    def scaled(self, factor: float) -> Model:
        """The same with that many times the images, at least one."""
        inputs = tuple((max(1, round(n * factor)), *rest) for n, *rest in self.inputs)
        return dataclasses.replace(self, inputs=inputs)


def _model(function: Callable[..., Any], *inputs: tuple[int, ...], **sizes: Any) -> Model:
    return Model(functools.partial(function, **sizes), inputs)


_MOBILENET = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
_EFFICIENTNET = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip

MODELS: dict[str, Model] = {
    "resnet18": _model(classifiers.resnet, (8, 128, 128, 3), depths=(2, 2, 2, 2), bottleneck=False),
    "resnet50": _model(classifiers.resnet, (4, 128, 128, 3), depths=(3, 4, 6, 3), bottleneck=True),
    "mobilenet_v2": _model(classifiers.mobilenet, (8, 96, 96, 3), stages=_MOBILENET),
    "efficientnet_b0": _model(classifiers.efficientnet, (8, 96, 96, 3), stages=_EFFICIENTNET),
    "convnext_t": _model(
        classifiers.convnext, (4, 96, 96, 3), depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)
    ),
    "unet_2x2": _model(images.unet, (4, 128, 128, 3), up=2),
    "unet_4x4": _model(images.unet, (4, 128, 128, 3), up=4),
    "gan": _model(images.dcgan, (16, 1, 1, 100), (16, 64, 64, 3)),
    "hifigan_v2": _model(sequences.hifigan, (4, 32, 80)),
    "tcn": _model(sequences.tcn, (4, 4096, 16)),
    "state_space": _model(sequences.state_space, (4, 1024, 192)),
    "unet_3d": _model(images.unet, (2, 32, 32, 32, 1), width=16, levels=3, normal=True, outputs=2),
}
