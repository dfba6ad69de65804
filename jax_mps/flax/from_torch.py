"""The arrays of PyTorch's layers, as Flax's layers of the same kind hold them."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_mps.conventions import array_from_torch, kernel_from_torch

__all__ = ["arrays_from_torch", "variables_from_torch"]

_STATISTICS = {"running_mean": "mean", "running_var": "var"}

_CLASSES = {
    "ConvTranspose": ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"],
    "Conv": ["Conv1d", "Conv2d", "Conv3d"],
    "Linear": ["Linear"],
    "Norm": [
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        *("GroupNorm", "LayerNorm", "RMSNorm"),  # the last one since PyTorch 2.4
    ],
}

# What the layers hold, and what weight norm, spectral norm and pruning add.
_KNOWN = re.compile(
    r"(weight|bias)(_(g|v|u|orig|mask))?|running_(mean|var)|num_batches_tracked|parametrizations\..*"
)

_STATE_DICT = (
    "a state_dict, which says neither which weights are those of a transposed convolution nor their groups: "
    "load it into the module (`module.load_state_dict(state)`) and pass the module"
)


def arrays_from_torch(layer: Any) -> dict[str, jax.Array]:
    """The parameters and statistics of one layer of PyTorch, by Flax's names.

        Linear           kernel[c, o] = weight[o, c]
        Conv             kernel[k, c, o] = weight[o, c, k]
        ConvTranspose    `kernel_from_torch(weight, groups)`, for `transpose_kernel=False`
        normalisation    scale = weight, mean = running_mean, var = running_var

    Weight norm, spectral norm, pruning and other parametrisations are computed: the kernel is the weight that
    the layer has in evaluation. The layer stays as it is.

    Args:
      layer: a `torch.nn` layer, or one of a class derived from it: `Linear`, `Conv1d` to `Conv3d`,
        `ConvTranspose1d` to `ConvTranspose3d`, or a normalisation. Its arrays count, not its `forward`.

    Returns:
      "kernel" and "bias"; or "scale" and "bias", with "mean" and "var" where there are running statistics.
      They are copies of the type that the layer has, bfloat16 and complex numbers too; float64 needs
      `jax_enable_x64`, as everywhere in JAX.

    Raises:
      TypeError: `layer` is of another kind, has parameters of another name, or is a state_dict.
      ValueError: an array has no values yet: a lazy layer before its first call, or the device "meta".

    Examples:
      >>> import torch
      >>> from jax_mps.flax.from_torch import arrays_from_torch
      >>> arrays_from_torch(torch.nn.ConvTranspose2d(8, 3, 4))["kernel"].shape
      (4, 4, 8, 3)
      >>> normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 3))
      >>> arrays_from_torch(normed)["kernel"].shape
      (8, 3)

    Source: `torch.nn`.
    """
    kind = _kind(layer)
    if kind is None:
        got = _STATE_DICT if isinstance(layer, Mapping) else type(layer).__name__
        raise TypeError(f"layer must be a Linear, Conv, ConvTranspose or Norm of torch.nn, got {got}")
    if own := [name for name in layer.state_dict() if not _KNOWN.fullmatch(name)]:
        raise TypeError(
            f"layer must have the parameters of torch.nn's {kind} alone, got {own} in {type(layer).__name__}"
        )
    layer = _in_evaluation(layer)
    arrays = {
        _STATISTICS.get(name, name): array_from_torch(f"{name} of {type(layer).__name__}", tensor)
        for name in ("weight", "bias", *_STATISTICS)
        if (tensor := getattr(layer, name, None)) is not None
    }
    if (weight := arrays.pop("weight", None)) is None:
        return arrays  # a normalisation without scale
    if kind == "Norm":
        return {"scale": weight, **arrays}
    if kind == "ConvTranspose":
        return {"kernel": kernel_from_torch(weight, layer.groups), **arrays}
    return {"kernel": jnp.moveaxis(weight, (0, 1), (-1, -2)), **arrays}  # a Linear has no other axes


def variables_from_torch(layers: Any) -> dict[str, Any]:
    """The variables of a Linen module, from PyTorch's layers under the names that Flax gives its own.

    Args:
      layers: a mapping from Flax's names to layers of PyTorch, as `arrays_from_torch` takes them. Or a
        whole `torch.nn.Module`: its layers keep their names, with one level of the tree for each part between
        dots. A state_dict has to be loaded into its module first.

    Returns:
      `{"params": ..., "batch_stats": ...}`, the second only if there are running statistics.

    Raises:
      TypeError: a layer is of another kind, another part of the module has parameters of its own, or
        `layers` is a state_dict.
      ValueError: an array has no values yet, see `arrays_from_torch`.

    Examples:
      >>> import jax, torch
      >>> from jax_mps.flax.from_torch import variables_from_torch
      >>> conv, norm = torch.nn.ConvTranspose2d(8, 3, 4), torch.nn.BatchNorm2d(3)
      >>> variables = variables_from_torch({"ConvTranspose_0": conv, "BatchNorm_0": norm})
      >>> jax.tree.map(lambda a: a.shape, variables["batch_stats"])
      {'BatchNorm_0': {'mean': (3,), 'var': (3,)}}
      >>> module = torch.nn.ModuleDict({"up": torch.nn.Sequential(conv, norm)})
      >>> jax.tree.map(lambda a: a.shape, variables_from_torch(module)["batch_stats"])
      {'up': {'1': {'mean': (3,), 'var': (3,)}}}

    Source: `flax.linen`.
    """
    variables: dict[str, Any] = {"params": {}}
    for path, layer in _paths(layers):
        for key, value in arrays_from_torch(layer).items():
            node = variables.setdefault("batch_stats" if key in _STATISTICS.values() else "params", {})
            for name in path:
                node = node.setdefault(name, {})
            node[key] = value
    return variables


def _kind(layer: Any) -> str | None:
    """Which of Flax's layers holds such arrays."""
    torch = sys.modules.get("torch")  # a layer of PyTorch has imported it
    if torch is None:
        return None
    for kind, names in _CLASSES.items():
        if isinstance(layer, tuple(getattr(torch.nn, name) for name in names if hasattr(torch.nn, name))):
            return kind
    return None


def _in_evaluation(layer: Any) -> Any:
    """A copy of a layer whose attributes are the arrays that it computes with in evaluation."""
    twin = object.__new__(type(layer))  # layers with parametrisations refuse `copy.copy`
    # In training, reading a weight can change what its parametrisation holds, so that is copied.
    vars(twin).update(vars(layer), _modules=copy.deepcopy(layer._modules))
    twin.eval()
    for hook in twin._forward_pre_hooks.values():
        # The older functions of torch.nn.utils set attributes before each call.
        if any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__):
            hook(twin, ())
    return twin


def _paths(layers: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The layers, each with its place in the tree."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(layers, torch.nn.Module):
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must be a mapping or a torch.nn.Module, got {type(layers).__name__}")
        if torch is not None and any(isinstance(value, torch.Tensor) for value in layers.values()):
            raise TypeError(f"layers must be layers of torch.nn by name, got {_STATE_DICT}")
        yield from (((name,), layer) for name, layer in layers.items())
        return
    inside: str | None = None  # of a layer are only parametrisations
    for name, part in layers.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if _kind(part) is not None:
            inside = f"{name}." if name else ""
            yield tuple(name.split(".")) if name else (), part
        elif own := [key for key in part.state_dict() if "." not in key]:
            raise TypeError(
                f"layers must hold parameters in a Linear, Conv, ConvTranspose or Norm of torch.nn alone, "
                f"got {own} of {type(part).__name__} {name!r}: pass the layers by name, without it"
            )
