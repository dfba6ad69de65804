"""`accelerate()` over several devices: ours, except on a mesh that is manual in part.

The classes here run in a process of their own, which has four CPU devices; `test_on_four_devices` starts it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mps
import stock_network
from devices import (
    INSIDE,
    collectives,
    four_devices,
    needs_explicit_sharding,
    needs_partitioning,
    shard_map,
    test_on_four_devices,
)

# The fixture that every test here uses, and the test that starts them.
__all__ = ["four_devices", "test_on_four_devices"]

pytestmark = pytest.mark.usefixtures("native")


def gradient(kernels: Any, x: Any) -> Any:
    """Sums over the devices that share a batch."""
    of_kernels, of_images = stock_network.gradient(kernels, x)
    return lax.psum(of_kernels, "d"), of_images


def on(mesh: Mesh, batch: int = 8) -> Any:
    """Kernels on every device, images spread over the first axis."""
    kernels, images = stock_network.arrays(batch)
    return jax.device_put((kernels, images), (NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))))


def expected(batch: int = 8) -> Any:
    return jax.jit(stock_network.gradient)(*stock_network.arrays(batch))


class TestShardMap:
    __test__ = INSIDE

    def test_over_all_axes_it_is_ours(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("d",))
        specs = (P(), P("d"))

        def whole(kernels: Any, x: Any) -> Any:
            # Marked as varying, so that JAX adds no sum of its own.
            kernels = jax.tree.map(lambda k: jax_mps._compat.vary_alike(k, x)[0], kernels)
            return gradient(kernels, x)

        function = jax.jit(shard_map(whole, mesh, specs, specs))
        with jax_mps.accelerate() as handle:
            found = function(*on(mesh))
        stock_network.assert_close(found, expected())
        assert {row.operation for row in handle.report()} >= stock_network.OPERATIONS
        assert all(row.ours for row in handle.report()), handle.report()

    @pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no public shard_map")
    def test_over_some_axes_it_stays_stock(self) -> None:
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("d", "e"))
        function = jax.jit(
            jax.shard_map(
                stock_network.block, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), axis_names={"d"}
            )
        )
        with jax_mps.accelerate() as handle:
            found = function(*on(mesh))
        stock_network.assert_close(found, stock_network.block(*stock_network.arrays(8)))
        assert len(handle.report()) > 0
        assert all("several devices" in row.why and not row.ours for row in handle.report()), handle.report()


class TestAutomaticSharding:
    __test__ = INSIDE

    @needs_partitioning
    @pytest.mark.parametrize("devices", [2, 4])
    def test_it_is_ours(self, devices: int) -> None:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
        with jax_mps.accelerate() as handle:
            step = jax.jit(stock_network.gradient)
            found = step(*on(mesh))
            text = step.lower(*on(mesh)).compile().as_text()
        stock_network.assert_close(found, expected())
        assert {row.operation for row in handle.report()} >= stock_network.OPERATIONS
        assert all(row.ours for row in handle.report()), handle.report()
        assert "convolution(" not in text
        assert collectives(text) == {"all-reduce"}, "images are gathered"

    def test_one_of_several_devices_is_ours(self) -> None:
        operands = jax.device_put(stock_network.arrays(), jax.devices()[2])
        with jax_mps.accelerate() as handle:
            found = jax.jit(stock_network.gradient)(*operands)
        stock_network.assert_close(found, expected(2))
        assert {x.device for x in jax.tree.leaves(found)} == {jax.devices()[2]}
        assert len(handle.report()) > 0
        assert all(row.ours for row in handle.report()), handle.report()


class TestExplicitSharding:
    __test__ = INSIDE

    @needs_explicit_sharding
    @needs_partitioning
    def test_it_is_ours(self) -> None:
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            operands = on(mesh)
            with jax_mps.accelerate() as handle:
                block = jax.jit(stock_network.block)
                found = block(*operands)
                text = block.lower(*operands).compile().as_text()
        stock_network.assert_close(found, stock_network.block(*stock_network.arrays(8)))
        assert len(handle.report()) > 0
        assert all(row.ours for row in handle.report()), handle.report()
        assert not collectives(text)
