"""An exported ICNet with its convolutions in int8, by explicit Q/DQ.

Q/DQ stand at the input of every int8 convolution and at its weights (stored as int8, a scale per output channel), never
at its bias. Max-pooling and resizing stay in int8, on the scale of their input. The inputs of a concatenation share one
scale with its output; the branches of an addition share one scale. The first convolution and the final 1×1 convolutions
stay in floating point, and so does all of the correlation: norms, products, softmax, min–max, sort, and the 1×1
convolution that is a part of its products.

Activations are written for the engine that runs the file:

- ONNX Runtime and OpenVINO, on a CPU: uint8. What is never negative, as behind a ReLU, has zero point 0 and so 255
  levels; Q then cuts off what the ReLU does, and both engines fuse the two into the convolution. The rest has zero
  point 128: OpenVINO takes signed int8 for another grid at some layers. ONNX Runtime runs a convolution in int8 only
  where Q follows, so there is one behind every ReLU of a convolution, whatever reads it; and only where a single DQ
  reads a Q, so residual additions read their other side as it is.
- TensorRT, which takes zero point 0 only: int8. The other side of a residual addition comes from a DQ, so that the
  addition is fused as well.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_opsetid
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from calibration.ranges import Ranges
from export.noise import FLOAT_LAYERS
from export.onnx_file import load_model, tensors, types_and_shapes
from runtime.contract import ExportKind, check_contract
from runtime.errors import ModelError
from runtime.files import check_model_file

PREFIX, SUFFIX = "network.", ".weight"  # of a layer's weights in an export with uint8 inputs
PRECISIONS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
ONE_SCALE = ("MaxPool", "Resize")  # the result is on the scale of the input
# The inputs are on one scale. ONNX Runtime refuses concatenations with Q/DQ in FP16; there Q stands behind them alone,
# and TensorRT moves it through to the inputs.
JOINS = {"fp32": ("Concat", "Add"), "fp16": ("Add",)}
RECTIFIERS = ("Relu", "Sigmoid", "Softmax")  # their results are never negative
KEEPERS = (*ONE_SCALE, "Concat", "Add", "Mul")  # nor are those of these, if no input is
ENGINES = ("onnxruntime", "openvino", "tensorrt")
FP16_OPSET = 19  # the first in which Q and DQ have FP16 scales


@dataclass(frozen=True)
class Layer:
    """A convolution: its name in the checkpoint, its node's, and its multiply-adds per image."""

    name: str
    node: str
    macs: int


class ExportedModel:
    """An exported ICNet that can be quantised.

    Args:
        path: an .onnx file from `icnet export`, with uint8 inputs, in FP32 or FP16.
        engine: one of `ENGINES`; None for "onnxruntime", or "tensorrt" for an FP16 export.

    Attributes:
        precision: "fp32" or "fp16".
        layers: all convolutions, in order; `FLOAT_LAYERS` are among them.

    Raises:
        ModelError: it can't be read, is quantised already, or is not such a file.
    """

    def __init__(self, path: Path, engine: str | None = None) -> None:
        self.path = path
        check_model_file(path)
        self.model = load_model(path)
        graph = self.model.graph
        if any("Quantize" in n.op_type or n.op_type.startswith("QLinear") for n in graph.node):
            raise ModelError(f"{path}: is quantised already; calibrate the export that it was made from")
        kind = check_contract(path, *tensors(self.model)).kind
        if kind is not ExportKind.PLAIN:
            raise ModelError(f"{path}: a {kind} export; calibrate a plain one (without --packed and --banked)")
        weights = {i.name: i for i in graph.initializer}
        _, self._shapes = types_and_shapes(self.model, 1)
        self.layers = _layers(self.model, self._shapes)
        missing = {*FLOAT_LAYERS, "refine_1.merge_conv.0"} - {layer.name for layer in self.layers}
        wrong = [f"no layer {name}" for name in sorted(missing)]
        if any(n.op_type == "Conv" and n.input[1] not in weights for n in graph.node):
            wrong.append("it has a convolution whose kernel is computed")
        if wrong:
            raise ModelError(f"{path}: not a graph that icnet export wrote: {wrong[0]}")
        self._nodes = {n.name: n for n in graph.node}
        self._producers = {o: n for n in graph.node for o in n.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self.precision = PRECISIONS[weights[f"{PREFIX}{FLOAT_LAYERS[0]}{SUFFIX}"].data_type]
        self.engine = engine or ("onnxruntime" if self.precision == "fp32" else "tensorrt")
        if self.precision == "fp16" and self.engine != "tensorrt":
            raise ModelError(f"{path}: in FP16, which is for TensorRT; for {engine} calibrate an FP32 export")
        self._uint8 = self.engine != "tensorrt"
        self._positive = self._never_negative() if self._uint8 else set()

    @property
    def candidates(self) -> tuple[Layer, ...]:
        """The layers that can be int8."""
        return tuple(layer for layer in self.layers if layer.name not in FLOAT_LAYERS)

    def share(self, int8: Collection[str]) -> float:
        """The share of these layers in the multiply-adds of all convolutions."""
        return sum(x.macs for x in self.layers if x.name in int8) / sum(x.macs for x in self.layers)

    def tensors(self, int8: Collection[str] | None = None) -> list[str]:
        """Names of the activations whose ranges are needed if these layers (None: all candidates) are int8."""
        convolutions, others = self._selected(int8)
        return list(dict.fromkeys([*_scaled(convolutions, others), *self._rectified(convolutions)]))

    def _rectified(self, convolutions: Iterable[onnx.NodeProto]) -> list[str]:
        """The outputs of the ReLUs that are the only readers of a convolution, if Q/DQ stand behind all of them."""
        readers = [self._readers[n.output[0]] for n in convolutions] if self._uint8 else []
        return [nodes[0].output[0] for nodes in readers if [n.op_type for n in nodes] == ["Relu"]]

    def _selected(self, int8: Collection[str] | None) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """The convolutions of these layers, and the other nodes before them that have Q/DQ on both sides."""
        wanted = [x for x in self.candidates if int8 is None or x.name in int8]
        convolutions = [self._nodes[layer.node] for layer in wanted]
        others: dict[str, onnx.NodeProto] = {}

        def visit(tensor: str) -> None:
            node = self._producers.get(tensor)
            if node is not None and node.op_type in (*ONE_SCALE, *JOINS[self.precision]):
                others[node.name] = node
                for source in node.input if node.op_type not in ONE_SCALE else ():
                    if self._producers[source].op_type == "Resize":
                        visit(source)

        for convolution in convolutions:
            visit(convolution.input[0])
        return convolutions, list(others.values())

    def quantised(self, ranges: Ranges, int8: Collection[str] | None = None) -> onnx.ModelProto:
        """A copy with these layers (None: all candidates) in int8.

        Args:
            ranges: the limit of every tensor in `tensors(int8)`.
            int8: names of layers.
        """
        convolutions, others = self._selected(int8)
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        if not convolutions:
            return model
        limits = {name: ranges[name] for name in _scaled(convolutions, others)}
        positive = self._positive & {*limits}
        for node in others:
            if node.op_type not in ONE_SCALE:
                self._tie(limits, positive, node)
        selected = {n.name for n in (*convolutions, *others)}
        for node in model.graph.node:
            if node.name in selected and node.op_type == "Resize":
                self._resize_by_factor(model, node)
        _drop_unread(model)
        ends = {name: ranges[name] for name in self._rectified(convolutions) if name not in limits}
        quantizer = self._quantizer(model, limits | ends, selected, positive | {*ends})
        for name in ends:
            quantizer.quantize_activation_tensor(name)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantised: onnx.ModelProto = quantizer.model.model
        keep = selected
        if not self._uint8:
            keep |= {n.name for n in quantised.graph.node if n.op_type == "Add"}
        _restore_floats(quantised, keep, ends)
        _strip(quantised, self.model)
        return quantised

    def _quantizer(
        self, model: onnx.ModelProto, limits: Ranges, nodes: Collection[str], positive: Collection[str]
    ) -> QDQQuantizer:
        dtype: type[np.floating] = np.float32
        if self.precision == "fp16":
            dtype = np.float16
            del model.opset_import[:]
            model.opset_import.append(make_opsetid("", FP16_OPSET))
        lowest = 128 / 127 if self._uint8 else 1  # so the zero point is 128, and the numbers are those of int8
        data = {
            name: TensorData(lowest=dtype(0 if name in positive else -limit * lowest), highest=dtype(limit))
            for name, limit in limits.items()
        }
        return QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if self._uint8 else QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, data),
            nodes_to_quantize=sorted(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=["Conv", *ONE_SCALE, *JOINS[self.precision]],
            extra_options={
                "ActivationSymmetric": not self._uint8,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "ForceQuantizeNoInputCheck": True,
                "OpTypesToExcludeOutputQuantization": ["Conv", "Add"],
            },
        )

    def _resize_by_factor(self, model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        """Give a resize a factor instead of the size that it computes from its input's shape.

        The result is the same, but ONNX Runtime does not fuse where a shape is read.
        """
        before, after = (self._shapes[name][-1] for name in (node.input[0], node.output[0]))
        scales = np.array([1, 1, after / before, after / before], np.float32)
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{node.name}_scales"))
        node.input[:] = [node.input[0], "", f"{node.name}_scales"]

    def _never_negative(self) -> set[str]:
        """Names of the tensors that are 0 or more, whatever the images."""
        found: set[str] = set()
        for node in self.model.graph.node:  # in the order of computation
            data = node.input[:1] if node.op_type in ONE_SCALE else node.input
            if node.op_type in RECTIFIERS or (node.op_type in KEEPERS and {*data} <= found):
                found.update(node.output)
        return found

    def _tie(self, limits: Ranges, positive: set[str], node: onnx.NodeProto) -> None:
        """Give the inputs of a concatenation or addition one limit and one zero point, also before a resize."""
        sources = [self._producers[name] for name in node.input]
        tied = [n.input[0] if n.op_type == "Resize" else n.output[0] for n in sources]
        if node.op_type == "Concat":
            tied += node.output
        limit = max(limits[name] for name in tied)
        limits.update(dict.fromkeys(tied, limit))
        if not {*tied} <= positive:
            positive.difference_update(tied)


def int8_share(model: onnx.ModelProto) -> float:
    """The share of multiply-adds in convolutions whose inputs and weights both come from a DQ."""
    dequantised = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    int8 = {n.name for n in model.graph.node if n.op_type == "Conv" and {*n.input[:2]} <= dequantised}
    layers = _layers(model, types_and_shapes(model, 1)[1])
    return sum(layer.macs for layer in layers if layer.node in int8) / sum(layer.macs for layer in layers)


def _scaled(convolutions: Iterable[onnx.NodeProto], others: Iterable[onnx.NodeProto]) -> list[str]:
    """The tensors with a scale of their own: not the outputs of pooling and resizing, which keep the input's scale."""
    names = [n.input[0] for n in convolutions]
    inherited = set()
    for node in others:
        names += node.input[:1] if node.op_type in ONE_SCALE else node.input
        if node.op_type in ONE_SCALE:
            inherited.add(node.output[0])
    return [name for name in dict.fromkeys(names) if name not in inherited]


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove the nodes whose results are not read."""
    while True:
        read = {name for n in model.graph.node for name in n.input} | {v.name for v in model.graph.output}
        unread = [n for n in model.graph.node if not read & {*n.output}]
        if not unread:
            return
        for node in unread:
            model.graph.node.remove(node)


def _restore_floats(model: onnx.ModelProto, keep: Collection[str], ends: Collection[str]) -> None:
    """Let every node outside `keep` read tensors as they are, without Q/DQ, but those of `ends`."""
    sources = {n.output[0]: n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    raw = {
        name: sources[n.input[0]].input[0]
        for name, n in sources.items()
        if n.op_type == "DequantizeLinear" and n.input[0] in sources and sources[n.input[0]].input[0] not in ends
    }
    for node in model.graph.node:
        if node.name not in keep and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            for i, name in enumerate(node.input):
                node.input[i] = raw.get(name, name)


def _strip(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Remove what only tracing and the quantiser need; it is a tenth of a narrow network's file."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")


def _layers(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> tuple[Layer, ...]:
    """The convolutions, given the shapes of a group of one."""
    weights = {i.name: i.dims for i in model.graph.initializer}
    quantised = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    layers = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = quantised.get(node.input[1], node.input[1])
            name = weight.removesuffix("_quantized").removesuffix(SUFFIX).removeprefix(PREFIX)
            layers.append(Layer(name, node.name, prod(shapes[node.output[0]]) * prod(weights[weight][1:])))
    return tuple(layers)
