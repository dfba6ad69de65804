"""The transposed convolution kernel and its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import Axis, Window
from jax_mps.lowering import rule
from jax_mps.mps import neuron, padding
from jax_mps.mps.convolution import (
    MPSCNNConvolutionDataSource,
    MPSCNNConvolutionDescriptor,
    Parameters,
    arrays,
    load,
)
from jax_mps.mps.kernel import (
    Array,
    Block,
    ForwardPlan,
    Images,
    MPSCNNGradientKernel,
    MPSCNNKernel,
    MPSKernel,
    Shape,
    Span,
    Target,
    aligned,
    anything,
    channels,
    check_destination,
    check_room,
    clipped,
    forward_plan,
    four,
    in_effect,
    kernel_class,
    one_of,
    setting,
    struct,
    write,
)
from jax_mps.mps.states import (
    MPSCNNConvolutionGradientState,
    MPSCNNConvolutionTransposeGradientState,
    MPSCNNConvolutionWeightsAndBiasesState,
)
from jax_mps.mps.structs import (
    MPSCNNConvolutionGradientOption,
    MPSImageEdgeMode,
    MPSKernelOptions,
    MPSNNConvolutionAccumulatorPrecisionOption,
    MPSOffset,
)
from jax_mps.ops.convolution import forward as conv_transpose
from jax_mps.ops.convolution import gradient_data, gradient_weights

OPTION = MPSCNNConvolutionGradientOption
PRECISION = MPSNNConvolutionAccumulatorPrecisionOption


class Bare(NamedTuple):
    """What is static about a kernel with parameters: the rest of it, and the data source itself."""

    kernel: Any
    source: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bare) and self.kernel == other.kernel and self.source is other.source

    def __hash__(self) -> int:
        return hash(self.kernel)

    def _with_leaves(self, leaves: Sequence[Any]) -> Any:
        kernel, biases = leaves
        return self.kernel._with(data_source=self.source, _kernel=kernel, _biases=biases)


@kernel_class
class _Convolution(MPSKernel):
    """A kernel with parameters: the weights, `[height, width, in / groups, out]`, and biases are leaves."""

    weights: dataclasses.InitVar[MPSCNNConvolutionDataSource]

    data_source: Any = setting(anything, None, init=False)
    descriptor: MPSCNNConvolutionDescriptor = setting(anything, None, init=False)
    _kernel: Array = setting(anything, None, init=False)
    _biases: Array = setting(anything, None, init=False)
    _without: Any = setting(anything, None, init=False)

    _leaves: ClassVar[tuple[str, ...]] = ("_kernel", "_biases")

    def __post_init__(self, weights: Any) -> None:
        parameters = weights if isinstance(weights, Parameters) else load(weights)
        names = ("data_source", "descriptor", "_kernel", "_biases")
        for name, value in zip(names, parameters, strict=True):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def _finish(self) -> None:
        super()._finish()
        bare = self._with(data_source=None, _kernel=None, _biases=None)
        bare.__dict__["_without"] = self.__dict__["_without"] = bare
        if self.device is not None and self._kernel is not None:
            placed = jax.device_put((self._kernel, self._biases), self.device)
            self.__dict__.update(zip(self._leaves, placed, strict=True))

    def _with(self, **attributes: Any) -> Self:
        """The same kernel with other arrays, which are not looked at."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__.update(attributes)
        return new

    def _bare(self) -> Self:
        return self._without

    def _statics(self) -> tuple[Any, ...]:
        return (*super()._statics(), self.descriptor)

    def __repr__(self) -> str:
        text = super().__repr__()
        start = text.index("(") + 1
        comma = ", " * (text[start] != ")")
        return f"{text[:start]}weights={self.data_source!r}{comma}{text[start:]}"

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self._kernel, self._biases), Bare(self._without, self.data_source)

    def copy(self, **changes: Any) -> Self:
        """A kernel like this one, parameters included, with some members changed.

        Args:
          **changes: the members to change, as the initialiser takes them; `weights` is a data source.

        Raises:
          TypeError: there is no such member.
          ValueError: as the initialiser.
        """
        return type(self)(**({"weights": self._parameters()} | self.settings() | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), weights=self._parameters(), **self.settings()), ()

    def _parameters(self) -> Any:
        """In place of a data source, what has been read from one."""
        return Parameters(self.data_source, self.descriptor, self._kernel, self._biases)

    def _spans(self) -> tuple[Span, Span]:
        d = self.descriptor
        return (
            Span(d.kernel_height, d.stride_in_pixels_y, d.dilation_rate_y),
            Span(d.kernel_width, d.stride_in_pixels_x, d.dilation_rate_x),
        )

    def _params(self, window: Window, start: int) -> dict[str, Any]:
        """What the functions need beside arrays."""
        reduced = self.options & MPSKernelOptions.ALLOW_REDUCED_PRECISION
        return {
            "window": window,
            "start": start,
            "channels_last": True,
            "groups": self.descriptor.groups,
            "transpose_kernel": False,
            "precision": lax.Precision.DEFAULT if reduced else None,
            "implementation": self.implementation,
        }

    def export_weights_and_biases(self) -> MPSCNNConvolutionWeightsAndBiasesState:
        """The parameters of this kernel."""
        return MPSCNNConvolutionWeightsAndBiasesState(
            weights=self._kernel.transpose(3, 0, 1, 2), biases=self._biases
        )

    def reload_weights_and_biases(self, state: MPSCNNConvolutionWeightsAndBiasesState) -> Self:
        """A kernel like this one with other parameters, in the types that these have.

        Apple's method changes the kernel; here kernels do not change, so use the one returned.

        Args:
          state: the weights `[out, height, width, in / groups]` and biases; no biases for none.

        Raises:
          ValueError: shapes are not those of the descriptor.
        """
        kernel, biases = arrays(state.weights, state.biases, self.descriptor)
        return self._with(_kernel=kernel.astype(self._kernel.dtype), _biases=biases)

    def reload_weights_and_biases_from_data_source(self) -> Self:
        """A kernel like this one with the parameters that its data source has now.

        Apple's method changes the kernel; here kernels do not change, so use the one returned.

        Raises:
          ValueError: the kernel has no data source, or it does not load.
        """
        if self.data_source is None:
            raise ValueError(
                "data_source must not be None for reload_weights_and_biases_from_data_source: this kernel "
                "was made without one; copy(weights=...) gives it one"
            )
        return self.copy(weights=self.data_source)

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return self.descriptor.groups


# --- forward ------------------------------------------------------------------------------------------


@kernel_class
class MPSCNNConvolutionTranspose(_Convolution, MPSCNNKernel):
    """The transposed convolution, with bias and activation.

    Along each axis, `stride - 1` zeros are put between the pixels of the source, and the weights, not
    rotated, are moved over that in steps of one pixel. The window of pixel 0 of the clip rectangle is
    centred at the expanded pixel `offset * stride + kernel_offset`. Then biases are added and the
    descriptor's neuron is applied:

        y[i, o] = f(bias[o] + sum over k, c of weights[o, k, c] * expanded[i + total - extent // 2 + dilation
        * k, c])

    Sums are formed in float32 (float64 for float64) and rounded once. Differentiable in the source, and in
    the weights and biases: `jax.grad` of a function of the kernel gives a kernel whose
    `export_weights_and_biases` are the gradients.

    Args:
      weights: a data source, see `MPSCNNConvolutionDataSource`; it is loaded, read and purged here.
      kernel_offset_x: columns of the expanded source by which the windows are moved.
      kernel_offset_y: rows, likewise.
      accumulator_precision_option: FLOAT keeps sums, biases and activation in float32 until the result is
        stored. HALF rounds the sums to the type of the image first.
      **members: those of `MPSCNNKernel` and `MPSKernel`. `edge_mode` must be ZERO. Without a destination,
        `padding` sizes the result (SAME: `(size - 1) * stride + 1`, not `size * stride`) and replaces
        `offset` and the kernel offsets.

    Raises:
      TypeError: `weights` is no data source, or a member has the wrong type.
      ValueError: a member is out of range, or the data source does not load or does not fit its descriptor.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> descriptor = mps.MPSCNNConvolutionDescriptor(
      ...     kernel_width=3, kernel_height=1, input_feature_channels=1, output_feature_channels=1,
      ...     stride_in_pixels_x=2)
      >>> source = mps.ConvolutionDataSource(descriptor, jnp.array([1., 10., 100.]).reshape(1, 1, 3, 1))
      >>> kernel = mps.MPSCNNConvolutionTranspose(weights=source)
      >>> kernel.encode(jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)).ravel()
      Array([ 10., 201.,  20., 302.,  30., 403.,  40.], dtype=float32)

    Source: `MPSCNNConvolutionTranspose` in MPSCNNConvolution.h.
    """

    kernel_offset_x: int = setting(geometry.integer, 0)
    kernel_offset_y: int = setting(geometry.integer, 0)
    accumulator_precision_option: PRECISION = setting(one_of(PRECISION), PRECISION.FLOAT)

    is_backwards: ClassVar[bool] = True

    kernel_width = property(lambda self: self.descriptor.kernel_width, doc="Columns of the weights.")
    kernel_height = property(lambda self: self.descriptor.kernel_height, doc="Rows of the weights.")
    stride_in_pixels_x = property(
        lambda self: self.descriptor.stride_in_pixels_x, doc="Upsampling factor along x."
    )
    stride_in_pixels_y = property(
        lambda self: self.descriptor.stride_in_pixels_y, doc="Upsampling factor along y."
    )
    dilation_rate_x = property(
        lambda self: self.descriptor.dilation_rate_x, doc="Columns from one tap to the next."
    )
    dilation_rate_y = property(
        lambda self: self.descriptor.dilation_rate_y, doc="Rows from one tap to the next."
    )
    input_feature_channels = property(
        lambda self: self.descriptor.input_feature_channels, doc="Channels of the source."
    )
    output_feature_channels = property(
        lambda self: self.descriptor.output_feature_channels, doc="Channels of the result."
    )

    def _check(self) -> None:
        if self.edge_mode != MPSImageEdgeMode.ZERO:
            raise ValueError(
                f"edge_mode must be ZERO for a transposed convolution, got {self.edge_mode.name}: between "
                "inserted zeros there is no nearest pixel"
            )

    def _policy(self, name: str, length: int, span: Span) -> tuple[int, int]:
        return padding.sized(self.padding, name, (length - 1) * span.stride + 1, span.extent, 1)

    def _with_offset(self, y: int, x: int) -> Self:
        return self.copy(offset=MPSOffset(z=self.offset.z), kernel_offset_y=y, kernel_offset_x=x)

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        return transposed_axis(self, self.offset, i, length, windows)

    def _written(self, read: int) -> int:
        if read != self.descriptor.input_feature_channels:
            raise ValueError(
                f"source_image must have input_feature_channels={self.descriptor.input_feature_channels} "
                "channels to be read (see source_feature_channel_offset and "
                f"source_feature_channel_max_count), got {read}"
            )
        return self.descriptor.output_feature_channels

    def _how(self, window: Window) -> Any:
        return None

    def _run(self, x: Array, plan: ForwardPlan) -> Array:
        kernel, biases, descriptor = self._kernel, self._biases, self.descriptor
        if descriptor.batch_normalization is not None:
            kernel, biases = descriptor.batch_normalization.fold(kernel, biases)
        function = descriptor.fused_neuron_descriptor
        once = biases is None and function is None
        half = self.accumulator_precision_option == PRECISION.HALF
        dtype = x.dtype if once or half else rule.accumulator(x.dtype)
        if x.size:
            params = self._params(plan.window, plan.start)
            y = conv_transpose(x, kernel, out_dtype=dtype, **params)
        else:
            y = lax.full(plan.target.block, np.zeros((), dtype))
        if biases is not None:
            y = y + biases.astype(y.dtype).reshape((1,) * (y.ndim - 1) + biases.shape)
        if function is not None:
            y = neuron.apply(y, function)
        return y if once or half else lax.convert_element_type(y, x.dtype)

    def _undoing(self, state: MPSCNNConvolutionGradientState, shape: Shape) -> ForwardPlan:
        """The plan of the call that takes an image of `shape` back to a convolution's source."""
        of = state.offset
        return undoing_plan(self._bare(), shape, state.source_height, state.source_width, of.y, of.x)

    def encode(
        self,
        source_image: ArrayLike,
        destination_image: ArrayLike | None = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> jax.Array:
        """Runs the kernel.

        Without a destination, `padding` gives the result its size and the windows their place; or, given the
        state of an ordinary convolution, the result has the size of that convolution's source and the
        windows lie where that convolution had them. Channels before `destination_feature_channel_offset` and
        pixels outside `clip_rect` are 0. With a destination, neither has a meaning: the result is the
        destination, with the clip rectangle and the channels concerned written anew.

        Args:
          source_image: an image `[height, width, channels]`, or images `[number, height, width, channels]`.
          destination_image: as many axes as the source, of its dtype.
          convolution_gradient_state: of the convolution that this kernel undoes.

        Returns:
          The destination.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: the source has not the descriptor's channels, `offset.z` and the clip rectangle ask for
            more source images than there are, the destination has too few channels, or the result would be
            empty.
        """
        if convolution_gradient_state is None or destination_image is not None:
            return super().encode(source_image, destination_image)
        x = self._image("source_image", source_image)
        return self._encode(x, self._undoing(convolution_gradient_state, x.shape), None)

    def encode_with_state(
        self,
        source_image: ArrayLike,
        destination_image: ArrayLike | None = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> tuple[jax.Array, MPSCNNConvolutionTransposeGradientState]:
        """`encode`, and the state with which the gradient kernel undoes that call."""
        y = self.encode(source_image, destination_image, convolution_gradient_state)
        return y, self.result_state(source_image, destination_image, convolution_gradient_state)

    def encode_batch(
        self,
        source_images: Images,
        destination_images: Images | None = None,
        convolution_gradient_states: Sequence[MPSCNNConvolutionGradientState] | None = None,
    ) -> list[jax.Array]:
        """`encode` of every image of an `MPSImageBatch`."""
        batches: Any = (source_images, destination_images, convolution_gradient_states)
        return [self.encode(*images) for images in aligned(*batches)]

    def encode_batch_with_states(
        self,
        source_images: Images,
        destination_images: Images | None = None,
        convolution_gradient_states: Sequence[MPSCNNConvolutionGradientState] | None = None,
    ) -> tuple[list[jax.Array], list[Any]]:
        """`encode_with_state` of every image of an `MPSImageBatch`."""
        batches: Any = (source_images, destination_images, convolution_gradient_states)
        pairs = [self.encode_with_state(*images) for images in aligned(*batches)]
        return [y for y, _ in pairs], [state for _, state in pairs]

    def result_state(
        self,
        source_image: Any,
        destination_image: Any = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> MPSCNNConvolutionTransposeGradientState:
        """The state that `encode_with_state` returns for images of these shapes."""
        shape = tuple(np.shape(source_image))
        if destination_image is not None:
            plan = forward_plan(self._bare(), shape, tuple(np.shape(destination_image)))
        elif convolution_gradient_state is not None:
            plan = self._undoing(convolution_gradient_state, shape)
        else:
            plan = forward_plan(self._bare(), shape, None)
        convolution = convolution_gradient_state and convolution_gradient_state.convolution
        return MPSCNNConvolutionTransposeGradientState(
            kernel=in_effect(plan),
            source_shape=shape,
            destination_shape=plan.target.shape,
            convolution_transpose=self,
            convolution=convolution,
        )


def transposed_axis(kernel: Any, offset: MPSOffset, i: int, length: int, size: int) -> Axis:
    """Axis i of (y, x), of `length` pixels in the source and `size` in the result."""
    span = kernel._spans()[i]
    inner = (kernel.kernel_offset_y, kernel.kernel_offset_x)[i]
    total = (offset.y, offset.x)[i] * span.stride + inner
    return Axis.from_total_offset(length, span.kernel, span.stride, span.dilation, total, size)


@functools.lru_cache(maxsize=4096)
def undoing_plan(
    kernel: MPSCNNConvolutionTranspose, shape: Shape, height: int, width: int, y: int, x: int
) -> ForwardPlan:
    """The plan of `kernel` undoing a convolution of that source size and offset."""
    even = [span.extent % 2 == 0 for span in kernel._spans()]
    kernel = kernel._with_offset(even[0] - y, even[1] - x)
    images = four(shape)[0] - kernel.offset.z
    to = (height, width, kernel.destination_feature_channel_offset + kernel.output_feature_channels)
    return forward_plan(kernel, shape, to if len(shape) == 3 else (images, *to))


# --- gradient -----------------------------------------------------------------------------------------


@kernel_class
class MPSCNNConvolutionTransposeGradient(_Convolution, MPSCNNGradientKernel):
    """The gradient of `MPSCNNConvolutionTranspose`: to its source, its weights and its biases.

    With E the gradient of the pixels that the forward kernel wrote, X its source, and the output pixel
    `i = stride * j - total + extent // 2 - dilation * k` that tap k of source pixel j feeds,

        data     dX[j, c]    = sum over o, k of      weights[o, k, c] * E[i, o]
        weights  dW[o, k, c] = sum over images, j of E[i, o] * X[j, c]
        biases   db[o]       = sum over images, i of E[i, o]

    E is the gradient before biases and activation: of a fused neuron or batch normalisation nothing is
    undone here (`jax.grad` through the forward kernel does undo them).

    Args:
      weights: the data source of the forward kernel.
      offset: the forward kernel's offset.
      kernel_offset_x: the forward kernel's.
      kernel_offset_y: the forward kernel's.
      gradient_option: which gradients to compute.
      **members: those of `MPSCNNBinaryKernel` and `MPSKernel`; `primary_offset` and `secondary_offset` must
        be 0.

    Raises:
      TypeError: `weights` is no data source, or a member has the wrong type.
      ValueError: a member is out of range, or the data source does not load or does not fit its descriptor.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> descriptor = mps.MPSCNNConvolutionDescriptor(
      ...     kernel_width=3, kernel_height=1, input_feature_channels=1, output_feature_channels=1)
      >>> source = mps.ConvolutionDataSource(descriptor, jnp.array([1., 10., 100.]).reshape(1, 1, 3, 1))
      >>> g = jnp.array([1., 10., 100., 1000.]).reshape(1, 4, 1)
      >>> x = jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)
      >>> dx, state = mps.MPSCNNConvolutionTransposeGradient(weights=source).encode(g, x)
      >>> dx.ravel()
      Array([   20.,   300.,  3000., 20000.], dtype=float32)
      >>> state.gradient_for_weights.ravel(), state.gradient_for_biases
      (Array([3210., 4321.,  432.], dtype=float32), Array([1111.], dtype=float32))

    Source: `MPSCNNConvolutionTransposeGradient` in MPSCNNConvolution.h.
    """

    offset: MPSOffset = setting(struct(MPSOffset), MPSOffset())
    gradient_option: MPSCNNConvolutionGradientOption = setting(one_of(OPTION), OPTION.ALL)

    source_gradient_feature_channels = property(
        lambda self: self.descriptor.output_feature_channels, doc="Channels of the incoming gradient."
    )
    source_image_feature_channels = property(
        lambda self: self.descriptor.input_feature_channels, doc="Channels of the source."
    )

    def _check(self) -> None:
        for name in ("primary_offset", "secondary_offset"):
            if getattr(self, name) != MPSOffset():
                raise ValueError(
                    f"{name} must be 0 for the gradient of a transposed convolution, whose windows offset "
                    f"and kernel_offset place as in the forward kernel, got {getattr(self, name)}"
                )
        if self.secondary_edge_mode != MPSImageEdgeMode.ZERO:
            raise ValueError(
                "secondary_edge_mode must be ZERO for a transposed convolution, got "
                f"{self.secondary_edge_mode.name}"
            )
        if not self.gradient_option:
            raise ValueError(f"gradient_option must ask for a gradient, got {self.gradient_option!r}")

    def encode(
        self,
        source_gradient: ArrayLike,
        source_image: ArrayLike,
        gradient_state: MPSCNNConvolutionTransposeGradientState | None = None,
        destination_gradient: ArrayLike | None = None,
    ) -> tuple[jax.Array | None, MPSCNNConvolutionTransposeGradientState]:
        """Runs the kernel.

        Args:
          source_gradient: the gradient of the forward kernel's clip rectangle; given its state and no
            destination, the gradient of all of its destination will do too.
          source_image: the forward kernel's source, of as many axes and the same dtype.
          gradient_state: the state of the forward call. Without a destination, offsets and channel offsets
            are those of that call. With one it is only checked.
          destination_gradient: an array to write the gradient of the source into, within the clip rectangle.

        Returns:
          A pair: the gradient of the source, and the state with `gradient_for_weights` and
          `gradient_for_biases`; `None` for each of the three that `gradient_option` does not ask for. The
          first is the destination, or without one an array like `source_image`, with zeros where nothing is
          written.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: the state is that of another kernel or of other shapes, the numbers of channels are not
            those of the descriptor, or the gradient has more images than the source.
        """
        g, x = self._operands(source_gradient, source_image)
        kernel, shape, destination = self._bare(), x.shape, None
        if gradient_state is not None:
            self._check_state(gradient_state, MPSCNNConvolutionTranspose)
        if destination_gradient is not None:
            destination = self._image("destination_gradient", destination_gradient)
            check_destination("destination_gradient", destination, "source_image", x)
            shape = destination.shape
        elif gradient_state is not None:
            kernel, block = stated(kernel, gradient_state.kernel, gradient_state.destination_shape, g.shape)
            g = block.read(g)
        plan = gradient_plan(kernel, g.shape, x.shape, shape)
        g, images = plan.gradient.read(g), plan.image.read(x)
        params = self._params(plan.window, plan.start)
        sums = rule.accumulator(x.dtype)
        data = weights = biases = None
        if self.gradient_option & OPTION.GRADIENT_WITH_DATA:
            if g.size and images.size:
                data = gradient_data(g, self._kernel, out_dtype=x.dtype, **params)
            else:
                data = lax.full(images.shape, np.zeros((), x.dtype))
            data = write(write(plan.covered.read(data), plan.inner, None), plan.target, destination)
        if self.gradient_option & OPTION.GRADIENT_WITH_WEIGHTS_AND_BIAS:
            if g.size and images.size:
                weights = gradient_weights(g, images, out_dtype=sums, **params).transpose(3, 0, 1, 2)
            else:
                weights = jnp.zeros(self.descriptor.weights_shape, sums)
            biases = jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=sums)
        if gradient_state is None:
            gradient_state = MPSCNNConvolutionTransposeGradientState(
                kernel=self._bare(), source_shape=x.shape, destination_shape=g.shape
            )
        return data, dataclasses.replace(
            gradient_state, gradient_for_weights=weights, gradient_for_biases=biases
        )

    def encode_batch(
        self,
        source_gradients: Images,
        source_images: Images,
        gradient_states: Sequence[MPSCNNConvolutionTransposeGradientState] | None = None,
        destination_gradients: Images | None = None,
    ) -> tuple[list[jax.Array | None], MPSCNNConvolutionTransposeGradientState]:
        """`encode` of every image of an `MPSImageBatch`; one state holds the sums of the gradients."""
        batches: Any = (source_gradients, source_images, gradient_states, destination_gradients)
        data, states = zip(*(self.encode(*images) for images in aligned(*batches)), strict=True)
        first, *rest = states
        weights, biases = first.gradient_for_weights, first.gradient_for_biases
        if weights is not None:
            for state in rest:
                weights, biases = weights + state.gradient_for_weights, biases + state.gradient_for_biases
        return list(data), dataclasses.replace(
            first, gradient_for_weights=weights, gradient_for_biases=biases
        )


class GradientPlan(NamedTuple):
    """A gradient call in integers."""

    gradient: Block
    """The channels of the gradient."""
    image: Block
    """The source images that belong to it."""
    window: Window
    start: int
    covered: Block
    """Of the derivative, what the clip rectangle can hold."""
    inner: Target
    """Where that lies in the clip rectangle."""
    target: Target
    """Where the clip rectangle lies in the destination."""


@functools.lru_cache(maxsize=4096)
def stated(
    kernel: MPSCNNConvolutionTransposeGradient,
    forward: MPSCNNConvolutionTranspose,
    destination: Shape,
    g: Shape,
) -> tuple[MPSCNNConvolutionTransposeGradient, Block]:
    """The kernel with the members that a forward call sets, and the part of the gradient that it wrote."""
    region = forward.clip_rect
    assert region is not None
    origin, size = clipped(region, four(destination))
    written = (*size, destination[-1])[4 - len(destination) :]
    ranges = [(0, n) for n in (*size, destination[-1])]
    if g == destination:
        ranges[:3] = [(o, o + n) for o, n in zip(origin, size, strict=True)]
    elif g != written:
        raise ValueError(
            f"source_gradient must have the shape of the forward kernel's destination, {destination}, or of "
            f"what it wrote, {written}, got {g}"
        )
    changed = kernel.copy(
        offset=forward.offset,
        kernel_offset_x=forward.kernel_offset_x,
        kernel_offset_y=forward.kernel_offset_y,
        primary_source_feature_channel_offset=forward.destination_feature_channel_offset,
        primary_source_feature_channel_max_count=forward.output_feature_channels,
        secondary_source_feature_channel_offset=forward.source_feature_channel_offset,
        secondary_source_feature_channel_max_count=forward.input_feature_channels,
        destination_feature_channel_offset=forward.source_feature_channel_offset,
        clip_rect=None,
    )
    return changed, Block.of(g, ranges)


@functools.lru_cache(maxsize=4096)
def gradient_plan(
    kernel: MPSCNNConvolutionTransposeGradient, g: Shape, x: Shape, destination: Shape
) -> GradientPlan:
    """Places the windows of a call, and the derivative in the destination."""
    rule.check_implementation(kernel.implementation, static=True)
    drop = 4 - len(x)
    g, x, result = four(g), four(x), four(destination)
    descriptor = kernel.descriptor
    firsts = []
    for side, image, wanted, shape in (
        ("primary", "source_gradient", descriptor.output_feature_channels, g),
        ("secondary", "source_image", descriptor.input_feature_channels, x),
    ):
        offset = f"{side}_source_feature_channel_offset"
        most = getattr(kernel, f"{side}_source_feature_channel_max_count")
        first = getattr(kernel, offset)
        read = channels(offset, shape[3], first, most)
        if read != wanted:
            raise ValueError(
                f"{image} must have {wanted} channels to be read, as the descriptor says (see {offset} and "
                f"{side}_source_feature_channel_max_count), got {read}"
            )
        firsts.append((first, first + read))
    z, images = kernel.offset.z, g[0]
    if not 0 <= z <= x[0] - images:
        raise ValueError(
            f"offset.z={z} and a gradient of {images} images need {z + images} source images, got {x[0]}"
        )
    at, written = kernel.destination_feature_channel_offset, descriptor.input_feature_channels
    check_room(at, written, result, "the destination")
    origin, size = clipped(kernel.clip_rect, result)
    inner = (max(0, min(images, size[0] - z)), min(x[1], size[1]), min(x[2], size[2]), written)
    window = Window(
        tuple(
            transposed_axis(kernel, kernel.offset, i, length, out)
            for i, (length, out) in enumerate(zip(x[1:3], g[1:3], strict=True))
        )
    )
    return GradientPlan(
        Block.of(g[drop:], [*((0, n) for n in g[:3]), firsts[0]]),
        Block.of(x[drop:], [(z, z + images), (0, x[1]), (0, x[2]), firsts[1]]),
        window,
        1 - drop,
        Block.of((images, *x[1:3], written)[drop:], [(0, n) for n in inner]),
        Target((*size, written)[drop:], (min(z, size[0]), 0, 0, 0)[drop:], inner[drop:]),
        Target(result[drop:], (*origin, at)[drop:], (*size, written)[drop:]),
    )
