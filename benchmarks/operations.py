"""Operations and bytes of every node of an exported model, counted from the file and its shapes, for any group size."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from runtime import ModelError

VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"}  # no data is moved
MOVERS = {
    "Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "Pad", "Range", "Slice", "Split", "Tile",
    "Transpose", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
PICKERS = {"Gather", "GatherElements"}  # they read of their first input as much as they write
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
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
    graph, types, shapes = _shapes(path, n)
    nodes = []
    for node in graph.node:
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
        return prod(shapes[name]) * onnx.helper.tensor_dtype_to_np_dtype(types[name]).itemsize

    outputs = sum(size(name) for name in node.output if name)
    inputs = [size(name) for name in node.input if name]
    if node.op_type in PICKERS:
        inputs[0] = outputs
    return sum(inputs) + outputs


def _module(node: NodeProto) -> str:
    """The innermost module that torch's exporter notes, without the name of the network itself."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith("network.")]
    except (ValueError, SyntaxError):
        return ""
    return modules[-1].removeprefix("network.") if modules else ""


def _shapes(path: Path, n: int) -> tuple[onnx.GraphProto, dict[str, int], dict[str, Shape]]:
    """The graph, and the type and shape of every tensor that has one."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common base
        raise ModelError(f"{path}: not an ONNX file") from error
    graph = model.graph
    axes = {i.type.tensor_type.shape.dim[0].dim_param for i in graph.input} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                found = _evaluate(dimension.dim_param, dict.fromkeys(axes, n))
                if found is None:
                    dimension.Clear()
                else:
                    dimension.dim_value = found
    constants = {tensor.name: tensor for tensor in graph.initializer}
    graph = onnx.shape_inference.infer_shapes(_without_data(model), data_prop=True).graph
    types: dict[str, int] = {name: tensor.data_type for name, tensor in constants.items()}
    shapes: dict[str, Shape] = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    for node in graph.node:  # a flattened tensor has as many elements as before
        source, target = node.input[0] if node.input else "", node.output[0]
        if node.op_type == "Reshape" and target not in shapes and source in shapes:
            rank = shapes.get(node.input[1])
            if rank == (1,):
                shapes[target] = (prod(shapes[source]),)
    return graph, types, shapes


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """Large weights are of no use to shape inference, which would copy them."""
    for tensor in model.graph.initializer:
        if prod(tensor.dims) > 1024 and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8):
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
            model.graph.input.append(value)
    kept = [t for t in model.graph.initializer if t.name not in {i.name for i in model.graph.input}]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a dimension such as "98*N"; None if it names anything else, or is written in another way."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return sizes[name]
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
                return OPERATORS[type(sign)](value(left), value(right))
        raise ValueError(expression)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError):
        return None
