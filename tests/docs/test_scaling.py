"""What `docs/scaling.md` says about communication, checked against programs compiled for up to 64 devices."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mps
from devices import DEVICES, collectives, four_devices, needs_partitioning, run_on_devices

__all__ = ["four_devices"]

INSIDE = DEVICES == 64
ROOT = Path(__file__).parents[2]
MESHES = [2, 4, 8, 64]


@needs_partitioning
def test_on_sixty_four_devices(request: pytest.FixtureRequest) -> None:
    run_on_devices(64, request, "TestCommunication")


test_on_sixty_four_devices.__test__ = not INSIDE  # type: ignore[attr-defined]


@functools.cache
def formulas() -> dict[str, Any]:
    """The functions that the page defines."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(page):
        if example.source.startswith("def "):
            exec(example.source, names)
    return names


def exchanged(text: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """The types of all arrays that a collective operation of a compiled program gives."""
    found = []
    for types in re.findall(rf"= (.*?) {operation}(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            found.append((dtype, tuple(int(n) for n in shape.split(",") if n)))
    return found


def on(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("d",))


def compiled(f: Any, devices: int, *operands: tuple[tuple[int, ...], P]) -> str:
    types = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(on(devices), spec))
        for shape, spec in operands
    ]
    return jax.jit(f).lower(*types).compile().as_text()


class TestCommunication:
    __test__ = INSIDE

    @pytest.mark.parametrize("devices", MESHES)
    @pytest.mark.parametrize(
        ("window", "stride", "low", "dilation"),
        [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2), (5, 3, 1, 1)],
    )
    def test_spatial(self, devices: int, window: int, stride: int, low: int, dilation: int) -> None:
        pooled_size = 8 * devices
        size = stride * pooled_size
        extent = dilation * (window - 1) + 1
        high = (pooled_size - 1) * stride + extent - low - size
        image, pooled = (2, size, 5, 4), (2, pooled_size, 5, 4)
        keywords = {
            "strides": (stride, 1),
            "padding": ((low, high), (0, 0)),
            "window_dilation": (dilation, 1),
        }
        rows = P(None, "d")
        pixels = formulas()["pixel_rows"](window, stride, low, dilation)
        windows = formulas()["window_rows"](window, stride, low, dilation)

        def gradient(g: Any) -> Any:
            return jax_mps.avg_pool_gradient(g, image, (window, 1), **keywords)

        for f, shape, expected in [
            (lambda x: jax_mps.avg_pool(x, (window, 1), **keywords), image, pixels),
            (lambda x: jax_mps.max_pool(x, (window, 1), **keywords), image, pixels),
            (gradient, pooled, windows),
        ]:
            text = compiled(f, devices, (shape, rows))
            assert collectives(text) == ({"collective-permute"} if any(expected) else set())
            found = [shape for _, shape in exchanged(text, "collective-permute")]
            assert sum(s[1] for s in found) == sum(expected), (found, expected)
            assert sum(map(math.prod, found)) == sum(expected) * 2 * 5 * 4

    @pytest.mark.parametrize("devices", MESHES)
    def test_gradient_of_a_kernel_is_one_sum_of_its_size(self, devices: int) -> None:
        def loss(x: Any, kernel: Any) -> Any:
            return jnp.sum(jax_mps.conv_transpose(x, kernel, strides=2))

        text = compiled(jax.grad(loss, 1), devices, ((64, 4, 4, 8), P("d")), ((3, 3, 8, 16), P()))
        assert collectives(text) == {"all-reduce"}
        assert exchanged(text, "all-reduce") == [("f32", (3, 3, 8, 16))]

    @pytest.mark.parametrize("devices", MESHES)
    def test_memory_of_a_device(self, devices: int) -> None:
        """A volume that is pooled, up-convolved and differentiated takes its part of each device.

        The lower bound is the volume and its gradient. A copy with borders comes to it, and what the pooled
        level needs; nothing has the size of the whole.
        """
        shape = (1, 16 * devices, 16, 16, 8)
        sharding = NamedSharding(on(devices), P(None, "d"))

        def loss(x: Any, kernel: Any) -> Any:
            y = jax_mps.max_pool(x, (3, 3, 3), strides=2, padding=1)
            return jnp.mean(jnp.sin(jax_mps.conv_transpose(y, kernel, strides=2)))

        types = [
            jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding),
            jax.ShapeDtypeStruct((2, 2, 2, 8, 8), np.float32, sharding=NamedSharding(on(devices), P())),
        ]
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*types).compile()
        assert "all-gather" not in collectives(program.as_text())
        memory = program.memory_analysis()
        part = math.prod(shape) * 4 // devices
        lower_bound = 2 * part
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert lower_bound <= total < 2 * lower_bound

    @pytest.mark.skipif(not hasattr(lax, "pcast"), reason="the example needs a newer JAX")
    @pytest.mark.parametrize("devices", MESHES)
    def test_the_example_adds_up_all_gradients_at_once(self, devices: int) -> None:
        spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "train_distributed.py")
        assert spec is not None
        assert spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        network = example.linen.UNet(channels=2, levels=2, depth=1)
        rule = optax.sgd(1e-3)
        images = NamedSharding(mesh, P("data"))
        batch = jax.ShapeDtypeStruct((64, 8, 8, 3), np.float32, sharding=images)
        state = jax.eval_shape(lambda: example.start(network, rule, 8, mesh))
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), state
        )
        text = example.make_step(network, rule, mesh).lower(state, batch, batch).compile().as_text()
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"]))
        assert collectives(text) == {"all-reduce"}
        assert exchanged(text, "all-reduce") == [("f32", (count + 1,))]
