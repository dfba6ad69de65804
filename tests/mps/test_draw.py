"""Pictures of windows: well formed, and of the windows that the kernels use."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import mps_cases
import mps_oracle
import mps_random
from jax_mps import mps
from jax_mps.mps import draw, picture

SVG = "{http://www.w3.org/2000/svg}"
DESCRIPTOR = mps.MPSCNNConvolutionDescriptor(
    kernel_width=3,
    kernel_height=2,
    input_feature_channels=1,
    output_feature_channels=1,
    stride_in_pixels_x=2,
    stride_in_pixels_y=3,
)
SOURCE = mps.ConvolutionDataSource(DESCRIPTOR, np.ones((1, 2, 3, 1), np.float32))


def texts(drawn):
    root = ElementTree.fromstring(drawn.svg)
    assert root.tag == f"{SVG}svg"
    return [element.text for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_lines_are_the_windows_of_the_loops(name, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        picture, "draw", lambda *args: seen.update(rows=args[4], columns=args[5], edge=args[6])
    )
    for index in range(6 if name.startswith("conv") else 60):  # weights have to be compiled for
        case = mps_random.draw(name, index).case
        params, source = case["params"], case["inputs"]["source"]
        kernel, lengths = mps_cases.build(case), source.shape[1:3]
        given = {}
        if name.endswith("gradient"):
            given["source_gradient_shape"] = case["inputs"]["source_gradient"].shape
        else:
            given["destination_shape"] = params["destination_shape"]
        draw.draw_windows(kernel, source.shape, **given)
        if name.startswith("conv"):
            kernels = case["inputs"]["weights"].shape[1:3]
            stride, centres = [1, 1], mps_oracle.total_offset(params)
            expanded = mps_oracle.expanded(source, params["stride"])
            assert [line.axis.size for line in (seen["rows"], seen["columns"])] == list(expanded.shape[1:3])
        else:
            kernels, stride = params["kernel"], params["stride"]
            offset = params["secondary_offset" if name.endswith("gradient") else "offset"]
            centres = [offset["y"], offset["x"]]
            assert [line.axis.size for line in (seen["rows"], seen["columns"])] == list(lengths)
        for axis, line in enumerate((seen["rows"], seen["columns"])):
            first = 0
            if name.endswith("gradient") and not name.startswith("conv"):
                first = line.first - params["primary_offset"]["yx"[axis]]
            for window in range(line.axis.windows):
                centre = centres[axis] + stride[axis] * (first + window)
                assert line.taps(window) == mps_oracle.taps(centre, kernels[axis], params["dilation"][axis])
        if name.endswith("gradient"):
            continue
        origin, size = mps_oracle.clip(params["clip_rect"], params["destination_shape"])
        assert [(line.first, line.axis.windows) for line in (seen["rows"], seen["columns"])] == [
            (origin[1], size[1]),
            (origin[2], size[2]),
        ]


def test_without_a_destination_the_policy_places_the_windows():
    kernel = mps.MPSCNNPoolingMax(kernel_width=2, kernel_height=2, stride_in_pixels_x=2, stride_in_pixels_y=2)
    words = texts(mps.draw_windows(kernel, (5, 6)))
    assert "destination, 3 \u00d7 3" in words
    assert "outside: reads 0" in words  # row 5 - 1 is odd
    words = texts(mps.draw_windows(kernel.copy(padding="size_valid_only"), (5, 6)))
    assert "destination, 2 \u00d7 3" in words
    assert "read by no window" in words
    assert "outside: reads 0" not in words


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"edge_mode": "zero"}, "outside: reads 0"),
        ({"edge_mode": "clamp"}, "outside: not read, not counted"),
        ({"edge_mode": "clamp", "zero_pad_size_x": 1, "zero_pad_size_y": 1}, "zero that the average counts"),
        ({"clip_rect": mps.MTLRegion(size=mps.MTLSize(width=1))}, "destination pixel left as it was"),
    ],
)
def test_the_legend_says_what_there_is(changes, word):
    kernel = mps.MPSCNNPoolingAverage(kernel_width=3, kernel_height=3)
    bare = kernel.copy(offset=mps.MPSOffset(x=1, y=1))
    assert word in texts(mps.draw_windows(kernel.copy(**changes), (4, 4), (4, 4)))
    assert word not in texts(mps.draw_windows(bare, (4, 4), (2, 2)))


def test_a_transposed_convolution_shows_its_inserted_zeros():
    kernel = mps.MPSCNNConvolutionTranspose(weights=SOURCE)
    words = texts(mps.draw_windows(kernel, (2, 3)))
    assert "source image, 2 \u00d7 3, with zeros between its pixels 4 \u00d7 5" in words
    assert "inserted zero" in words
    # 14 of 20 pixels, and those around the image that windows reach.
    assert words.count("0") >= 14


def test_large_images_are_cut():
    kernel = mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=3, stride_in_pixels_x=2, stride_in_pixels_y=2)
    drawn = mps.draw_windows(kernel, (1000, 2000))
    assert "source image, 1000 \u00d7 2000, its top left corner" in texts(drawn)
    assert len(drawn.svg) < 300_000


def test_empty_images_can_be_drawn():
    kernel = mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=3)
    for source, destination in (((0, 3), (2, 2)), ((3, 3), (0, 2)), ((0, 0), (0, 0))):
        assert texts(mps.draw_windows(kernel, source, destination))


@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_notebooks_show_every_kernel(name):
    kernel = mps_cases.build(mps_random.draw(name, 3).case)
    shown = kernel._repr_html_()
    ElementTree.fromstring(shown)
    assert type(kernel).__name__ in shown
    assert "<svg" in shown
    assert not re.search(r"<script|href|url\(", shown)


def test_notebooks_show_base_classes():
    for kernel in (mps.MPSKernel(), mps.MPSCNNKernel(), mps.MPSCNNGradientKernel()):
        shown = kernel._repr_html_()
        assert type(kernel).__name__ in shown
        assert "<svg" not in shown


def test_pictures_are_saved(tmp_path):
    drawn = mps.draw_windows(mps.MPSCNNPoolingMax(kernel_width=1, kernel_height=1), (2, 2))
    drawn.save(tmp_path / "windows.svg")
    assert (tmp_path / "windows.svg").read_text(encoding="utf-8") == drawn.svg == drawn._repr_html_()
    assert drawn._repr_svg_() == drawn.svg


def test_shapes_are_checked():
    forward = mps.MPSCNNPoolingMax(kernel_width=1, kernel_height=1)
    gradient = mps.MPSCNNPoolingMaxGradient(kernel_width=1, kernel_height=1)
    with pytest.raises(ValueError, match="source_shape must be"):
        mps.draw_windows(forward, (1,))
    with pytest.raises(ValueError, match="source_gradient_shape must be None"):
        mps.draw_windows(forward, (2, 2), source_gradient_shape=(2, 2))
    with pytest.raises(ValueError, match="needs source_gradient_shape"):
        mps.draw_windows(gradient, (2, 2))
