"""Activation functions of convolutions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mps.mps.structs import MPSCNNNeuronType, member

Array = Any
TYPE = MPSCNNNeuronType

DEFAULTS = {
    TYPE.RELU: {"a": 0.0},
    TYPE.LINEAR: {"a": 1.0, "b": 0.0},
    TYPE.HARD_SIGMOID: {"a": 0.2, "b": 0.5},
    TYPE.TANH: {"a": 1.0, "b": 1.0},
    TYPE.SOFT_PLUS: {"a": 1.0, "b": 1.0},
    TYPE.ELU: {"a": 1.0},
    TYPE.RELUN: {"a": 1.0, "b": 6.0},
    TYPE.POWER: {"a": 1.0, "b": 0.0, "c": 1.0},
    TYPE.EXPONENTIAL: {"a": 1.0, "b": 0.0, "c": -1.0},
    TYPE.LOGARITHM: {"a": 1.0, "b": 0.0, "c": -1.0},
}
"""What a, b and c are when they are not given; 0 for a type that does not use them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSNNNeuronDescriptor:
    """An activation function f, applied last in a convolution.

    | type | f(x) | defaults |
    |---|---|---|
    | `NONE` | x | |
    | `RELU` | x where x >= 0, else a * x | a = 0 |
    | `LINEAR` | a * x + b | a = 1, b = 0 |
    | `SIGMOID` | 1 / (1 + exp(-x)) | |
    | `HARD_SIGMOID` | a * x + b, cut to 0 .. 1 | a = 0.2, b = 0.5 |
    | `TANH` | a * tanh(b * x) | a = 1, b = 1 |
    | `ABSOLUTE` | abs(x) | |
    | `SOFT_PLUS` | a * log(1 + exp(b * x)) | a = 1, b = 1 |
    | `SOFT_SIGN` | x / (1 + abs(x)) | |
    | `ELU` | x where x >= 0, else a * (exp(x) - 1) | a = 1 |
    | `PRELU` | x where x >= 0, else data[channel] * x | |
    | `RELUN` | that of `RELU`, at most b | a = 1, b = 6 |
    | `POWER` | (a * x + b) ** c | a = 1, b = 0, c = 1 |
    | `EXPONENTIAL` | c ** (a * x + b); base e for c = -1 | a = 1, b = 0, c = -1 |
    | `LOGARITHM` | log(a * x + b) to the base c; e for c = -1 | a = 1, b = 0, c = -1 |
    | `GELU` | x * (1 + erf(x / sqrt(2))) / 2 | |

    Args:
      neuron_type: which function, as an `MPSCNNNeuronType`, its number or its name.
      a: its parameter a.
      b: its parameter b.
      c: its parameter c.
      data: for `PRELU`, the slope of each output channel.

    Examples:
      >>> from jax_mps import mps
      >>> mps.MPSNNNeuronDescriptor(neuron_type="relun", a=0.1).b
      6.0

    Source: `MPSNNNeuronDescriptor` and the classes `MPSCNNNeuron...` in MPSCNNNeuron.h.
    """

    neuron_type: MPSCNNNeuronType = TYPE.NONE
    a: float = None  # type: ignore[assignment]  # the default depends on the type
    b: float = None  # type: ignore[assignment]
    c: float = None  # type: ignore[assignment]
    data: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        kind = member(TYPE, "neuron_type", self.neuron_type)
        object.__setattr__(self, "neuron_type", kind)
        for name in "abc":
            value = getattr(self, name)
            if value is None:
                value = DEFAULTS.get(kind, {}).get(name, 0.0)
            object.__setattr__(self, name, float(value))
        if (kind == TYPE.PRELU) != (self.data is not None):
            raise ValueError(
                "data must be given for PRELU, one slope for each output channel, and for nothing else, got "
                f"data={self.data!r} for {kind.name}"
            )
        if self.data is not None:
            object.__setattr__(self, "data", tuple(np.ravel(self.data).astype(float).tolist()))
        if kind in (TYPE.EXPONENTIAL, TYPE.LOGARITHM) and self.c != -1 and self.c <= 0:
            raise ValueError(f"c must be a positive base, or -1 for e, with {kind.name}, got {self.c}")


def apply(x: Array, neuron: MPSNNNeuronDescriptor) -> Array:
    """f(x), for an array whose last axis is the channels."""
    a, b, c = neuron.a, neuron.b, neuron.c

    def relu(slope: Any) -> Array:
        return jnp.where(x >= 0, x, slope * x)

    def base() -> float:
        return 1.0 if c == -1 else math.log(c)

    match neuron.neuron_type:
        case TYPE.NONE:
            return x
        case TYPE.RELU:
            return relu(a)
        case TYPE.LINEAR:
            return a * x + b
        case TYPE.SIGMOID:
            return jax.nn.sigmoid(x)
        case TYPE.HARD_SIGMOID:
            return jnp.clip(a * x + b, 0, 1)
        case TYPE.TANH:
            return a * jnp.tanh(b * x)
        case TYPE.ABSOLUTE:
            return jnp.abs(x)
        case TYPE.SOFT_PLUS:
            return a * jax.nn.softplus(b * x)
        case TYPE.SOFT_SIGN:
            return jax.nn.soft_sign(x)
        case TYPE.ELU:
            return jnp.where(x >= 0, x, a * jnp.expm1(jnp.minimum(x, 0)))
        case TYPE.PRELU:
            slopes = jnp.asarray(neuron.data, x.dtype)
            return relu(slopes.reshape((1,) * (x.ndim - 1) + slopes.shape))
        case TYPE.RELUN:
            return jnp.minimum(relu(a), b)
        case TYPE.POWER:
            return jnp.power(a * x + b, c)
        case TYPE.EXPONENTIAL:
            return jnp.exp((a * x + b) * base())
        case TYPE.LOGARITHM:
            return jnp.log(a * x + b) / base()
        case TYPE.GELU:
            return jax.nn.gelu(x, approximate=False)
