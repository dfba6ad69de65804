"""Arrays over several devices: `shard_map`, automatic and explicit sharding.

The classes here run in a process of their own, which has four CPU devices; `test_on_four_devices` starts it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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

WINDOW = {"window_shape": (3, 3), "strides": 2, "padding": ((1, 0), (0, 1))}


# --- what is computed ---------------------------------------------------------------------------------

IMAGE, POOLED = (8, 16, 16, 12), (8, 8, 8, 12)
KINDS = {"image": IMAGE, "pooled": POOLED}

# A function of its operands and `implementation`, and what the operands are.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "max_pool": (functools.partial(jax_mps.max_pool, **WINDOW), ("image",)),
    "max_pool_with_indices": (
        functools.partial(jax_mps.max_pool, return_indices=True, **WINDOW),
        ("image",),
    ),
    "avg_pool": (functools.partial(jax_mps.avg_pool, count_include_pad=False, **WINDOW), ("image",)),
    "l2_pool": (functools.partial(jax_mps.l2_pool, **WINDOW), ("image",)),
    "lp_pool": (functools.partial(jax_mps.lp_pool, p=3, **WINDOW), ("image",)),
    "adaptive_avg_pool": (functools.partial(jax_mps.adaptive_avg_pool, output_size=(12, 4)), ("image",)),
    "adaptive_max_pool": (
        functools.partial(jax_mps.adaptive_max_pool, output_size=(20, 12), return_indices=True),
        ("image",),
    ),
    "fractional_max_pool": (
        lambda x, **keywords: jax_mps.fractional_max_pool(
            x, 3, (8, 12), jnp.full((x.shape[0], x.shape[3], 2), 0.3), return_indices=True, **keywords
        ),
        ("image",),
    ),
    "max_pool_gradient": (functools.partial(jax_mps.max_pool_gradient, **WINDOW), ("pooled", "image")),
    "avg_pool_gradient": (
        lambda g, **keywords: jax_mps.avg_pool_gradient(
            g, (g.shape[0], 16, 16, g.shape[3]), count_include_pad=False, **WINDOW, **keywords
        ),
        ("pooled",),
    ),
    "l2_pool_gradient": (functools.partial(jax_mps.l2_pool_gradient, **WINDOW), ("pooled", "image")),
    "max_unpool": (
        functools.partial(jax_mps.max_unpool, output_shape=(16, 16)),
        ("pooled", "indices"),
    ),
}


def operands_of(name: str, batches: Sequence[int] | None = None) -> tuple[np.ndarray, ...]:
    """Operands of a call; `batches` may give each a batch size of its own."""
    rng = np.random.default_rng(0)
    arrays = []
    for i, kind in enumerate(CALLS[name][1]):
        shape = IMAGE if kind == "image" else POOLED
        shape = (batches[i] if batches else shape[0], *shape[1:])
        if kind == "indices":
            plane = np.argsort(rng.random((shape[0], 256, shape[3])), axis=1)[:, :64]
            arrays.append(plane.reshape(shape).astype(np.int32))
        else:
            arrays.append(oracle.distinct(shape, seed=i) / 64)
    return tuple(arrays)


def first_of(name: str, implementation: str | None = None) -> Callable[..., Any]:
    function = CALLS[name][0]
    return lambda *operands: jax.tree.leaves(function(*operands, implementation=implementation))[0]


def scalar(f: Callable[..., Any]) -> Callable[..., Any]:
    """A nonlinear scalar function of the result of `f`, that weighs every element differently."""

    def function(*operands: Any) -> Any:
        y = f(*operands)
        weights = jnp.cos(jax.lax.iota(y.dtype, y.size)).reshape(y.shape)
        return jnp.sum(weights * y * (1 + y / 8))

    return function


def square_sum(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: jnp.sum(jnp.square(f(*operands)))


def differentiable(name: str) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(CALLS[name][1]) if kind != "indices")


@functools.cache
def on_one_device(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The results of a call, and the gradients of its `square_sum`, without any sharding."""
    operands = operands_of(name)
    results = CALLS[name][0](*operands)
    gradients = jax.jit(jax.grad(square_sum(first_of(name)), differentiable(name)))(*operands)
    return [np.asarray(r) for r in jax.tree.leaves(results)], [np.asarray(g) for g in gradients]


def check_close(actual: Any, expected: Any) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * max(1, np.abs(e).max()))


# --- shard_map ----------------------------------------------------------------------------------------


class TestShardMap:
    __test__ = INSIDE

    @staticmethod
    def mesh(devices: int) -> Mesh:
        return Mesh(np.array(jax.devices()[:devices]), ("d",))

    SPECS = (
        *((name, (P("d"),) * len(kinds)) for name, (_, kinds) in CALLS.items()),
        *((name, specs) for name, (_, kinds) in CALLS.items() if len(kinds) == 2
          for specs in ((P("d"), P()), (P(), P("d")))),
    )  # fmt: skip

    @pytest.mark.parametrize(
        ("devices", "implementation"), [(2, "xla"), (4, "native")], indirect=["implementation"]
    )
    @pytest.mark.parametrize(("name", "specs"), SPECS, ids=lambda v: v if isinstance(v, str) else str(len(v)))
    def test_values_and_derivatives(self, name, specs, devices, implementation):
        # A replicated operand has the batch of one device, and meets every part of the sharded ones.
        parts = [devices if spec == P("d") else 1 for spec in specs]
        operands = tuple(map(jnp.asarray, operands_of(name, [8 // devices * n for n in parts])))
        shards = [np.split(np.asarray(x), n) * (devices // n) for x, n in zip(operands, parts, strict=True)]
        shards = list(zip(*shards, strict=True))
        f = first_of(name, implementation)
        mapped = shard_map(f, self.mesh(devices), specs, P("d"))
        at = differentiable(name)

        # The same, a device after the other. The parts of a gradient are put together, or added up.
        run = jax.jit(f)
        expected = np.concatenate([run(*shard) for shard in shards])
        check_close(jax.jit(mapped)(*operands), expected)

        cotangent = jax.grad(scalar(lambda y: y))(expected)
        pull_back = jax.jit(lambda ct, *x: jax.vjp(f, *x)[1](ct))
        pulled = [
            pull_back(*c)
            for c in zip(np.split(np.asarray(cotangent), devices), *zip(*shards, strict=True), strict=True)
        ]
        gradients = [
            np.concatenate([p[i] for p in pulled]) if parts[i] > 1 else np.sum([p[i] for p in pulled], axis=0)
            for i in at
        ]
        check_close(jax.jit(jax.grad(scalar(mapped), at))(*operands), gradients)

        # The tangent of a replicated operand reaches every device.
        def push(f: Callable[..., Any], *operands: Any) -> Any:
            floats, rest = operands[: len(at)], operands[len(at) :]
            return jax.jvp(lambda *x: f(*x, *rest), floats, floats)[1]

        run = jax.jit(functools.partial(push, f))
        expected = np.concatenate([run(*shard) for shard in shards])
        check_close(jax.jit(functools.partial(push, mapped))(*operands), expected)

    @pytest.mark.parametrize("axis", [1, 3], ids=["height", "channels"])
    def test_every_device_pools_its_own_part(self, axis, implementation):
        spec = P(*(["d" if i == axis else None for i in range(4)]))
        (x,) = operands_of("max_pool")
        f = first_of("max_pool", implementation)
        mapped = shard_map(f, self.mesh(4), (spec,), spec)
        expected = np.concatenate([np.asarray(f(part)) for part in np.split(x, 4, axis)], axis)
        np.testing.assert_array_equal(jax.jit(mapped)(x), expected)

    @pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
    def test_gradient_inside_of_a_loss_over_all_devices(self, name, implementation):
        (x,) = operands_of(name)
        scale = np.float32(1.5)
        f = first_of(name, implementation)

        def loss(scale: Any, x: Any) -> Any:
            return jnp.sum(jnp.square(f(scale * x)))

        def total(scale: Any, x: Any) -> Any:
            return jax.lax.psum(loss(scale, x), "d")

        gradient = jax.grad(shard_map(total, self.mesh(4), (P(), P("d")), P()), (0, 1))
        check_close(jax.jit(gradient)(scale, x), jax.grad(loss, (0, 1))(scale, x))

    def test_hessian_and_vmap(self, implementation):
        x = np.asarray(oracle.distinct((4, 4, 4, 1)) / 8)
        f = functools.partial(jax_mps.l2_pool, window_shape=(2, 2), strides=2, implementation=implementation)
        mapped = shard_map(jax.vmap(f), self.mesh(4), (P("d"),), P("d"))
        check_close(jax.jit(jax.hessian(scalar(mapped)))(x), jax.hessian(scalar(jax.vmap(f)))(x))

    @pytest.mark.usefixtures("native")
    def test_native_kernels_run_on_every_device(self):
        (x,) = operands_of("max_pool")
        mapped = shard_map(first_of("max_pool"), self.mesh(4), (P("d"),), P("d"))
        text = jax.jit(mapped).lower(x).compile().as_text()
        assert library.target("max_pool") in text
        assert not collectives(text)

    @pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
    def test_a_mesh_that_is_manual_in_part(self):
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        (x,) = operands_of("max_pool")
        x = jax.device_put(x, NamedSharding(mesh, P("a", None, None, "b")))
        f = first_of("max_pool")
        mapped = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
        value, gradient = jax.jit(jax.value_and_grad(scalar(mapped)))(x)
        check_close((value, gradient), jax.value_and_grad(scalar(f))(np.asarray(x)))
        if jax.config.jax_use_shardy_partitioner:  # the one before it gathers the channels here
            assert "all-gather" not in collectives(jax.jit(mapped).lower(x).compile().as_text())


# --- automatic sharding -------------------------------------------------------------------------------

LAYOUTS = {
    "batch": P("d"),
    "channels": P(None, None, None, "d"),
    "height": P(None, "d"),
    "width": P(None, None, "d"),
}


class TestAutomaticSharding:
    __test__ = INSIDE

    @staticmethod
    def put(arrays: Sequence[np.ndarray], spec: P) -> list[jax.Array]:
        mesh = Mesh(np.array(jax.devices()), ("d",))
        return [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]

    @pytest.mark.filterwarnings("ignore:jax_mps. an array that is sharded:UserWarning")  # of unpooling
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", CALLS)
    def test_values_and_gradients(self, name, layout):
        sharded, at = self.put(operands_of(name), LAYOUTS[layout]), differentiable(name)
        results, gradients = on_one_device(name)
        check_close(jax.jit(CALLS[name][0])(*sharded), results)
        check_close(jax.jit(jax.grad(square_sum(first_of(name)), at))(*sharded), gradients)

    @pytest.mark.parametrize("layout", ["batch", "channels"])
    @pytest.mark.parametrize("name", sorted(CALLS.keys() - {"max_unpool", "fractional_max_pool"}))
    def test_batch_and_channels_stay_where_they_are(self, name, layout):
        sharded, at = self.put(operands_of(name), LAYOUTS[layout]), differentiable(name)
        f = first_of(name)
        forward = jax.jit(f).lower(*sharded).compile()
        assert not collectives(forward.as_text())

        def pull_back(g: Any, *operands: Any) -> Any:
            return jax.vjp(f, *operands)[1](g)

        y = forward(*sharded)
        kept = sharded[0].sharding
        assert y.sharding.is_equivalent_to(kept, y.ndim)
        backward = jax.jit(pull_back).lower(y, *sharded).compile()
        assert not collectives(backward.as_text())
        gradients = backward(y, *sharded)
        assert len(gradients) == len(at)
        for dx in gradients:
            # A gradient of constant 0 has no reason to lie anywhere.
            assert dx.sharding.is_equivalent_to(kept, dx.ndim) or not np.any(dx)

    @pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
    def test_overlapping_windows_fetch_only_borders(self, name):
        (x,) = self.put(operands_of(name), LAYOUTS["height"])
        text = jax.jit(first_of(name)).lower(x).compile().as_text()
        assert collectives(text) == {"collective-permute"}

    @pytest.mark.parametrize("name", ["max_unpool"])
    def test_unpooling_keeps_the_batch(self, name):
        sharded = self.put(operands_of(name), LAYOUTS["batch"])
        compiled = jax.jit(first_of(name)).lower(*sharded).compile()
        assert not collectives(compiled.as_text())
        y = compiled(*sharded)
        assert y.sharding.is_equivalent_to(sharded[0].sharding, y.ndim)

    def test_two_mesh_axes(self):
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        (x,) = operands_of("max_pool")
        spec = P("a", None, None, "b")
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        f = first_of("max_pool")
        compiled = jax.jit(f).lower(sharded).compile()
        assert not collectives(compiled.as_text())
        y = compiled(sharded)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)
        check_close(y, f(x))

    def test_eager_calls(self):
        (x,) = operands_of("max_pool")
        (sharded,) = self.put((x,), LAYOUTS["batch"])
        f = first_of("max_pool")
        y, dx = jax.value_and_grad(scalar(f))(sharded)
        check_close((y, dx), jax.value_and_grad(scalar(f))(x))
        y = f(sharded)
        assert y.sharding.is_equivalent_to(sharded.sharding, y.ndim)

    def test_replicated_arrays(self):
        (x,) = operands_of("max_pool")
        (replicated,) = self.put((x,), P())
        f = first_of("max_pool")
        check_close(jax.jit(f)(replicated), f(x))

    def test_one_device_that_is_not_the_first(self, implementation):
        (x,) = operands_of("max_pool")
        f = first_of("max_pool", implementation)
        y = jax.jit(f)(jax.device_put(x, jax.devices()[2]))
        assert y.devices() == {jax.devices()[2]}
        check_close(y, f(x))

    @needs_partitioning
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_native_kernels_run_on_every_part(self, layout):
        sharded = self.put(operands_of("max_pool"), LAYOUTS[layout])
        f = jax.jit(first_of("max_pool", "native"))
        text = f.lower(*sharded).compile().as_text()
        assert library.target("max_pool") in text
        check_close(f(*sharded), on_one_device("max_pool")[0][0])


# --- explicit sharding --------------------------------------------------------------------------------


@needs_explicit_sharding
class TestExplicitSharding:
    __test__ = INSIDE

    @pytest.fixture(autouse=True)
    def mesh(self):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            yield mesh

    @staticmethod
    def put(arrays: Sequence[np.ndarray], spec: P) -> list[jax.Array]:
        return [jax.device_put(x, spec) for x in arrays]

    # What JAX itself cannot gather without being told where results are to lie.
    REFUSED = (("fractional_max_pool", "height"), ("fractional_max_pool", "width"))
    SHARDED = tuple((name, layout) for name in CALLS for layout in LAYOUTS)

    @pytest.mark.filterwarnings("ignore:jax_mps. an array that is sharded:UserWarning")  # of unpooling
    @pytest.mark.parametrize(("name", "layout"), sorted(set(SHARDED) - set(REFUSED)))
    def test_values_and_gradients(self, name, layout):
        sharded, at = self.put(operands_of(name), LAYOUTS[layout]), differentiable(name)
        results, gradients = on_one_device(name)
        check_close(jax.jit(CALLS[name][0])(*sharded), results)
        check_close(jax.jit(jax.grad(square_sum(first_of(name)), at))(*sharded), gradients)

    @pytest.mark.parametrize("layout", ["batch", "channels"])
    @pytest.mark.parametrize("name", CALLS)
    def test_types_say_how_results_are_sharded(self, name, layout):
        sharded, at = self.put(operands_of(name), LAYOUTS[layout]), differentiable(name)
        first = first_of(name)
        spec = jax.typeof(sharded[0]).sharding.spec
        assert spec == P(*LAYOUTS[layout], *[None] * (4 - len(LAYOUTS[layout])))

        @jax.jit
        def run(*operands: Any) -> Any:
            y = first(*operands)
            gradients = jax.grad(square_sum(first), at)(*operands)
            assert jax.typeof(y).sharding.spec == spec
            assert [jax.typeof(g).sharding.spec for g in gradients] == [spec] * len(at)
            return y, gradients

        y, gradients = run(*sharded)
        for result in (y, *gradients):
            assert result.sharding.spec == spec
        # The sum over all elements is the only thing that the devices exchange.
        if name != "max_unpool" or layout == "batch":
            assert collectives(run.lower(*sharded).compile().as_text()) <= {"all-reduce"}

    @pytest.mark.parametrize(("name", "layout"), REFUSED)
    def test_refused(self, name, layout):
        with pytest.raises(Exception, match="out sharding could not be resolved"):
            jax.jit(first_of(name))(*self.put(operands_of(name), LAYOUTS[layout]))

    def test_eager_calls_and_vmap(self):
        (x,) = operands_of("max_pool")
        (sharded,) = self.put((x,), LAYOUTS["batch"])
        f = first_of("max_pool")
        y = f(sharded)
        check_close(y, f(x))
        assert y.sharding.spec == P("d", None, None, None)
        each = jax.jit(jax.vmap(lambda x: f(x[None])[0]))(sharded)
        check_close(each, f(x))
        assert each.sharding.spec == P("d", None, None, None)
