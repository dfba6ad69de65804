"""Cases in the schema of golden.json, run through the classes of `jax_mps.mps`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_mps import mps

FORWARD = {
    "max": mps.MPSCNNPoolingMax,
    "dilated_max": mps.MPSCNNDilatedPoolingMax,
    "average": mps.MPSCNNPoolingAverage,
    "l2norm": mps.MPSCNNPoolingL2Norm,
}
GRADIENT = {
    "max": mps.MPSCNNPoolingMaxGradient,
    "dilated_max": mps.MPSCNNDilatedPoolingMaxGradient,
    "average": mps.MPSCNNPoolingAverageGradient,
    "l2norm": mps.MPSCNNPoolingL2NormGradient,
}


def array(entry: Any) -> np.ndarray | None:
    """An array of the file in float64; arrays stay what they are."""
    if entry is None or isinstance(entry, np.ndarray):
        return entry
    return np.array([float(v) for v in entry["data"]]).reshape(entry["shape"])


def region(entry: dict[str, Any] | None) -> mps.MTLRegion | None:
    if entry is None:
        return None
    return mps.MTLRegion(origin=mps.MTLOrigin(**entry["origin"]), size=mps.MTLSize(**entry["size"]))


def window(params: dict[str, Any]) -> dict[str, int]:
    """Lists are [y, x], members say which."""
    members = {
        "kernel_height": params["kernel"][0],
        "kernel_width": params["kernel"][1],
        "stride_in_pixels_y": params["stride"][0],
        "stride_in_pixels_x": params["stride"][1],
    }
    if params["kind"] == "dilated_max":
        members |= {"dilation_rate_y": params["dilation"][0], "dilation_rate_x": params["dilation"][1]}
    else:
        assert params["dilation"] == [1, 1]
    if params["kind"] == "average":
        members |= {"zero_pad_size_x": params["zero_pad"]["x"], "zero_pad_size_y": params["zero_pad"]["y"]}
    return members


def descriptor(params: dict[str, Any], weights: np.ndarray) -> mps.MPSCNNConvolutionDescriptor:
    outputs, height, width, per_group = weights.shape
    neuron = None
    if params.get("neuron", {}).get("type", "none") != "none":
        entry = dict(params["neuron"])
        kind = entry.pop("type")
        if kind == "prelu":
            entry = {"data": entry["a"]}
        neuron = mps.MPSNNNeuronDescriptor(neuron_type=kind, **entry)
    return mps.MPSCNNConvolutionDescriptor(
        kernel_width=width,
        kernel_height=height,
        input_feature_channels=per_group * params["groups"],
        output_feature_channels=outputs,
        stride_in_pixels_y=params["stride"][0],
        stride_in_pixels_x=params["stride"][1],
        dilation_rate_y=params["dilation"][0],
        dilation_rate_x=params["dilation"][1],
        groups=params["groups"],
        fused_neuron_descriptor=neuron,
    )


def build(case: dict[str, Any], implementation: str | None = None, dtype: str = "float32") -> Any:
    """The kernel that a case describes."""
    params, op = case["params"], case["op"]
    members: dict[str, Any] = {"implementation": implementation}
    if op == "pool_forward":
        names = ("source_feature_channel_offset", "source_feature_channel_max_count")
        return FORWARD[params["kind"]](
            **window(params),
            offset=mps.MPSOffset(**params["offset"]),
            clip_rect=region(params["clip_rect"]),
            edge_mode=params["edge_mode"],
            destination_feature_channel_offset=params["destination_feature_channel_offset"],
            **{name: params[name] for name in names},
            **members,
        )
    if op == "pool_gradient":
        return GRADIENT[params["kind"]](
            **window(params),
            primary_offset=mps.MPSOffset(**params["primary_offset"]),
            secondary_offset=mps.MPSOffset(**params["secondary_offset"]),
            source_size=mps.MTLSize(**(params["source_size"] or {})),
            clip_rect=region(params["clip_rect"]),
            secondary_edge_mode=params["edge_mode"],
            **members,
        )
    weights, bias = array(case["inputs"]["weights"]), array(case["inputs"].get("bias"))
    assert weights is not None
    source = mps.ConvolutionDataSource(
        descriptor(params, weights),
        jnp.asarray(weights, dtype),
        None if bias is None else jnp.asarray(bias, "float64" if dtype == "float64" else "float32"),
    )
    members |= {
        "weights": source,
        "offset": mps.MPSOffset(**params["offset"]),
        "kernel_offset_x": params["kernel_offset"]["x"],
        "kernel_offset_y": params["kernel_offset"]["y"],
    }
    if op == "conv_transpose_forward":
        return mps.MPSCNNConvolutionTranspose(
            clip_rect=region(params["clip_rect"]), edge_mode=params["edge_mode"], **members
        )
    return mps.MPSCNNConvolutionTransposeGradient(gradient_option=params["gradient_option"], **members)


def run_case(
    case: dict[str, Any], implementation: str | None = None, dtype: str = "float32"
) -> dict[str, np.ndarray | None]:
    """The outputs of a case, under the names of the schema and in float64.

    Args:
      case: `op`, `params` and `inputs` as in the file; inputs may also be NumPy arrays.
      implementation: `None`, "native" or "xla".
      dtype: in which type to compute; "float64" needs 64-bit types enabled.
    """
    kernel = build(case, implementation, dtype)
    inputs = {
        name: jnp.asarray(array(value), dtype)
        for name, value in case["inputs"].items()
        if name in ("source", "source_gradient")
    }
    if case["op"] == "conv_transpose_gradient":
        data, state = kernel.encode(inputs["source_gradient"], inputs["source"])
        outputs = {
            "gradient_data": data,
            "gradient_weights": state.gradient_for_weights,
            "gradient_biases": state.gradient_for_biases,
        }
    else:
        shape, fill = case["params"]["destination_shape"], case["params"]["destination_fill"]
        destination = jnp.full(shape, fill, dtype)
        if case["op"] == "pool_gradient":
            out = kernel.encode(inputs["source_gradient"], inputs["source"], destination_gradient=destination)
        else:
            out = kernel.encode(inputs["source"], destination)
        outputs = {"destination": out}
    return {name: None if a is None else np.asarray(a, np.float64) for name, a in outputs.items()}
