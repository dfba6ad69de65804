"""Native kernels over several devices: who computes what, what is exchanged, and that nothing is gathered.

`TestEightDevices` runs in a process of its own, which has eight CPU devices. The references of values are
stock JAX operations on one device.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mps
from devices import DEVICES, collectives, four_devices, needs_partitioning, run_on_devices
from jax_mps.geometry import Axis
from jax_mps.lowering import partition

__all__ = ["four_devices"]

INSIDE = DEVICES == 8


@needs_partitioning
@pytest.mark.parametrize("group", ["TestNothingIsGathered", "TestValues"])
def test_on_eight_devices(request: pytest.FixtureRequest, group: str) -> None:
    run_on_devices(8, request, group)


test_on_eight_devices.__test__ = not INSIDE


# --- the cut of an axis, against numbers ----------------------------------------------------------------


def taps(axis: Axis) -> set[tuple[int, int, int]]:
    """Of all taps inside the image: window, tap, pixel."""
    return {
        (w, t, p)
        for w, t in itertools.product(range(axis.windows), range(axis.taps))
        for p in [axis.stride * w - axis.low + axis.dilation * t]
        if 0 <= p < axis.size
    }


@pytest.mark.parametrize("by_image", [False, True], ids=["windows", "pixels"])
def test_pieces_have_each_tap_once(by_image: bool) -> None:
    """The taps of all devices, numbered in the whole, are the taps of the whole."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, k, s, d, n = (int(rng.integers(1, most)) for most in (30, 5, 5, 4, 9))
        low = int(rng.integers(0, d * (k - 1) + 2))
        axis = Axis(size, k, s, d, low, int(rng.integers(1, 1 + max(1, (size + low) // s))))
        cut = partition._Cut.of(axis, n, ("a",), by_image)
        if cut is None:
            continue
        found: list[tuple[int, int, int]] = []
        block = -(-(axis.size if by_image else axis.windows) // n)
        for j, piece in enumerate(cut.pieces):
            if piece is None:
                continue
            first, begin = piece.image[0], piece.pooled[0]
            assert (piece.axis.size, piece.axis.windows) == (piece.image[1] - first, piece.pooled[1] - begin)
            mine = taps(piece.axis)
            found += [(w + begin, t, p + first) for w, t, p in mine]
            assert piece.place + (first if by_image else begin) - piece.place >= j * block
        assert sorted(found) == sorted(taps(axis)), (axis, n)


def test_conv_rule_names_what_is_special() -> None:
    factors = partition.Factors(
        ((("batch0",), ("pooled0",), ("group", "in")), (("tap0",), ("in",), ("group", "out"))),
        ((("batch0",), ("image0",), ("group", "out")),),
        {"group": 2, "in": 3, "out": 5},
    )
    rule, keywords = factors.sharding_rule()
    assert rule == "batch0 space0 (group in), tap0 in (group out) -> batch0 space0 (group out)"
    assert keywords == {
        "reduction_factors": ("in",),
        "need_replication_factors": ("tap0",),
        "permutation_factors": ("space0",),
        "group": 2,
        "out": 5,
    }


# --- eight devices --------------------------------------------------------------------------------------

WINDOW = {"window_shape": (3, 3), "strides": 2, "padding": 1}
IMAGE, POOLED, KERNEL = (8, 16, 16, 16), (8, 8, 8, 16), (3, 3, 16, 16)
CONV = {"strides": 2, "padding": 1, "output_padding": 1}


def grad(f: Any) -> Any:
    return lambda *x: jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), tuple(range(len(x))))(*x)


def pool(name: str, **more: Any) -> Any:
    return functools.partial(getattr(jax_mps, name), **WINDOW, **more)


POOLS = {
    "max_pool": pool("max_pool"),
    "max_pool_with_indices": pool("max_pool", return_indices=True),
    "avg_pool": pool("avg_pool", count_include_pad=False),
    "l2_pool": pool("l2_pool"),
    "lp_pool": pool("lp_pool", p=3),
    **{f"{n}' gradient": grad(pool(n)) for n in ("max_pool", "avg_pool", "l2_pool")},
}
CONVS = {
    "conv": functools.partial(jax_mps.conv, strides=1, padding="SAME"),
    "conv_transpose": functools.partial(jax_mps.conv_transpose, **CONV),
    "conv' gradient": grad(functools.partial(jax_mps.conv, strides=1, padding="SAME")),
    "conv_transpose' gradient": grad(functools.partial(jax_mps.conv_transpose, **CONV)),
}
DEPTHWISE = {
    "conv": functools.partial(jax_mps.conv, strides=1, padding="SAME", groups=16),
    "conv' gradient": grad(functools.partial(jax_mps.conv, strides=1, padding="SAME", groups=16)),
}


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def grid() -> Any:
    """Functions, shapes of operands, their specs, and what may be exchanged."""
    batch, channels = P("d"), P(None, None, None, "d")
    for name, f in POOLS.items():
        yield name, f, (IMAGE,), (batch,), set()
        yield name, f, (IMAGE,), (channels,), set()
    for name, f in CONVS.items():
        sums = {"all-reduce"} if "gradient" in name else set()
        yield name, f, (POOLED, KERNEL), (batch, P()), sums
        # Each device computes some output channels; the image's gradient is a sum over them.
        yield name, f, (POOLED, KERNEL), (P(), channels), sums
    for name, f in DEPTHWISE.items():
        sums = {"all-reduce"} if "gradient" in name else set()
        yield name, f, (POOLED, (3, 3, 1, 16)), (batch, P()), sums
        yield name, f, (POOLED, (3, 3, 1, 16)), (channels, channels), set()


class TestNothingIsGathered:
    """The grid of operations on meshes of 2, 4 and 8 devices."""

    __test__ = INSIDE

    @pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
    @pytest.mark.parametrize("devices", [2, 4, 8])
    def test_batch_channels_and_groups(self, devices: int, explicit: bool) -> None:
        if explicit:
            mesh = jax.make_mesh(
                (devices,),
                ("d",),
                axis_types=(jax.sharding.AxisType.Explicit,),
                devices=jax.devices()[:devices],
            )
        else:
            mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
        for name, f, shapes, specs, allowed in grid():
            operands = draw(*shapes)
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
            with jax.set_mesh(mesh) if explicit else jax.numpy_dtype_promotion("strict"):
                compiled = jax.jit(f).lower(*placed).compile()
                found = compiled(*placed)
            text = compiled.as_text()
            assert collectives(text) <= allowed, (name, specs, collectives(text))
            assert re.search(r'custom_call_target="jax_mps\.', text), (name, specs)
            assert not re.search(r" (reduce-window|convolution|select-and-scatter)\(", text), (name, specs)
            if devices == 8:
                for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(f)(*operands)), strict=True):
                    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * max(1, np.abs(e).max()))

    def test_spatial_axes_exchange_borders_alone(self) -> None:
        """A row of 3 x 3 windows needs one row of one neighbour; its gradient as much."""
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("h", "w"))
        (x,) = draw((2, 32, 32, 4))
        placed = jax.device_put(x, NamedSharding(mesh, P(None, "h", "w")))
        for name, f in POOLS.items():
            text = jax.jit(f).lower(placed).compile().as_text()
            if name in ("max_pool_with_indices", "lp_pool"):  # not of the windowed primitives alone
                assert "all-gather" not in collectives(text), name
            else:
                assert collectives(text) == {"collective-permute"}, name
                rows = re.findall(r"= \w+\[([\d,]+)\]\S* collective-permute\(", text)
                assert rows
                assert {min(map(int, shape.split(",")[1:3])) for shape in rows} == {1}, (name, rows)
            for a, e in zip(jax.tree.leaves(jax.jit(f)(placed)), jax.tree.leaves(jax.jit(f)(x)), strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)

    def test_weights_on_the_axis_of_the_batch_follow_the_images(self) -> None:
        """Kernels that are spread over the devices that share a batch are gathered; images are not."""
        mesh = Mesh(np.array(jax.devices()), ("d",))
        x, kernel = draw(POOLED, KERNEL)
        placed = jax.device_put(
            (x, kernel), tuple(NamedSharding(mesh, s) for s in (P("d"), P(None, None, "d")))
        )
        f = jax.jit(CONVS["conv"])
        text = f.lower(*placed).compile().as_text()
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
        assert {np.prod(list(map(int, shape.split(",")))) for shape in gathered} <= {kernel.size}
        np.testing.assert_allclose(f(*placed), f(x, kernel), rtol=1e-5, atol=1e-4)

    def test_a_gather_is_not_silent(self) -> None:
        """Windows as long as the image: every device would need all of it."""
        mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
        (x,) = draw((1, 32, 32, 4))
        placed = jax.device_put(x, NamedSharding(mesh, P(None, "d")))

        def f(x: Any, implementation: str | None = None) -> Any:
            return jax_mps.max_pool(x, (31, 1), strides=1, implementation=implementation)

        with pytest.warns(UserWarning, match="has to be gathered on every device"):
            found = jax.jit(lambda x: f(x, "native"))(placed)
        np.testing.assert_array_equal(found, f(x))
        np.testing.assert_array_equal(jax.jit(lambda x: f(x, "xla"))(placed), f(x))

    def test_unpooling_over_parts_of_planes_is_not_silent(self) -> None:
        """Indices are positions in the whole plane, so a device needs all of it."""
        mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
        (x,) = draw((1, 16, 16, 4))
        y, indices = jax_mps.max_pool(x, 2, strides=2, return_indices=True)
        placed = jax.device_put((y, indices), NamedSharding(mesh, P(None, "d")))
        unpool = functools.partial(jax_mps.max_unpool, output_shape=(16, 16))
        with pytest.warns(UserWarning, match="has to be gathered on every device"):
            found = jax.jit(functools.partial(unpool, implementation="native"))(*placed)
        np.testing.assert_array_equal(found, unpool(y, indices))


class TestValues:
    """Random windows over random meshes, cut along spatial axes, against stock JAX."""

    __test__ = INSIDE

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("kind", ["max", "sum", "conv", "transposed"])
    @pytest.mark.filterwarnings("ignore:jax_mps. an array that is sharded:UserWarning")
    def test_spatial(self, kind: str, seed: int) -> None:
        rng = np.random.default_rng((seed, len(kind)))
        devices = int(rng.choice([2, 3, 4, 6, 8]))
        mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
        k, s, d = (int(rng.integers(1, most)) for most in (4, 4, 3))
        low = int(rng.integers(0, (k - 1) * d + 1))
        high = int(rng.integers(0, (k - 1) * d + 1))
        size = devices * int(rng.integers(3, 6))  # longer than any window
        x = rng.permutation(2 * size * 4 * 3).reshape(2, size, 4, 3).astype(np.float32) / 64
        kernel = rng.integers(-3, 4, (k, 2, 3, 5)).astype(np.float32)
        pads, dims = ((low, high), (0, 0)), ("NHWC", "HWIO", "NHWC")
        extent = (k - 1) * d + 1
        assert size >= extent
        window = {"strides": (s, 1), "padding": pads}

        def ours(x: Any) -> Any:
            if kind == "max":
                return jax_mps.max_pool(x, (k, 2), window_dilation=(d, 1), implementation="native", **window)
            if kind == "sum":
                keywords = {"divisor_override": 1, "window_dilation": (d, 1), "implementation": "native"}
                return jax_mps.avg_pool(x, (k, 2), **keywords, **window)
            if kind == "conv":
                return jax_mps.conv(x, kernel, kernel_dilation=(d, 1), implementation="native", **window)
            return jax_mps.conv_transpose(
                x, kernel, strides=(s, 1), kernel_dilation=(d, 1), implementation="native"
            )

        def stock(x: Any) -> Any:
            shape = (1, k, 2, 1), (1, s, 1, 1), ((0, 0), *pads, (0, 0))
            if kind in ("max", "sum"):
                init, combine = (-np.inf, lax.max) if kind == "max" else (0.0, lax.add)
                return lax.reduce_window(x, init, combine, *shape, window_dilation=(1, d, 1, 1))
            if kind == "conv":
                return lax.conv_general_dilated(
                    x, kernel, (s, 1), pads, rhs_dilation=(d, 1), dimension_numbers=dims
                )
            around = ((extent - 1, extent - 1), (1, 1))
            return lax.conv_general_dilated(
                x, kernel, (1, 1), around, lhs_dilation=(s, 1), rhs_dilation=(d, 1), dimension_numbers=dims
            )

        placed = jax.device_put(x, NamedSharding(mesh, P(None, "d")))
        np.testing.assert_allclose(jax.jit(ours)(placed), stock(x), rtol=1e-5, atol=1e-4)
        # Distinct numbers: every maximum is one pixel, so any reference has the same gradient.
        weights = jnp.cos(jnp.arange(stock(x).size, dtype=np.float32)).reshape(stock(x).shape)
        pulled = jax.jit(jax.grad(lambda x: jnp.sum(ours(x) * weights)))(placed)
        reference = stock_gradient(kind, x, weights, stock)
        np.testing.assert_allclose(pulled, reference, rtol=1e-4, atol=1e-4)


def stock_gradient(kind: str, x: np.ndarray, weights: Any, stock: Any) -> Any:
    if kind != "max":
        return jax.grad(lambda x: jnp.sum(stock(x) * weights))(x)
    # Stock JAX has no gradient of dilated maxima; each maximum is where its number is.
    y = np.asarray(stock(x)).ravel()
    order = np.argsort(x, axis=None)
    places = order[np.searchsorted(x.ravel(), y, sorter=order)]
    dx = np.zeros(x.size, np.float64)
    np.add.at(dx, places, np.asarray(weights, np.float64).ravel())
    return dx.reshape(x.shape)
