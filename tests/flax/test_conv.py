"""The layer `Conv`, Linen and NNX, ours beside Flax's: parameters, values, gradients."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.linear import _Conv
from jax import lax

from flax_arrays import LayerCase as Case
from flax_arrays import close, needs_nnx_lists, numbers, operand
from jax_mps.flax import linen, nnx

CASES = {
    "kernel as an int": Case((2, 6, 3), 4, 3),
    "no bias": Case((2, 6, 3), 4, (3,), {"use_bias": False}),
    "no batch axis": Case((6, 5, 3), 4, (3, 3), {"strides": (2, 1)}),
    "three batch axes": Case((2, 1, 3, 6, 2), 3, (4,), {"strides": 2}),
    "three spatial axes": Case((1, 4, 3, 4, 2), 3, (2, 3, 2), {"strides": (2, 1, 2)}),
    "four spatial axes": Case((1, 3, 3, 3, 4, 2), 3, (2, 2, 1, 2), ours=False),
    # every form of padding
    "same": Case((2, 6, 5, 3), 4, (4, 3), {"strides": (2, 2), "padding": "SAME"}),
    "same lower": Case((2, 6, 5, 3), 4, (4, 4), {"strides": (2, 1), "padding": "SAME_LOWER"}),
    "valid": Case((2, 6, 5, 3), 4, (3, 2), {"strides": (2, 3), "padding": "VALID"}),
    "int": Case((2, 6, 3), 4, (3,), {"strides": None, "padding": 1}),
    "ints": Case((2, 6, 5, 3), 4, (3, 4), {"padding": (1, 2)}),
    "pairs": Case((2, 6, 5, 3), 4, (3, 4), {"strides": (2, 2), "padding": ((0, 2), (1, 3))}),
    "int and pair": Case((2, 6, 5, 3), 4, (3, 4), {"padding": (2, (1, 3))}),
    "circular": Case((2, 6, 5, 3), 4, (4, 3), {"strides": (2, 1), "padding": "CIRCULAR"}),
    "circular, dilated": Case((2, 7, 3), 4, (3,), {"kernel_dilation": 3, "padding": "CIRCULAR"}),
    "reflect": Case((2, 6, 5, 3), 4, (4, 3), {"strides": (1, 2), "padding": "REFLECT"}),
    "causal": Case((2, 7, 3), 4, (3,), {"kernel_dilation": (2,), "padding": "CAUSAL"}),
    "causal, depthwise": Case((2, 7, 3), 3, (4,), {"feature_group_count": 3, "padding": "CAUSAL"}),
    # dilation and groups
    "kernel dilation": Case((2, 9, 3), 4, (3,), {"strides": (2,), "kernel_dilation": (3,)}),
    "input dilation": Case((2, 6, 5, 3), 4, (4, 3), {"input_dilation": (2, 3), "padding": (2, (1, 0))}),
    "input dilation and strides": Case(
        (2, 6, 5, 3),
        4,
        (4, 3),
        {"input_dilation": 2, "strides": (3, 1), "kernel_dilation": (1, 2), "padding": 1},
    ),
    "groups": Case((2, 6, 5, 4), 6, (3, 3), {"feature_group_count": 2}),
    "depthwise": Case((2, 6, 5, 4), 4, (3, 3), {"strides": 2, "feature_group_count": 4}),
    "multiplier": Case((2, 6, 5, 3), 6, (3, 3), {"feature_group_count": 3}),
    # the other arguments
    "mask": Case((2, 6, 3), 4, (3,), {"mask": jnp.tril(jnp.ones((3, 3, 4)))}),
    "precision": Case((2, 6, 3), 4, (3,), {"precision": "highest"}),
    "empty result": Case((2, 2, 3), 4, (3,), {"padding": "VALID"}, ours=False),
    "empty batch": Case((0, 6, 3), 4, (3,), ours=False),
    # types: of inputs, parameters and computation
    "bfloat16": Case((2, 6, 3), 4, (3,), {"dtype": jnp.bfloat16}, tolerance=2e-2),
    # Flax sums the gradient of the bias in float16.
    "float16": Case((2, 6, 5, 3), 4, (3, 3), {"dtype": jnp.float16}, tolerance=1e-2),
    "float16 inputs": Case((2, 6, 3), 4, (3,), {}, jnp.float16),
    "bfloat16 parameters": Case((2, 6, 3), 4, (3,), {"param_dtype": jnp.bfloat16}, tolerance=1e-2),
    "integers": Case((2, 6, 3), 4, (3,), {}, jnp.int32),
    "complex numbers": Case((2, 6, 3), 4, (3,), {"dtype": jnp.complex64}, ours=False),
}
PLAIN = {"kernel_init": numbers, "bias_init": numbers}
OURS = ("conv_transpose_gradient_data", "conv_transpose")
KNOWN = inspect.signature(flax.nnx.Conv.__init__).parameters
OLD = "REFLECT" not in inspect.getsource(_Conv)


def known(name: str, *marks: Any) -> Any:
    old = OLD and CASES[name].options.get("padding") == "REFLECT"
    return pytest.param(
        name, marks=[*marks, pytest.mark.skipif(old, reason="this Flax is older than REFLECT")]
    )


def image(case: Case) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(-4, 5, case.shape), case.input_dtype)


def total(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(y.real.astype(jnp.float32)))


def names_in(f: Callable[..., Any], *operands: Any) -> set[str]:
    """The convolutions of a program."""
    text = str(jax.make_jaxpr(f)(*operands))
    return {name for name in (*OURS, "conv_general_dilated") if f"{name}[" in text}


@pytest.mark.parametrize("name", [known(name) for name in CASES])
def test_linen_as_flax(name: str) -> None:
    case = CASES[name]
    x = image(case)
    results = []
    for module in (linen, flax.linen):
        layer = module.Conv(case.features, case.kernel_size, **(PLAIN | case.options))
        variables = layer.init(jax.random.key(0), x)

        def function(variables: Any, x: jax.Array, layer: Any = layer) -> tuple[jax.Array, jax.Array]:
            y = layer.apply(variables, x)
            return total(y), y

        wanted = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        results.append((variables, jax.jit(jax.grad(function, wanted, has_aux=True))(variables, x)))
        assert bool(names_in(layer.apply, variables, x) & set(OURS)) == (case.ours and module is linen)
    (variables, ours), (flax_variables, theirs) = results
    close(variables, flax_variables, 0)
    close(ours, theirs, case.tolerance)


NNX_CASES = [name for i, name in enumerate(CASES) if i % 2 or name in ("mask", "complex numbers", "reflect")]


@pytest.mark.parametrize("name", [known(name, *[needs_nnx_lists] * (name == "mask")) for name in NNX_CASES])
def test_nnx_as_flax(name: str) -> None:
    case = CASES[name]
    results = []
    for module in (nnx, flax.nnx):
        layer = module.Conv(
            case.shape[-1], case.features, case.kernel_size, **(PLAIN | case.options), rngs=nnx.Rngs(0)
        )
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        def function(parameters: Any, x: jax.Array, graph: Any = graph, rest: Any = rest) -> Any:
            y, pull_back = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), parameters, x)
            return y, jax.tree.leaves(pull_back(jnp.cos(y)))

        x = image(case).astype(jnp.result_type(case.input_dtype, jnp.float16))
        results.append((nnx.to_pure_dict(parameters), function(parameters, x)))
    (parameters, ours), (flax_parameters, theirs) = results
    close(parameters, flax_parameters, 0)
    close(ours, theirs, case.tolerance)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
@pytest.mark.skipif("preferred_element_type" not in KNOWN, reason="this Flax has no such argument")
@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16),
        (jnp.float32, np.float64),  # float32 without 64-bit types
    ],
)
def test_result_of_a_preferred_type(dtype: Any, preferred: Any) -> None:
    x = operand(2, 6, 5, 3)
    options = PLAIN | {"dtype": dtype, "preferred_element_type": preferred, "use_bias": False}
    layers = [m.Conv(3, 4, (3, 3), **options, rngs=nnx.Rngs(0)) for m in (nnx, flax.nnx)]
    close(layers[0](x), layers[1](x), 4e-3)
    assert names_in(layers[0], x) == {OURS[0]}


def test_negative_padding() -> None:
    """XLA's CPU code for it reads beside the array in float32, so the image is cut here."""
    x = operand(2, 9, 8, 3)
    layer = linen.Conv(4, (3, 2), strides=(1, 2), padding=((-2, 1), (-1, -2)), **PLAIN)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    stock = flax.linen.Conv(4, (3, 2), strides=(1, 2), padding=((0, 1), (0, 0)))
    close(y, stock.apply(variables, x[:, 2:, 1:-2]), 1e-5)


def test_initialisers_are_those_of_flax() -> None:
    key, x = jax.random.key(0), jnp.ones((2, 5, 4))
    options: dict[str, Any] = {"feature_group_count": 2}
    close(*(m.Conv(6, (3,), **options).init(key, x) for m in (linen, flax.linen)), 0)
    layers = [m.Conv(4, 6, (3,), **options, rngs=nnx.Rngs(0)) for m in (nnx, flax.nnx)]
    close(*(nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in layers), 0)


def test_positional_arguments_are_those_of_flax() -> None:
    fields = list(flax.linen.Conv.__dataclass_fields__)
    assert [name for name in linen.Conv.__dataclass_fields__ if name in fields] == fields
    x = jnp.ones((1, 6, 6, 2))
    arguments = (3, (2, 2), (2, 2), 1, (1, 2), (2, 1), 1, False)
    close(
        *(m.Conv(*arguments, **PLAIN).init_with_output(jax.random.key(0), x) for m in (linen, flax.linen)),
        1e-5,
    )
    close(*(m.Conv(2, 3, (2, 2), 2, **PLAIN, rngs=nnx.Rngs(0))(x) for m in (nnx, flax.nnx)), 1e-5)


def test_checkpoints_load_both_ways() -> None:
    x = operand(2, 6, 5, 4)
    layers = [m.Conv(6, (3, 3), feature_group_count=2, **PLAIN) for m in (linen, flax.linen)]
    for ours, theirs in (layers, layers[::-1]):
        y, variables = ours.init_with_output(jax.random.key(0), x)
        empty = jax.tree.map(jnp.zeros_like, theirs.init(jax.random.key(1), x))
        loaded = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(variables))
        close(theirs.apply(loaded, x), y, 1e-5)
    nnx_layers = [
        m.Conv(4, 6, (3, 3), feature_group_count=2, **PLAIN, rngs=nnx.Rngs(i))
        for i, m in enumerate((nnx, flax.nnx))
    ]
    for mine, other in (nnx_layers, nnx_layers[::-1]):
        nnx.update(other, nnx.state(mine, nnx.Param))
        close(mine(x), other(x), 1e-5)


# --- which function computes --------------------------------------------------------------------------


def test_a_function_that_is_given_is_used() -> None:
    x, seen = jnp.ones((1, 6, 2)), []

    def mine(*operands: Any, **options: Any) -> jax.Array:
        seen.append(options)
        return lax.conv_general_dilated(*operands, **options)

    for more in ({"conv_general_dilated": mine}, {"conv_general_dilated_cls": lambda: mine}):
        layer = linen.Conv(3, (3,), implementation="native", **more, **PLAIN)
        variables = layer.init(jax.random.key(0), x)
        assert names_in(layer.clone().apply, variables, x) == {"conv_general_dilated"}
    stock = nnx.Conv(2, 3, (3,), conv_general_dilated=mine, **PLAIN, rngs=nnx.Rngs(0))
    assert names_in(stock, x) == {"conv_general_dilated"}
    assert len(seen) == 5


def test_paths() -> None:
    x = jnp.ones((1, 4, 2))
    for implementation in ("xla", None):
        layer = linen.Conv(3, (3,), implementation=implementation, **PLAIN)
        variables = layer.init(jax.random.key(0), x)
        text = f"implementation={implementation}"
        assert text in str(jax.make_jaxpr(layer.apply)(variables, x))
        other = nnx.Conv(2, 3, (3,), implementation=implementation, **PLAIN, rngs=nnx.Rngs(0))
        assert other.implementation == implementation
        assert text in str(jax.make_jaxpr(other)(x))
        # A copy with another path takes that path.
        copy = linen.Conv(3, (3,), **PLAIN).clone(implementation=implementation)
        assert text in str(jax.make_jaxpr(copy.apply)(variables, x))


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_native_where_it_cannot_be_had() -> None:
    for options, shape, words in (
        ({"dtype": jnp.complex64}, (1, 4, 2), "dtype complex64"),
        ({"padding": "VALID"}, (1, 2, 2), "an empty array"),
        ({}, (0, 4, 2), "an empty array"),
        ({"kernel_size": (1, 1, 1, 1)}, (1, 1, 1, 1, 1, 2), "4 spatial axes"),
    ):
        for implementation in ("native", "metal"):
            layer = linen.Conv(
                **({"features": 3, "kernel_size": (3,), "implementation": implementation} | options)
            )
            with pytest.raises(ValueError, match=f"implementation='{implementation}' cannot be had: {words}"):
                layer.init(jax.random.key(0), jnp.zeros(shape))
        # XLA computes it in any case.
        linen.Conv(**({"features": 3, "kernel_size": (3,), "implementation": "xla"} | options)).init(
            jax.random.key(0), jnp.zeros(shape)
        )


def test_a_layer_is_a_value() -> None:
    """Equal layers are equal, hash alike, and come back from a pickle."""
    one, same = (linen.Conv(3, (3,), **PLAIN) for _ in range(2))
    other = linen.Conv(3, (3,), implementation="xla", **PLAIN)
    again = pickle.loads(pickle.dumps(other))
    assert one == same == one.clone() != other == again
    assert len({one, same, one.copy(), other, again}) == 2
    assert one != flax.linen.Conv(3, (3,), **PLAIN)
    assert "Conv" in one.tabulate(jax.random.key(0), jnp.ones((1, 4, 2)))
    graphs = [
        nnx.split(nnx.Conv(2, 3, (3,), implementation=i, **PLAIN, rngs=nnx.Rngs(0)))[0]
        for i in (None, None, "xla")
    ]
    assert graphs[0] == graphs[1] != graphs[2]
    assert hash(graphs[0]) == hash(graphs[1])


# --- in models ----------------------------------------------------------------------------------------


class Block(linen.Module):
    """One of everything that Flax does to a layer: a scan over depth, recomputation, a map."""

    conv: Any = linen.Conv

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def step(layer: Any, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return linen.relu(layer(x)), None

        scan = linen.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(self.conv(4, (3, 3), **PLAIN, name="deep"), x, None)
        x = linen.remat(self.conv)(4, (3, 3), strides=2, **PLAIN)(x)
        mapped = linen.vmap(
            self.conv, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return mapped(2, (2, 2), **PLAIN)(x)


@pytest.mark.skipif(not hasattr(jax.api_util, "debug_info"), reason="Flax's own scan wants a newer JAX")
def test_lifted_transformations_of_linen() -> None:
    x = operand(2, 6, 6, 4)
    results = []
    for conv in (linen.Conv, flax.linen.Conv):
        block = Block(conv)
        variables = jax.tree.map(lambda a: a / 8, block.init(jax.random.key(0), x))
        gradient = jax.jit(jax.value_and_grad(lambda v, x, block=block: total(block.apply(v, x)), (0, 1)))
        results.append((jax.tree.map(jnp.shape, variables), gradient(variables, x)))
    (shapes, ours), (flax_shapes, theirs) = results
    assert list(jax.tree.leaves(shapes)) == list(jax.tree.leaves(flax_shapes))
    assert len(jax.tree.leaves(ours)) == len(jax.tree.leaves(theirs))
    close(jax.tree.leaves(ours), jax.tree.leaves(theirs), 1e-4)


@pytest.mark.skipif(not hasattr(flax.nnx, "data"), reason="the masks of this Flax are nothing for nnx.jit")
def test_nnx_transformations() -> None:
    x, target = operand(2, 6, 3), jnp.zeros((2, 3, 2))
    mask = jnp.ones((4, 3, 2)).at[0].set(0)
    layers = [m.Conv(3, 2, (4,), 2, **PLAIN, mask=mask, rngs=nnx.Rngs(0)) for m in (nnx, flax.nnx)]

    @nnx.jit
    def step(layer: Any) -> jax.Array:
        loss, gradient = nnx.value_and_grad(lambda layer: jnp.sum((layer(x) - target) ** 2))(layer)
        parameters = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradient))
        return loss

    losses = [[float(step(layer)) for _ in range(2)] for layer in layers]
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    close(*(nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in layers), 1e-5)
    again = nnx.merge(*nnx.split(layers[0]))
    assert type(again) is nnx.Conv
    np.testing.assert_array_equal(again(x), layers[0](x))


@pytest.mark.parametrize("module", [nnx, flax.nnx])
def test_nnx_vmap_of_layers(module: Any) -> None:
    x = operand(3, 2, 6, 3)

    def make(key: Any) -> Any:
        return module.Conv(3, 2, (3,), rngs=nnx.Rngs(key), kernel_init=jax.random.normal)

    def apply(layer: Any, x: jax.Array) -> jax.Array:
        return layer(x)

    layers = nnx.vmap(make, in_axes=0, out_axes=0)(jax.random.split(jax.random.key(0), 3))
    found = nnx.vmap(apply, in_axes=(0, 0), out_axes=0)(layers, x)
    for i in range(3):
        one = flax.nnx.Conv(3, 2, (3,), rngs=nnx.Rngs(0))
        nnx.update(one, jax.tree.map(lambda a: a[i], nnx.state(layers, nnx.Param)))  # noqa: B023
        close(found[i], one(x[i]), 1e-5)


def test_strict_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"):
        x = jnp.ones((2, 4, 2))
        layer = linen.Conv(3, (3,), padding="CIRCULAR", dtype=jnp.bfloat16, **PLAIN)
        assert layer.init_with_output(jax.random.key(0), x)[0].dtype == jnp.bfloat16
        assert nnx.Conv(2, 3, (3,), **PLAIN, rngs=nnx.Rngs(0))(x).shape == (2, 4, 3)
        half = nnx.Conv(2, 3, (3,), dtype=jnp.bfloat16, **PLAIN, rngs=nnx.Rngs(0))
        assert half(x).dtype == jnp.bfloat16


def test_other_convolutions_are_flax_own() -> None:
    assert linen.ConvLocal is flax.linen.ConvLocal
    assert issubclass(linen.Conv, flax.linen.Conv)
    assert issubclass(nnx.Conv, flax.nnx.Conv)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strides": (2, 2)}, ValueError, ["strides", "(2, 2)"]),
        ({"strides": 0}, ValueError, ["strides", "at least 1"]),
        ({"strides": (1.5,)}, TypeError, ["strides", "1.5"]),
        ({"input_dilation": (0,)}, ValueError, ["input_dilation", "at least 1"]),
        ({"kernel_dilation": (1, 2)}, ValueError, ["kernel_dilation", "(1, 2)"]),
        ({"feature_group_count": 3}, ValueError, ["groups", "4", "3"]),
        ({"padding": ((0.5, 1),)}, TypeError, ["padding", "0.5"]),
        ({"padding": (1, 1)}, ValueError, ["padding", "(1, 1)"]),
        ({"input_dilation": 2}, ValueError, ["padding"]),  # Flax' own rule
        ({"implementation": "metal"}, ValueError, ["implementation", "metal"]),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    x = jnp.zeros((1, 4, 3))
    calls = (
        lambda: linen.Conv(4, (3,), **options, **PLAIN).init(jax.random.key(0), x),
        lambda: nnx.Conv(3, 4, (3,), **options, **PLAIN, rngs=nnx.Rngs(0))(x),
    )
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value
