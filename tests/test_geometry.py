"""Windows as integers, against brute force. No arrays of pixels here."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from jax import export

import jax_mps
import oracle
from jax_mps import geometry
from jax_mps.geometry import Axis, Divisor, Window, place

ARGUMENTS = {
    "strides": 1,
    "padding": "VALID",
    "window_dilation": 1,
    "ceil_mode": False,
    "data_format": "channels_last",
}


def placed(shape, window_shape, **arguments):
    return place(shape, window_shape, **{**ARGUMENTS, **arguments})


def taps(axis):
    """Pixels that each window reads, from the definition; outside ones too."""
    return [
        [axis.stride * i - axis.low + axis.dilation * k for k in range(axis.taps)]
        for i in range(axis.windows)
    ]


GRID = list(itertools.product((1, 4, 9), (1, 2, 3, 4, 7), (1, 2, 5), (1, 2, 3)))


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), GRID)
def test_offset_and_padding(size, kernel, stride, dilation):
    """Section 2.8 both ways: the offset is the centre of the first window, an even extent leans left."""
    extent = (kernel - 1) * dilation + 1
    for offset, out in itertools.product(range(-4, 5), (1, 3)):
        axis = Axis.from_offset(size, kernel, stride, dilation, offset, out)
        assert axis.offset == offset
        assert axis.extent == extent
        assert axis.low == extent // 2 - offset
        first = taps(axis)[0]
        assert first[0] == offset - extent // 2
        # The smallest high padding with this many windows, and back to the number of windows.
        assert axis.high == (out - 1) * stride + extent - size - axis.low
        assert (size + axis.low + axis.high - extent) // stride + 1 == out
        assert size + axis.high == taps(axis)[-1][-1] + 1


@pytest.mark.parametrize(
    ("kernel", "dilation", "expected"),
    [
        (2, 3, [-2, 1]),
        (3, 2, [-2, 0, 2]),
        (4, 2, [-3, -1, 1, 3]),
        (2, 1, [-1, 0]),
        (3, 1, [-1, 0, 1]),
        (1, 5, [0]),
    ],
)
def test_documented_centres(kernel, dilation, expected):
    assert taps(Axis.from_offset(8, kernel, 1, dilation, 0, 1))[0] == expected


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), GRID)
def test_numbers_of_windows(size, kernel, stride, dilation, ceil_mode):
    for lo, hi in itertools.product(range(-2, 4), repeat=2):
        reference = oracle.line(size, kernel, stride, dilation, (lo, hi), ceil_mode)
        arguments = {
            "strides": stride,
            "padding": ((lo, hi),),
            "window_dilation": dilation,
            "ceil_mode": ceil_mode,
        }
        valid = (
            reference.windows > 0
            and reference.last > reference.first
            and all(reference.counted(i, (0, 0)) for i in range(reference.windows))
        )
        if not valid:
            with pytest.raises(ValueError, match=r"window_shape|padding"):
                placed((1, size, 1), (kernel,), **arguments)
            continue
        placement = placed((1, size, 1), (kernel,), **arguments)
        (axis,) = placement.window.axes
        assert axis.windows == reference.windows
        assert placement.crop == ((max(-lo, 0), max(-hi, 0)),)
        assert axis.size == reference.last - reference.first
        # The same pixels, counted from the first one that is left.
        assert [t + reference.first for t in taps(axis)[0]] == [reference.tap(0, k) for k in range(kernel)]


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), GRID)
def test_same_padding(size, kernel, stride, dilation):
    extent = (kernel - 1) * dilation + 1
    ((lo, hi),) = jax.lax.padtype_to_pads((size,), (extent,), (stride,), "SAME")
    arguments = {"strides": stride, "padding": "SAME", "window_dilation": dilation}
    reference = oracle.line(size, kernel, stride, dilation, (lo, hi), False)
    if not all(reference.counted(i, (0, 0)) for i in range(reference.windows)):
        assert dilation > 1  # such a window may step over the whole image
        with pytest.raises(ValueError, match="without a valid tap"):
            placed((1, size, 1), (kernel,), **arguments)
        return
    (axis,) = placed((1, size, 1), (kernel,), **arguments).window.axes
    assert axis.windows == -(-size // stride)
    assert axis.low == lo
    assert axis.high <= hi


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), GRID)
def test_counts_and_windows_without_a_tap(size, kernel, stride, dilation):
    for lo, out in itertools.product(range(-3, 8, 2), (1, 4)):
        axis = Axis(size, kernel, stride, dilation, lo, out)
        inside = [sum(0 <= t < size for t in window) for window in taps(axis)]
        assert axis.first_empty_window() == next((i for i, n in enumerate(inside) if n == 0), None)
        for band in ((0, 0), (1, 0), (2, 3)):
            expected = [sum(-band[0] <= t < size + band[1] for t in window) for window in taps(axis)]
            assert list(axis.counted_taps(*band)) == expected
        assert axis.overlaps_padding() == any(
            not 0 <= t < size for window in taps(axis) for t in (window[0], window[-1])
        )


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), GRID)
def test_moving_windows_and_images(size, kernel, stride, dilation):
    axis = Axis(size, kernel, stride, dilation, 2, 5)
    assert taps(axis.select(1, 3)) == taps(axis)[1:4]
    assert axis.select(0, 5) == axis
    moved = axis.cropped(2, 1)
    assert moved.size == size - 3
    assert [[t + 2 for t in window] for window in taps(moved)] == taps(axis)
    assert axis.cropped(2, 1).cropped(-2, -1) == axis
    grown, before, after = axis.enclosed()
    assert grown == axis.cropped(-before, -after)
    assert min(map(min, taps(grown))) >= 0
    assert max(map(max, taps(grown))) < grown.size
    assert before == max(0, -min(map(min, taps(axis))))
    assert after == max(0, max(map(max, taps(axis))) - size + 1)
    assert not grown.overlaps_padding()


@pytest.mark.parametrize(
    ("taps", "dtype"),
    [(1, "int8"), (128, "int8"), (129, "int16"), (2**15, "int16"), (2**15 + 1, "int32"), (2**20, "int32")],
)
def test_the_type_of_tap_numbers(taps, dtype):
    assert Window((Axis(taps, taps, 1, 1, 0, 1),)).tap_dtype == dtype


def test_windows_of_several_axes():
    placement = placed((2, 7, 9, 5, 3), (3, 2, 1), strides=(2, 1, 4), padding=((1, 0), (0, 0), (-1, 0)))
    window = placement.window
    assert placement.start == 1
    assert placement.crop == ((0, 0), (0, 0), (1, 0))
    assert placement.pads == ((1, 0), (0, 0), (-1, 0))
    assert (window.rank, window.taps) == (3, 6)
    assert window.shape == (3, 2, 1)
    assert window.sizes == (7, 9, 4)
    assert window.counts == (3, 8, 1)
    assert window.is_static()
    assert window.overlaps_padding()


@pytest.mark.parametrize(("data_format", "start"), [("channels_last", 2), ("channels_first", 3)])
def test_where_spatial_axes_start(data_format, start):
    shape = (4, 5, 8, 8, 3) if data_format == "channels_last" else (4, 5, 3, 8, 8)
    assert placed(shape, (2, 2), data_format=data_format).start == start


def test_divisors():
    padded = placed((1, 8, 1), (3,), strides=2, padding=1)
    unpadded = placed((1, 8, 1), (3,), strides=2)

    def divisor(placement, *, count_include_pad=True, ceil_mode=False, override=None):
        return geometry.divisor(
            placement, count_include_pad=count_include_pad, ceil_mode=ceil_mode, override=override
        )

    assert divisor(padded) == Divisor(3, ())
    assert divisor(padded, count_include_pad=False) == Divisor(0, ((0, 0),))
    assert divisor(padded, ceil_mode=True) == Divisor(0, ((1, 1),))
    assert divisor(padded, override=7) == Divisor(7, ())
    assert divisor(unpadded, count_include_pad=False) == Divisor(3, ())


def test_equal_calls_give_equal_placements():
    """They are hashable keys of compiled programs; a second, equal call must not compile again."""
    one = placed((1, 8, 8, 1), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    other = placed([1, 8, 8, 1], [3, 3], strides=2, padding=1)
    assert one == other
    assert hash(one) == hash(other)


# --- symbolic sizes -----------------------------------------------------------------------------------


def symbols(text):
    return export.symbolic_shape(text, constraints=["h >= 8"])


@pytest.mark.parametrize(
    ("padding", "ceil_mode"),
    [(0, False), (1, False), ("SAME", False), (((-1, 2),), False), (0, True), (1, True), (((-1, 2),), True)],
    ids=str,
)
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (2, 3, 2), (4, 1, 1)])
def test_symbolic_sizes(kernel, stride, dilation, padding, ceil_mode):
    arguments = {"strides": stride, "padding": padding, "window_dilation": dilation, "ceil_mode": ceil_mode}
    placement = placed((1, *symbols("h"), 1), (kernel,), **arguments)
    assert not placement.window.is_static()
    (axis,) = placement.window.axes

    def at(dim, value):
        return dim if isinstance(dim, int) else int(dim._evaluate({"h": value}))

    for size in (8, 9, 10, 11, 23):
        (static,) = placed((1, size, 1), (kernel,), **arguments).window.axes
        assert (at(axis.size, size), at(axis.low, size), at(axis.windows, size)) == (
            static.size,
            static.low,
            static.windows,
        )
        assert at(axis.high, size) == static.high


def test_symbolic_sizes_stay_open():
    (axis,) = placed((1, *symbols("h"), 1), (3,), strides=1, padding=1).window.axes
    assert axis.overlaps_padding()
    assert axis.first_empty_window() is None
    assert not geometry.surely_below(axis.size, 100)
    assert geometry.surely_below(axis.size - axis.size - 1, 0)


def test_a_symbolic_size_that_is_surely_too_small():
    small = export.symbolic_shape("h", constraints=["h <= 4"])
    with pytest.raises(ValueError, match="below 1"):
        placed((1, *small, 1), (9,))


def test_symbolic_batches_keep_windows_static():
    placement = placed((*export.symbolic_shape("b"), 8, 8, 3), (2, 2), strides=2)
    assert placement.window.is_static()


def test_no_array_is_touched():
    """Shapes of more pixels than fit anywhere."""
    shape = jax.eval_shape(
        lambda x: jax_mps.max_pool(x, 2, strides=2),
        jax.ShapeDtypeStruct((2**20, 2**20, 2**20, 1), np.float32),
    )
    assert shape.shape == (2**20, 2**19, 2**19, 1)


def test_old_names_of_attributes_warn() -> None:
    axis = Axis(9, 3, 2, 1, 1, 5)
    for old, new in (("kernel", "taps"), ("lo", "low"), ("hi", "high"), ("out", "windows")):
        with pytest.warns(DeprecationWarning, match=f"Axis.{old} is now {new}"):
            assert getattr(axis, old) == getattr(axis, new)
    with pytest.warns(DeprecationWarning, match="Window.outs is now counts"):
        assert Window((axis,)).outs == (5,)
    with pytest.raises(AttributeError, match="'Axis' object has no attribute 'taken'"):
        _ = axis.taken
