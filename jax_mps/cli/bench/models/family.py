"""Inference and training steps of the networks: stock JAX, the same under `accelerate()`, and PyTorch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import jax_mps
from jax_mps.cli.bench.models.catalogue import MODELS, Model
from jax_mps.cli.bench.runner import Case, Contender
from jax_mps.cli.bench.torch_peer import Peer

__all__ = ["Models", "model_case"]

# Rounding turns a ReLU or the winner of a maximum near a tie, which normalisation spreads. Of the greatest
# gradient, stock float32 is 3.5e-3 off stock float64 for the ResNet-18, and 2.6e-2 for the ResNet-50;
# accelerated 9e-4 and 2.7e-2. In bfloat16 every layer rounds to 4e-3; what is not computed would be off by 1.
_TOLERANCES = {
    "float32": {"inference": (1e-3,), "train_step": (1e-3, 5e-2)},
    "bfloat16": {"inference": (1e-1,), "train_step": (5e-2, 5e-1)},
}
_TORCH_RATE = 0.0  # PyTorch changes its weights in place, and every call is to compute the same


class Models:
    """The networks of `models.catalogue`, on the stock layers of Flax.

    | operation | what is timed |
    |---|---|
    | inference | the output, with the running means of batch normalisation |
    | train_step | forward and backward of a mean square, new weights (SGD), new running means |
    """

    ops = ("inference", "train_step")
    shapes = tuple(MODELS)

    def __init__(self, batch_scale: float = 1) -> None:
        self._batch_scale = batch_scale

    def case(
        self, shape: str, op: str, dtype: str, layout: str, batch: int | None, contenders: Sequence[str]
    ) -> Case:
        """The case of these names; parameters, running means and images have the type."""
        if dtype not in _TOLERANCES or layout != "channels_last":
            raise ValueError(
                f"the networks are {' or '.join(_TOLERANCES)}, channels last; not {dtype}, {layout}"
            )
        model = MODELS[shape].scaled(self._batch_scale)
        if batch:
            model = model.scaled(batch / model.inputs[0][0])
        return model_case(shape, model, op, contenders, dtype)


def model_case(name: str, model: Model, op: str, contenders: Sequence[str], dtype: str = "float32") -> Case:
    """An operation of a network on stock Flax: "native" ("xla" beyond the CPU) accelerated, "lax" not."""
    return Case(
        shape=name,
        description=" ".join("x".join(map(str, shape)) for shape in model.inputs),
        op=op,
        dtype=dtype,
        layout="channels_last",
        bytes_moved=0,
        tolerances=_TOLERANCES[dtype][op],
        contenders={who: functools.partial(_contender, who, model, op, dtype) for who in contenders},
    )


def _contender(who: str, model: Model, op: str, dtype: str) -> Contender:
    if who.startswith("torch"):
        return _torch(who, model, op, dtype)
    if who == "lax":
        return _jax(model, op, dtype)
    if who == "native" or jax.default_backend() != "cpu":
        with jax_mps.accelerate():
            return _jax(model, op, dtype)
    raise NotImplementedError("accelerate() uses the native kernels on the CPU")


def _data(model: Model, op: str) -> tuple[dict[str, Any], list[jax.Array], jax.Array]:
    """Parameters and running means, inputs, and what the output is to be."""
    from jax_mps.cli.bench.models.flax_layers import Network, variables

    random = np.random.default_rng(1)
    network = Network(model.function, op == "train_step")
    found = variables(network, model.inputs)
    inputs = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in model.inputs]
    out = jax.eval_shape(functools.partial(network.apply, mutable="batch_stats"), found, *inputs)[0]
    return found, inputs, jnp.asarray(random.standard_normal(out.shape), jnp.float32)


# --- JAX ----------------------------------------------------------------------------------------------


def _jax(model: Model, op: str, dtype: str) -> Contender:
    from jax_mps.cli.bench.models.flax_layers import Network

    network = Network(model.function, op == "train_step")
    found, inputs, target = jax.tree.map(lambda x: x.astype(dtype), _data(model, op))

    def inference(found: Any, inputs: Any) -> Any:
        return network.apply(found, *inputs)

    def train_step(found: Any, inputs: Any, target: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            out, rest = network.apply({**found, "params": params}, *inputs, mutable="batch_stats")
            return jnp.mean(jnp.square(out - target)), rest

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(found["params"])
        return value, jax.tree.map(jnp.subtract, found["params"], gradient), rest

    def fetch_inference(out: jax.Array) -> list[np.ndarray]:
        return [np.asarray(out, np.float64)]

    def fetch_train_step(outputs: Any) -> list[np.ndarray]:
        value, params, _ = outputs  # a step of rate 1: the difference is the gradient
        return [np.asarray(value, np.float64), _flat(found["params"]) - _flat(params)]

    if op == "inference":
        call, seconds = _compiled(inference, found, inputs)
        return Contender(call, jax.block_until_ready, fetch_inference, first_call=1e3 * seconds)
    call, seconds = _compiled(train_step, found, inputs, target)
    return Contender(call, jax.block_until_ready, fetch_train_step, first_call=1e3 * seconds)


def _compiled(function: Callable[..., Any], *operands: Any) -> tuple[Callable[[], Any], float]:
    """A call of the compiled function, and the seconds that it took to trace, lower and compile."""
    jax.clear_caches()  # whoever comes second would find half of the trace there
    start = time.perf_counter()
    program = jax.jit(function).lower(*operands).compile()
    return functools.partial(program, *operands), time.perf_counter() - start


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# --- PyTorch ------------------------------------------------------------------------------------------


def _torch(who: str, model: Model, op: str, dtype: str) -> Contender:
    from jax_mps.cli.bench.models.torch_layers import forward, from_tensor, to_tensor

    peer = Peer.find(who, len(model.inputs[0]) - 2, dtype)
    torch = peer.torch
    found, arrays, wanted = _data(model, op)

    def parameter(path: Any, array: jax.Array) -> Any:
        return to_tensor(peer, path[0].key, np.asarray(array))

    tensors = {kind: jax.tree_util.tree_map_with_path(parameter, found[kind]) for kind in found}
    params = tensors["params"]
    inputs = [peer.tensor(np.asarray(a)) for a in arrays]
    target = peer.tensor(np.asarray(wanted))

    def output() -> Any:
        return forward(model.function, torch, tensors, inputs, train=op == "train_step")

    def inference() -> tuple[Any, ...]:
        with torch.inference_mode():
            return (output(),)

    if op == "inference":
        return peer.contender(inference)

    weights = [weight.requires_grad_() for weight in jax.tree.leaves(params)]
    optimizer = torch.optim.SGD(weights, lr=_TORCH_RATE)

    def train_step() -> Any:
        optimizer.zero_grad()
        value = torch.nn.functional.mse_loss(output(), target)
        value.backward()
        optimizer.step()
        return value

    def fetch(value: Any) -> list[np.ndarray]:
        gradient = jax.tree_util.tree_map_with_path(
            lambda path, weight: from_tensor(path[0].key, weight.grad), params
        )
        return [value.detach().cpu().double().numpy(), _flat(gradient)]

    return Contender(train_step, peer.contender(inference).wait, fetch)
