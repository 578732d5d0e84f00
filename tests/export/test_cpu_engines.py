"""What files for OpenVINO and for MNN have in common: the maps of all kinds of exports, and what can't be built."""

import importlib.util
import re
import sys

import numpy as np
import onnx
import pytest

from export.cpu_proof import sample_calls
from export.onnx_file import save_model
from export.to_mnn import build_mnn
from export.to_openvino import build_openvino
from runtime import DependencyError, Predictor
from runtime.contract import INTERFACES
from runtime.errors import how_to_install
from runtime.files import bank_files
from tests.helpers import damage

ENGINES = ("openvino", "mnn")
GROUPS = [(call["images"], call["sisms"]) for call in sample_calls(INTERFACES[0])]


@pytest.fixture(params=ENGINES)
def engine_exports(request):
    """`exports` for an engine."""
    return request.getfixturevalue(f"{request.param}_exports")


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1e-3


def test_maps_are_those_of_onnx_runtime_whatever_the_order_of_sizes(exports, engine_exports):
    """What a call returned stays as it is; OpenVINO's are the same to the bit at every call."""
    with Predictor(exports) as reference, Predictor(engine_exports) as predictor:
        right = [reference.predict_tensors(*group) for group in GROUPS]
        first = [predictor.predict_tensors(*group) for group in GROUPS]
        kept = [maps.copy() for maps in first]
        for maps, expected in zip(first, right, strict=True):
            close(maps, expected)
        for index in reversed(range(len(GROUPS))):
            again = predictor.predict_tensors(*GROUPS[index])
            close(again, right[index])
            if engine_exports.suffix == ".xml":
                np.testing.assert_array_equal(again, kept[index])
        for maps, copy in zip(first, kept, strict=True):
            np.testing.assert_array_equal(maps, copy)


def test_several_groups_in_one_call(exports, engine_exports):
    packed = engine_exports.with_name(f"icnet.packed{engine_exports.suffix}")
    with Predictor(exports) as reference, Predictor(packed, max_images=8) as predictor:
        assert predictor.packed
        for group, maps in zip(GROUPS, predictor.predict_groups(GROUPS), strict=True):
            close(np.stack(maps), reference.predict_tensors(*group))


def test_chunks_and_kept_banks(exports, engine_exports):
    images, sisms = GROUPS[3]
    with (
        Predictor(exports, bank_export=bank_files(exports)) as reference,
        Predictor(bank_export=bank_files(engine_exports), max_images=5) as predictor,
    ):
        close(predictor.predict_tensors(images, sisms), reference.predict_tensors(images, sisms))
        bank = predictor.bank(images, sisms)
        np.testing.assert_allclose(bank.sivs, reference.bank(images, sisms).sivs, atol=1e-5)
        for kept in (bank, bank[:1]):  # banks are the network's, not the engine's
            for one, other in zip(
                predictor.against(kept, *GROUPS[1]), reference.against(kept, *GROUPS[1]), strict=True
            ):
                close(one, other)


def fixed_group(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def fixed_bank(model):
    for value in model.graph.input:
        if value.name == "bank":
            value.type.tensor_type.shape.dim[0].dim_value = 20


def unknown_operator(model):
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "NoSuchOperator"


def dangling(model):
    """MNN's converter crashes."""
    next(node for node in model.graph.node if node.op_type == "Conv").input[1] = "nowhere"


def in_fp16(model):
    onnx.helper.set_model_props(model, {"precision": "fp16"})


def in_half_precision(model):
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float16(1), "half"))


def in_int8(model):
    for node in model.graph.node:
        node.output[:] = ["before" if name == "maps" else name for name in node.output]
    arrays = {"scale": np.float32(1 / 255), "zero": np.uint8(0)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    quantise = onnx.helper.make_node("QuantizeLinear", ["before", "scale", "zero"], ["bytes"])
    model.graph.node.extend([quantise, onnx.helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["maps"])])


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("openvino", fixed_group, "m.onnx: exported for a fixed size, images uint8 [1, 224, 224, 3]"),
        ("openvino", unknown_operator, "m.onnx: OpenVINO can't convert it"),
        ("openvino", in_fp16, "m.onnx: in FP16, for GPUs"),
        ("openvino", damage, "NaN or infinite values"),
        (
            "mnn",
            fixed_group,
            "m.onnx: exported for a fixed size, images uint8 [1, 224, 224, 3]; export it with dynamic axes",
        ),
        ("mnn", fixed_bank, "m.onnx: exported for a fixed size, bank float32 [20, 40]; export it with dynamic axes"),
        ("mnn", unknown_operator, "m.onnx: MNN can't convert or run it"),
        ("mnn", dangling, "m.onnx: MNN can't convert or run it (exit code -"),
        ("mnn", in_half_precision, "m.onnx: in FP16, which MNN would run in FP32"),
        ("mnn", in_int8, "m.onnx: in INT8, which MNN's converter does not take"),
        ("mnn", damage, "not written: the ONNX file computes NaN or infinite values"),
    ],
)
def test_models_that_can_not_be_built(icnet, exports, tmp_path, backend, change, message):
    pytest.importorskip({"openvino": "openvino", "mnn": "MNN"}[backend], reason="it is not installed")
    model = onnx.load(exports.with_name("icnet.banked.onnx") if change is fixed_bank else exports)
    change(model)
    save_model(model, tmp_path / "m.onnx")
    output = tmp_path / "out" / ("x.xml" if backend == "openvino" else "x.mnn")
    code, out, err = icnet("build", "--backend", backend, "--onnx", tmp_path / "m.onnx", "--output", output)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("openvino", ("--max", 4), "--max: is for TensorRT"),
        ("openvino", ("--inspect",), "--inspect: is for TensorRT"),
        ("mnn", ("--precision", "bf16"), "--precision: is for OpenVINO"),
        ("tensorrt", ("--precision", "bf16", "--max", 4), "--precision: is for OpenVINO"),
        ("mnn", ("--max", 4), "--max: is for TensorRT"),
        ("mnn", ("--profile", "1:2:3"), "--profile: is for TensorRT"),
        ("mnn", ("--inspect",), "--inspect: is for TensorRT"),
        ("mnn", ("--trtexec",), "--trtexec: is for TensorRT"),
    ],
)
def test_options_of_other_engines_are_refused(icnet, exports, tmp_path, backend, options, message):
    code, _, err = icnet("build", "--backend", backend, "--onnx", exports, "--output", tmp_path / "x.xml", *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(("module", "build"), [("openvino", build_openvino), ("MNN", build_mnn)])
def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    request, exports, tmp_path, monkeypatch, module, build
):
    path = request.getfixturevalue(f"{module.lower()}_exports")
    monkeypatch.setitem(sys.modules, module, None)
    missing = f"{module} is not installed: {how_to_install(module.lower())}"
    with pytest.raises(DependencyError, match=re.escape(missing)):
        Predictor(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=f"{module}, onnx, onnxruntime: not installed"):
        build(exports, tmp_path / path.name)
