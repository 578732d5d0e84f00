"""ONNX files, read and written: bytes, tensors, metadata, shapes, operations of every node, sessions of ONNX Runtime.

The packages `onnx` and `onnxruntime` are imported when they are needed: TensorRT builds engines without them.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import FILE_DIGEST, ExportKind, TensorSpec
from runtime.errors import DependencyError, ModelError, how_to_install, one_line
from runtime.files import UNSEALED, check_seal, seal, write_bytes

if TYPE_CHECKING:
    import onnx
    import onnxruntime

TAKES = {  # what exports take, for messages
    ExportKind.PLAIN: "groups of any size",
    ExportKind.FLOAT32: "groups of any size",
    ExportKind.PACKED: "any number of groups",
    ExportKind.RAGGED: "any number of groups, for Triton",
    ExportKind.INTRA: "images to SIVs",
    ExportKind.BANKED: "any bank",
    ExportKind.DETECTOR: "single images",
}
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"}  # they move no data
MOVERS = {
    "Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "Pad", "Range", "Slice", "Split", "Tile",
    "Transpose", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
PICKERS = {"Gather", "GatherElements"}  # they read as much of their first input as they write
# They compute shapes, if their inputs are integers.
SHAPE_OPERATORS = {
    "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
}  # fmt: skip
MODULE, WEIGHT = re.compile(r"(?:^|\.)network\.(.+)"), re.compile(r"(?:^|\.)network\.(.+)\.weight")
PACKED = ".fp16"  # end of the names of weights from `pack_weights`
SMALL = 1024  # elements; a larger tensor is no shape
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """The operations and bytes of one node.

    Attributes:
        name: the node's name.
        op: its operator.
        module: the network's module that it comes from, e.g. "Co4.cosal_feat.conv"; "" if the file does not say.
        flop: FLOP of a convolution or matrix product, a multiply-add counting 2, as in torch's FLOP counter.
        other: operations of any other node, one per element of its largest tensor; 0 if it only moves data.
        bytes: all inputs read once and all outputs written once; 0 for a view.
    """

    name: str
    op: str
    module: str
    flop: int
    other: int
    bytes: int

    @property
    def level(self) -> str:
        """The part of the network, e.g. "Co4" or "refine_1"; "rest" for a node outside all of them."""
        return self.module.partition(".")[0] or "rest"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, checked against the digest in them, if there is one.

    Raises:
        ModelError: it can't be read, or is damaged.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ModelError(f"{path}: not a model file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    check_seal(path, data)
    return data


def load_model(path: Path, data: bytes | None = None, weights: bool = True) -> "onnx.ModelProto":
    """The model of an ONNX file, without the file's digest.

    Args:
        path: the file.
        data: its bytes, from `read_bytes`, if they are read already.
        weights: whether to read weights that are in files of their own.

    Raises:
        ModelError: the file can't be read, is damaged, or is not an ONNX model.
        DependencyError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise DependencyError(f"onnx is not installed: {how_to_install('export')}") from error
    data = read_bytes(path) if data is None else data
    try:
        model = onnx.load_model_from_string(data)
        if weights:
            onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # protobuf's errors have no common base
        raise ModelError(f"{path}: not an ONNX model: {one_line(error)}") from error
    notes = metadata(model)
    if notes.pop(FILE_DIGEST, None) is not None:  # it is the file's, not that of a model which is made from this one
        onnx.helper.set_model_props(model, notes)
    unpack_weights(model)
    return model


def pack_weights(model: "onnx.ModelProto") -> None:
    """Store in FP16 the large FP32 weights that it holds exactly, with a Cast behind each, in place."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and prod(tensor.dims) > SMALL:
            array = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if (half.astype(np.float32) == array).all():
                name = str(tensor.name)
                tensor.CopyFrom(numpy_helper.from_array(half, name + PACKED))
                casts.append(
                    helper.make_node("Cast", [name + PACKED], [name], name=f"{name}.cast", to=TensorProto.FLOAT)
                )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def unpack_weights(model: "onnx.ModelProto") -> None:
    """Undo `pack_weights`: weights are in FP32 again, and the casts gone."""
    from onnx import numpy_helper

    packed = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(PACKED)}
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in packed]
    for node in casts:
        tensor = packed[node.input[0]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        model.graph.node.remove(node)


def save_model(model: "onnx.ModelProto", path: Path) -> None:
    """Write a model as one ONNX file, weights inside, with the file's digest in its `metadata_props`."""
    import onnx

    onnx.helper.set_model_props(model, metadata(model) | {FILE_DIGEST: UNSEALED})
    write_bytes(path, model.SerializeToString())
    onnx.helper.set_model_props(model, metadata(model) | {FILE_DIGEST: seal(path)})


def tensors(model: "onnx.ModelProto") -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and the outputs of a model."""
    from onnx.helper import tensor_dtype_to_np_dtype

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dims = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        return TensorSpec(value.name, str(tensor_dtype_to_np_dtype(tensor.elem_type)), tuple(dims))

    return [spec(v) for v in model.graph.input], [spec(v) for v in model.graph.output]


def metadata(model: "onnx.ModelProto") -> dict[str, str]:
    """The notes in a model's `metadata_props`."""
    return {p.key: p.value for p in model.metadata_props}


def cpu_session(
    path: object, model: bytes = b"", threads: int | None = None, optimised: bool = True, profile: Path | None = None
) -> "onnxruntime.InferenceSession":
    """A session of ONNX Runtime on the CPU.

    Args:
        path: the model's file; a name for messages if `model` is given.
        model: the model itself; empty to read the file.
        threads: CPU threads; None for one per core.
        optimised: whether ONNX Runtime may rewrite the graph.
        profile: where profiles of the kernels go: the start of their files' names. None for no profile.

    Raises:
        ModelError: ONNX Runtime can't load the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as in runtime.backends.onnx_session
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise ModelError(f"{path}: ONNX Runtime can't load it: {one_line(error)}") from error


def count(path: Path, n: int) -> list[Node]:
    """The nodes of an exported model, in the file's order, with the operations and bytes that a group of n takes.

    Raises:
        ModelError: not an ONNX model, or one with a shape that does not follow from the group's size.
    """
    model = load_model(path)
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


def _flop(node: "onnx.NodeProto", inputs: list[Shape], outputs: list[Shape]) -> int:
    if node.op_type == "Conv":
        return 2 * prod(outputs[0]) * prod(inputs[1][1:])  # [K, C / groups, height, width] of the kernel
    if node.op_type == "MatMul":
        return 2 * prod(outputs[0]) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * prod(outputs[0]) * inputs[0][0 if transposed else 1]
    return 0


def _bytes(node: "onnx.NodeProto", shapes: Mapping[str, Shape], types: Mapping[str, int]) -> int:
    from onnx.helper import tensor_dtype_to_np_dtype

    if node.op_type in VIEWS:
        return 0

    def size(name: str) -> int:
        return prod(shapes[name]) * tensor_dtype_to_np_dtype(types[name]).itemsize

    outputs = sum(size(name) for name in node.output if name)
    inputs = [size(name) for name in node.input if name]
    if node.op_type in PICKERS:
        inputs[0] = outputs
    return sum(inputs) + outputs


def _module(node: "onnx.NodeProto") -> str:
    """The innermost module that torch's exporter notes for a node, or whose weights it reads; without "network."."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        found = [MODULE.search(scope) for scope in reversed(ast.literal_eval(scopes)[:-1])]
    except (ValueError, SyntaxError):
        found = []
    found += [WEIGHT.search(name) for name in node.input]
    return next((match[1] for match in found if match), "")


def types_and_shapes(model: "onnx.ModelProto", n: int) -> tuple[dict[str, int], dict[str, Shape]]:
    """The ONNX type of every tensor, and its shape where known, with all dynamic axes of the inputs set to n.

    Shapes that the graph computes (Shape, Gather, Concat, … into Reshape) are computed here; then shapes are inferred
    again.
    """
    import onnx
    from onnx import numpy_helper

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
    graph: "onnx.GraphProto", shapes: Mapping[str, Shape], constants: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The results of nodes that compute shapes; they are added to the constants."""
    from onnx.reference import ReferenceEvaluator

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


def _drop_data(graph: "onnx.GraphProto") -> None:
    """Turn the large weights into inputs: shape inference would copy them and needs only their shapes."""
    from onnx import helper

    kept = [tensor for tensor in graph.initializer if prod(tensor.dims) <= SMALL]
    for tensor in graph.initializer:
        if prod(tensor.dims) > SMALL:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims)))
    del graph.initializer[:]
    graph.initializer.extend(kept)
