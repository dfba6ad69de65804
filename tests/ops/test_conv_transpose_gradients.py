"""Derivatives of transposed convolution of all orders against explicit arrays of numbers.

The three functions are the derivatives of one trilinear form, `sum(g * conv_transpose(x, kernel))`. Here it
is one array `T[g, x, kernel]` that the oracle fills in, and every derivative is a contraction of it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import convs
import jax_mps
import oracle

CASES = {
    "1d": convs.Conv((3,), (2,), 2, ((1, 0),), 1, 1, 2, 2),
    "1d-groups-dilated": convs.Conv((2,), (2,), 1, 1, 1, 2, 4, 2, 2, True),
    "2d": convs.Conv((2, 2), (3, 2), 2, ((1, 0), (-1, 1)), (1, 0), 1, 2, 1, transpose_kernel=True),
    "2d-depthwise": convs.Conv((2, 2), (2, 3), (1, 2), 1, 0, 1, 2, 2, 2),
    "3d": convs.Conv((2, 1, 2), (2, 2, 1), (2, 1, 2), 0, 0, 1, 1, 2),
}


def trilinear(case):
    """`T[g, x, kernel]`, and operands in float64."""
    arrays = case.arrays(batch=(1,), dtype=np.float64)
    units = np.eye(arrays.x.size).reshape(-1, *arrays.x.shape[1:])
    columns = [
        oracle.conv_transpose(units, unit.reshape(arrays.kernel.shape), **case.call)
        for unit in np.eye(arrays.kernel.size)
    ]
    return np.stack(columns, -1).reshape(arrays.x.size, arrays.g.size, -1).swapaxes(0, 1), arrays


def flat(function, *shapes):
    """A function of flat arrays instead of arrays of these shapes."""
    return lambda *operands: function(*(a.reshape(s) for a, s in zip(operands, shapes, strict=True))).ravel()


def functions(case, arrays, implementation):
    """The three functions of flat operands, and what they contract in `T`."""
    call = {**case.call, "implementation": implementation}
    x, kernel, g = (a.shape for a in arrays)
    data = functools.partial(jax_mps.conv_transpose_gradient_data, source_shape=x, **call)
    weights = functools.partial(jax_mps.conv_transpose_gradient_weights, kernel_shape=kernel, **call)
    forward = functools.partial(jax_mps.conv_transpose, **call)
    return {
        "forward": (flat(forward, x, kernel), ("x", "kernel"), "gxk,x,k->g"),
        "data": (flat(data, g, kernel), ("g", "kernel"), "gxk,g,k->x"),
        "weights": (flat(weights, g, x), ("g", "x"), "gxk,g,x->k"),
    }


@pytest.mark.parametrize("op", ["forward", "data", "weights"])
@convs.on_both_paths("name", CASES, lambda name: name in ("1d-groups-dilated", "2d"))
def test_every_first_derivative(name, op, implementation, x64):
    tensor, arrays = trilinear(CASES[name])
    f, operands, rule = functions(CASES[name], arrays, implementation)[op]
    a, b = (getattr(arrays, o).ravel() for o in operands)
    value, result, (to_a, to_b) = np.einsum(rule, tensor, a, b), rule[-1], (o[0] for o in operands)
    jacobians = [
        np.einsum(f"gxk,{to_b}->{result}{to_a}", tensor, b),
        np.einsum(f"gxk,{to_a}->{result}{to_b}", tensor, a),
    ]
    ta, tb, ct = (oracle.normal(v.shape, np.float64, 7 + i) for i, v in enumerate((a, b, value)))

    @jax.jit
    def run(a, b, ta, tb, ct):
        y, push = jax.linearize(f, a, b)
        return {
            "jacfwd": jax.jacfwd(f, (0, 1))(a, b),
            "jacrev": jax.jacrev(f, (0, 1))(a, b),
            "jvp": jax.jvp(f, (a, b), (ta, tb)),
            "one": (jax.jvp(lambda a: f(a, b), (a,), (ta,))[1], jax.jvp(lambda b: f(a, b), (b,), (tb,))[1]),
            "linearize": (y, push(ta, tb)),
            "vjp": jax.vjp(f, a, b)[1](ct),
            "transpose": (
                jax.linear_transpose(lambda a: f(a, b), a)(ct)[0],
                jax.linear_transpose(lambda b: f(a, b), b)(ct)[0],
            ),
        }

    found = run(a, b, ta, tb, ct)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    tangents = [j @ t for j, t in zip(jacobians, (ta, tb), strict=True)]
    for i in range(2):
        close(found["jacfwd"][i], jacobians[i])
        close(found["jacrev"][i], jacobians[i])
        close(found["one"][i], tangents[i])
        close(found["vjp"][i], ct @ jacobians[i])
        close(found["transpose"][i], ct @ jacobians[i])
    for key in ("jvp", "linearize"):
        close(found[key][0], value)
        close(found[key][1], tangents[0] + tangents[1])


@convs.on_both_paths(
    "name", ["1d-groups-dilated", "2d", "2d-depthwise"], lambda name: name == "1d-groups-dilated"
)
def test_second_and_third_derivatives_of_the_form(name, implementation, x64):
    tensor, arrays = trilinear(CASES[name])
    f, _, _ = functions(CASES[name], arrays, implementation)["forward"]
    g, x, kernel = (a.ravel() for a in (arrays.g, arrays.x, arrays.kernel))

    def form(g, x, kernel):
        return jnp.sum(g * f(x, kernel))

    @jax.jit
    def run(*operands):
        mixed = jax.jacrev(jax.jacfwd(form, 1), 2)  # reverse over forward
        return {
            "hessian": jax.hessian(form, (0, 1, 2))(*operands),
            "reverse": jax.jacrev(jax.jacrev(form, 2), 1)(*operands),
            "forward": jax.jacfwd(jax.jacfwd(form, 2), 1)(*operands),
            "third": jax.jacfwd(mixed, 0)(*operands),
            "third-reverse": jax.jacrev(jax.jacrev(jax.grad(form, 0), 1), 2)(*operands),
            "third-zero": jax.jacfwd(mixed, 1)(*operands),
        }

    found = run(g, x, kernel)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    blocks = {
        (0, 1): np.einsum("gxk,k->gx", tensor, kernel),
        (0, 2): np.einsum("gxk,x->gk", tensor, x),
        (1, 2): np.einsum("gxk,g->xk", tensor, g),
    }
    for i in range(3):
        assert not np.any(found["hessian"][i][i])
    for (i, j), block in blocks.items():
        assert np.any(block)
        close(found["hessian"][i][j], block)
        close(found["hessian"][j][i], block.T)
    close(found["reverse"], blocks[1, 2].T)
    close(found["forward"], blocks[1, 2].T)
    close(found["third"], np.moveaxis(tensor, 0, -1))
    close(found["third-reverse"], tensor)
    assert not np.any(found["third-zero"])


@convs.on_both_paths("name", ["1d", "2d-depthwise"], lambda name: name == "1d")
def test_hessian_vector_products_of_a_loss(name, implementation, x64):
    """Of half the square of the result, in the image and the kernel at once, by every pair of modes."""
    tensor, arrays = trilinear(CASES[name])
    f, _, _ = functions(CASES[name], arrays, implementation)["forward"]
    x, kernel = arrays.x.ravel(), arrays.kernel.ravel()
    v = tuple(oracle.normal(a.shape, np.float64, 5 + i) for i, a in enumerate((x, kernel)))

    def loss(p):
        return jnp.sum(f(*p) ** 2) / 2

    def dot(a, b):
        return sum(jnp.vdot(i, j) for i, j in zip(a, b, strict=True))

    @jax.jit
    def run(p, v):
        gradient = jax.grad(loss)
        return {
            "forward over reverse": jax.jvp(gradient, (p,), (v,))[1],
            "reverse over forward": jax.grad(lambda p: jax.jvp(loss, (p,), (v,))[1])(p),
            "reverse over reverse": jax.grad(lambda p: dot(gradient(p), v))(p),
            "forward over forward": jax.jvp(lambda p: jax.jvp(loss, (p,), (v,))[1], (p,), (v,))[1],
        }

    to_x, to_k = np.einsum("gxk,k->gx", tensor, kernel), np.einsum("gxk,x->gk", tensor, x)
    both = np.concatenate([to_x, to_k], 1)
    mixed = np.einsum("gxk,g->xk", tensor, to_x @ x)
    hessian = both.T @ both
    hessian[: x.size, x.size :] += mixed
    hessian[x.size :, : x.size] += mixed.T
    expected = hessian @ np.concatenate(v)
    for mode, product in run((x, kernel), v).items():
        if mode == "forward over forward":
            np.testing.assert_allclose(product, np.concatenate(v) @ expected, rtol=1e-10)
        else:
            np.testing.assert_allclose(
                np.concatenate(product), expected, rtol=1e-10, atol=1e-10, err_msg=mode
            )


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
@pytest.mark.parametrize(
    ("op", "name"), [("forward", "1d-groups-dilated"), ("data", "1d"), ("weights", "1d")]
)
def test_check_grads(op, name, implementation, x64):
    _, arrays = trilinear(CASES[name])
    f, operands, _ = functions(CASES[name], arrays, implementation)[op]
    a, b = (getattr(arrays, o).ravel() for o in operands)

    @jax.jit
    def function(a, b):  # the sine, so that derivatives of all orders differ from 0
        return jnp.sin(f(a, b))

    check_grads(function, (a, b), order=2, modes=["fwd", "rev"], eps=1e-4, atol=1e-5, rtol=1e-5)


# --- what a derivative is made of ---------------------------------------------------------------------


def primitives(f, *operands):
    return {str(eqn.primitive) for eqn in jax.make_jaxpr(f)(*operands).eqns}


OURS = {"conv_transpose", "conv_transpose_gradient_data", "conv_transpose_gradient_weights"}


@pytest.mark.parametrize(("argnums", "expected"), [
    (0, {"conv_transpose_gradient_data"}),
    (1, {"conv_transpose_gradient_weights"}),
    ((0, 1), {"conv_transpose_gradient_data", "conv_transpose_gradient_weights"}),
])  # fmt: skip
def test_gradients_are_the_documented_kernels_and_only_those_asked_for(argnums, expected):
    case = convs.CASES["fcn"]
    x, kernel, g = case.arrays()

    def pull_back(x, kernel, g):
        return jax.grad(lambda x, k: jnp.sum(g * jax_mps.conv_transpose(x, k, **case.call)), argnums)(
            x, kernel
        )

    assert primitives(pull_back, x, kernel, g) & OURS == expected | {"conv_transpose"}


def test_no_product_with_a_tangent_of_zero():
    case = convs.CASES["fcn"]
    x, kernel, _ = case.arrays()
    f = functools.partial(jax_mps.conv_transpose, **case.call)
    one = jax.make_jaxpr(lambda t: jax.jvp(lambda x: f(x, kernel), (x,), (t,)))(x)
    assert [str(e.primitive) for e in one.eqns if str(e.primitive) in OURS] == ["conv_transpose"] * 2


def test_what_is_kept_for_the_gradients():
    """The operands, and of those only what is needed."""
    case = convs.CASES["fcn"]
    x, kernel, _ = case.arrays()
    f = functools.partial(jax_mps.conv_transpose, **case.call)

    def kept(f, *operands):
        _, pull_back = jax.eval_shape(lambda *o: jax.vjp(f, *o), *operands)
        return sorted(leaf.shape for leaf in jax.tree.leaves(pull_back) if leaf.shape)

    assert kept(f, x, kernel) == sorted([x.shape, kernel.shape])
    assert kept(lambda x: f(x, jnp.asarray(kernel)), x) == [kernel.shape]
    assert kept(lambda k: f(jnp.asarray(x), k), kernel) == [x.shape]
