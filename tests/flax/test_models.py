"""The example models on our layers and on Flax's, one import line apart; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import pytest

import jax_mps.flax.models.linen as linen_models
import jax_mps.flax.models.nnx as nnx_models
from flax_arrays import close, filled_linen, filled_nnx, needs_nnx_lists, operand
from jax_mps.flax import models, nnx

UNET = {"channels": 4, "levels": 3}
CALLS: dict[str, Any] = {
    # the model's arguments, those of its NNX form alone, and the shape of its operand
    "UNet": (UNET | {"depth": 1}, {}, (2, 12, 16, 3)),
    "Generator": ({"channels": 2}, {"noise": 5}, (2, 5)),
}


# --- one import line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [linen_models, nnx_models])
def test_only_the_import_line_changes(ours: Any) -> None:
    stock = models.with_stock_flax(ours)
    path = Path(ours.__file__)
    (line,) = [line for line in path.read_text().splitlines() if "jax_mps" in line]
    assert line in ("from jax_mps.flax import linen as nn", "from jax_mps.flax import nnx")
    name = line.split()[-1]
    assert getattr(stock, name) in (flax.linen, flax.nnx)
    assert stock.UNet is not ours.UNet
    with pytest.raises(ValueError, match="one line"):
        models.with_stock_flax(models)


@pytest.mark.parametrize("name", CALLS)
def test_linen_models_as_on_flax(name: str) -> None:
    arguments, _, shape = CALLS[name]
    x = operand(*shape)
    train = {} if name == "UNet" else {"train": True}
    results = []
    for module in (linen_models, models.with_stock_flax(linen_models)):
        model = getattr(module, name)(**arguments)
        variables = filled_linen(model, x)

        def total(params: Any, x: jax.Array, rest: Any, model: Any = model) -> Any:
            y, statistics = model.apply({"params": params} | rest, x, **train, mutable="batch_stats")
            return jnp.sum(jnp.sin(y)), (y, statistics)

        params = variables.pop("params")
        results.append(jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x, variables))
    close(*results)


@needs_nnx_lists
@pytest.mark.parametrize("name", CALLS)
def test_nnx_models_as_on_flax(name: str) -> None:
    arguments, others, shape = CALLS[name]
    x = operand(*shape)
    results = []
    for module in (nnx_models, models.with_stock_flax(nnx_models)):

        @nnx.jit
        def gradients(model: Any, x: jax.Array) -> Any:
            def total(model: Any, x: jax.Array) -> Any:
                y = model(x)
                return jnp.sum(jnp.sin(y)), y

            return nnx.grad(total, argnums=(0, 1), has_aux=True)(model, x)

        model = filled_nnx(
            lambda rngs, module=module: getattr(module, name)(**arguments, **others, rngs=rngs)
        )
        (gradient, gradient_x), y = gradients(model, x)
        statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        results.append((nnx.to_pure_dict(gradient), gradient_x, y, statistics))
    close(*results)


@needs_nnx_lists
def test_discriminators() -> None:
    """Ours and those on Flax's layers are the same function, in Linen and in NNX."""
    x = operand(2, 64, 64, 3)
    model = linen_models.Discriminator(channels=2)
    variables = filled_linen(model, x)
    y, statistics = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))(variables, x)
    assert y.shape == (2,)
    stock = models.with_stock_flax(linen_models).Discriminator(channels=2)
    close(
        jax.jit(lambda v, x: stock.apply(v, x, train=True, mutable="batch_stats"))(variables, x),
        (y, statistics),
    )

    other = filled_nnx(lambda rngs: nnx_models.Discriminator(channels=2, rngs=rngs))
    for i, layer in enumerate([*other.downs, other.last]):
        nnx.update(layer, variables["params"][f"Conv_{i}"])
    for i, norm in enumerate(other.norms):
        nnx.update(norm, variables["params"][f"BatchNorm_{i}"] | variables["batch_stats"][f"BatchNorm_{i}"])
    close(nnx.jit(lambda model, x: model(x))(other, x), y)
    close(other.norms[-1].mean[...], statistics["batch_stats"]["BatchNorm_2"]["mean"])


# --- PyTorch ------------------------------------------------------------------------------------------


# --- checkpoints --------------------------------------------------------------------------------------


def linen_pair() -> tuple[Any, Any, jax.Array, Any, jax.Array]:
    """The U-Net on ours, fresh, and on Flax's layers, trained; an image, and what the latter makes of it."""
    x = operand(1, 8, 8, 3)
    ours = linen_models.UNet(channels=2, levels=2, depth=1)
    theirs = models.with_stock_flax(linen_models).UNet(channels=2, levels=2, depth=1)
    variables = filled_linen(theirs, x)
    return ours, jax.eval_shape(ours.init, jax.random.key(0), x), x, variables, theirs.apply(variables, x)


def test_flax_serialization() -> None:
    ours, shapes, x, trained, expected = linen_pair()
    saved = flax.serialization.to_bytes(trained)
    fresh = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    restored = flax.serialization.from_bytes(fresh, saved)
    close(ours.apply(restored, x), expected)
    assert flax.serialization.to_bytes(restored) == saved


@pytest.mark.filterwarnings("ignore:Couldn't find sharding info:UserWarning")
def test_orbax_linen(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    version = tuple(map(int, orbax.__version__.split(".")[:3]))
    if version > (0, 11, 5) and jax.__version_info__ < (0, 6):  # wants jax.monitoring.record_scalar
        pytest.skip("this Orbax wants a newer JAX")
    ours, shapes, x, trained, expected = linen_pair()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", trained)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "old", shapes)
        close(ours.apply(restored, x), expected)
        checkpointer.save(tmp_path / "new", restored)
        checkpointer.wait_until_finished()
        close(checkpointer.restore(tmp_path / "new", trained), trained, 0)


@needs_nnx_lists
def test_orbax_nnx(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    x = operand(1, 8, 8, 3)
    arguments = {"channels": 2, "levels": 2, "depth": 1}
    theirs = filled_nnx(lambda rngs: models.with_stock_flax(nnx_models).UNet(**arguments, rngs=rngs))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", nnx.state(theirs))
        checkpointer.wait_until_finished()
        graph, state = nnx.split(nnx.eval_shape(lambda: nnx_models.UNet(**arguments, rngs=nnx.Rngs(0))))
        ours = nnx.merge(graph, checkpointer.restore(tmp_path / "old", state))
    close(ours(x), theirs(x))
