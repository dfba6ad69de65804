"""Training steps of unmodified Flax models, as functions to lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_mps.cli.bench.models.catalogue import MODELS
from jax_mps.cli.bench.models.flax_layers import Network, variables

OPTIMISERS: dict[str, Callable[[], Any]] = {
    # Both have the gradient in their state.
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
}


class Step(NamedTuple):
    """A step, and what it takes: variables, state of the optimiser, inputs, of one image each."""

    call: Callable[..., Any]
    operands: tuple[Any, Any, list[np.ndarray]]


def step(name: str, optimiser: str) -> Step:
    """The step gives the parameters, the state of the optimiser, and the running averages."""
    model = MODELS[name].scaled(0.01)
    network, rule = Network(model.function, True), OPTIMISERS[optimiser]()
    found = variables(network, model.inputs)
    random = np.random.default_rng(0)
    inputs = [random.standard_normal(shape).astype(np.float32) for shape in model.inputs]

    def call(found: Any, state: Any, inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            out, rest = network.apply({**found, "params": params}, *inputs, mutable="batch_stats")
            return jnp.mean(jnp.square(out)), rest

        gradient, rest = jax.grad(loss, has_aux=True)(found["params"])
        updates, state_after = rule.update(gradient, state)
        return optax.apply_updates(found["params"], updates), state_after, rest

    return Step(call, (found, rule.init(found["params"]), inputs))
