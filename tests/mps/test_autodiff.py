"""`jax.vjp` through a forward kernel is its gradient kernel, for every class over random parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mps import mps

POOLS = {
    mps.MPSCNNPoolingMax: mps.MPSCNNPoolingMaxGradient,
    mps.MPSCNNDilatedPoolingMax: mps.MPSCNNDilatedPoolingMaxGradient,
    mps.MPSCNNPoolingAverage: mps.MPSCNNPoolingAverageGradient,
    mps.MPSCNNPoolingL2Norm: mps.MPSCNNPoolingL2NormGradient,
}


def window(rng, cls):
    names = ["kernel_width", "kernel_height", "stride_in_pixels_x", "stride_in_pixels_y"]
    if cls is mps.MPSCNNDilatedPoolingMax:
        names += ["dilation_rate_x", "dilation_rate_y"]
    return {name: int(rng.integers(1, 4)) for name in names}


def offset(rng, low, high, z=0):
    x, y = (int(v) for v in rng.integers(low, high, 2))
    return mps.MPSOffset(x=x, y=y, z=z)


@pytest.mark.parametrize("cls", POOLS)
@pytest.mark.parametrize("seed", range(2))
def test_pooling(cls, seed):
    rng = np.random.default_rng([seed, list(POOLS).index(cls)])
    members = window(rng, cls)
    more = {"edge_mode": str(rng.choice(["zero", "clamp"]))}
    if cls is mps.MPSCNNPoolingAverage:
        more |= {"zero_pad_size_x": int(rng.integers(0, 2)), "zero_pad_size_y": int(rng.integers(0, 2))}
    gradient = POOLS[cls](**members)
    x = jnp.asarray(rng.normal(size=(3, 6, 5, 4)), jnp.float32)

    # Sized by the policy.
    kernel = cls(**members, **more)
    y, pull = jax.vjp(kernel.encode, x)
    _, state = kernel.encode_with_state(x)
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose(gradient.encode(g, x, state), pull(g)[0], rtol=1e-5, atol=1e-5)

    # Into a part of a destination, from a part of the source.
    kernel = kernel.copy(
        offset=offset(rng, -2, 4, z=1),
        clip_rect=mps.MTLRegion(
            origin=mps.MTLOrigin(x=1, y=int(rng.integers(0, 3)), z=1), size=mps.MTLSize(width=2, depth=1)
        ),
        source_feature_channel_offset=1,
        source_feature_channel_max_count=2,
        destination_feature_channel_offset=1,
    )
    to = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    y, pull = jax.vjp(kernel.encode, x, to)
    state = kernel.result_state(x, to)
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    dx, dto = pull(g)
    assert float(jnp.abs(dx).sum()) > 0 or cls is not mps.MPSCNNPoolingAverage
    np.testing.assert_allclose(gradient.encode(g, x, state), dx, rtol=1e-5, atol=1e-5)
    # The destination keeps what lies outside, so its gradient is the incoming one there.
    inside = np.zeros(to.shape, bool)
    origin = kernel.clip_rect.origin
    inside[1:2, origin.y :, 1:3, 1:3] = True
    np.testing.assert_array_equal(dto, np.where(inside, 0, g))


def transposed(rng, **members):
    groups = int(rng.integers(1, 3))
    descriptor = mps.MPSCNNConvolutionDescriptor(
        kernel_width=int(rng.integers(1, 4)),
        kernel_height=int(rng.integers(1, 4)),
        input_feature_channels=2,
        output_feature_channels=2,
        stride_in_pixels_x=int(rng.integers(1, 4)),
        stride_in_pixels_y=int(rng.integers(1, 4)),
        dilation_rate_x=int(rng.integers(1, 3)),
        groups=groups,
    )
    weights = jnp.asarray(rng.normal(size=descriptor.weights_shape), jnp.float32)
    source = mps.ConvolutionDataSource(descriptor, weights, jnp.asarray(rng.normal(size=2), jnp.float32))
    return mps.MPSCNNConvolutionTranspose(weights=source, **members), source


@pytest.mark.parametrize("seed", range(2))
def test_transposed_convolution(seed):
    rng = np.random.default_rng(seed)
    region = mps.MTLRegion(origin=mps.MTLOrigin(x=1, z=1), size=mps.MTLSize(height=5))
    kernel, source = transposed(
        rng,
        offset=offset(rng, -1, 2, z=1),
        kernel_offset_x=int(rng.integers(-2, 3)),
        kernel_offset_y=int(rng.integers(-2, 3)),
        clip_rect=region,
        source_feature_channel_offset=1,
        source_feature_channel_max_count=2,
        destination_feature_channel_offset=1,
    )
    x = jnp.asarray(rng.normal(size=(2, 4, 3, 4)), jnp.float32)
    gradient = mps.MPSCNNConvolutionTransposeGradient(weights=source)
    for to in (None, jnp.zeros((2, 6, 7, 4), jnp.float32)):
        kernel = kernel if to is not None else kernel.copy(clip_rect=None)
        y, pull = jax.vjp(lambda kernel, x, to=to: kernel.encode(x, to), kernel, x)
        state = kernel.result_state(x, to)
        kernel = kernel.copy(clip_rect=region)
        g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
        dkernel, dx = pull(g)
        data, state = gradient.encode(g, x, state)
        np.testing.assert_allclose(data, dx, rtol=1e-4, atol=1e-4)
        wanted = dkernel.export_weights_and_biases()
        np.testing.assert_allclose(state.gradient_for_weights, wanted.weights, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.gradient_for_biases, wanted.biases, rtol=1e-4, atol=1e-4)
        assert state.gradient_for_weights.shape == source.descriptor().weights_shape


def test_gradient_options_and_batches():
    rng = np.random.default_rng(0)
    kernel, source = transposed(rng)
    xs = [jnp.asarray(rng.normal(size=(3, 3, 2)), jnp.float32) for _ in range(2)]
    ys, states = kernel.encode_batch_with_states(xs)
    assert [y.shape for y in ys] == [y.shape for y in kernel.encode_batch(xs)]
    gs = [jnp.asarray(rng.normal(size=y.shape), jnp.float32) for y in ys]
    gradient = mps.MPSCNNConvolutionTransposeGradient(weights=source)
    data, state = gradient.encode_batch(gs, xs, states)
    stacked, whole = gradient.encode(jnp.stack(gs), jnp.stack(xs), kernel.result_state(jnp.stack(xs)))
    np.testing.assert_allclose(jnp.stack(data), stacked, rtol=1e-5, atol=1e-5)
    for name in ("gradient_for_weights", "gradient_for_biases"):
        np.testing.assert_allclose(getattr(state, name), getattr(whole, name), rtol=1e-4, atol=1e-4)
    only = gradient.copy(gradient_option="gradient_with_data")
    dx, none = only.encode(gs[0], xs[0], states[0])
    np.testing.assert_array_equal(dx, data[0])
    assert none.gradient_for_weights is none.gradient_for_biases is None
    only = gradient.copy(gradient_option=mps.MPSCNNConvolutionGradientOption.GRADIENT_WITH_WEIGHTS_AND_BIAS)
    none, some = only.encode(gs[0], xs[0], states[0])
    assert none is None
    assert some.gradient_for_weights is not None


def test_data_gradient_into_a_destination():
    rng = np.random.default_rng(1)
    kernel, source = transposed(rng)
    x = jnp.asarray(rng.normal(size=(3, 3, 2)), jnp.float32)
    y, state = kernel.encode_with_state(x)
    gradient = mps.MPSCNNConvolutionTransposeGradient(weights=source)
    dx, _ = gradient.encode(y, x, state)
    placed = gradient.copy(
        offset=state.kernel.offset,
        kernel_offset_x=state.kernel.kernel_offset_x,
        kernel_offset_y=state.kernel.kernel_offset_y,
        clip_rect=mps.MTLRegion(origin=mps.MTLOrigin(x=1, y=2), size=mps.MTLSize(width=4)),
    )
    out, _ = placed.encode(y, x, destination_gradient=jnp.full((6, 6, 2), 7.0))
    expected = np.full((6, 6, 2), 7.0, np.float32)
    expected[2:, 1:5] = 0
    expected[2:5, 1:4] = dx
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_vmap_and_second_derivatives():
    kernel = mps.MPSCNNPoolingL2Norm(kernel_width=2, kernel_height=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
    together = kernel.encode(x)
    np.testing.assert_allclose(jax.vmap(kernel.encode)(x), together, rtol=1e-6)
    hessian = jax.jit(jax.hessian(lambda x: kernel.encode(x).sum()))(x[0, :2, :2, :1])
    assert np.isfinite(hessian).all()
    assert np.abs(hessian).max() > 0
    # Several kernels at once: their weights are mapped over.
    rng = np.random.default_rng(1)
    first, source = transposed(rng)
    new = source.weights() * 2
    second = first.reload_weights_and_biases(
        mps.MPSCNNConvolutionWeightsAndBiasesState(weights=new, biases=source.bias_terms())
    )
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    image = x[0]
    out = jax.vmap(lambda kernel: kernel.encode(image))(both)
    np.testing.assert_allclose(out[0], first.encode(image), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[1], second.encode(image), rtol=1e-5, atol=1e-5)
