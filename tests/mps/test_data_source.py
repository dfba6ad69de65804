"""Parameters of the transposed convolution: data sources, quantised weights, neurons, training."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_mps import mps

POINT = {"kernel_width": 1, "kernel_height": 1, "input_feature_channels": 2, "output_feature_channels": 2}
SPEC = mps.MPSCNNConvolutionDescriptor(
    kernel_width=2, kernel_height=1, input_feature_channels=1, output_feature_channels=2
)


class Recorded:
    """A data source that records what it is asked."""

    def __init__(self, weights, biases=None, descriptor=SPEC, loads=True):
        self.values, self.biases, self.spec, self.loads, self.calls = weights, biases, descriptor, loads, []

    def load(self):
        self.calls.append("load")
        return self.loads

    def purge(self):
        self.calls.append("purge")

    def descriptor(self):
        self.calls.append("descriptor")
        return self.spec

    def data_type(self):
        return self.values.dtype.name

    def weights(self):
        self.calls.append("weights")
        return self.values

    def bias_terms(self):
        return self.biases


def exported(source):
    return mps.MPSCNNConvolutionTranspose(weights=source).export_weights_and_biases()


def test_life_cycle():
    weights = np.arange(4, dtype=np.float32)
    source = Recorded(weights)
    assert isinstance(source, mps.MPSCNNConvolutionDataSource)
    kernel = mps.MPSCNNConvolutionTranspose(weights=source)
    assert source.calls == ["load", "descriptor", "weights", "purge"]
    state = kernel.export_weights_and_biases()
    np.testing.assert_array_equal(state.weights, weights.reshape(2, 1, 2, 1))  # a flat buffer will do
    assert state.biases is None
    source.values, source.biases = 2 * weights, np.ones(2)
    assert kernel.copy() == kernel
    new = kernel.reload_weights_and_biases_from_data_source()
    assert source.calls[4:] == ["load", "descriptor", "weights", "purge"]
    np.testing.assert_array_equal(new.export_weights_and_biases().weights.ravel(), 2 * weights)
    np.testing.assert_array_equal(new.export_weights_and_biases().biases, [1, 1])
    back = new.reload_weights_and_biases(state)
    assert back == kernel
    with pytest.raises(ValueError, match="load"):
        mps.MPSCNNConvolutionTranspose(weights=Recorded(weights, loads=False))
    broken = Recorded(weights, descriptor="none")
    with pytest.raises(TypeError, match="descriptor"):
        mps.MPSCNNConvolutionTranspose(weights=broken)
    assert broken.calls[-1] == "purge"


def test_zeros_from_a_descriptor():
    state = mps.MPSCNNConvolutionWeightsAndBiasesState.from_descriptor(SPEC)
    assert state.weights.shape == (2, 1, 2, 1)
    assert state.biases.shape == (2,)


def test_quantised_weights():
    bytes_ = np.array([0, 255, 51, 102], np.uint8).reshape(2, 1, 2, 1)
    linear = mps.ConvolutionDataSource(SPEC, bytes_, ranges=np.array([[-1, 1], [0, 5]]))
    assert linear.data_type() == mps.MPSDataType.UINT8
    np.testing.assert_allclose(exported(linear).weights.ravel(), [-1, 1, 1, 2], rtol=1e-6)
    table = np.linspace(-2, 3, 256)
    looked_up = mps.ConvolutionDataSource(SPEC, bytes_, lookup_table=table)
    np.testing.assert_allclose(exported(looked_up).weights.ravel(), table[[0, 255, 51, 102]], rtol=1e-6)
    with pytest.raises(ValueError, match="weights of uint8 need a weights_quantization_type"):
        exported(mps.ConvolutionDataSource(SPEC, bytes_))
    with pytest.raises(ValueError, match="must have 256 numbers"):
        exported(mps.ConvolutionDataSource(SPEC, bytes_, lookup_table=table[:5]))
    with pytest.raises(ValueError, match=r"must have shape \(2, 2\)"):
        exported(mps.ConvolutionDataSource(SPEC, bytes_, ranges=[0, 1]))


def test_types_of_weights():
    weights = jnp.array([1.0, 1 / 3, 2.0, 3.0])
    assert exported(Recorded(weights.astype(jnp.bfloat16))).weights.dtype == jnp.bfloat16
    source = Recorded(weights)
    source.kernel_weights_data_type = lambda: mps.MPSDataType.FLOAT16
    assert exported(source).weights.dtype == np.float16
    source.data_type = lambda: "float16"
    with pytest.raises(TypeError, match=r"weights\(\) must be of the type that data_type\(\) says"):
        exported(source)


def test_half_precision_is_rounded_once():
    """Bias and activation see the sums in float32, unless the accumulator is to be half."""
    descriptor = mps.MPSCNNConvolutionDescriptor(
        kernel_width=1, kernel_height=1, input_feature_channels=1, output_feature_channels=1
    )
    weights = jnp.array([2049.0]).reshape(1, 1, 1, 1)  # no float16 is 2049
    source = mps.ConvolutionDataSource(descriptor, weights, jnp.array([-2048.0]))
    kernel = mps.MPSCNNConvolutionTranspose(weights=source)
    x = jnp.ones((1, 1, 1), jnp.float16)
    assert kernel.encode(x).dtype == np.float16
    assert kernel.encode(x).item() == 1
    assert kernel.copy(accumulator_precision_option="half").encode(x).item() == 0


def test_reduced_precision_is_asked_for():
    kernel = mps.MPSCNNConvolutionTranspose(weights=Recorded(np.ones(4, np.float32)), implementation="xla")
    x = jnp.ones((1, 3, 1))
    text = {
        options: str(jax.make_jaxpr(kernel.copy(options=options).encode)(x))
        for options in (0, mps.MPSKernelOptions.ALLOW_REDUCED_PRECISION)
    }
    assert "precision=None" in text[0]
    assert "precision=None" not in text[2]


# --- neurons ------------------------------------------------------------------------------------------

SLOPES = [0.25, -0.5]
NEURONS = {
    "none": ({}, lambda x: x),
    "relu": ({"a": 0.1}, lambda x: x if x >= 0 else 0.1 * x),
    "linear": ({"a": 2, "b": -1}, lambda x: 2 * x - 1),
    "sigmoid": ({}, lambda x: 1 / (1 + math.exp(-x))),
    "hard_sigmoid": ({}, lambda x: min(max(0.2 * x + 0.5, 0), 1)),
    "tanh": ({"a": 2, "b": 0.5}, lambda x: 2 * math.tanh(0.5 * x)),
    "absolute": ({}, abs),
    "soft_plus": ({"a": 2, "b": 0.5}, lambda x: 2 * math.log(1 + math.exp(0.5 * x))),
    "soft_sign": ({}, lambda x: x / (1 + abs(x))),
    "elu": ({"a": 0.5}, lambda x: x if x >= 0 else 0.5 * (math.exp(x) - 1)),
    "prelu": ({"data": SLOPES}, None),
    "relun": ({"a": 0.5, "b": 2}, lambda x: min(x if x >= 0 else 0.5 * x, 2)),
    "power": ({"a": 0.5, "b": 3, "c": 2}, lambda x: (0.5 * x + 3) ** 2),
    "exponential": ({"c": 2}, lambda x: 2**x),
    "logarithm": ({"b": 5}, lambda x: math.log(x + 5)),
    "gelu": ({}, lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
}
VALUES = np.array([-4.0, -2.7, -1.0, -0.3, 0.4, 1.1, 2.4, 3.9])


def neuron_kernel(name, dtype):
    neuron = mps.MPSNNNeuronDescriptor(neuron_type=name, **NEURONS[name][0])
    descriptor = mps.MPSCNNConvolutionDescriptor(**POINT, fused_neuron_descriptor=neuron)
    eye = jnp.eye(2, dtype=dtype).reshape(2, 1, 1, 2)
    return mps.MPSCNNConvolutionTranspose(weights=mps.ConvolutionDataSource(descriptor, eye))


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_and_their_gradients(name, x64):
    kernel = neuron_kernel(name, np.float64)
    x = jnp.asarray(VALUES).reshape(1, 4, 2)

    def expected(x):
        if name == "prelu":
            return np.where(x >= 0, x, np.array(SLOPES) * x)
        return np.vectorize(NEURONS[name][1], otypes=[np.float64])(x)

    np.testing.assert_allclose(kernel.encode(x), expected(np.asarray(x)), rtol=1e-6, atol=1e-7)
    slope = jax.grad(lambda x: kernel.encode(x).sum())(x)
    step = 1e-5
    differences = (expected(np.asarray(x) + step) - expected(np.asarray(x) - step)) / (2 * step)
    np.testing.assert_allclose(slope, differences, rtol=1e-5, atol=1e-6)


def test_gradients_stay_finite():
    x = jnp.array([-1e4, 1e4]).reshape(1, 1, 2)
    for name in ("elu", "soft_plus"):
        kernel = neuron_kernel(name, np.float32)
        assert np.isfinite(jax.grad(lambda x, kernel=kernel: kernel.encode(x).sum())(x)).all(), name


def test_batch_normalisation_is_that_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    mean, gamma, beta, bias = rng.normal(size=(4, 2)).astype(np.float32)
    variance = rng.uniform(0.5, 2, 2).astype(np.float32)
    weights = rng.normal(size=(2, 1, 1, 2)).astype(np.float32)
    descriptor = mps.MPSCNNConvolutionDescriptor(**POINT).set_batch_normalization_parameters_for_inference(
        mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3
    )
    x = rng.normal(size=(3, 4, 2)).astype(np.float32)
    for biases in (bias, None):
        source = mps.ConvolutionDataSource(descriptor, weights, biases)
        plain = x @ weights[:, 0, 0].T + (0 if biases is None else biases)
        rows = torch.from_numpy(plain.reshape(-1, 2))
        arrays = (torch.from_numpy(a) for a in (mean, variance, gamma, beta))
        expected = torch.nn.functional.batch_norm(rows, *arrays, eps=1e-3).numpy().reshape(x.shape)
        out = mps.MPSCNNConvolutionTranspose(weights=source).encode(x)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


# --- training -----------------------------------------------------------------------------------------


class Trained(mps.ConvolutionDataSource):
    """A data source whose parameters an optimiser keeps."""

    def __init__(self, descriptor, weights, bias_terms):
        super().__init__(descriptor, weights, bias_terms)
        self.optimiser = optax.adam(0.05)
        self.memory = self.optimiser.init((weights, bias_terms))

    def update(self, gradient_state, source_state):
        gradients = (gradient_state.gradient_for_weights, gradient_state.gradient_for_biases)
        values = (source_state.weights, source_state.biases)
        with jax.numpy_dtype_promotion("standard"):  # Adam takes a float to an integer power
            changes, self.memory = self.optimiser.update(gradients, self.memory, values)
        self._weights, self._bias_terms = optax.apply_updates(values, changes)
        return mps.MPSCNNConvolutionWeightsAndBiasesState(weights=self._weights, biases=self._bias_terms)


def test_an_optimiser_in_the_data_source_trains_a_network():
    """Upsampling with two layers and a pooling between, by gradient kernels alone."""
    rng = np.random.default_rng(0)

    def layer(inputs, outputs):
        descriptor = mps.MPSCNNConvolutionDescriptor(
            kernel_width=3, kernel_height=3, input_feature_channels=inputs, output_feature_channels=outputs,
            stride_in_pixels_x=2, stride_in_pixels_y=2,
        )  # fmt: skip
        weights = jnp.asarray(rng.normal(size=descriptor.weights_shape) / 3, jnp.float32)
        source = Trained(descriptor, weights, jnp.zeros(outputs))
        forward = mps.MPSCNNConvolutionTranspose(weights=source)
        return source, forward, mps.MPSCNNConvolutionTransposeGradient(weights=source)

    window = {"kernel_width": 2, "kernel_height": 2}
    pool, pool_gradient = mps.MPSCNNPoolingMax(**window), mps.MPSCNNPoolingMaxGradient(**window)
    x = jnp.asarray(rng.normal(size=(4, 3, 3, 2)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(4, 9, 9, 1)) / 4 + 0.5, jnp.float32)
    layers = [layer(2, 3), layer(3, 1)]

    @jax.jit
    def gradients(first, second, backward_first, backward_second):
        hidden, of_first = first.encode_with_state(x)
        pooled, of_pool = pool.encode_with_state(hidden)
        y, of_second = second.encode_with_state(pooled)
        error = y - target
        g, of_second = backward_second.encode(2 * error / error.size, pooled, of_second)
        _, of_first = backward_first.encode(pool_gradient.encode(g, hidden, of_pool), x, of_first)
        return (error**2).mean(), of_first, of_second

    def loss(kernels):
        return ((kernels[1].encode(pool.encode(kernels[0].encode(x))) - target) ** 2).mean()

    losses = []
    for step in range(60):
        first, second = (forward for _, forward, _ in layers)
        value, *states = gradients(first, second, layers[0][2], layers[1][2])
        if step == 0:
            wanted = jax.grad(loss)((first, second))
            for kernel, state in zip(wanted, states, strict=True):
                parameters = kernel.export_weights_and_biases()
                np.testing.assert_allclose(
                    state.gradient_for_weights, parameters.weights, rtol=1e-3, atol=1e-5
                )
                np.testing.assert_allclose(state.gradient_for_biases, parameters.biases, rtol=1e-3, atol=1e-5)
        losses.append(float(value))
        for i, (source, forward, backward) in enumerate(layers):
            new = source.update(states[i], forward.export_weights_and_biases())
            reloaded = forward.reload_weights_and_biases(new)
            assert reloaded == forward.reload_weights_and_biases_from_data_source()
            layers[i] = (source, reloaded, backward.reload_weights_and_biases_from_data_source())
    assert losses[-1] < 0.5 * losses[0]
    assert gradients._cache_size() == 1  # new parameters compile nothing
