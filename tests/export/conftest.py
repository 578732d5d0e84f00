import sys
import types

import onnx
import pytest

from export.onnx_file import save_model
from export.to_mnn import build_mnn
from export.to_onnx import write_onnx
from export.to_openvino import build_openvino
from runtime.contract import ExportKind


@pytest.fixture
def only_rtx(monkeypatch):
    """RTX, also where TensorRT is installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def tensorrt(monkeypatch, only_rtx):
    """A stand-in for TensorRT 10: RTX under its name; and the arguments of two of its calls."""
    import tensorrt_rtx as rtx

    seen = types.SimpleNamespace(flags=[], caches=[])

    class Builder(rtx.Builder):
        def create_network(self, flags):
            seen.flags.append(flags)
            return super().create_network(flags)

    def create_timing_cache(config, data):
        seen.caches.append(data)
        return create(config, b"")  # RTX has no timings, and without a GPU it refuses its own cache

    create = rtx.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(rtx.IBuilderConfig, "create_timing_cache", create_timing_cache)
    fake = types.ModuleType("tensorrt")
    fake.__dict__.update({k: v for k, v in vars(rtx).items() if not k.startswith("__")})
    fake.__dict__.update(__version__="10.13.0", Builder=Builder)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return seen


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


@pytest.fixture
def no_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)


@pytest.fixture(scope="session")
def float_model(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    write_onnx(network, path, ExportKind.FLOAT32, {"precision": "fp32", "io": "float32"})
    return path


@pytest.fixture
def fixed_model(model_file, tmp_path):
    model = onnx.load(model_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    path = tmp_path / "in" / "fixed.onnx"
    path.parent.mkdir()
    save_model(model, path)
    return path


@pytest.fixture(scope="session")
def openvino_exports(exports):
    """`exports` for OpenVINO."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    for path in exports.parent.glob("*.onnx"):
        build_openvino(path, path.with_suffix(".xml"))
    return exports.with_suffix(".xml")


@pytest.fixture(scope="session")
def mnn_exports(exports):
    """`exports` for MNN."""
    pytest.importorskip("MNN", reason="MNN is not installed")
    for path in exports.parent.glob("*.onnx"):
        build_mnn(path, path.with_suffix(".mnn"))
    return exports.with_suffix(".mnn")
