"""What all kernels share: they are immutable values, nodes of JAX's pytrees, and compute where they are told.

The modules of this package from the bottom up: the structs; what a convolution is and where its parameters
come from (`descriptor`, `data_source`); the members of kernels (`settings`) and the integers of a call
(`placement`); this module; the bases of forward and gradient kernels (`forward`, `gradient`,
`gradient_plan`); the kernels; and above them `draw` and `coding`, which know the kernels of every class.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_mps.lowering import rule
from jax_mps.mps.placement import Array
from jax_mps.mps.settings import a_device, anything, one_of, setting
from jax_mps.mps.structs import MPSKernelOptions
from jax_mps.ops import operands
from jax_mps.ops.operands import FLOATS

MOST_BYTES = 2**30
"""`from_bytes` refuses more unless the caller says otherwise."""

_FROM_ABOVE: dict[str, Callable[..., Any]] = {}

F = TypeVar("F", bound="Callable[..., Any]")


def serves_kernels(function: F) -> F:
    """Lets methods of kernels call a function of a module above, which this module cannot import.

    Such a function knows every class of kernels: `to_bytes` and `from_bytes_of` of `coding`, `html_of` of
    `draw`. The package imports these two modules, so the functions are there before the first kernel.
    """
    _FROM_ABOVE[function.__name__] = function
    return function


K = TypeVar("K", bound="type[MPSKernel]")


def _refuse(self: Any, name: str, value: Any = None) -> None:
    raise dataclasses.FrozenInstanceError(
        f"{type(self).__name__} does not change, so {name} cannot be set: "
        f"make a changed kernel with copy({name}=...)"
    )


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(setting,))
def kernel_class(cls: K) -> K:
    """Makes a class of kernels: initialiser, immutability, and its place as a node of JAX's pytrees."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
    made.__setattr__ = made.__delattr__ = _refuse  # type: ignore[method-assign]
    jax.tree_util.register_pytree_node(
        made, lambda kernel: kernel._flatten(), lambda static, leaves: static._with_leaves(leaves)
    )
    return made  # type: ignore[return-value]


@kernel_class
class MPSKernel:
    """The base of every kernel. Kernels do not change; `copy` makes changed ones.

    Kernels hash and are equal by value, so they may be static arguments of `jax.jit`, parts of its other
    arguments (as pytrees, of which only the parameters of convolutions are leaves), or simply closed over.

    Args:
      device: where to compute: a `jax.Device`, or `None` for where the images are.
      options: `ALLOW_REDUCED_PRECISION` lets a transposed convolution multiply with less than float32 where
        the platform has faster units for that; without it, JAX's own configuration decides. The others have
        no meaning here.
      implementation: `None` chooses; "native" or "xla" forces a path.
    """

    device: jax.Device | None = setting(a_device, default=None)
    options: MPSKernelOptions = setting(one_of(MPSKernelOptions), default=MPSKernelOptions.NONE)
    implementation: str | None = setting(anything, default=None)

    _leaves: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold arrays."""

    _key: Any = setting(anything, default=None, init=False)
    _hash: int = setting(anything, default=0, init=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, field.metadata["check"](field.name, getattr(self, field.name))
            )
        if self.implementation not in rule.IMPLEMENTATIONS:
            rule.check_implementation(self.implementation, static=True)
        self._check()
        self._finish()

    def _check(self) -> None:
        """The rules that concern several members, or a member of one class."""

    def _finish(self) -> None:
        """Keeps what every call needs."""
        key = (type(self), *self._statics())
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "_hash", hash(key))

    def _statics(self) -> tuple[Any, ...]:
        """Everything but the arrays."""
        return tuple(self.settings().values())

    def settings(self) -> dict[str, Any]:
        """The members that the initialiser takes, and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def copy(self, **changes: Any) -> Self:
        """A kernel like this one with some members changed.

        Args:
          **changes: the members to change, as the initialiser takes them.

        Raises:
          TypeError: there is no such member.
          ValueError: as the initialiser.
        """
        return type(self)(**(self.settings() | changes))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or self._key != other._key:
            return False
        return all(_equal(getattr(self, name), getattr(other, name)) for name in self._leaves)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [f"{name}={value!r}" for name, value in self.settings().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _without_arrays(self) -> Self:
        """The kernel without its arrays."""
        return self

    # As text, as bytes and in notebooks

    def to_bytes(self) -> bytes:
        """The kernel as bytes, for a file or another process; the counterpart of NSSecureCoding.

        They are a safetensors file: the settings in its metadata, the parameters of a forward transposed
        convolution as tensors. A gradient kernel is stored without parameters, as the original is: it takes
        those of the forward kernel. A device is not stored.

        Raises:
          ImportError: safetensors is not installed.
          TypeError: the kernel is of a class that `jax_mps.mps` does not have, or its parameters are traced.
        """
        return _FROM_ABOVE["to_bytes"](self)

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview,
        *,
        weights: Any = None,
        device: jax.Device | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> Self:
        """The kernel that `to_bytes` of this class, or of one derived from it, gave.

        Arguments, result and errors are those of `mps.from_bytes`; a kernel of another class is a
        `CodingError` too.
        """
        return _FROM_ABOVE["from_bytes_of"](cls, data, weights=weights, device=device, most_bytes=most_bytes)

    def _repr_html_(self) -> str:
        return _FROM_ABOVE["html_of"](self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes differ from process to process, so a pickled kernel is made again.
        return functools.partial(type(self), **self.settings()), ()

    # As a pytree

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return tuple(getattr(self, name) for name in self._leaves), self

    def _with_leaves(self, leaves: Sequence[Any]) -> Self:
        del leaves
        return self

    # Images

    def _image(self, name: str, value: ArrayLike, dtypes: Sequence[str] = FLOATS) -> Array:
        x = operands.array(name, value, dtypes)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be an image [height, width, channels] or images "
                f"[number, height, width, channels], got shape {x.shape}"
            )
        return x if self.device is None else jax.device_put(x, self.device)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if a is None or b is None or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b)
