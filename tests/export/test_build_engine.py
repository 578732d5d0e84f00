"""Engines: real builds with TensorRT-RTX, which needs no GPU; what only TensorRT has, on its stand-in below."""

import ctypes
import hashlib
import io
import json
import shlex
import signal
import subprocess
import sys
import types

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import Progress

from export import build_engine as module
from export import tensorrt_api
from export.build_engine import Options, Profile, build_engine
from export.tensorrt_api import gpu, layer_table
from export.to_onnx import write_onnx
from runtime import DependencyError, InputError, ModelError, OutputError
from tests.helpers import HAS_TENSORRT_RTX

if not HAS_TENSORRT_RTX:
    pytest.skip("tensorrt-rtx has no wheel for this platform", allow_module_level=True)
import tensorrt_rtx as rtx

# The bindings' Builder.__del__ warns when a Python subclass of it, as some tests make, is collected.
pytestmark = pytest.mark.filterwarnings("ignore:Use del obj")

ONE = (Profile(1, 2, 4),)
SIZES = ("--min", 1, "--opt", 2, "--max", 4)


@pytest.fixture(autouse=True)
def only_rtx(monkeypatch):
    """These tests are about RTX, also where TensorRT is installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def tensorrt(monkeypatch):
    """A stand-in for TensorRT 10: RTX under its name; and what two of its calls are given."""
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
    write_onnx(network, path, "float32", {"precision": "fp32", "io": "float32"})
    return path


@pytest.fixture
def fixed_model(model_file, tmp_path):
    model = onnx.load(model_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    path = tmp_path / "in" / "fixed.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    return path


def foreign_model(path, operator="Relu", node_name="the_node"):
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 7]) for n in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], node_name)], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_profile(model_file, tmp_path):
    engine = tmp_path / "new" / "icnet.engine"
    record = build_engine(model_file, engine, ONE)
    assert engine.stat().st_size > model_file.stat().st_size / 2
    assert names(engine.parent) == ["icnet.engine", "icnet.engine.json"]
    saved = json.loads((engine.parent / "icnet.engine.json").read_text())
    assert saved["engine_sha256"] == sha256(engine)
    assert saved["onnx_sha256"] == sha256(model_file)
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


def test_the_float_interface_and_its_metadata(float_model, tmp_path):
    record = build_engine(float_model, tmp_path / "x.engine", ONE)
    assert record["onnx_metadata"] == {"precision": "fp32", "io": "float32"}


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "group sizes are missing"),
        (("--min", 1, "--opt", 4), "group sizes are missing"),
        ((*SIZES, "--profile", "1:2:4"), "one or the other"),
        (("--opt", 2, "--profile", "1:2:4"), "one or the other"),
        (("--profile", "1:2"), "--profile 1:2: expected three group sizes, MIN:OPT:MAX"),
        (("--profile", "1:x:4"), "--profile 1:x:4: expected"),
        (("--profile", "1:2:4", "--profile", "4:3:5"), "profile 4:3:5: group sizes must be"),
        (("--min", 3, "--opt", 2, "--max", 4), "profile 3:2:4: group sizes must be"),
        ((*SIZES, "--workspace", 0), "at least 1 MiB"),
        ((*SIZES, "--hardware-compatible"), "--hardware-compatible: TensorRT-RTX does not have it"),
        ((*SIZES, "--version-compatible"), "--version-compatible: TensorRT-RTX does not have it"),
        ((*SIZES, "--compute-capability", "3.5"), "--compute-capability 3.5: this TensorRT-RTX builds for 7.5, 8.0"),
        ((*SIZES, "--trtexec", "--compute-capability", "8.6"), "trtexec has no such option"),
    ],
)
def test_wrong_options_are_one_line(icnet, model_file, tmp_path, arguments, message):
    code, out, err = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert names(tmp_path) == []


def test_wrong_files_are_one_line_and_leave_nothing(icnet, model_file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "text.onnx").write_text("weights are in the other file\n")
    (folder / "empty.onnx").touch()
    (folder / "half.onnx").write_bytes(model_file.read_bytes()[:100_000])
    foreign_model(folder / "other.onnx")
    foreign_model(folder / "operator.onnx", "NoSuchOperator")
    out = tmp_path / "out"
    for name, message in [
        ("none.onnx", "none.onnx: no such file"),
        (".", "can't be read: Is a directory"),
        ("text.onnx", "text.onnx: TensorRT can't read it: Assertion failed"),
        ("empty.onnx", "expected inputs images uint8 [N, 224, 224, 3], sisms"),
        ("empty.onnx", "found inputs none and outputs none"),
        ("half.onnx", "half.onnx: TensorRT can't read it: Assertion failed"),
        ("other.onnx", "found inputs x float32 [?, 7] and outputs y float32 [?, 7]"),
        ("operator.onnx", "(node NoSuchOperator the_node)"),
    ]:
        code, _, err = icnet("build", "--onnx", folder / name, "--output", out / "x.engine", *SIZES)
        assert code == 2
        assert err.startswith("icnet build: error: ")
        assert message in err
        assert err.count("\n") == 1
        assert not out.exists()


def test_outputs_that_cant_be_written(icnet, model_file, tmp_path):
    (tmp_path / "file").touch()
    for option, path in [("--output", tmp_path / "file" / "x.engine"), ("--timing-cache", tmp_path / "file" / "x")]:
        code, _, err = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES, option, path)
        assert code == 2
        assert "file is not a folder" in err
        assert names(tmp_path) == ["file"]


def test_the_model_is_not_overwritten(model_file):
    before = sha256(model_file)
    with pytest.raises(OutputError, match="is the model itself"):
        build_engine(model_file, model_file.parent / "." / model_file.name, ONE)
    assert sha256(model_file) == before


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


def test_compute_capabilities(icnet, model_file, tmp_path):
    arguments = ("--compute-capability", "8.6", "--compute-capability", "12.0")
    code, _, _ = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES, *arguments)
    assert code == 0
    both = json.loads((tmp_path / "x.engine.json").read_text())
    assert both["options"]["compute_capabilities"] == ["8.6", "12.0"]
    one = build_engine(model_file, tmp_path / "y.engine", ONE, Options(compute_capabilities=("8.6",)))
    assert one["engine_sha256"] != both["engine_sha256"]  # they get to TensorRT


def test_a_new_timing_cache_and_one_that_does_not_fit(icnet, model_file, tmp_path):
    cache = tmp_path / "caches" / "timing"
    arguments = ("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES, "--timing-cache", cache)
    code, out, _ = icnet(*arguments)
    assert code == 0
    assert "timing cache" not in out
    assert json.loads((tmp_path / "x.engine.json").read_text())["timing_cache"] == "new"
    written = cache.read_bytes()
    assert written
    cache.write_bytes(b"of another machine")
    code, out, _ = icnet(*arguments)
    assert code == 0
    assert f"{cache}: not a timing cache of this TensorRT and GPU; replaced by a fresh one" in out
    assert cache.read_bytes() == written
    assert names(cache.parent) == ["timing"]


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
    configs = []

    class Builder(rtx.Builder):
        def build_serialized_network(self, network, config):
            configs.append(config)

    monkeypatch.setattr(sys.modules["tensorrt"], "Builder", Builder)
    options = Options(workspace=64, version_compatible=True, hardware_compatible=True, inspect=True)
    with pytest.raises(ModelError, match="could not build it"):
        build_engine(model_file, tmp_path / "x.engine", ONE, options)
    (config,) = configs
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 64 * 2**20
    assert config.get_flag(rtx.BuilderFlag.VERSION_COMPATIBLE)
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(
    ("arguments", "profile"),
    [((4,), "1:4:4"), ((64,), "1:5:64"), ((64, "--min", 8), "8:8:64"), ((9, "--opt", 2), "1:2:9")],
)
def test_only_the_largest_group_must_be_named(icnet, model_file, tmp_path, arguments, profile):
    command = ("build", "--onnx", model_file, "--output", tmp_path / "x.engine", "--max", *arguments)
    code, out, _ = icnet(*command)
    assert code == 0
    assert out.endswith(f"groups of {profile}\n")


def test_packed_and_bank_exports(icnet, exports, tmp_path):
    for kind, options, says in [
        ("packed", ("--max", 64), "groups of 1:5:64"),
        ("intra", ("--max", 16), "groups of 1:5:16"),
        ("banked", ("--max", 16, "--max-bank", 300), "groups of 1:5:16, banks of 1:20:300"),
        ("banked", ("--max", 4, "--max-bank", 9, "--min-bank", 2, "--opt-bank", 3), "banks of 2:3:9"),
    ]:
        model, engine = exports.with_name(f"icnet.{kind}.onnx"), tmp_path / f"icnet.{kind}.engine"
        code, out, _ = icnet("build", "--onnx", model, "--output", engine, *options)
        assert (code, says in out) == (0, True)
        digest = json.loads(engine.with_name(engine.name + ".json").read_text())["onnx_metadata"]["weights_sha256"]
        assert f"icnet {digest}".encode() in engine.read_bytes()  # the engine's name: a sidecar may get lost


def test_sizes_of_banks_are_one_line(icnet, exports, tmp_path):
    banked, output = exports.with_name("icnet.banked.onnx"), ("--output", tmp_path / "x.engine", "--max", 4)
    for model, options, message in [
        (banked, (), "icnet.banked.onnx: takes a bank, whose sizes are missing: give --max-bank"),
        (banked, ("--min-bank", 2), "sizes of the bank are missing: give --max-bank"),
        (banked, ("--max-bank", 0), "must be 1 ≤ MIN ≤ OPT ≤ MAX"),
        (exports, ("--max-bank", 9), "icnet.onnx takes no bank"),
        (exports, ("--max-bank", 9, "--trtexec"), "icnet.onnx takes no bank"),
    ]:
        code, _, err = icnet("build", "--onnx", model, *output, *options)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
    assert list(tmp_path.iterdir()) == []


def test_trtexec_of_a_bank_export(icnet, exports, no_tensorrt):
    model = exports.with_name("icnet.banked.onnx")
    _, out, _ = icnet("build", "--onnx", model, "--output", "x.engine", "--max", 4, "--max-bank", 300, "--trtexec")
    assert "--maxShapes=images:4x224x224x3,sisms:4x224x224,bank:300x40" in out
    assert "--optShapes=images:4x224x224x3,sisms:4x224x224,bank:20x40" in out
    _, out, _ = icnet(
        "build", "--onnx", exports.with_name("icnet.packed.onnx"), "--output", "x", "--max", 9, "--trtexec"
    )
    assert "--maxShapes=images:9x224x224x3,sisms:9x224x224,groups:9 " in out


def test_tensorrt_that_is_missing_broken_or_without_a_driver(icnet, model_file, tmp_path, monkeypatch):
    arguments = ("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES)

    def no_driver(logger):
        logger.log(rtx.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with monkeypatch.context() as patch:
        patch.setattr(rtx, "Builder", no_driver)
        code, _, err = icnet(*arguments)
        assert code == 2
        assert "does not start: CUDA initialization failure with error: 35" in err
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, _, err = icnet(*arguments)
    assert code == 2
    assert "pip install 'icnet-deploy[tensorrt]', or 'icnet-deploy[tensorrt-rtx]'" in err
    assert err.count("\n") == 1

    def broken(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_api.importlib, "import_module", broken)
    with pytest.raises(DependencyError, match=r"tensorrt is installed but can't be loaded: libnvinfer\.so\.10"):
        tensorrt_api.load_tensorrt()
    assert names(tmp_path) == []


class Spy(Progress):
    """Records what a progress bar is told, and calls `hook` at every step."""

    def __init__(self, hook=lambda: None):
        super().__init__(console=Console(file=io.StringIO()))
        self.started, self.steps, self.hook = {}, 0, hook

    def add_task(self, description, **kwargs):
        self.started[description] = kwargs["total"]
        return super().add_task(description, **kwargs)

    def update(self, task, **kwargs):
        self.steps += 1
        super().update(task, **kwargs)
        self.hook()


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


def test_ctrl_c_on_the_command_line(icnet, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Progress", lambda **_: Spy(lambda: signal.raise_signal(signal.SIGINT)))
    code, _, err = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES)
    assert code == 130
    assert err == "\nicnet build: stopped\n"


def test_inspect_without_a_gpu(icnet, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(rtx.Runtime, "deserialize_cuda_engine", lambda *_: None)  # also on a machine with a GPU
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES, "--inspect")
    assert code == 0
    assert "Layers of the parsed network, without constants: the engine can't be loaded here" in " ".join(out.split())
    convolutions = [line for line in out.splitlines() if "CONVOLUTION" in line]
    assert len(convolutions) == sum(n.op_type == "Conv" for n in onnx.load(model_file).graph.node)
    assert all("FP32" in line for line in convolutions)
    assert "CONSTANT" not in out


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
    onnx.save(model, path)
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


def trtexec(out):
    """{10: arguments, 11: arguments} of what --trtexec printed."""
    lines = out.splitlines()
    assert lines[::2] == ["# TensorRT 10", "# TensorRT 11"]
    return {10: shlex.split(lines[1]), 11: shlex.split(lines[3])}


def test_trtexec(icnet, model_file, tmp_path, no_tensorrt):
    profiles = ("--profile", "1:1:1", "--profile", "2:5:16")
    output = tmp_path / "my engine"
    code, out, _ = icnet("build", "--onnx", model_file, "--output", output, *profiles, "--trtexec")
    assert code == 0
    commands = trtexec(out)
    assert commands[11] == [
        "trtexec",
        f"--onnx={model_file}",
        f"--saveEngine={output}",
        "--skipInference",
        "--profile=0",
        "--minShapes=images:1x224x224x3,sisms:1x224x224",
        "--optShapes=images:1x224x224x3,sisms:1x224x224",
        "--maxShapes=images:1x224x224x3,sisms:1x224x224",
        "--profile=1",
        "--minShapes=images:2x224x224x3,sisms:2x224x224",
        "--optShapes=images:5x224x224x3,sisms:5x224x224",
        "--maxShapes=images:16x224x224x3,sisms:16x224x224",
    ]
    assert commands[10] == [*commands[11], "--stronglyTyped"]
    assert names(tmp_path) == []


def test_trtexec_options_and_the_float_interface(icnet, float_model, tmp_path, no_tensorrt):
    options = ("--workspace", 512, "--timing-cache", "t.cache", "--version-compatible", "--hardware-compatible")
    code, out, _ = icnet("build", "--onnx", float_model, "--output", "x", *SIZES, *options, "--inspect", "--trtexec")
    assert code == 0
    arguments = trtexec(out)[10]
    assert "--optShapes=images:2x3x224x224,sisms:2x1x224x224" in arguments
    assert "--profile=0" not in arguments
    assert {
        "--memPoolSize=workspace:512",
        "--timingCacheFile=t.cache",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--profilingVerbosity=detailed",
        "--dumpLayerInfo",
    } < set(arguments)


def test_trtexec_reads_the_model_where_it_can(icnet, model_file, fixed_model, tmp_path, no_tensorrt, monkeypatch):
    build = ("build", "--output", "x", "--trtexec")
    code, out, _ = icnet(*build, "--onnx", fixed_model, "--profile", "3:3:3")
    assert code == 0
    assert "Shapes" not in out  # trtexec refuses them for a model without dynamic axes
    assert icnet(*build, "--onnx", fixed_model, *SIZES)[0] == 2
    code, _, err = icnet(*build, "--onnx", foreign_model(tmp_path / "other.onnx"), *SIZES)
    assert code == 2
    assert "not an ICNet export" in err
    assert icnet(*build, "--onnx", tmp_path / "none.onnx", *SIZES)[0] == 2
    (tmp_path / "text.onnx").write_text("no protocol buffer")
    code, _, err = icnet(*build, "--onnx", tmp_path / "text.onnx", *SIZES)
    assert code == 2
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, out, _ = icnet(*build, "--onnx", model_file, *SIZES)
    assert code == 0
    assert "assuming uint8 inputs: onnx is not installed" in out
    assert "--maxShapes=images:4x224x224x3,sisms:4x224x224" in out


def test_the_script_is_the_command(model_file, tmp_path):
    command = [sys.executable, module.__file__, "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "groups of 1:2:4" in done.stdout
    assert done.stderr == ""
    assert names(tmp_path) == ["x.engine", "x.engine.json"]
