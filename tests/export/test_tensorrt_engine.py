"""Engines: real builds with TensorRT-RTX, which needs no GPU; what only TensorRT has, on its stand-in."""

import ctypes
import io
import json
import signal
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from export.fp16 import half_precision
from export.onnx_file import save_model
from export.tensorrt_api import gpu, layer_table
from export.tensorrt_engine import Options, Profile, build_engine, default_profiles, gaps, trtexec_commands
from export.to_onnx import write_onnx
from runtime import InputError, ModelError, OutputError
from runtime.files import digest
from tests.export.engines import ONE, Spy, names
from tests.helpers import HAS_TENSORRT_RTX

if not HAS_TENSORRT_RTX:
    pytest.skip("tensorrt-rtx has no wheel for this platform", allow_module_level=True)
import tensorrt_rtx as rtx

# The bindings' Builder.__del__ warns when a Python subclass of it, as some tests make, is collected.
pytestmark = [pytest.mark.usefixtures("only_rtx"), pytest.mark.filterwarnings("ignore:Use del obj")]


def test_one_profile(model_file, tmp_path):
    engine = tmp_path / "new" / "icnet.engine"
    record = build_engine(model_file, engine, ONE)
    assert engine.stat().st_size > model_file.stat().st_size / 2
    assert names(engine.parent) == ["icnet.engine", "icnet.engine.json"]
    saved = json.loads((engine.parent / "icnet.engine.json").read_text())
    assert saved["engine_sha256"] == digest(engine)
    assert saved["onnx_sha256"] == digest(model_file)
    assert saved["profiles"] == [{"min": 1, "opt": 2, "max": 4}]
    assert saved["tensorrt"] == "tensorrt_rtx"
    assert saved["tensorrt_version"] == rtx.__version__
    assert saved["producer"].startswith("icnet-deploy ")
    assert record["engine_sha256"] == saved["engine_sha256"]


def test_the_profiles_reach_tensorrt(model_file, tmp_path, monkeypatch):
    shapes = []

    class Builder(rtx.Builder):
        def build_serialized_network(self, network, config):
            shapes.append(config.num_optimization_profiles)
            return super().build_serialized_network(network, config)

        def create_optimization_profile(self):
            profile = super().create_optimization_profile()
            profiles.append(profile)
            return profile

    profiles = []
    monkeypatch.setattr(rtx, "Builder", Builder)
    build_engine(model_file, tmp_path / "x.engine", [Profile(1, 1, 1), Profile(2, 5, 16), Profile(17, 32, 64)])
    assert shapes == [3]
    assert [tuple(d) for d in profiles[1].get_shape("images")] == [(n, 224, 224, 3) for n in (2, 5, 16)]
    assert [tuple(d) for d in profiles[2].get_shape("sisms")] == [(n, 224, 224) for n in (17, 32, 64)]


def test_the_bank_has_a_profile_of_its_own(exports, tmp_path, monkeypatch):
    class Builder(rtx.Builder):
        def build_serialized_network(self, network, config):
            return None

        def create_optimization_profile(self):
            profiles.append(super().create_optimization_profile())
            return profiles[-1]

    profiles = []
    monkeypatch.setattr(rtx, "Builder", Builder)
    groups, options = [Profile(1, 1, 1), Profile(2, 5, 16)], Options(bank=Profile(3, 20, 300))
    with pytest.raises(ModelError, match="could not build it"):
        build_engine(exports.with_name("icnet.banked.onnx"), tmp_path / "x.engine", groups, options)
    assert [[tuple(d) for d in p.get_shape("bank")] for p in profiles] == [[(n, 40) for n in (3, 20, 300)]] * 2
    assert [[d[0] for d in p.get_shape("images")] for p in profiles] == [[1, 1, 1], [2, 5, 16]]


def test_the_float_interface_and_its_metadata(float_model, tmp_path):
    record = build_engine(float_model, tmp_path / "x.engine", ONE)
    assert record["onnx_metadata"] == {"precision": "fp32", "io": "float32"}


def test_a_ragged_export(ragged_file, tmp_path):
    """`rgbs` grows with the images; of groups there may be one, or as many as images."""
    record = build_engine(ragged_file, tmp_path / "x.engine", ONE)
    assert record["kind"] == "ragged"
    command = trtexec_commands(ragged_file, tmp_path / "x.engine", ONE)[10]
    for size, groups, images in (("min", 1, 1), ("opt", 1, 2), ("max", 4, 4)):
        assert f"--{size}Shapes=rgbs:{images * 224 * 224 * 4},shapes:{groups}x4 " in command


def test_onnx_is_not_needed(model_file, tmp_path, no_onnx):
    assert build_engine(model_file, tmp_path / "x.engine", ONE)["onnx_metadata"] is None


def test_importing_it_loads_no_engine_and_no_torch():
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt_rtx"}
    code = f"import sys, export.build_engine; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_model_for_one_group_size(fixed_model, tmp_path):
    with pytest.raises(ModelError, match=r"fixed\.onnx: exported for groups of exactly 3, so profile 1:2:4 can't"):
        build_engine(fixed_model, tmp_path / "x.engine", ONE)
    assert names(tmp_path) == ["in"]


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 5, 4), (5, 4, 3)])
def test_profiles_out_of_order(sizes):
    with pytest.raises(InputError, match="1 ≤ MIN ≤ OPT ≤ MAX"):
        Profile(*sizes)


def test_the_model_is_not_overwritten(model_file):
    before = digest(model_file)
    with pytest.raises(OutputError, match="is an input of this run"):
        build_engine(model_file, model_file.parent / "." / model_file.name, ONE)
    assert digest(model_file) == before


def test_a_failed_build_says_why_and_keeps_what_was_there(model_file, tmp_path):
    engine, sidecar, cache = (tmp_path / n for n in ("x.engine", "x.engine.json", "cache"))
    for path in (engine, sidecar):
        path.write_text("of yesterday")
    with pytest.raises(ModelError, match=r"icnet\.onnx: TensorRT could not build it: .*workspace") as caught:
        build_engine(model_file, engine, ONE, Options(workspace=1, timing_cache=cache))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["x.engine", "x.engine.json"]
    assert engine.read_text() == sidecar.read_text() == "of yesterday"


@pytest.mark.parametrize("crash_at", [0, 1])
def test_a_crash_leaves_no_sidecar_of_another_engine(model_file, tmp_path, monkeypatch, crash_at):
    """Between the renames of the engine (the first) and the sidecar (the second), and before both."""
    engine, sidecar = tmp_path / "x.engine", tmp_path / "x.engine.json"
    engine.write_text("of yesterday")
    sidecar.write_text("of yesterday's engine")
    rename, renamed = type(engine).replace, []

    def crash(self, target):
        if len(renamed) == crash_at:
            raise OSError("the machine went down")
        renamed.append(target)
        return rename(self, target)

    monkeypatch.setattr(type(engine), "replace", crash)
    with pytest.raises(OutputError):
        build_engine(model_file, engine, ONE)
    assert renamed == [engine][:crash_at]
    assert not sidecar.exists()
    assert (engine.stat().st_size > 1000) == bool(crash_at)


def test_tensorrt_10_is_strongly_typed_and_reuses_its_timing_cache(tensorrt, model_file, tmp_path):
    cache = tmp_path / "timing"
    options = Options(timing_cache=cache, hardware_compatible=True)
    record = build_engine(model_file, tmp_path / "x.engine", ONE, options)
    strongly_typed = 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert tensorrt.flags == [strongly_typed]
    assert (record["tensorrt"], record["tensorrt_version"], record["timing_cache"]) == ("tensorrt", "10.13.0", "new")
    written = cache.read_bytes()
    assert build_engine(model_file, tmp_path / "x.engine", ONE, options)["timing_cache"] == "read"
    assert tensorrt.caches == [b"", written]


def test_options_that_only_rtx_has(tensorrt, model_file, tmp_path):
    with pytest.raises(InputError, match="--compute-capability: only TensorRT-RTX has it"):
        build_engine(model_file, tmp_path / "x.engine", ONE, Options(compute_capabilities=("8.6",)))


def test_options_reach_the_config(tensorrt, model_file, tmp_path, monkeypatch):
    options = Options(workspace=64, version_compatible=True, hardware_compatible=True, inspect=True)
    module = sys.modules["tensorrt"]
    config = spied_config(module, monkeypatch, model_file, tmp_path / "x.engine", ONE, options)
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert config.get_flag(rtx.BuilderFlag.VERSION_COMPATIBLE)
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED


def spied_config(module, monkeypatch, *args):
    """The configuration that `build_engine` with these arguments hands to the builder of `module`."""
    configs = []

    class Builder(rtx.Builder):
        def build_serialized_network(self, network, config):
            configs.append(config)

    monkeypatch.setattr(module, "Builder", Builder)
    with pytest.raises(ModelError, match="could not build it"):
        build_engine(*args)
    return configs[0]


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_unless_asked_for(model_file, tmp_path, monkeypatch, tf32):
    config = spied_config(rtx, monkeypatch, model_file, tmp_path / "x.engine", ONE, Options(tf32=tf32))
    assert config.get_flag(rtx.BuilderFlag.TF32) == tf32
    assert config.builder_optimization_level == 3


def test_the_optimisation_level_reaches_the_config(model_file, tmp_path, monkeypatch):
    config = spied_config(rtx, monkeypatch, model_file, tmp_path / "x.engine", ONE, Options(level=5))
    assert config.builder_optimization_level == 5
    for level in (-1, 6):
        with pytest.raises(InputError, match=f"--level {level}: TensorRT's optimisation levels are 0 to 5"):
            build_engine(model_file, tmp_path / "x.engine", ONE, Options(level=level))


def test_tf32_is_for_fp32_models(network, tmp_path):
    write_onnx(half_precision(network), tmp_path / "half.onnx")
    with pytest.raises(InputError, match=r"--tf32: .*half\.onnx is not an FP32 model \(HALF\)"):
        build_engine(tmp_path / "half.onnx", tmp_path / "x.engine", ONE, Options(tf32=True))
    assert names(tmp_path) == ["half.onnx"]


def test_two_builds_share_one_logger(model_file, tmp_path, monkeypatch):
    """TensorRT keeps the first, so what it says of the second build must be heard by it too."""
    loggers = []

    class Builder(rtx.Builder):
        def __init__(self, logger):
            loggers.append(logger)
            super().__init__(logger)

        def build_serialized_network(self, network, config):
            loggers[0].log(rtx.ILogger.ERROR, f"error {len(loggers)}")

    monkeypatch.setattr(rtx, "Builder", Builder)
    for number in (1, 2):
        with pytest.raises(ModelError, match=f"could not build it: error {number}$"):
            build_engine(model_file, tmp_path / "x.engine", ONE)
    assert loggers[0] is loggers[1]


@pytest.mark.parametrize(
    ("largest", "profiles"),
    [
        (1, "1:1:1"),
        (2, "1:1:1 2:2:2"),
        (4, "1:1:1 2:4:4"),
        (8, "1:1:1 2:5:8"),
        (9, "1:1:1 2:5:8 9:9:9"),
        (64, "1:1:1 2:5:8 9:32:64"),
    ],
)
def test_default_profiles(largest, profiles):
    found = default_profiles(largest)
    assert " ".join(map(str, found)) == profiles
    assert gaps(found) == []


def test_gaps_between_profiles():
    assert gaps([Profile(9, 9, 12), Profile(2, 4, 6), Profile(1, 1, 1), Profile(3, 3, 7), Profile(20, 20, 20)]) == [
        "8", "13 to 19",
    ]  # fmt: skip


def test_progress(model_file, tmp_path):
    spy = Spy()
    build_engine(model_file, tmp_path / "x.engine", ONE, progress=spy)
    assert spy.steps > 100
    assert any(not name.startswith(" ") for name in spy.started)
    assert any(name.startswith("    ") for name in spy.started)  # a phase of a phase of a phase
    assert all(total > 0 for total in spy.started.values())
    assert spy.tasks == []  # every phase that began has ended


def test_ctrl_c_stops_the_build(model_file, tmp_path):
    spy = Spy(lambda: signal.raise_signal(signal.SIGINT) if spy.steps == 3 else None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(model_file, tmp_path / "x.engine", ONE, Options(timing_cache=tmp_path / "cache"), spy)
    assert spy.steps < 20  # not at the end
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_inspect_shows_half_precision(model_file, tmp_path):
    """A graph whose last convolution is in FP16, between casts."""
    model = onnx.load(model_file)
    conv = [n for n in model.graph.node if n.op_type == "Conv"][-1]
    weights = {i.name: i for i in model.graph.initializer}
    for name in conv.input[1:]:
        array = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
        weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    before = helper.make_node("Cast", [conv.input[0]], ["half_in"], to=TensorProto.FLOAT16)
    after = helper.make_node("Cast", ["half_out"], [conv.output[0]], to=TensorProto.FLOAT)
    conv.input[0], conv.output[0] = "half_in", "half_out"
    i = list(model.graph.node).index(conv)
    model.graph.node.insert(i + 1, after)
    model.graph.node.insert(i, before)
    del model.graph.value_info[:]
    path = tmp_path / "half.onnx"
    save_model(model, path)
    layers = build_engine(path, tmp_path / "x.engine", ONE, Options(inspect=True))["layers"]
    precisions = [row[2] for row in layers["layers"] if row[1] == "CONVOLUTION"]
    assert precisions.count("FP16") == 1
    assert precisions.count("FP32") == len(precisions) - 1 > 40


@pytest.mark.parametrize(
    "outputs",
    [
        [{"Name": "t", "Format/Datatype": "Row major linear FP16 format"}],  # TensorRT 10
        [{"Name": "t", "DataType": "Half", "Format": "Row major linear FP16 format"}],  # 11
    ],
)
def test_inspect_with_a_gpu(model_file, tmp_path, monkeypatch, outputs):
    information = {"Layers": [{"Name": "conv [1]", "LayerType": "CaskConvolution", "Outputs": outputs}, "bare"]}
    inspector = types.SimpleNamespace(get_engine_information=lambda format: json.dumps(information))
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(rtx.Runtime, "deserialize_cuda_engine", lambda *_: engine)
    layers = build_engine(model_file, tmp_path / "x.engine", ONE, Options(inspect=True))["layers"]
    assert layers["of"] == "engine"
    expected = "Half Row major linear FP16 format" if "DataType" in outputs[0] else "Row major linear FP16 format"
    assert layers["layers"] == [("conv [1]", "CaskConvolution", expected), ("bare", "", "")]
    console = Console(file=io.StringIO(), width=200)
    console.print(layer_table(layers))
    assert "Layers of the engine" in console.file.getvalue()
    assert "conv [1]" in console.file.getvalue()


def test_the_gpu_is_in_the_sidecar(model_file, tmp_path, monkeypatch):
    class Driver:
        """A driver with one GPU."""

        def __init__(self, name):
            pass

        def cuInit(self, flags):
            return 0

        def cuCtxGetDevice(self, device):
            return 201  # no context

        def cuDeviceGet(self, device, ordinal):
            device._obj.value = 7
            return 0

        def cuDeviceGetName(self, name, size, device):
            name.value = b"NVIDIA L4"
            return 0 if device.value == 7 else 101

        def cuDeviceGetAttribute(self, value, attribute, device):
            value._obj.value = {75: 8, 76: 9}[attribute]
            return 0

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", Driver)
        record = build_engine(model_file, tmp_path / "x.engine", ONE)
        assert record["gpu"] == {"name": "NVIDIA L4", "compute_capability": "8.9"}
        patch.setattr(Driver, "cuInit", lambda *_: 100)  # a driver without a GPU
        assert gpu() is None

    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    assert gpu() is None
