"""`icnet bench gpu-check` on the simulated GPU, where all of it runs; and what it says where something is missing."""

import json
import sys
from functools import partial

import numpy as np
import pytest

from benchmarks import gpu_check, gpu_checks, gpu_subject
from benchmarks.gpu_check import perform
from benchmarks.gpu_checks import Check
from benchmarks.gpu_subject import Subject
from export.checkpoint import save_checkpoint
from runtime import DependencyError
from runtime.backends import onnx as onnx_backend
from runtime.backends.onnx import CPU
from tests import simulated_gpu
from tests.helpers import random_network

NAMES = {
    "page-locked copies", "copies from the driver's memory", "captured copies", "TensorRT FP32",
    "TensorRT FP32 with TF32", "TensorRT FP16", "TensorRT INT8", "CUDA graphs on and off", "packed groups", "kept bank",
    "group in chunks", "stream of mixed sizes", "memory of a long stream", "ONNX Runtime CPU FP32",
    "ONNX Runtime CPU FP16", "ONNX Runtime CPU: convolutions on the GPU",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "icnet.pth"
    save_checkpoint(path, random_network(1 / 32))
    return path


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    """Exports and the CPU's maps, made once."""
    return Subject(tmp_path_factory.mktemp("subject"), weights, calls=8)


@pytest.fixture
def subject(made, tmp_path, monkeypatch):
    """The same, with engines of its own."""

    def engine(precision, kind="plain", tf32=False):
        path = tmp_path / f"{precision}.{kind}.{tf32}.engine"
        gpu_subject.build_engine(made.onnx(precision, kind), path, gpu_subject.PROFILES, None)
        return path

    monkeypatch.setattr(made, "engine", engine)
    return made


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with TensorRT; its memory is what is allocated there. The CPU's provider is taken for CUDA's."""
    gpu = simulated_gpu.install(simulated_gpu.Gpu(), monkeypatch)
    built = []

    def build_engine(onnx_path, output, profiles, options):
        ranges = [(p.min, p.opt, p.max) for p in profiles]
        if "banked" in output.name:
            bank = gpu_subject.BANKS
            ranges = [{"images": r, "sisms": r, "bank": (bank.min, bank.opt, bank.max)} for r in ranges]
        built.append(options)
        simulated_gpu.engine_file(output, onnx_path, ranges)

    monkeypatch.setattr(gpu_subject, "build_engine", build_engine)
    monkeypatch.setattr(gpu_checks, "used_gpu_memory", lambda: sum(a.size for a in gpu.allocations.values()))
    monkeypatch.setattr(gpu_checks, "CUDA", CPU)
    monkeypatch.setattr(gpu_checks, "PROVIDERS", {"onnxruntime": CPU})
    monkeypatch.setattr(onnx_backend, "CUDA", (CPU,))
    monkeypatch.setattr(onnx_backend, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_checks, "_times", lambda run: {"median_s": 0.001})
    gpu.built = built
    return gpu


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """The driver's tool, which tells of a card."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'NVIDIA Test-1, 8.9, 580.65.06, 24564'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")


@pytest.fixture
def no_gpu(monkeypatch):
    def no_driver():
        raise DependencyError("no NVIDIA driver on this machine (libcuda.so.1): a GPU is needed")

    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setattr("runtime.backends.cuda_driver.load_driver", no_driver)
    monkeypatch.setattr(gpu_check, "_ask_driver", list)


def outcome(run, subject):
    row = perform(Check("x", run, lambda: None), subject)
    return row["outcome"], row.get("why", "")


def test_everything_runs_and_passes_on_a_gpu(icnet, gpu, smi, weights, tmp_path):
    folder = tmp_path / "results"
    code, out, _ = icnet(
        "bench", "gpu-check", "--checkpoint", weights, "--groups", 8, "--output", folder / "gpu_check_x.json"
    )
    results = json.loads((folder / "gpu_check_x.json").read_text())
    assert {row["name"]: row["outcome"] for row in results["checks"]} == dict.fromkeys(NAMES, "passed")
    assert code == 0
    assert "green: 16 of 16 checks passed, of tensorrt and onnxruntime" in out
    assert (results["machine"]["gpu"], results["machine"]["compute_capability"]) == ("NVIDIA Test-1", "8.9")
    assert (results["machine"]["driver"], results["machine"]["gpu_memory_bytes"]) == ("580.65.06", 24564 << 20)
    for row in results["checks"]:
        assert row["figures"].get("mean_difference", 0) <= row["figures"].get("bound", 0)
    assert sum(options.tf32 for options in gpu.built) == 1
    assert gpu.leaks() == {}

    page = tmp_path / "page.md"
    page.write_text("<!-- results: gpu_check_x -->\n<!-- end of results -->\n")
    assert icnet("bench", "report", page, "--results", folder)[0] == 0
    assert "| TensorRT FP16 | passed |" in page.read_text()
    assert "NVIDIA Test-1" in page.read_text()


def test_without_a_gpu_it_is_red_and_names_what_is_missing(icnet, no_gpu, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    code, out, _ = icnet("bench", "gpu-check", "--checkpoint", weights)
    assert code == 1
    assert "red: 0 of 16 checks passed" in out
    assert "could not: pycuda is not installed: pip install" in out
    assert "could not: no NVIDIA driver on this machine (libcuda.so.1)" in out
    assert [*tmp_path.iterdir()] == []


def test_onnxruntime_without_cuda_is_red(icnet, gpu, smi, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "CUDA", "CUDAExecutionProvider")
    monkeypatch.setattr(gpu_checks, "PROVIDERS", {"onnxruntime": "CUDAExecutionProvider"})
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    output = tmp_path / "x.json"
    code, out, _ = icnet("bench", "gpu-check", "--checkpoint", weights, "--engine", "onnxruntime", "--output", output)
    assert code == 1
    assert "could not: this onnxruntime has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip" in out
    assert {row["outcome"] for row in json.loads(output.read_text())["checks"]} == {"could not"}


def test_wrong_maps_fail(gpu, subject, tmp_path, monkeypatch):
    """An engine of another network of the same kind, whose maps are plausible."""
    other = tmp_path / "other.pth"
    save_checkpoint(other, random_network(1 / 32, seed=1))
    foreign = Subject(tmp_path, other, 8).onnx("fp32")
    assert len(subject.expected) == len(subject.groups)  # the CPU's maps, of the right network
    monkeypatch.setattr(subject, "onnx", lambda *_: foreign)
    found, why = outcome(partial(gpu_checks.engine_maps, "fp16", False), subject)
    assert found == "failed"
    assert "where rounding explains" in why


def test_without_tensorrt_no_engine_is_a_success(gpu, subject, monkeypatch):
    def missing(*_):
        raise DependencyError("TensorRT is not installed: pip install 'icnet-deploy[tensorrt]'")

    monkeypatch.setattr(gpu_subject, "build_engine", missing)
    found, why = outcome(partial(gpu_checks.engine_maps, "fp16", False), subject)
    assert (found, why) == ("could not", "TensorRT is not installed: pip install 'icnet-deploy[tensorrt]'")


def test_maps_that_are_not_finite_fail(subject):
    broken = [np.full_like(maps, np.nan) for maps in subject.expected]
    assert outcome(lambda s: s.judge("fp16", broken), subject)[0] == "failed"
    assert outcome(lambda s: s.judge("fp16", subject.expected), subject)[0] == "passed"


def test_a_stream_that_keeps_memory_fails(gpu, subject, monkeypatch):
    used = iter([0, gpu_checks.MAX_GROWTH + 1])
    monkeypatch.setattr(gpu_checks, "used_gpu_memory", lambda: next(used))
    found, why = outcome(gpu_checks.long_stream, subject)
    assert (found, why) == ("failed", "the GPU's memory grew by 64 MiB in 8 groups")


@pytest.mark.parametrize("run", [gpu_checks.captured_copies, gpu_checks.graphs_on_and_off])
def test_graphs_that_can_not_be_captured_are_no_success(gpu, subject, run, monkeypatch):
    simulated_gpu.install(simulated_gpu.Gpu(bindings=False), monkeypatch)
    found, why = outcome(run, subject)
    assert found == "could not"
    assert why.startswith("cuda-bindings is not installed")


def test_convolutions_on_the_cpu_fail(subject, monkeypatch):
    """The profile tells where a node was computed."""
    monkeypatch.setattr(gpu_checks.json, "loads", lambda text: [
        {"name": "a_kernel_time", "args": {"op_name": "Conv", "provider": "CUDAExecutionProvider"}},
        {"name": "b_kernel_time", "args": {"op_name": "FusedConv", "provider": CPU}},
    ])  # fmt: skip
    found, why = outcome(partial(gpu_checks.onnxruntime_convolutions, CPU), subject)
    assert (found, why) == ("failed", f"1 of 2 convolutions were not computed by {CPU}")


def test_a_copy_that_changes_fails(gpu, subject, monkeypatch):
    monkeypatch.setattr("runtime.backends.cuda.Cuda.copy_out", lambda *_: None)
    assert outcome(gpu_checks.page_locked_copies, subject)[0] == "failed"
    assert outcome(gpu_checks.driver_copies, subject)[0] == "failed"
