"""Apple's structs and enumerations, under their names, with keywords for fields.

Apple orders fields x first, arrays order their axes y first; so the structs take no positional arguments.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, TypeVar

from jax_mps import geometry


def _check_integers(struct: Any, *, least: int | None = None, unbounded: bool = False) -> None:
    for field in dataclasses.fields(struct):
        value = getattr(struct, field.name)
        if unbounded and value is None:
            continue
        name = f"{field.name} of {type(struct).__name__}"
        value = geometry.integer(name, value)
        if least is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        object.__setattr__(struct, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MPSOffset:
    """A signed position: column `x`, row `y`, image `z`."""

    x: int = 0
    y: int = 0
    z: int = 0

    def __post_init__(self) -> None:
        _check_integers(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MTLOrigin:
    """The first column, row and image of a region; none is negative."""

    x: int = 0
    y: int = 0
    z: int = 0

    def __post_init__(self) -> None:
        _check_integers(self, least=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MTLSize:
    """Columns, rows and images; `None` is Apple's `NSUIntegerMax`: as many as there are."""

    width: int | None = None
    height: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        _check_integers(self, least=0, unbounded=True)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MTLRegion:
    """A box of pixels. A clip rectangle of `None` is Apple's `MPSRectNoClip`."""

    origin: MTLOrigin = MTLOrigin()
    size: MTLSize = MTLSize()

    def __post_init__(self) -> None:
        if not isinstance(self.origin, MTLOrigin):
            raise TypeError(f"origin must be an MTLOrigin, got {self.origin!r}")
        if not isinstance(self.size, MTLSize):
            raise TypeError(f"size must be an MTLSize, got {self.size!r}")


class MPSImageEdgeMode(enum.IntEnum):
    """What a tap outside the image reads. The last three belong to `MPSNNPad` alone."""

    ZERO = 0
    CLAMP = 1
    MIRROR = 2
    MIRROR_WITH_EDGE = 3
    CONSTANT = 4


class MPSKernelOptions(enum.IntFlag):
    """Options of every kernel. Only `ALLOW_REDUCED_PRECISION` has a meaning here."""

    NONE = 0
    SKIP_API_VALIDATION = 1
    ALLOW_REDUCED_PRECISION = 2
    DISABLE_INTERNAL_TILING = 4
    INSERT_DEBUG_GROUPS = 8
    VERBOSE = 16


class MPSCNNNeuronType(enum.IntEnum):
    """Activation functions, see `MPSNNNeuronDescriptor`."""

    NONE = 0
    RELU = 1
    LINEAR = 2
    SIGMOID = 3
    HARD_SIGMOID = 4
    TANH = 5
    ABSOLUTE = 6
    SOFT_PLUS = 7
    SOFT_SIGN = 8
    ELU = 9
    PRELU = 10
    RELUN = 11
    POWER = 12
    EXPONENTIAL = 13
    LOGARITHM = 14
    GELU = 15


class MPSNNConvolutionAccumulatorPrecisionOption(enum.IntEnum):
    """The type of the sums of a convolution, see `MPSCNNConvolutionTranspose`."""

    HALF = 0
    FLOAT = 1


class MPSCNNConvolutionGradientOption(enum.IntFlag):
    """Which gradients of a convolution to compute."""

    GRADIENT_WITH_DATA = 1
    GRADIENT_WITH_WEIGHTS_AND_BIAS = 2
    ALL = 3


class MPSCNNConvolutionWeightsLayout(enum.IntEnum):
    """The order of the axes of weights: `[out, kernel height, kernel width, in / groups]`, the only one."""

    OHWI = 0


class MPSCNNWeightsQuantizationType(enum.IntEnum):
    """How weights of 8 bits stand for numbers, see `MPSCNNConvolutionDataSource`."""

    NONE = 0
    LINEAR = 1
    LOOKUP_TABLE = 2


class MPSDataType(enum.Enum):
    """The types of weights that a data source may have; `BFLOAT16` and `FLOAT64` are extensions."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"


class MPSNNPaddingMethod(enum.IntFlag):
    """How a result is sized and where its windows lie when no destination is given.

    One value of each group, or'ed together; those of value 0 may be left out. Of the reserved values and a
    `CUSTOM` policy there is no meaning here: size and offset of a policy of one's own go into the
    destination image and `offset`.
    """

    ALIGN_CENTERED = 0
    ALIGN_TOP_LEFT = 1
    ALIGN_BOTTOM_RIGHT = 2
    ALIGN_RESERVED = 3
    ADD_REMAINDER_TO_TOP_LEFT = 0
    ADD_REMAINDER_TO_TOP_RIGHT = 1 << 2
    ADD_REMAINDER_TO_BOTTOM_LEFT = 2 << 2
    ADD_REMAINDER_TO_BOTTOM_RIGHT = 3 << 2
    SIZE_VALID_ONLY = 0
    SIZE_SAME = 1 << 4
    SIZE_FULL = 2 << 4
    SIZE_RESERVED = 3 << 4
    CUSTOM_ALLOW_FOR_NODE_FUSION = 1 << 13
    CUSTOM = 1 << 14
    EXCLUDE_EDGES = 1 << 15


Member = TypeVar("Member", bound=enum.Enum)


def member(kind: type[Member], name: str, value: Any) -> Member:
    """`value` as a member of an enumeration: itself, its number or its name in any case."""
    if isinstance(value, str) and issubclass(kind, enum.Enum):
        found = kind.__members__.get(value.upper())
        if found is not None:
            return found
    elif not isinstance(value, bool):
        try:
            return kind(value)
        except ValueError:
            pass
    names = ", ".join(n.lower() for n in kind.__members__)
    raise ValueError(f"{name} must be a {kind.__name__}, its number or one of {names}, got {value!r}")
