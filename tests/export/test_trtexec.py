"""`icnet build --trtexec`: the command lines for NVIDIA's builder."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.export.engines import SIZES, foreign_model, names

pytestmark = pytest.mark.usefixtures("only_rtx")


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
        "--noTF32",
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


def test_trtexec_with_tf32_a_level_and_gaps(icnet, model_file, tmp_path, no_tensorrt):
    build = ("build", "--onnx", model_file, "--output", "x", "--tf32", "--level", 5, "--trtexec")
    code, out, _ = icnet(*build, "--max", 64)
    assert code == 0
    arguments = trtexec(out)[11]
    assert "--noTF32" not in arguments
    assert "--builderOptimizationLevel=5" in arguments
    assert [a for a in arguments if a.startswith("--profile")] == ["--profile=0", "--profile=1", "--profile=2"]
    _, out, _ = icnet(*build, "--profile", "1:1:2", "--profile", "2:4:5", "--profile", "9:9:9")
    notes = [line for line in out.splitlines() if line.startswith("# note")]
    assert notes == [
        "# note: groups of 6 to 8 are in no profile, so the engine refuses them",
        "# note: profiles 1:1:2 and 2:4:5 overlap; of several, the one with the smallest MAX is used",
    ]


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


def test_the_page_shows_what_is_printed(icnet, model_file, tmp_path, monkeypatch, no_tensorrt):
    page = (Path(__file__).parents[2] / "docs/gpu.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if "--trtexec`" in line).split("`")
    words = next(part for part in command if part.endswith("--trtexec")).split()
    (shown,) = re.findall(r"```\n(# TensorRT 10\n.*?)```", page, re.DOTALL)
    (tmp_path / "icnet.fp16.onnx").symlink_to(model_file)
    monkeypatch.chdir(tmp_path)
    code, out, _ = icnet(*words[1:])
    assert code == 0
    assert trtexec(shown.replace("\\\n", " ")) == trtexec(out)


def test_trtexec_of_a_bank_export(icnet, exports, no_tensorrt):
    model = exports.with_name("icnet.banked.onnx")
    _, out, _ = icnet(
        "build", "--onnx", model, "--output", "x.engine", "--min", 1, "--max", 4, "--max-bank", 300, "--trtexec"
    )
    assert "--maxShapes=images:4x224x224x3,sisms:4x224x224,bank:300x40" in out
    assert "--optShapes=images:4x224x224x3,sisms:4x224x224,bank:20x40" in out
    _, out, _ = icnet(
        "build", "--onnx", exports.with_name("icnet.packed.onnx"), "--output", "x", "--max", 9, "--trtexec"
    )
    assert "--maxShapes=images:9x224x224x3,sisms:9x224x224,groups:9 " in out


def test_the_page_on_gpus_shows_what_is_printed(icnet, model_file, tmp_path, monkeypatch):
    (tmp_path / "icnet.fp16.onnx").write_bytes(model_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    options = ("--onnx", "icnet.fp16.onnx", "--output", "icnet.engine", "--max", 64)
    code, out, _ = icnet("build", *options, "--trtexec")
    assert code == 0
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"icnet build {' '.join(map(str, options))}\n" in page
    assert " ".join(out.split()) in " ".join(page.replace("\\\n", " ").split())
