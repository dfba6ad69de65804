"""The layer `ConvTranspose`, Linen and NNX, ours beside Flax's: parameters, values, gradients."""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_arrays import LayerCase as Case
from flax_arrays import close, needs_nnx_lists, numbers
from jax_mps.flax import linen, nnx


def needs_argument(module: Any) -> pytest.MarkDecorator:
    """Skips where the layer of this Flax does not know an argument of ours."""
    known = "preferred_element_type" in inspect.signature(module.ConvTranspose.__init__).parameters
    return pytest.mark.skipif(not known, reason="this Flax is older than preferred_element_type")


CASES = {
    "kernel as an int": Case((2, 5, 3), 4, 3),
    "no bias": Case((2, 5, 3), 4, (3,), {"use_bias": False}),
    "no batch axis": Case((5, 4, 3), 4, (3, 3), {"strides": (2, 1)}),
    "three batch axes": Case((2, 1, 3, 5, 2), 3, (4,), {"strides": (2,)}),
    "three spatial axes": Case((1, 3, 2, 3, 2), 3, (2, 3, 2), {"strides": (2, 1, 2)}),
    # every form of padding
    "same": Case((2, 5, 4, 3), 4, (4, 4), {"strides": (2, 2), "padding": "SAME"}),
    "same, kernel below the stride": Case((2, 5, 3), 4, (2,), {"strides": (3,), "padding": "SAME"}),
    "valid": Case((2, 5, 4, 3), 4, (3, 2), {"strides": (2, 3), "padding": "VALID"}),
    "int": Case((2, 5, 3), 4, (3,), {"strides": (2,), "padding": 1}),
    "ints": Case((2, 5, 4, 3), 4, (3, 4), {"strides": (2, 2), "padding": (1, 2)}),
    "pairs": Case((2, 5, 4, 3), 4, (3, 4), {"strides": (2, 2), "padding": ((0, 2), (1, 3))}),
    "int and pair": Case((2, 5, 4, 3), 4, (3, 4), {"strides": (2, 2), "padding": (2, (1, 3))}),
    "negative pair": Case((2, 5, 3), 4, (3,), {"strides": (2,), "padding": ((-1, 4),)}),
    "circular, even": Case((2, 5, 4, 3), 4, (4, 3), {"strides": (2, 1), "padding": "CIRCULAR"}),
    "circular, even and ordinary": Case(
        (2, 5, 4, 3), 4, (4, 3), {"strides": (2, 1), "padding": "CIRCULAR", "transpose_kernel": True}
    ),
    "circular, below the stride": Case((2, 3, 3), 4, (2,), {"strides": (3,), "padding": "CIRCULAR"}),
    "circular, beyond a period": Case(
        (2, 3, 3), 4, (8,), {"kernel_dilation": (2,), "padding": "CIRCULAR", "transpose_kernel": True}
    ),
    # the other arguments
    "dilation": Case((2, 5, 3), 4, (3,), {"strides": (2,), "kernel_dilation": (3,)}),
    "ordinary kernel": Case((2, 5, 4, 3), 4, (4, 3), {"strides": (2, 2), "transpose_kernel": True}),
    "mask": Case((2, 5, 3), 4, (3,), {"mask": jnp.tril(jnp.ones((3, 3, 4)))}),
    "precision": Case((2, 5, 3), 4, (3,), {"precision": "highest"}),
    # types: of inputs, parameters, computation and result
    "bfloat16": Case((2, 5, 3), 4, (3,), {"dtype": jnp.bfloat16}, tolerance=2e-2),
    "float16 inputs": Case((2, 5, 3), 4, (3,), {}, jnp.float16),
    "bfloat16 parameters": Case((2, 5, 3), 4, (3,), {"param_dtype": jnp.bfloat16}, tolerance=1e-2),
    "integers": Case((2, 5, 3), 4, (3,), {}, jnp.int32),
    "wider result": Case(
        (2, 5, 3),
        4,
        (3,),
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
        tolerance=2e-2,
    ),
}


def image(case: Case) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(-4, 5, case.shape), case.input_dtype)


PLAIN = {"kernel_init": numbers, "bias_init": numbers}

# NNX shares the computation; its own are the parameters and what promotes them.
NNX_CASES = [
    "kernel as an int",
    "no bias",
    "three batch axes",
    "int and pair",
    "circular, even and ordinary",
    "dilation",
    pytest.param("mask", marks=needs_nnx_lists),
    "precision",
    "bfloat16",
    "bfloat16 parameters",
    "integers",
    pytest.param("wider result", marks=needs_argument(flax.nnx)),
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_argument(flax.linen)) if name == "wider result" else name
        for name in CASES
    ],
)
def test_linen_as_flax(name: str) -> None:
    case = CASES[name]
    x = image(case)
    results = []
    for module in (linen, flax.linen):
        layer = module.ConvTranspose(case.features, case.kernel_size, **(PLAIN | case.options))
        variables = layer.init(jax.random.key(0), x)

        def total(variables: Any, x: jax.Array, layer: Any = layer) -> tuple[jax.Array, jax.Array]:
            y = layer.apply(variables, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        wanted = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        try:
            gradient = jax.jit(jax.grad(total, wanted, has_aux=True))(variables, x)
        except TypeError as error:
            stock_is_old = module is flax.linen and jax.__version_info__ < (0, 10, 2)
            if not stock_is_old or "requires arguments to have the same dtypes" not in str(error):
                raise
            pytest.skip("stock JAX of this version has no gradient of a wider result")
        results.append((variables, gradient))
    (variables, ours), (flax_variables, theirs) = results
    close(variables, flax_variables, 0)
    close(ours, theirs, case.tolerance)


@pytest.mark.parametrize("name", NNX_CASES)
def test_nnx_as_flax(name: str) -> None:
    case = CASES[name]
    results = []
    for module in (nnx, flax.nnx):
        layer = module.ConvTranspose(
            case.shape[-1], case.features, case.kernel_size, **(PLAIN | case.options), rngs=nnx.Rngs(0)
        )
        results.append((nnx.to_pure_dict(nnx.state(layer, nnx.Param)), layer(image(case))))
    (parameters, ours), (flax_parameters, theirs) = results
    close(parameters, flax_parameters, 0)
    close(ours, theirs, case.tolerance)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_initialisers_are_those_of_flax(transpose_kernel: bool) -> None:
    options: dict[str, Any] = {"transpose_kernel": transpose_kernel}
    key, x = jax.random.key(0), jnp.ones((2, 5, 3))
    close(*(m.ConvTranspose(3, (2,), **options).init(key, x) for m in (linen, flax.linen)), 0)
    close(
        *(
            nnx.to_pure_dict(nnx.state(m.ConvTranspose(3, 3, (2,), **options, rngs=nnx.Rngs(0)), nnx.Param))
            for m in (nnx, flax.nnx)
        ),
        0,
    )


def test_positional_arguments_are_those_of_flax() -> None:
    fields = list(flax.linen.ConvTranspose.__dataclass_fields__)
    ours = [name for name in linen.ConvTranspose.__dataclass_fields__ if name in fields]
    assert ours == fields
    x = jnp.ones((1, 4, 4, 2))
    arguments = (3, (2, 2), (2, 2), "VALID", (2, 1), False)
    close(
        *(
            m.ConvTranspose(*arguments, kernel_init=numbers).init_with_output(jax.random.key(0), x)
            for m in (linen, flax.linen)
        ),
        1e-6,
    )


def test_promotion_may_be_replaced() -> None:
    def halved(*arrays: Any, dtype: Any) -> list[Any]:
        assert dtype == jnp.float16
        return [None if a is None else jnp.asarray(a, dtype) for a in arrays]

    x = jnp.ones((1, 4, 2))
    layer = linen.ConvTranspose(3, (2,), **PLAIN, dtype=jnp.float16, promote_dtype=halved)
    assert layer.init_with_output(jax.random.key(0), x)[0].dtype == jnp.float16
    nnx_layer = nnx.ConvTranspose(
        2,
        3,
        (2,),
        dtype=jnp.float16,
        promote_dtype=lambda a, dtype: halved(*a, dtype=dtype),
        rngs=nnx.Rngs(0),
    )
    assert nnx_layer(x).dtype == jnp.float16


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_complex_numbers(padding: str) -> None:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 5, 3)) + 1j * random.standard_normal((2, 5, 3)), jnp.complex64)
    results = []
    for module in (linen, flax.linen):
        layer = module.ConvTranspose(4, (3,), strides=(2,), padding=padding, **PLAIN)
        variables = layer.init(jax.random.key(0), x)
        results.append(jax.vjp(layer.apply, variables, x)[1](layer.apply(variables, x)))
    close(*results, 1e-5)


# --- beyond Flax --------------------------------------------------------------------------------------


def test_output_padding_with_the_paddings_of_flax() -> None:
    x = jnp.ones((1, 4, 2))
    for padding, around in ((0, ((0, 1),)), ("VALID", ((2, 3),))):
        layer = linen.ConvTranspose(3, (3,), strides=2, padding=padding, output_padding=1, **PLAIN)
        y, variables = layer.init_with_output(jax.random.key(0), x)
        expected = flax.linen.ConvTranspose(3, (3,), strides=(2,), padding=around).apply(variables, x)
        close(y, expected, 1e-6)


def test_paths() -> None:
    x = jnp.ones((1, 4, 2))
    for implementation in ("xla", None):
        layer = linen.ConvTranspose(3, (3,), implementation=implementation, **PLAIN)
        variables = layer.init(jax.random.key(0), x)
        program = str(jax.make_jaxpr(layer.apply)(variables, x))
        assert f"implementation={implementation}" in program


def test_strict_promotion() -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        layer = linen.ConvTranspose(3, (3,), padding="CIRCULAR", dtype=jnp.bfloat16, **PLAIN)
        y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 2)))
        assert y.dtype == jnp.bfloat16
        assert nnx.ConvTranspose(2, 3, (3,), **PLAIN, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 2))).shape == (
            2,
            4,
            3,
        )


# --- NNX ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(flax.nnx, "data"), reason="the masks of this Flax are nothing for nnx.jit")
@pytest.mark.parametrize("use_bias", [False, True])
def test_nnx_transformations(use_bias: bool) -> None:
    x, target = jnp.ones((2, 4, 3)), jnp.zeros((2, 8, 2))
    layers = [
        module.ConvTranspose(
            3,
            2,
            (4,),
            (2,),
            use_bias=use_bias,
            **PLAIN,
            mask=jnp.ones((4, 3, 2)).at[0].set(0),
            rngs=nnx.Rngs(0),
        )
        for module in (nnx, flax.nnx)
    ]

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

    graph, state = nnx.split(layers[0])
    again = nnx.merge(graph, state)
    assert type(again) is nnx.ConvTranspose
    np.testing.assert_array_equal(again(x), layers[0](x))
    np.testing.assert_array_equal(jax.jit(lambda state: nnx.merge(graph, state)(x))(state), nnx.jit(again)(x))


def test_nnx_metadata() -> None:
    layer = nnx.ConvTranspose(
        3,
        2,
        (4,),
        **PLAIN,
        kernel_metadata={"tag": "kernel"},
        bias_metadata={"tag": "bias"},
        rngs=nnx.Rngs(0),
    )
    assert (layer.kernel.tag, layer.bias.tag) == ("kernel", "bias")


# --- the rest of Flax ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(linen, flax.linen), (nnx, flax.nnx)])
def test_everything_else_is_flax(ours: Any, theirs: Any) -> None:
    public = [name for name in dir(theirs) if not name.startswith("_")]
    assert set(public) <= set(dir(ours))
    others = [name for name in public if getattr(ours, name) is not getattr(theirs, name)]
    assert set(others) <= set(ours.__all__)
    assert issubclass(ours.ConvTranspose, theirs.ConvTranspose)
    with pytest.raises(AttributeError, match="no_such_name"):
        ours.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="__path__"):
        ours.__path__  # noqa: B018


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype", "error", "words"),
    [
        ({"groups": 2}, jnp.float32, ValueError, ["groups", "3", "4", "2"]),
        ({"groups": 1.5}, jnp.float32, TypeError, ["groups", "1.5"]),
        ({"mask": jnp.ones((3, 4, 3))}, jnp.float32, ValueError, ["mask", "(3, 3, 4)", "(3, 4, 3)"]),
        ({"padding": "CAUSAL"}, jnp.float32, ValueError, ["padding", "CAUSAL", "'CIRCULAR'"]),
        ({"padding": ((1, 2, 3),)}, jnp.float32, ValueError, ["padding", "(1, 2, 3)"]),
        ({"padding": (1, 1)}, jnp.float32, ValueError, ["padding", "1 spatial"]),
        ({"padding": 1.5}, jnp.float32, TypeError, ["padding", "1.5"]),
        ({"padding_convention": "torch"}, jnp.float32, ValueError, ["padding", "torch", "'SAME'"]),
        ({"padding_convention": "keras"}, jnp.float32, ValueError, ["padding_convention", "keras"]),
        ({"output_padding": 1}, jnp.float32, ValueError, ["output_padding", "'SAME'", "1"]),
        ({"output_padding": 3, "padding": 1}, jnp.float32, ValueError, ["output_padding", "0 to 0", "3"]),
        ({"strides": (2, 2)}, jnp.float32, ValueError, ["strides", "(2, 2)"]),
        (
            {"preferred_element_type": jnp.float16},
            jnp.float32,
            TypeError,
            ["preferred_element_type", "float16"],
        ),
        ({"implementation": "metal"}, jnp.float32, ValueError, ["implementation", "metal"]),
    ],
)
def test_errors(options: dict[str, Any], dtype: Any, error: type[Exception], words: list[str]) -> None:
    x = jnp.zeros((1, 4, 3), dtype)
    calls = (
        lambda: linen.ConvTranspose(4, (3,), **options, **PLAIN).init(jax.random.key(0), x),
        lambda: nnx.ConvTranspose(3, 4, (3,), **options, **PLAIN, rngs=nnx.Rngs(0))(x),
    )
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value
