"""`icnet build`: options, files, what it prints, and errors, with TensorRT-RTX, which needs no GPU to build."""

import json
import signal
import subprocess
import sys

import onnx
import pytest

from export import build_engine as command_module
from export.tensorrt_engine import Options, build_engine
from runtime import DependencyError, tensorrt_library
from tests.export.engines import ONE, SIZES, Spy, foreign_model, names
from tests.helpers import HAS_TENSORRT_RTX

if not HAS_TENSORRT_RTX:
    pytest.skip("tensorrt-rtx has no wheel for this platform", allow_module_level=True)
import tensorrt_rtx as rtx

# The bindings' Builder.__del__ warns when a Python subclass of it, as some tests make, is collected.
pytestmark = [pytest.mark.usefixtures("only_rtx"), pytest.mark.filterwarnings("ignore:Use del obj")]


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
        (("--max", 0), "--max 0: expected 1 or more"),
        ((*SIZES, "--level", 6), "--level 6: TensorRT's optimisation levels are 0 to 5"),
        ((*SIZES, "--level", 6, "--trtexec"), "--level 6: TensorRT's optimisation levels are 0 to 5"),
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
        (".", "not a model file"),
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


@pytest.mark.parametrize(
    ("arguments", "profile"),
    [
        ((1,), "1:1:1"),
        ((4,), "1:1:1, 2:4:4"),
        ((64,), "1:1:1, 2:5:8, 9:32:64"),
        ((64, "--min", 8), "8:8:64"),
        ((9, "--opt", 2), "1:2:9"),
    ],
)
def test_only_the_largest_group_must_be_named(icnet, model_file, tmp_path, arguments, profile):
    command = ("build", "--onnx", model_file, "--output", tmp_path / "x.engine", "--max", *arguments)
    code, out, _ = icnet(*command)
    assert code == 0
    assert out.endswith(f"groups of {profile}\n")


def test_packed_and_bank_exports(icnet, exports, tmp_path):
    for kind, options, says in [
        ("packed", ("--max", 64), "groups of 1:1:1, 2:5:8, 9:32:64"),
        ("intra", ("--max", 16, "--min", 1), "groups of 1:5:16"),
        ("banked", ("--max", 16, "--max-bank", 300), "groups of 1:1:1, 2:5:8, 9:16:16, banks of 1:20:300"),
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
    assert "[tensorrt]', or [tensorrt-rtx] for GeForce and RTX GPUs" in err
    assert err.count("\n") == 1

    def broken(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_library.importlib, "import_module", broken)
    with pytest.raises(DependencyError, match=r"tensorrt is installed but can't be loaded: libnvinfer\.so\.10"):
        tensorrt_library.load_first()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_on_the_command_line(icnet, model_file, tmp_path, monkeypatch, number, expected):
    monkeypatch.setattr(command_module, "Progress", lambda **_: Spy(lambda: signal.raise_signal(number)))
    code, _, err = icnet("build", "--onnx", model_file, "--output", tmp_path / "x.engine", *SIZES)
    assert code == expected
    assert err == "\nicnet build: stopped\n"
    assert names(tmp_path) == []


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


def test_the_script_is_the_command(model_file, tmp_path):
    command = [
        sys.executable,
        command_module.__file__,
        "--onnx",
        model_file,
        "--output",
        tmp_path / "x.engine",
        *SIZES,
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "groups of 1:2:4" in done.stdout
    assert done.stderr == ""
    assert names(tmp_path) == ["x.engine", "x.engine.json"]
