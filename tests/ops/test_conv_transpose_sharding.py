"""Transposed convolution over several devices: `shard_map`, automatic and explicit sharding.

The classes here run in a process of their own, which has four CPU devices; `test_on_four_devices` starts it.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import convs
import jax_mps
import oracle
from devices import (
    INSIDE,
    collectives,
    four_devices,
    needs_explicit_sharding,
    needs_partitioning,
    shard_map,
    test_on_four_devices,
)
from jax_mps.lowering import library

# The fixture that every test here uses, and the test that starts them.
__all__ = ["four_devices", "test_on_four_devices"]


# --- what is computed ---------------------------------------------------------------------------------

CASE = convs.Conv((4, 6), (3, 3), 2, ((1, 0), (0, 1)), 0, 1, 8, 12)
GROUPED = CASE._replace(groups=4, transpose_kernel=True)
BATCH = 8


def check_close(actual: Any, expected: Any) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        oracle.assert_close(a, np.asarray(e, np.float64), length=512)


def function(op: convs.Op, case: convs.Conv = CASE, implementation: str | None = None) -> Any:
    """One of the three functions of its two operands, for any batch."""

    def call(a: Any, b: Any) -> Any:
        batch = (a.shape[0],)
        shapes = {"x": case.shape("channels_last", batch), "kernel": case.kernel_shape}
        third = [] if op is convs.FORWARD else [shapes["x" if op is convs.DATA else "kernel"]]
        return op.function(a, b, *third, **case.call, implementation=implementation)

    return call


def loss(f: Any) -> Any:
    """A nonlinear scalar function of the result, whose terms belong to one element each."""
    return lambda *operands: jnp.sum(jnp.sin(f(*operands)))


class TestShardMap:
    __test__ = INSIDE

    @staticmethod
    def mesh(devices: int) -> Mesh:
        return Mesh(np.array(jax.devices()[:devices]), ("d",))

    @pytest.mark.parametrize("op", convs.OPS, ids=str)
    @convs.on_both_paths(
        ("devices", "specs"),
        [(2, (P("d"), P())), (4, (P("d"), P())), (4, (P(), P("d"))), (4, (P("d"), P("d")))],
        lambda devices, specs: devices == 4 and specs[0] == P("d"),
    )
    def test_values_and_derivatives(self, op, devices, specs, implementation):
        # Each device's part of a sharded operand is a whole operand, kernels included.
        whole = op.of(CASE.arrays(batch=(2,)))
        parts = [
            [whole_part + np.float32(0.25 * d) for d in range(devices if spec == P("d") else 1)]
            for whole_part, spec in zip(whole, specs, strict=True)
        ]
        operands = [np.concatenate(part) for part in parts]
        f = function(op, implementation=implementation)
        mapped = shard_map(f, self.mesh(devices), specs, P("d"))

        # The same, a device after the other. The parts of a gradient are put together, or added up.
        @jax.jit
        def alone(a, b):
            return f(a, b), jax.grad(loss(f), (0, 1))(a, b), jax.jvp(f, (a, b), (a, b))[1]

        each = [alone(*(part[d % len(part)] for part in parts)) for d in range(devices)]

        @jax.jit
        def together(a, b):
            return mapped(a, b), jax.grad(loss(mapped), (0, 1))(a, b), jax.jvp(mapped, (a, b), (a, b))[1]

        y, gradients, tangent = together(*operands)
        check_close(y, np.concatenate([e[0] for e in each]))
        check_close(tangent, np.concatenate([e[2] for e in each]))
        for i, part in enumerate(parts):
            pulled = [e[1][i] for e in each]
            check_close(gradients[i], np.concatenate(pulled) if len(part) > 1 else np.sum(pulled, axis=0))

    def test_a_training_step(self, implementation):
        """The gradient of a replicated kernel, inside of a loss over all devices, and outside."""
        x, kernel, _ = GROUPED.arrays(batch=(BATCH,))
        f = function(convs.FORWARD, GROUPED, implementation)

        def total(kernel: Any, x: Any) -> Any:
            return jax.lax.psum(loss(f)(x, kernel), "d")

        inside = jax.grad(shard_map(total, self.mesh(4), (P(), P("d")), P()), (0, 1))
        alone = jax.grad(lambda kernel, x: loss(f)(x, kernel), (0, 1))
        check_close(jax.jit(inside)(kernel, x), jax.jit(alone)(kernel, x))

    def test_vmap_of_images_with_kernels(self, implementation):
        """Every device has some images, and for each a kernel of its own."""
        x, kernel, _ = GROUPED.arrays(batch=(BATCH,))
        kernels = np.stack([kernel * np.float32(1 + n / 8) for n in range(BATCH)])
        f = function(convs.FORWARD, GROUPED, implementation)

        def each(x, kernels):
            return jax.vmap(jax.grad(lambda k, x: loss(f)(x[None], k)))(kernels, x)

        mapped = shard_map(each, self.mesh(4), (P("d"), P("d")), P("d"))
        check_close(jax.jit(mapped)(x, kernels), jax.jit(each)(x, kernels))

    @pytest.mark.usefixtures("native")
    def test_native_kernels_run_on_every_device(self):
        for op in convs.OPS:
            operands = op.of(CASE.arrays(batch=(BATCH,)))
            specs = tuple(P() if name == "kernel" else P("d") for name in op.operands)
            mapped = shard_map(function(op), self.mesh(4), specs, P("d"))
            text = jax.jit(mapped).lower(*operands).compile().as_text()
            name = {"forward": "", "data": "_gradient_data", "weights": "_gradient_weights"}[op.name]
            assert f'"{library.target("conv_transpose" + name)}"' in text
            assert not collectives(text)


# How the arrays lie over the devices: each layout is one of a training step.
LAYOUTS = {
    "batch": convs.Arrays(P("d"), P(), P("d")),
    "height": convs.Arrays(P(None, "d"), P(), P(None, "d")),
    "outputs": convs.Arrays(P(), P(None, None, None, "d"), P(None, None, None, "d")),
    "inputs": convs.Arrays(P(None, None, None, "d"), P(None, None, "d"), P()),
}


@functools.cache
def on_one_device() -> tuple[convs.Arrays, Any, Any]:
    arrays = CASE.arrays(batch=(BATCH,))
    values = convs.run_all(CASE.call)(arrays)
    gradients = jax.jit(jax.grad(loss(function(convs.FORWARD)), (0, 1)))(arrays.x, arrays.kernel)
    return arrays, jax.tree.map(np.asarray, values), jax.tree.map(np.asarray, gradients)


class TestAutomaticSharding:
    __test__ = INSIDE

    @staticmethod
    def put(arrays: convs.Arrays, specs: convs.Arrays) -> convs.Arrays:
        mesh = Mesh(np.array(jax.devices()), ("d",))
        places = [NamedSharding(mesh, spec) for spec in specs]
        return convs.Arrays(*map(jax.device_put, arrays, places))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_gradients(self, layout):
        arrays, values, gradients = on_one_device()
        sharded = self.put(arrays, LAYOUTS[layout])
        check_close(convs.run_all(CASE.call)(sharded), values)
        gradient = jax.jit(jax.grad(loss(function(convs.FORWARD)), (0, 1)))
        check_close(gradient(sharded.x, sharded.kernel), gradients)

    @pytest.mark.parametrize(
        "case", [CASE, GROUPED, CASE._replace(window=(2, 2), padding=0, output_padding=0)], ids=str
    )
    def test_the_batch_stays_where_it_is(self, case):
        """Images are never gathered; the gradient of the kernel is added up."""
        arrays = self.put(case.arrays(batch=(BATCH,)), LAYOUTS["batch"])
        for op in convs.OPS:
            compiled = jax.jit(function(op, case)).lower(*op.of(arrays)).compile()
            assert collectives(compiled.as_text()) <= ({"all-reduce"} if op is convs.WEIGHTS else set())
            out = compiled(*op.of(arrays))
            kept = arrays.kernel if op is convs.WEIGHTS else arrays.x
            assert out.sharding.is_equivalent_to(kept.sharding, out.ndim)
            convs.check(op, out, convs.Arrays(*map(np.asarray, arrays)), **case.call)

    def test_depthwise_channels_stay_where_they_are(self):
        case = CASE._replace(outputs=8, groups=8, transpose_kernel=True)
        channels = P(None, None, None, "d")
        arrays = self.put(case.arrays(batch=(BATCH,)), convs.Arrays(channels, channels, channels))
        for op in convs.OPS:
            compiled = jax.jit(function(op, case)).lower(*op.of(arrays)).compile()
            assert not collectives(compiled.as_text())
            convs.check(op, compiled(*op.of(arrays)), convs.Arrays(*map(np.asarray, arrays)), **case.call)

    def test_eager_calls(self):
        arrays, values, _ = on_one_device()
        sharded = self.put(arrays, LAYOUTS["batch"])
        for op in convs.OPS:
            check_close(function(op)(*op.of(sharded)), values[op.name])

    @needs_partitioning
    def test_native_kernels_run_on_every_part(self):
        for layout in LAYOUTS:
            arrays = self.put(CASE.arrays(batch=(BATCH,)), LAYOUTS[layout])
            for op in convs.OPS:
                f = jax.jit(function(op, implementation="native"))
                text = f.lower(*op.of(arrays)).compile().as_text()
                assert "jax_mps" in "".join(re.findall(r'custom_call_target="([^"]*)"', text))
                assert "all-gather" not in collectives(text)
                check_close(f(*op.of(arrays)), on_one_device()[1][op.name])


@needs_explicit_sharding
class TestExplicitSharding:
    __test__ = INSIDE

    @pytest.fixture(autouse=True)
    def mesh(self):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            yield mesh

    @pytest.mark.parametrize("layout", ["batch", "height", "outputs"])
    def test_values_and_gradients(self, layout):
        arrays, values, gradients = on_one_device()
        sharded = convs.Arrays(*map(jax.device_put, arrays, LAYOUTS[layout]))
        for op in convs.OPS:
            check_close(jax.jit(function(op))(*op.of(sharded)), values[op.name])
        gradient = jax.jit(jax.grad(loss(function(convs.FORWARD)), (0, 1)))
        check_close(gradient(sharded.x, sharded.kernel), gradients)

    def test_types_say_how_results_are_sharded(self):
        """By the batch, where the image is; like its operand, where a gradient is."""
        arrays, values, _ = on_one_device()
        x, kernel, g = map(jax.device_put, arrays, LAYOUTS["batch"])
        spec, whole = P("d", None, None, None), P(None, None, None, None)

        @jax.jit
        def run(x, kernel, g):
            f = function(convs.FORWARD)
            y, pull_back = jax.vjp(f, x, kernel)
            pulled = pull_back(g)
            assert jax.typeof(y).sharding.spec == spec
            assert [jax.typeof(p).sharding.spec for p in pulled] == [spec, whole]
            assert jax.typeof(function(convs.DATA)(g, kernel)).sharding.spec == spec
            return y, pulled

        y, pulled = run(x, kernel, g)
        assert (y.sharding.spec, pulled[0].sharding.spec) == (spec, spec)
        check_close((y, *pulled), tuple(values[op.name] for op in convs.OPS))
        assert collectives(run.lower(x, kernel, g).compile().as_text()) <= {"all-reduce"}

    def test_eager_calls_and_vmap(self):
        arrays, values, _ = on_one_device()
        x, kernel, _ = map(jax.device_put, arrays, LAYOUTS["batch"])
        f = function(convs.FORWARD)
        y = f(x, kernel)
        check_close(y, values["forward"])
        assert y.sharding.spec == P("d", None, None, None)
        each = jax.jit(jax.vmap(lambda x: jax_mps.conv_transpose(x, kernel, **CASE.call)))(x)
        check_close(each, values["forward"])
        assert each.sharding.spec == P("d", None, None, None)

    @pytest.mark.parametrize(("groups", "kept"), [(8, "d"), (2, None)])
    def test_channels_of_groups_stay_sharded_where_devices_hold_whole_groups(self, groups, kept):
        case = CASE._replace(inputs=8, outputs=16, groups=groups)
        arrays = case.arrays(batch=(2,))
        f, channels = function(convs.FORWARD, case), P(None, None, None, "d")
        expected = convs.FORWARD.expect(arrays, **case.call)

        def place(x: Any, sharded: bool) -> Any:
            return jax.device_put(x, channels if sharded else P(None, None, None, None))

        for of_image, of_kernel in ((True, True), (True, False), (False, True)):
            y = jax.jit(f)(place(arrays.x, of_image), place(arrays.kernel, of_kernel))
            assert y.sharding.spec == P(None, None, None, kept), (of_image, of_kernel)
            check_close(y, expected.astype(np.float32))
            dk = jax.jit(function(convs.WEIGHTS, case))(place(arrays.g, of_image), place(arrays.x, of_image))
            assert dk.sharding.spec == P(None, None, None, kept if of_image else None)
            check_close(dk, convs.WEIGHTS.expect(arrays, **case.call).astype(np.float32))
