"""Example models: a U-Net and a DCGAN, in Linen (`models.linen`) and in NNX (`models.nnx`)."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType

__all__ = ["with_stock_flax"]


def with_stock_flax(models: ModuleType) -> ModuleType:
    """The same models on Flax's own layers: their source again, with only its import line changed.

    Args:
      models: `jax_mps.flax.models.linen` or `jax_mps.flax.models.nnx`.

    Returns:
      A module with the same names.

    Raises:
      ValueError: the module does not import its layers from `jax_mps.flax`.

    Examples:
      >>> from jax_mps.flax import models
      >>> import jax_mps.flax.models.linen
      >>> stock = models.with_stock_flax(models.linen)
      >>> stock.nn.ConvTranspose.__module__
      'flax.linen.linear'
    """
    source = inspect.getsource(models)
    ours, theirs = "\nfrom jax_mps.flax import ", "\nfrom flax import "
    if source.count(ours) != 1:
        raise ValueError(f"models must have one line{ours}..., got {models.__name__}")
    spec = importlib.util.spec_from_loader(f"{models.__name__}_with_stock_flax", loader=None)
    assert spec is not None
    stock = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stock  # where dataclasses look for the names in their annotations
    exec(compile(source.replace(ours, theirs), f"{models.__file__} with stock Flax", "exec"), vars(stock))
    return stock
