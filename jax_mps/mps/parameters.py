"""What the two kernels with weights share: they read a data source, and weights and biases are leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax import lax

from jax_mps.geometry import Axis, Window
from jax_mps.mps.data_source import MPSCNNConvolutionDataSource, Parameters, arrays, load
from jax_mps.mps.descriptor import MPSCNNConvolutionDescriptor
from jax_mps.mps.kernel import MPSKernel, kernel_class
from jax_mps.mps.placement import Array, Span
from jax_mps.mps.settings import anything, setting
from jax_mps.mps.states import MPSCNNConvolutionWeightsAndBiasesState
from jax_mps.mps.structs import MPSKernelOptions


class Static(NamedTuple):
    """What is static about a kernel with parameters: the rest of it, and the data source itself."""

    kernel: Any
    source: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.kernel == other.kernel and self.source is other.source

    def __hash__(self) -> int:
        return hash(self.kernel)

    def _with_leaves(self, leaves: Sequence[Any]) -> Any:
        kernel, biases = leaves
        return self.kernel._with_parameters(data_source=self.source, _kernel=kernel, _biases=biases)


@kernel_class
class KernelWithParameters(MPSKernel):
    """A kernel with parameters: the weights, `[height, width, in / groups, out]`, and biases are leaves."""

    weights: dataclasses.InitVar[MPSCNNConvolutionDataSource]

    data_source: Any = setting(anything, default=None, init=False)
    descriptor: MPSCNNConvolutionDescriptor = setting(anything, default=None, init=False)
    _kernel: Array = setting(anything, default=None, init=False)
    _biases: Array = setting(anything, default=None, init=False)
    _arrayless: Any = setting(anything, default=None, init=False)  # this kernel without them

    _leaves: ClassVar[tuple[str, ...]] = ("_kernel", "_biases")

    def __post_init__(self, weights: Any) -> None:
        parameters = weights if isinstance(weights, Parameters) else load(weights)
        names = ("data_source", "descriptor", "_kernel", "_biases")
        for name, value in zip(names, parameters, strict=True):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def _finish(self) -> None:
        super()._finish()
        arrayless = self._with_parameters(data_source=None, _kernel=None, _biases=None)
        arrayless.__dict__["_arrayless"] = self.__dict__["_arrayless"] = arrayless
        if self.device is not None and self._kernel is not None:
            placed = jax.device_put((self._kernel, self._biases), self.device)
            self.__dict__.update(zip(self._leaves, placed, strict=True))

    def _with_parameters(self, **attributes: Any) -> Self:
        """The same kernel with other parameters, which are not looked at."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__.update(attributes)
        return new

    def _without_arrays(self) -> Self:
        return self._arrayless

    def _statics(self) -> tuple[Any, ...]:
        return (*super()._statics(), self.descriptor)

    def __repr__(self) -> str:
        text = super().__repr__()
        start = text.index("(") + 1
        comma = ", " * (text[start] != ")")
        return f"{text[:start]}weights={self.data_source!r}{comma}{text[start:]}"

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self._kernel, self._biases), Static(self._arrayless, self.data_source)

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

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        """The windows along axis i of (y, x): on the source with its zeros, the offsets add up."""
        kernel: Any = self  # both kernels have these offsets
        span = self._spans()[i]
        offset = (kernel.offset.y, kernel.offset.x)[i]
        total = offset * span.stride + (kernel.kernel_offset_y, kernel.kernel_offset_x)[i]
        return Axis.from_total_offset(length, span.kernel, span.stride, span.dilation, total, windows)

    def _edge_rule(self, window: Window) -> None:
        """Nothing: these kernels have one edge mode."""
        del window

    def _function_arguments(self, window: Window, start: int) -> dict[str, Any]:
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
        return self._with_parameters(_kernel=kernel.astype(self._kernel.dtype), _biases=biases)

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
