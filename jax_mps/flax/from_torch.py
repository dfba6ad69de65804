"""The arrays of PyTorch's layers, as Flax's layers of the same kind hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_mps.conventions import kernel_from_torch

__all__ = ["arrays_from_torch", "variables_from_torch"]

_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def arrays_from_torch(layer: Any) -> dict[str, jax.Array]:
    """The parameters and statistics of one layer of PyTorch, by Flax's names.

    Args:
      layer: a `torch.nn` layer: `Linear`, `Conv1d` to `Conv3d`, `ConvTranspose1d` to `ConvTranspose3d` (whose
        kernel is for `transpose_kernel=False`), or a normalisation.

    Returns:
      "kernel" and "bias"; or "scale" and "bias", with "mean" and "var" where there are running statistics.

    Raises:
      TypeError: `layer` is of another kind.

    Examples:
      >>> import torch
      >>> from jax_mps.flax.from_torch import arrays_from_torch
      >>> arrays_from_torch(torch.nn.ConvTranspose2d(8, 3, 4))["kernel"].shape
      (4, 4, 8, 3)

    Source: `torch.nn`.
    """
    kind = type(layer).__name__
    # Copies: PyTorch updates its own in place.
    state = {k: jnp.array(v.detach().cpu().numpy()) for k, v in layer.state_dict().items()}
    state.pop("num_batches_tracked", None)
    weight = state.pop("weight", None)
    arrays = {_STATISTICS.get(name, name): value for name, value in state.items()}
    if weight is None:
        if "Norm" in kind:
            return arrays  # a normalisation without scale
    elif kind == "Linear":
        return {"kernel": weight.T, **arrays}
    elif kind.startswith("ConvTranspose"):
        return {"kernel": kernel_from_torch(weight, layer.groups), **arrays}
    elif kind.startswith("Conv"):
        return {"kernel": jnp.moveaxis(weight, (0, 1), (-1, -2)), **arrays}
    elif "Norm" in kind:
        return {"scale": weight, **arrays}
    raise TypeError(f"layer must be a Linear, Conv, ConvTranspose or Norm of torch.nn, got {kind}")


def variables_from_torch(layers: Mapping[str, Any]) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """The variables of a Linen module, from PyTorch's layers under the names that Flax gives its own.

    Args:
      layers: layers of PyTorch, as `arrays_from_torch` takes them.

    Returns:
      `{"params": ..., "batch_stats": ...}`, the second only if there are running statistics.

    Raises:
      TypeError: a layer is of another kind.

    Examples:
      >>> import jax, torch
      >>> from jax_mps.flax.from_torch import variables_from_torch
      >>> conv, norm = torch.nn.ConvTranspose2d(8, 3, 4), torch.nn.BatchNorm2d(3)
      >>> variables = variables_from_torch({"ConvTranspose_0": conv, "BatchNorm_0": norm})
      >>> jax.tree.map(lambda a: a.shape, variables["batch_stats"])
      {'BatchNorm_0': {'mean': (3,), 'var': (3,)}}

    Source: `flax.linen`.
    """
    variables: dict[str, dict[str, dict[str, jax.Array]]] = {"params": {}}
    for name, layer in layers.items():
        for key, value in arrays_from_torch(layer).items():
            collection = "batch_stats" if key in _STATISTICS.values() else "params"
            variables.setdefault(collection, {}).setdefault(name, {})[key] = value
    return variables
