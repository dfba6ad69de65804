"""Axes of length 0: mapped ones, batches and channels, in every transformation."""

from __future__ import annotations

import functools
import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
from jax_mps.flax import linen

POOL = {"window_shape": (2,), "strides": 2}
X, Y, KERNEL = (2, 6, 2), (2, 3, 2), (3, 2, 4)
AT = np.zeros(Y, np.int32)
# The functions, and the shapes of their operands.
CALLS = {
    "max_pool": (functools.partial(jax_mps.max_pool, **POOL), (X,)),
    "avg_pool": (functools.partial(jax_mps.avg_pool, **POOL), (X,)),
    "l2_pool": (functools.partial(jax_mps.l2_pool, **POOL), (X,)),
    "max_pool_gradient": (functools.partial(jax_mps.max_pool_gradient, **POOL), (Y, X)),
    "avg_pool_gradient": (functools.partial(jax_mps.avg_pool_gradient, source_shape=X, **POOL), (Y,)),
    "l2_pool_gradient": (functools.partial(jax_mps.l2_pool_gradient, **POOL), (Y, X)),
    "max_unpool": (functools.partial(jax_mps.max_unpool, indices=AT, output_shape=(6,)), (Y,)),
    "conv": (jax_mps.conv, (X, KERNEL)),
    "conv, input dilation": (functools.partial(jax_mps.conv, input_dilation=2, strides=3), (X, KERNEL)),
    "conv_transpose": (functools.partial(jax_mps.conv_transpose, strides=2), (X, KERNEL)),
    "grouped": (functools.partial(jax_mps.conv_transpose, groups=2), (X, (3, 1, 4))),
    "conv_transpose_gradient_data": (
        functools.partial(jax_mps.conv_transpose_gradient_data, source_shape=X),
        ((2, 8, 4), KERNEL),
    ),
    "conv_transpose_gradient_weights": (
        functools.partial(jax_mps.conv_transpose_gradient_weights, kernel_shape=KERNEL),
        ((2, 8, 4), X),
    ),
}


def check_mapped(f, operands, shape):
    for transform in (lambda g: g, jax.jit):
        assert transform(f)(*operands).shape == shape
        y, tangent = transform(lambda *x: jax.jvp(f, x, x))(*operands)
        assert y.shape == tangent.shape == shape
        found = transform(lambda *x: jax.vjp(f, *x)[1](f(*x)))(*operands)
        for gradient, x in zip(found, operands, strict=True):
            np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("name", CALLS)
def test_mapped_axes(name, implementation):
    call, shapes = CALLS[name]
    f = functools.partial(call, implementation=implementation)
    example = jax.eval_shape(f, *(jax.ShapeDtypeStruct(s, np.float32) for s in shapes)).shape
    for mapped in itertools.product((None, 0, 1), repeat=len(shapes)):
        if all(d is None for d in mapped):
            continue
        operands = [
            jnp.ones(s if d is None else (*s[:d], 0, *s[d:]), np.float32)
            for s, d in zip(shapes, mapped, strict=True)
        ]
        check_mapped(jax.vmap(f, in_axes=mapped), operands, (0, *example))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "max_unpool"])  # whose indices are fixed
def test_jacobians_of_empty_batches(name, implementation):
    call, shapes = CALLS[name]
    f = functools.partial(call, implementation=implementation)
    if "source_shape" in getattr(call, "keywords", {}):
        f = functools.partial(f, source_shape=(0, *X[1:]))
    operands = [jnp.ones((0, *s[1:]) if s[0] == 2 else s, np.float32) for s in shapes]
    for i, x in enumerate(operands):
        for jacobian in (jax.jacrev, jax.jacfwd):
            found = jacobian(f, argnums=i)(*operands)
            assert found.shape == (*f(*operands).shape, *x.shape)


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(0, 2, 4), (2, 0, 4), (2, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_empty_batches_and_channels(name, batch, inputs, outputs, implementation):
    f = functools.partial(getattr(jax_mps, name), strides=2, implementation=implementation)
    x, kernel = jnp.ones((batch, 6, inputs)), jnp.ones((3, inputs, outputs))
    y, pull_back = jax.vjp(f, x, kernel)
    if not inputs:
        np.testing.assert_array_equal(y, np.zeros_like(y))
    for gradient, operand in zip(pull_back(y), (x, kernel), strict=True):
        assert gradient.shape == operand.shape
    tangent = jax.jvp(lambda *x: jax.vjp(f, *x)[1](f(*x)), (x, kernel), (x, kernel))[1]
    assert [t.shape for t in tangent] == [x.shape, kernel.shape]


@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_no_layers(layer):
    """`flax.linen.vmap` over no layers at all."""
    mapped = flax.linen.vmap(
        getattr(linen, layer), variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=0
    )
    model = mapped(features=3, kernel_size=(3,))
    variables = model.init(jax.random.key(0), jnp.ones((0, 2, 6, 2)))
    assert model.apply(variables, jnp.ones((0, 2, 6, 2))).shape[0] == 0
