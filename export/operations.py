"""Operations and bytes of every node of an exported model, counted from the file and its shapes, for any group size."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from runtime import ModelError

VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"}  # no data is moved
MOVERS = {
    "Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "Pad", "Range", "Slice", "Split", "Tile",
    "Transpose", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
PICKERS = {"Gather", "GatherElements"}  # they read of their first input as much as they write
# What shapes are computed with; of integers only.
SHAPE_OPERATORS = {
    "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
}  # fmt: skip
MODULE, WEIGHT = re.compile(r"(?:^|\.)network\.(.+)"), re.compile(r"(?:^|\.)network\.(.+)\.weight")
SMALL = 1024  # elements; what is larger is no shape
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """What one node does.

    Attributes:
        name: the node's.
        op: its operator.
        module: where in the network it comes from, e.g. "Co4.cosal_feat.conv"; "" if the file does not say.
        flop: of convolutions and matrix products, a multiply-add counting 2, as torch's FLOP counter has it.
        other: operations of other nodes: one per element of the largest tensor; none where data is only moved.
        bytes: all inputs read and all outputs written once; none for views.
    """

    name: str
    op: str
    module: str
    flop: int
    other: int
    bytes: int

    @property
    def level(self) -> str:
        """The part of the network, e.g. "Co4" or "refine_1"; "rest" for what is outside all of them."""
        return self.module.partition(".")[0] or "rest"


def count(path: Path, n: int) -> list[Node]:
    """The nodes of an exported model, in the file's order, for a group of n.

    Raises:
        ModelError: not an ONNX file, or one with a shape that does not follow from the group's size.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common base
        raise ModelError(f"{path}: not an ONNX file") from error
    types, shapes = types_and_shapes(model, n)
    nodes = []
    for node in model.graph.node:
        unknown = [name for name in (*node.input, *node.output) if name and name not in shapes]
        if unknown:
            raise ModelError(
                f"{path}: the shape of {unknown[0]} ({node.op_type}) does not follow from the group's size"
            )
        inputs = [shapes[name] for name in node.input if name]
        outputs = [shapes[name] for name in node.output if name]
        flop = _flop(node, inputs, outputs)
        moves = node.op_type in VIEWS | MOVERS
        other = 0 if flop or moves else max(map(prod, inputs + outputs))
        nodes.append(Node(node.name, node.op_type, _module(node), flop, other, _bytes(node, shapes, types)))
    return nodes


def total_flop(path: Path, n: int) -> int:
    """FLOP of all convolutions and matrix products for a group of n; raises what `count` does."""
    return sum(node.flop for node in count(path, n))


def _flop(node: NodeProto, inputs: list[Shape], outputs: list[Shape]) -> int:
    if node.op_type == "Conv":
        return 2 * prod(outputs[0]) * prod(inputs[1][1:])  # [K, C / groups, height, width] of the kernel
    if node.op_type == "MatMul":
        return 2 * prod(outputs[0]) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * prod(outputs[0]) * inputs[0][0 if transposed else 1]
    return 0


def _bytes(node: NodeProto, shapes: Mapping[str, Shape], types: Mapping[str, int]) -> int:
    if node.op_type in VIEWS:
        return 0

    def size(name: str) -> int:
        return prod(shapes[name]) * helper.tensor_dtype_to_np_dtype(types[name]).itemsize

    outputs = sum(size(name) for name in node.output if name)
    inputs = [size(name) for name in node.input if name]
    if node.op_type in PICKERS:
        inputs[0] = outputs
    return sum(inputs) + outputs


def _module(node: NodeProto) -> str:
    """The innermost module that torch's exporter notes, or whose weights it reads, without the network's own name."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        found = [MODULE.search(scope) for scope in reversed(ast.literal_eval(scopes)[:-1])]
    except (ValueError, SyntaxError):
        found = []
    found += [WEIGHT.search(name) for name in node.input]
    return next((match[1] for match in found if match), "")


def types_and_shapes(model: onnx.ModelProto, n: int) -> tuple[dict[str, int], dict[str, Shape]]:
    """The type and shape of every tensor that has one when all dynamic axes of the model's inputs are n.

    Shapes that a graph computes (Shape, Gather, Concat, … into Reshape) are computed here, and inferred from again.
    """
    original, model = model, onnx.ModelProto()
    model.CopyFrom(original)
    graph = model.graph
    del graph.value_info[:]
    for dimension in (d for value in graph.input for d in value.type.tensor_type.shape.dim):
        if not dimension.HasField("dim_value"):
            dimension.dim_value = n
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if prod(t.dims) <= SMALL}
    _drop_data(graph)
    while True:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            tensor = value.type.tensor_type
            types[value.name] = tensor.elem_type
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
        computed = _computed(graph, shapes, constants)
        if not computed:
            return types, shapes
        nodes = [node for node in graph.node if node.output[0] not in computed]
        del graph.node[:]
        graph.node.extend(nodes)
        for name, array in computed.items():
            graph.initializer.append(numpy_helper.from_array(array, name))
            types[name], shapes[name] = graph.initializer[-1].data_type, array.shape


def _computed(
    graph: onnx.GraphProto, shapes: Mapping[str, Shape], constants: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """What nodes that compute shapes, and others like them, give; it is added to the constants."""
    found: dict[str, NDArray[Any]] = {}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {str(attribute.name): attribute.i for attribute in node.attribute}
            array: NDArray[Any] = np.array(shapes[node.input[0]], np.int64)[ends.get("start", 0) : ends.get("end")]
        elif node.op_type in SHAPE_OPERATORS and all(name in constants for name in node.input if name):
            feeds = {str(name): constants[name] for name in node.input if name}
            results: Any = ReferenceEvaluator(node).run(None, feeds)
            array = np.asarray(results[0])
        else:
            continue
        if array.size <= SMALL and array.dtype.kind == "i":
            found[node.output[0]] = constants[node.output[0]] = array
    return found


def _drop_data(graph: onnx.GraphProto) -> None:
    """Make inputs of the large weights, which are of no use to shape inference; it would copy them."""
    kept = [tensor for tensor in graph.initializer if prod(tensor.dims) <= SMALL]
    for tensor in graph.initializer:
        if prod(tensor.dims) > SMALL:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims)))
    del graph.initializer[:]
    graph.initializer.extend(kept)
