"""The table of members in docs/mps.md: complete, and true."""

import re
from pathlib import Path

import numpy as np
import pytest

from jax_mps import mps

PAGE = Path(__file__).parents[2] / "docs" / "mps.md"

# Every member that the documentation of the kernels has, under the class that has it first.
MEMBERS = {
    "MPSKernel": [
        "device",
        "label",
        "options",
        "init(device:)",
        "init(coder:device:)",
        "copy(with:device:)",
        "encode(with:)",
    ],
    "MPSCNNKernel": [
        "offset",
        "clipRect",
        "destinationFeatureChannelOffset",
        "sourceFeatureChannelOffset",
        "sourceFeatureChannelMaxCount",
        "edgeMode",
        "kernelWidth",
        "kernelHeight",
        "strideInPixelsX",
        "strideInPixelsY",
        "dilationRateX",
        "dilationRateY",
        "isBackwards",
        "isStateModified",
        "padding",
        "destinationImageAllocator",
        "encode(commandBuffer:sourceImage:destinationImage:)",
        "encodeBatch(commandBuffer:sourceImages:destinationImages:)",
        "encode(commandBuffer:sourceImage:)",
        "encodeBatch(commandBuffer:sourceImages:)",
        "encode(commandBuffer:sourceImage:destinationState:destinationImage:)",
        "encode(commandBuffer:sourceImage:destinationState:destinationStateIsTemporary:)",
        "encodeBatch(commandBuffer:sourceImages:destinationStates:destinationImages:)",
        "resultState(sourceImage:sourceStates:destinationImage:)",
        "resultStateBatch(sourceImage:sourceStates:destinationImage:)",
        "temporaryResultState(commandBuffer:sourceImage:sourceStates:destinationImage:)",
        "temporaryResultStateBatch(commandBuffer:sourceImage:sourceStates:destinationImage:)",
        "isResultStateReusedAcrossBatch",
        "appendBatchBarrier",
        "destinationImageDescriptor(sourceImages:sourceStates:)",
        "encodingStorageSize(sourceImage:sourceStates:destinationImage:)",
        "batchEncodingStorageSize(sourceImage:sourceStates:destinationImage:)",
    ],
    "MPSCNNBinaryKernel": [
        "primaryOffset",
        "secondaryOffset",
        "clipRect",
        "destinationFeatureChannelOffset",
        "primarySourceFeatureChannelOffset",
        "secondarySourceFeatureChannelOffset",
        "primarySourceFeatureChannelMaxCount",
        "secondarySourceFeatureChannelMaxCount",
        "primaryEdgeMode",
        "secondaryEdgeMode",
        "primaryKernelWidth",
        "secondaryKernelWidth",
        "primaryKernelHeight",
        "secondaryKernelHeight",
        "primaryStrideInPixelsX",
        "secondaryStrideInPixelsX",
        "primaryStrideInPixelsY",
        "secondaryStrideInPixelsY",
        "primaryDilationRateX",
        "secondaryDilationRateX",
        "primaryDilationRateY",
        "secondaryDilationRateY",
        "isBackwards",
        "isStateModified",
        "padding",
        "destinationImageAllocator",
        "encode(commandBuffer:primaryImage:secondaryImage:destinationImage:)",
        "encode(commandBuffer:primaryImage:secondaryImage:)",
        "resultState(primaryImage:secondaryImage:sourceStates:destinationImage:)",
        "destinationImageDescriptor(sourceImages:sourceStates:)",
        "encodingStorageSize(primaryImage:secondaryImage:sourceStates:destinationImage:)",
    ],
    "MPSCNNGradientKernel": [
        "kernelOffsetX",
        "kernelOffsetY",
        "encode(commandBuffer:sourceGradient:sourceImage:gradientState:)",
        "encode(commandBuffer:sourceGradient:sourceImage:gradientState:destinationGradient:)",
        "encodeBatch(commandBuffer:sourceGradients:sourceImages:gradientStates:)",
        "encodeBatch(commandBuffer:sourceGradients:sourceImages:gradientStates:destinationGradients:)",
    ],
    "MPSCNNPooling": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
    ],
    "MPSCNNPoolingMax": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
    ],
    "MPSCNNPoolingAverage": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "zeroPadSizeX",
        "zeroPadSizeY",
    ],
    "MPSCNNPoolingL2Norm": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
    ],
    "MPSCNNDilatedPoolingMax": [
        "init(device:kernelWidth:kernelHeight:dilationRateX:dilationRateY:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "dilationRateX",
        "dilationRateY",
    ],
    "MPSCNNPoolingGradient": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "sourceSize",
    ],
    "MPSCNNPoolingMaxGradient": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "sourceSize",
    ],
    "MPSCNNPoolingAverageGradient": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "sourceSize",
        "zeroPadSizeX",
        "zeroPadSizeY",
    ],
    "MPSCNNPoolingL2NormGradient": [
        "init(device:kernelWidth:kernelHeight:)",
        "init(device:kernelWidth:kernelHeight:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "sourceSize",
    ],
    "MPSCNNDilatedPoolingMaxGradient": [
        "init(device:kernelWidth:kernelHeight:dilationRateX:dilationRateY:strideInPixelsX:strideInPixelsY:)",
        "init(coder:device:)",
        "sourceSize",
    ],
    "MPSCNNConvolutionTranspose": [
        "init(device:weights:)",
        "init(coder:device:)",
        "inputFeatureChannels",
        "outputFeatureChannels",
        "groups",
        "kernelOffsetX",
        "kernelOffsetY",
        "accumulatorPrecisionOption",
        "dataSource",
        "encode(commandBuffer:sourceImage:convolutionGradientState:)",
        "encode(commandBuffer:sourceImage:convolutionGradientState:destinationImage:)",
        "encodeBatch(commandBuffer:sourceImages:convolutionGradientStates:)",
        "encode(commandBuffer:sourceImage:convolutionGradientState:destinationState:destinationStateIsTemporary:)",
        "resultState(sourceImage:sourceStates:destinationImage:)",
        "reloadWeightsAndBiasesFromDataSource()",
        "reloadWeightsAndBiases(with:state:)",
        "exportWeightsAndBiases(with:resultStateCanBeTemporary:)",
    ],
    "MPSCNNConvolutionTransposeGradient": [
        "init(device:weights:)",
        "init(coder:device:)",
        "dataSource",
        "gradientOption",
        "groups",
        "sourceGradientFeatureChannels",
        "sourceImageFeatureChannels",
        "reloadWeightsAndBiasesFromDataSource()",
        "reloadWeightsAndBiases(with:state:)",
    ],
    "MPSCNNConvolutionDescriptor": [
        "kernelWidth",
        "kernelHeight",
        "inputFeatureChannels",
        "outputFeatureChannels",
        "strideInPixelsX",
        "strideInPixelsY",
        "dilationRateX",
        "dilationRateY",
        "groups",
        "fusedNeuronDescriptor",
        "setBatchNormalizationParametersForInference(mean:variance:gamma:beta:epsilon:)",
    ],
    "ConvolutionDataSource": [
        "dataType()",
        "descriptor()",
        "weights()",
        "biasTerms()",
        "load()",
        "purge()",
        "label()",
        "rangesForUInt8Kernel()",
        "lookupTableForUInt8Kernel()",
        "weightsQuantizationType()",
        "update(with:gradientState:sourceState:)",
        "update(with:sourceState:)",
        "copy(with:device:)",
        "weightsLayout()",
        "kernelWeightsDataType()",
    ],
    "MPSState": [
        "resource",
        "readCount",
        "isTemporary",
        "synchronize(on:)",
    ],
    "MPSNNGradientState": [
        "(opaque)",
        "sourceWidth",
        "sourceHeight",
    ],
    "MPSCNNConvolutionGradientState": [
        "gradientForWeights",
        "gradientForBiases",
        "convolution",
        "sourceWidth",
        "sourceHeight",
        "gradientForWeightsLayout",
    ],
    "MPSCNNConvolutionTransposeGradientState": [
        "convolutionTranspose",
    ],
    "MPSCNNConvolutionWeightsAndBiasesState": [
        "weights",
        "biases",
        "weightsOffset",
        "biasesOffset",
    ],
}


def rows():
    """(class, cells) of every row of the tables."""
    kind = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"### `(\w+)`", line):
            kind = heading[1]
        elif kind and line.startswith("| `"):
            yield kind, [cell.strip() for cell in line.strip("|").split(" | ")]


ROWS = list(rows())


def example(kind):
    """An object of the class, or of one that inherits it where it is abstract, made with little."""
    window = {"kernel_width": 3, "kernel_height": 3}
    descriptor = mps.MPSCNNConvolutionDescriptor(input_feature_channels=1, output_feature_channels=1)
    source = mps.ConvolutionDataSource(descriptor, np.zeros((1, 3, 3, 1), np.float32))
    forward = mps.MPSCNNConvolutionTranspose(weights=source)
    return {
        "MPSKernel": lambda: mps.MPSCNNPoolingMax(**window),
        "MPSCNNKernel": lambda: mps.MPSCNNPoolingMax(**window),
        "MPSCNNPooling": lambda: mps.MPSCNNPoolingMax(**window),
        "MPSCNNBinaryKernel": lambda: mps.MPSCNNPoolingMaxGradient(**window),
        "MPSCNNGradientKernel": lambda: mps.MPSCNNPoolingMaxGradient(**window),
        "MPSCNNPoolingGradient": lambda: mps.MPSCNNPoolingMaxGradient(**window),
        "MPSCNNConvolutionDescriptor": lambda: descriptor,
        "ConvolutionDataSource": lambda: source,
        "MPSCNNConvolutionTranspose": lambda: forward,
        "MPSCNNConvolutionTransposeGradient": lambda: mps.MPSCNNConvolutionTransposeGradient(weights=source),
        "MPSNNGradientState": lambda: mps.MPSCNNPoolingMax(**window).result_state(np.zeros((3, 3, 1))),
        "MPSCNNConvolutionGradientState": lambda: mps.MPSCNNConvolutionGradientState(
            source_width=1, source_height=1
        ),
        "MPSCNNConvolutionTransposeGradientState": lambda: forward.result_state(np.zeros((3, 3, 1))),
        "MPSCNNConvolutionWeightsAndBiasesState": lambda: mps.MPSCNNConvolutionWeightsAndBiasesState(
            weights=np.zeros((1, 3, 3, 1))
        ),
    }.get(kind, lambda: getattr(mps, kind)(**window))()


def test_every_member_has_its_row():
    listed = {}
    for kind, cells in ROWS:
        assert len(cells) == 6, cells
        listed.setdefault(kind, []).append(cells[0].strip("`"))
    assert listed == MEMBERS


@pytest.mark.parametrize(("kind", "cells"), [(k, c) for k, c in ROWS if c[4] == "present"])
def test_what_is_present_is_there_with_its_default(kind, cells):
    name, default = (cell.strip("`") for cell in cells[1:3])
    instance = example(kind)
    assert isinstance(instance, getattr(mps, kind))
    assert hasattr(instance, name)
    if default:
        expected = eval(default, vars(mps))
        assert getattr(instance, name) == expected
        assert type(getattr(instance, name)) is type(expected)


@pytest.mark.parametrize(("kind", "cells"), [(k, c) for k, c in ROWS if c[4] != "present"])
def test_what_is_absent_has_something_in_its_place(kind, cells):
    name = re.sub(r"\(.*", "", cells[0].strip("`"))
    name = re.sub(r"(?<=[a-z])([A-Z])", lambda m: "_" + m[1].lower(), name)
    assert cells[4] == "absent"
    assert cells[5]
    if hasattr(mps, kind) and name not in ("encode", "copy", "result_state"):
        assert not hasattr(example(kind), name)
