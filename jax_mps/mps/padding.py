"""Padding policies: the size of a result and the offset of its windows, one axis at a time."""

from __future__ import annotations

from jax_mps.mps.structs import MPSNNPaddingMethod

METHOD = MPSNNPaddingMethod
DEFAULT = METHOD.ALIGN_CENTERED | METHOD.ADD_REMAINDER_TO_TOP_LEFT | METHOD.SIZE_SAME
TENSORFLOW_SAME = METHOD.ALIGN_CENTERED | METHOD.ADD_REMAINDER_TO_BOTTOM_RIGHT | METHOD.SIZE_SAME

KNOWN = 0x3F | int(METHOD.CUSTOM_ALLOW_FOR_NODE_FUSION | METHOD.EXCLUDE_EDGES)


def check(name: str, value: MPSNNPaddingMethod) -> MPSNNPaddingMethod:
    """Refuses the policies that have no meaning here."""
    if value & METHOD.CUSTOM:
        raise ValueError(
            f"{name} must not be CUSTOM: size the result yourself, give it as the destination image and set "
            f"the offset, got {value!r}"
        )
    reserved = value & 3 == METHOD.ALIGN_RESERVED or value & METHOD.SIZE_RESERVED == METHOD.SIZE_RESERVED
    if reserved or int(value) & ~KNOWN:
        raise ValueError(f"{name} must be made of documented values that are not reserved, got {value!r}")
    return value


def sized(method: MPSNNPaddingMethod, axis: str, length: int, extent: int, stride: int) -> tuple[int, int]:
    """The number of windows on an axis, and the centre of the first one.

    Args:
      method: the policy.
      axis: "x" or "y"; the remainder goes to either end of each.
      length: pixels of the image, of a transposed convolution with the zeros between them.
      extent: pixels that a window spans.
      stride: pixels from one window to the next.
    """
    style = {METHOD.SIZE_VALID_ONLY: -1, METHOD.SIZE_SAME: 0, METHOD.SIZE_FULL: 1}[
        METHOD(method & METHOD.SIZE_RESERVED)
    ]
    windows = -(-(length + style * (extent - 1)) // stride)
    if windows < 1:
        raise ValueError(
            f"padding={method!r} leaves no window of {extent} pixels along {axis} on {length} pixels: "
            "the result would be empty"
        )
    extra = (windows - 1) * stride + extent - length
    align = method & METHOD.ALIGN_RESERVED
    if align == METHOD.ALIGN_TOP_LEFT:
        left = extra
    elif align == METHOD.ALIGN_BOTTOM_RIGHT:
        left = 0
    else:
        remainder = method & METHOD.ADD_REMAINDER_TO_BOTTOM_RIGHT
        low = {"y": METHOD.ADD_REMAINDER_TO_TOP_RIGHT, "x": METHOD.ADD_REMAINDER_TO_BOTTOM_LEFT}[axis]
        doubled = extra + (remainder in (METHOD.ADD_REMAINDER_TO_TOP_LEFT, low))
        left = doubled // 2 if doubled >= 0 else -(-doubled // 2)  # as C divides, towards zero
    return windows, extent // 2 - left
