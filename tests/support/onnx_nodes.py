"""Nodes of ONNX as calls of this library, and the cases that ONNX ships for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_mps import conventions

Arrays = list[Any]


class Case(NamedTuple):
    """A node with what it reads and what it gives."""

    name: str
    kind: str
    attributes: dict[str, Any]
    inputs: Arrays
    """None where an input is left out."""
    outputs: Arrays

    def __str__(self) -> str:
        return self.name


# --- the cases ----------------------------------------------------------------------------------------

MODULES = (
    "averagepool",
    "conv",
    "convtranspose",
    "globalaveragepool",
    "globalmaxpool",
    "lppool",
    "maxpool",
    "maxunpool",
)


def cases() -> list[Case]:
    """Cases of ONNX's own, and of models that PyTorch wrote; all of them have one node."""
    from onnx.backend.test.case import node

    for name in MODULES:  # a module adds its cases when it is imported
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    found = [
        _case(test.name, test.model, *data)
        for test in node._NodeTestCases
        for data in test.data_sets
        if test.model.graph.node[0].op_type in KINDS
    ]
    return sorted([*found, *_converted()], key=str)


def _converted() -> Iterator[Case]:
    import onnx
    from onnx.backend.test.loader import load_model_tests

    for kind in ("pytorch-converted", "pytorch-operator"):
        for test in load_model_tests(kind=kind):
            folder = Path(str(test.model_dir))
            model = onnx.load(folder / "model.onnx")
            if [node.op_type for node in model.graph.node] in [[kind] for kind in KINDS]:
                arrays = [
                    [_read(path) for path in sorted(folder.glob(f"test_data_set_0/{side}put_*.pb"))]
                    for side in ("in", "out")
                ]
                yield _case(test.name, model, *arrays)


def _read(path: Path) -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _case(name: str, model: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Case:
    import onnx

    graph = model.graph
    (node,) = graph.node
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    given = [value.name for value in graph.input if value.name not in known]
    known |= dict(zip(given, inputs, strict=False))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Case(name, node.op_type, attributes, [known.get(i) for i in node.input], list(outputs))


# --- the calls ----------------------------------------------------------------------------------------


def run(case: Case, functions: Any) -> Arrays:
    """What functions of channels first make of a node: ours, or those of `stock_calls`."""
    return KINDS[case.kind](functions, case.attributes, len(case.outputs), *case.inputs)


def expected(case: Case) -> Arrays:
    """The outputs, but with indices of maxima as positions in their plane."""
    y, *indices = case.outputs
    order = case.attributes.get("storage_order", 0)
    shape = np.shape(case.inputs[0])
    positions = (conventions.indices_from_onnx(at, shape, storage_order=order) for at in indices)
    return [y, *map(np.asarray, positions)]


def _strides_and_padding(a: dict[str, Any], rank: int) -> dict[str, Any]:
    strides = tuple(a.get("strides", (1,) * rank))
    auto = a.get("auto_pad", b"NOTSET").decode()
    if auto != "NOTSET":
        return {"strides": strides, "padding": auto.replace("SAME_UPPER", "SAME")}
    pads = a.get("pads", (0,) * (2 * rank))
    return {"strides": strides, "padding": tuple(zip(pads[:rank], pads[rank:], strict=True))}


def _windows(a: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    window = tuple(a["kernel_shape"])
    call = _strides_and_padding(a, len(window)) | {"ceil_mode": bool(a.get("ceil_mode", 0))}
    return window, call | {"window_dilation": tuple(a.get("dilations", (1,) * len(window)))}


def _average(functions: Any, a: dict[str, Any], outputs: int, x: Any) -> Arrays:
    window, call = _windows(a)
    return [functions.avg_pool(x, window, **call, count_include_pad=bool(a.get("count_include_pad", 0)))]


def _maximum(functions: Any, a: dict[str, Any], outputs: int, x: Any) -> Arrays:
    window, call = _windows(a)
    found = functions.max_pool(x, window, **call, **{"return_indices": True} if outputs == 2 else {})
    return list(found) if outputs == 2 else [found]


def _norm(functions: Any, a: dict[str, Any], outputs: int, x: Any) -> Arrays:
    window, call = _windows(a)
    return [functions.lp_pool(x, window, p=a.get("p", 2), **call)]


def _global_average(functions: Any, a: dict[str, Any], outputs: int, x: Any) -> Arrays:
    return _average(functions, {"kernel_shape": x.shape[2:]}, outputs, x)


def _global_maximum(functions: Any, a: dict[str, Any], outputs: int, x: Any) -> Arrays:
    return _maximum(functions, {"kernel_shape": x.shape[2:]}, outputs, x)


def _unpooling(functions: Any, a: dict[str, Any], outputs: int, x: Any, at: Any, shape: Any = None) -> Arrays:
    window, call = _windows(a)
    axes = zip(x.shape[2:], window, call["strides"], call["padding"], strict=True)
    pooled = tuple((n - 1) * s + k - low - high for n, k, s, (low, high) in axes)
    sizes = pooled if shape is None else tuple(int(n) for n in shape[2:])
    positions = conventions.indices_from_onnx(at, (*x.shape[:2], *pooled))
    return [functions.max_unpool(x, positions, sizes, indices_shape=pooled)]


def _convolution(a: dict[str, Any], kernel: Any) -> dict[str, Any]:
    rank = kernel.ndim - 2
    dilation = tuple(a.get("dilations", (1,) * rank))
    return _strides_and_padding(a, rank) | {"kernel_dilation": dilation, "groups": a.get("group", 1)}


def _conv(functions: Any, a: dict[str, Any], outputs: int, x: Any, weight: Any, bias: Any = None) -> Arrays:
    kernel = jnp.moveaxis(weight, (0, 1), (-1, -2))
    return [functions.conv(x, kernel, bias, **_convolution(a, kernel))]


def _conv_transpose(
    functions: Any, a: dict[str, Any], outputs: int, x: Any, weight: Any, bias: Any = None
) -> Arrays:
    kernel = conventions.kernel_from_torch(weight, a.get("group", 1))
    call = _convolution(a, kernel)
    rank = kernel.ndim - 2
    call["output_padding"] = tuple(a.get("output_padding", (0,) * rank))
    if "output_shape" in a:
        call["padding"] = _padding_for(a["output_shape"], x.shape[2:], kernel.shape[:rank], a, call)
    return [functions.conv_transpose(x, kernel, bias, **call)]


def _padding_for(
    shape: Sequence[int], sizes: Sequence[int], window: Sequence[int], a: dict[str, Any], call: dict[str, Any]
) -> tuple[tuple[int, int], ...]:
    """What ONNX cuts off, so that the result has a shape."""
    names = ("strides", "output_padding", "kernel_dilation")
    axes = zip(shape, sizes, window, *(call[name] for name in names), strict=True)
    pairs = []
    for wanted, n, k, s, more, d in axes:
        total = s * (n - 1) + more + (k - 1) * d + 1 - wanted
        half = total // 2
        pairs.append((half, total - half) if a.get("auto_pad") == b"SAME_UPPER" else (total - half, half))
    return tuple(pairs)


KINDS: dict[str, Callable[..., Arrays]] = {
    "AveragePool": _average,
    "MaxPool": _maximum,
    "LpPool": _norm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_maximum,
    "MaxUnpool": _unpooling,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
}
