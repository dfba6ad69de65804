"""`vmap` of transposed convolution over images, kernels or both, and what it becomes.

Every transformation of the three functions is in `test_transformations.py`, for one geometry. Here are
groups, kernels of either kind, layouts and ranks, which the rule of `vmap` folds into channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convs
import grid
import jax_mps
import oracle


def stacked(case, data_format, count):
    """That many arrays of each kind along a first axis."""
    each = [case.arrays(data_format) for _ in range(count)]
    return convs.Arrays(
        *(np.stack([(a[i] + n).astype(np.float32) for n, a in enumerate(each)]) for i in range(3))
    )


def close(op, case, actual, each, **call):
    """Compares a stack of results with the oracle's, one after the other."""
    assert len(actual) == len(each)
    for y, arrays in zip(actual, each, strict=True):
        convs.check(op, y, arrays, **call)


FOLDED = [
    ("cut-and-pad", "channels_last"), ("vocoder", "channels_first"), ("upsample", "channels_last"),
    ("multiplier", "channels_first"), ("groups", "channels_last"), ("groups-disjoint", "channels_first"),
    ("volume-groups", "channels_last"),
]  # fmt: skip


@convs.on_both_paths(("name", "data_format"), FOLDED, lambda n, _: n in ("groups", "cut-and-pad"))
def test_vmap_folds_into_channels(name, data_format, implementation):
    case = convs.CASES[name]
    call = {**case.call, "data_format": data_format}
    many = stacked(case, data_format, 3)
    one = convs.Arrays(*(a[1] for a in many))
    # Operands mapped alone and together, over a first, a middle and the last axis.
    mappings = [(1, None), (None, 2), (0, -1)]

    @jax.jit
    def run(many, one):
        found = {}
        for op in convs.OPS:

            def function(a, b, op=op):
                arrays = one._replace(**dict(zip(op.operands, (a, b), strict=True)))
                return op.apply(arrays, **call, implementation=implementation)

            for axes in mappings:
                operands = [
                    jnp.moveaxis(a, 0, at) if at is not None else b
                    for a, b, at in zip(op.of(many), op.of(one), axes, strict=True)
                ]
                found[f"{op.name} {axes}"] = jax.vmap(function, axes)(*operands)
        return found

    found = run(many, one)
    for op in convs.OPS:
        for axes in mappings:
            each = []
            for n in range(3):
                operands = zip(op.operands, op.of(many), axes, strict=True)
                mapped = {kind: a[n] for kind, a, at in operands if at is not None}
                each.append(one._replace(**mapped))
            close(op, case, found[f"{op.name} {axes}"], each, **call)


@pytest.mark.parametrize(("name", "data_format"), [("fcn", "channels_last"), ("groups", "channels_first")])
def test_nested_vmap_of_images_and_kernels(name, data_format, implementation):
    """Every image with every kernel, from either side, and both mapped twice."""
    case = convs.CASES[name]
    call = {**case.call, "data_format": data_format}
    many = stacked(case, data_format, 3)

    @jax.jit
    def run(x, k):
        f = functools.partial(jax_mps.conv_transpose, **call, implementation=implementation)
        return (
            jax.vmap(jax.vmap(f, (0, None)), (None, 0))(x, k),
            jax.vmap(jax.vmap(f, (None, 0)), (0, None))(x, k),
            jax.vmap(jax.vmap(f))(jnp.stack([x, 2 * x]), jnp.stack([k, k])),
            jax.vmap(jax.vmap(f), (0, None))(jnp.stack([x, 2 * x]), k),
        )

    by_kernel, by_image, twice, mixed = run(many.x, many.kernel)
    for i in range(3):
        for j in range(3):
            arrays = convs.Arrays(many.x[i], many.kernel[j], many.g[0])
            convs.check(convs.FORWARD, by_kernel[j][i], arrays, **call)
            np.testing.assert_allclose(by_image[i][j], by_kernel[j][i], rtol=1e-5, atol=1e-4)
        for both in (twice, mixed):
            np.testing.assert_allclose(both[0][i], by_kernel[i][i], rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(both[1][i], 2 * by_kernel[i][i], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["fcn", "upsample", "groups-dilated"])
def test_gradients_of_every_example(name, implementation):
    """A gradient of the kernel for each image; the sum of them is that of the batch."""
    case = convs.CASES[name]
    arrays = case.arrays(batch=(4,))

    @jax.jit
    def run(x, kernel, g):
        f = functools.partial(jax_mps.conv_transpose, **case.call, implementation=implementation)
        pull = lambda x, g: jax.vjp(lambda k: f(x, k), kernel)[1](g)[0]  # noqa: E731
        summed = jax.grad(lambda k: jnp.sum(g * jax.vmap(lambda x: f(x, k))(x)))(kernel)
        return jax.vmap(pull)(x, g), summed, pull(x, g)

    each, summed, whole = run(*arrays)
    for n in range(4):
        alone = convs.Arrays(arrays.x[n], arrays.kernel, arrays.g[n])
        convs.check(convs.WEIGHTS, each[n], alone, **case.call)
    for total in (summed, whole, np.sum(each, axis=0)):
        convs.check(convs.WEIGHTS, total, arrays, **case.call)


@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_vmap_moves_no_image_that_it_can_leave(data_format):
    """A mapped batch is one more batch axis: the primitive sees the array as it is."""
    case = convs.CASES["fcn"]
    x, kernel, g = case.arrays(data_format, (3, 2))
    call = {**case.call, "data_format": data_format}
    like = case.shape(data_format, (2,))
    functions = {
        "conv_transpose": (lambda x: jax_mps.conv_transpose(x, kernel, **call), x),
        "conv_transpose_gradient_data": (
            lambda g: jax_mps.conv_transpose_gradient_data(g, kernel, like, **call), g,
        ),
    }  # fmt: skip
    for name, (f, image) in functions.items():
        primitives = [str(e.primitive) for e in jax.make_jaxpr(jax.vmap(f))(image).eqns]
        # Old versions put the kernel, a constant, on its device.
        assert [p for p in primitives if p != "device_put"] == [name]


def test_300_kernels_are_one_call():
    """A vmap over kernels, over images and over both is one of our primitives, whatever their number."""
    case = convs.Conv((2,), (2,), 2, inputs=2, outputs=2)
    x, kernel, g = case.arrays()
    kernels, images = (np.stack([a] * 300) for a in (kernel, x))
    f = functools.partial(jax_mps.conv_transpose, **case.call)

    def pull(x, kernel):
        return jax.vjp(f, x, kernel)[1](g)

    calls = {(None, 0): (x, kernels), (0, None): (images, kernel), (0, 0): (images, kernels)}
    for mapped, operands in calls.items():
        equations = jax.make_jaxpr(jax.vmap(pull, mapped))(*operands).eqns
        ours = [str(e.primitive) for e in equations if str(e.primitive).startswith("conv_transpose")]
        # The value itself is computed too.
        assert sorted(ours) == [
            "conv_transpose", "conv_transpose_gradient_data", "conv_transpose_gradient_weights",
        ]  # fmt: skip
    y = jax.jit(jax.vmap(f, (None, 0)))(x, kernels)
    oracle.assert_close(y, np.stack([oracle.conv_transpose(x, kernel, **case.call)] * 300), length=8)
