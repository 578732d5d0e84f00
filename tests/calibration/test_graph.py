"""What is in an INT8 graph, and which models can be calibrated."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from calibration.graph import ExportedModel, int8_share
from export.icnet import ICNet
from export.noise import FLOAT_LAYERS
from export.onnx_file import save_model
from export.samples import smooth_group
from export.to_onnx import write_onnx
from runtime import ModelError, Predictor
from runtime.contract import ExportKind
from tests.helpers import build_with_tensorrt, random_network


def nodes_by_output(model):
    return {o: n for n in model.graph.node for o in n.output}


def attribute(node, name):
    return next(a.i for a in node.attribute if a.name == name)


def scale_of(model, tensor):
    """The scale of the Q/DQ pair through which a node reads `tensor`."""
    node = nodes_by_output(model)[tensor]
    assert node.op_type == "DequantizeLinear", tensor
    return next(float(numpy_helper.to_array(i)) for i in model.graph.initializer if i.name == node.input[1])


def test_every_convolution_but_three_is_int8_and_nothing_else_is_quantised(calibrated):
    model, ranges = calibrated
    quantised = model.quantised(ranges)
    onnx.checker.check_model(quantised, full_check=True)
    producers = nodes_by_output(quantised)
    weights = {i.name: i for i in quantised.graph.initializer}
    float_weights, zeros = set(), set()
    for node in quantised.graph.node:
        if node.op_type != "Conv":
            continue
        activation, weight = (producers.get(name) for name in node.input[:2])
        if weight is None:
            name = node.input[1].removeprefix("network.").removesuffix(".weight")
            float_weights.add(name)
            # Q stands behind the ReLU before the last layer, or ONNX Runtime would compute the convolution before it, a
            # 20th of all operations, in FP32. It moves maps by 8e-5 on average, all of INT8 by 3.5e-3.
            assert (activation.op_type == "DequantizeLinear") == (name == "refine_1.pred.pred.0")
            if activation.op_type == "DequantizeLinear":
                assert producers[producers[activation.input[0]].input[0]].op_type == "Relu"
            else:
                assert activation.op_type != "QuantizeLinear"
            continue
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        kernel = weights[weight.input[0]]
        assert kernel.data_type == onnx.TensorProto.INT8
        assert attribute(weight, "axis") == 0
        assert list(weights[weight.input[1]].dims) == [kernel.dims[0]]  # a scale per output channel
        assert not numpy_helper.to_array(weights[weight.input[2]]).any()
        zero = numpy_helper.to_array(weights[activation.input[2]])
        assert zero.dtype == np.uint8
        zeros.add(int(zero))
        assert len(node.input) < 3 or weights[node.input[2]].data_type == onnx.TensorProto.FLOAT
    assert float_weights == {*FLOAT_LAYERS}
    assert zeros == {0, 128}
    dequantised = {o for n in quantised.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    through = {n.op_type for n in quantised.graph.node if dequantised & {*n.input}}
    assert through == {"Conv", "MaxPool", "Resize", "Concat", "Add"}
    assert int8_share(quantised) == pytest.approx(model.share([layer.name for layer in model.candidates]))
    assert int8_share(quantised) > 0.9


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {"MaxPool": 5, "Resize": 5, "Concat": 3, "Add": 2}),
        ("fp16", {"MaxPool": 5, "Resize": 2, "Add": 2, "residual": 8}),
    ],
)
def test_what_is_pooled_resized_joined_or_added_is_on_one_scale(precision, expected, request):
    model, ranges = request.getfixturevalue("calibrated" if precision == "fp32" else "calibrated_fp16")
    quantised = model.quantised(ranges)
    readers = {i: n for n in quantised.graph.node for i in n.input}
    producers = nodes_by_output(quantised)
    originals = {n.name: n for n in model.model.graph.node}
    seen = Counter()
    for node in quantised.graph.node:
        dequantised = [i for i in node.input if i in producers and producers[i].op_type == "DequantizeLinear"]
        if node.op_type in ("MaxPool", "Resize", "Concat") and dequantised:
            after = readers[readers[node.output[0]].output[0]].output[0]
            inputs = node.input if node.op_type == "Concat" else node.input[:1]
            assert {scale_of(quantised, i) for i in inputs} == {scale_of(quantised, after)}
            if node.op_type == "Concat":  # of the largest: nothing that is joined is cut off
                joined = originals[node.name].output[0]
                levels = 255 if joined in model._positive else 127
                assert levels * scale_of(quantised, after) >= 0.999 * ranges[joined]
            seen[node.op_type] += 1
        if node.op_type == "Add" and dequantised:
            assert len({scale_of(quantised, i) for i in dequantised}) == 1
            others = [producers[i].op_type for i in node.input if i not in dequantised]
            assert others in ([], ["Conv"])  # a block's convolution is fused with the addition
            seen["residual" if others else "Add"] += 1
    assert seen == expected


def test_onnx_runtime_computes_nearly_all_of_it_in_int8(calibrated, tmp_path):
    model, ranges = calibrated
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    file = model.quantised(ranges).SerializeToString()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    kernels = {n.name.partition("_token_")[0] for n in optimised.graph.node if n.op_type == "QLinearConv"}
    assert sum(x.macs for x in model.layers if x.node in kernels) > 0.85 * sum(x.macs for x in model.layers)


def test_layers_that_stay_in_floating_point_read_tensors_as_they_are(calibrated):
    """But the ReLU of an int8 convolution through Q/DQ: without Q, ONNX Runtime computes that convolution in FP32 too.

    A layer's cost in `--max-drop` is measured like this. In OpenVINO, which does without that Q, it moved the mean |Δ|
    to FP32's maps by at most 8e-5, of 3e-3 to 5e-3 (four choices of layers; the checkpoint for photographs).
    """
    model, ranges = calibrated
    names = [layer.name for layer in model.candidates]
    for kept in (["refine_1.cmprs"], ["vgg.vgg.5"], ["refine_2.merge_conv.0"], names[:-1], names):
        int8 = [name for name in names if name not in kept]
        quantised = model.quantised(ranges, int8)
        onnx.checker.check_model(quantised, full_check=True)
        producers = nodes_by_output(quantised)
        convolutions = [n for n in quantised.graph.node if n.op_type == "Conv"]
        dequantised = [n for n in convolutions if producers[n.input[0]].op_type == "DequantizeLinear"]
        found = [n for n in dequantised if n.input[1] in producers]
        assert len(found) == len(int8)
        for node in dequantised:  # the others read what is one kernel with an int8 convolution and its ReLU
            if node not in found:
                relu = producers[producers[producers[node.input[0]].input[0]].input[0]]
                assert relu.op_type == "Relu"
                assert producers[relu.input[0]] in found
        assert int8_share(quantised) == pytest.approx(model.share(int8))
    assert "QuantizeLinear" not in {n.op_type for n in quantised.graph.node}


def test_operations_are_counted_per_image(calibrated):
    """Outputs × kernel; both polarities in a co-saliency module."""
    model, _ = calibrated
    macs = {layer.name: layer.macs for layer in model.layers}
    assert macs["vgg.vgg.2"] == 4 * 4 * 9 * 224**2
    assert macs["Co4.cosal_feat.conv.1.conv.0"] == 2 * 8 * 8 * 9 * 28**2
    assert macs["Co4.conv.0"] == 8 * 16 * 28**2  # joins the polarities
    assert macs["refine_1.cmprs"] == 4 * 2 * 224**2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_parses_and_builds_it(precision, request, groups, tmp_path, icnet):
    export = request.getfixturevalue("narrow" if precision == "fp32" else "narrow_fp16")
    arguments = ("--onnx", export, "--groups", groups, "--method", "minmax", "--rest", precision)
    code, _, _ = icnet("calibrate", *arguments, "--engine", "tensorrt", "--output", tmp_path / "int8.onnx")
    assert code == 0
    size, errors = build_with_tensorrt(tmp_path / "int8.onnx", profile=(1, 2, 4))
    assert errors == []
    assert size > 0
    group = smooth_group(2, 1)
    with Predictor(export) as float_, Predictor(tmp_path / "int8.onnx") as int8:
        maps = [p.predict_tensors(group.images, group.sisms) for p in (float_, int8)]
    assert 0 < np.abs(maps[0] - maps[1]).mean() < 0.05


def test_the_file_is_at_most_30_per_cent(tmp_path):
    torch.manual_seed(0)
    write_onnx(ICNet(0.25).eval(), tmp_path / "icnet.onnx")
    model = ExportedModel(tmp_path / "icnet.onnx")
    size = model.quantised(dict.fromkeys(model.tensors(), 1.0)).ByteSize()
    assert size < 0.3 * (tmp_path / "icnet.onnx").stat().st_size


def test_models_that_can_not_be_calibrated(narrow, calibrated, tmp_path, checkpoint):
    model, ranges = calibrated
    onnx.save(model.quantised(ranges), tmp_path / "int8.onnx")
    float_io = tmp_path / "float.onnx"
    write_onnx(random_network(1 / 32), float_io, ExportKind.FLOAT32)
    renamed = onnx.load(narrow)
    for tensor in renamed.graph.initializer:
        if tensor.name == "network.vgg.vgg.0.weight":
            tensor.name = "w"
    for node in renamed.graph.node:
        node.input[:] = ["w" if i == "network.vgg.vgg.0.weight" else i for i in node.input]
    save_model(renamed, tmp_path / "renamed.onnx")
    for path, message in [
        (tmp_path / "int8.onnx", "is quantised already; calibrate the export"),
        (float_io, "export it with --io uint8"),
        (tmp_path / "renamed.onnx", "not a graph that icnet export wrote: no layer vgg.vgg.0"),
        (checkpoint, "not an"),
        (tmp_path / "none.onnx", "no such model file"),
        (tmp_path, "not a model file"),
    ]:
        with pytest.raises(ModelError, match=message):
            ExportedModel(Path(path))
