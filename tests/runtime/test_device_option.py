"""--device of the commands that run models."""

import pytest

from runtime.backends import onnx as backend
from runtime.backends.onnx import CPU, OnnxBackend
from runtime.commands.device import place
from runtime.files import bank_files
from tests.helpers import BIRDS
from tests.simulated_gpu import Gpu, install

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


def command(name, model, output):
    """The command line of one that runs a model."""
    if name == "evaluate":
        data = BIRDS.parent / "pasted"
        return ("evaluate", data, "--models", model, "--output", output)
    return (name, BIRDS, "--model", model, "--sisms", "builtin", "--output", output)


@pytest.fixture
def asked(monkeypatch):
    """The providers that models were opened with; the CPU's takes the place of any."""
    asked = []
    real = OnnxBackend.__init__

    def opened(self, path, threads=None, providers=(CPU,)):
        asked.append(list(providers))
        real(self, path, threads)

    monkeypatch.setattr(OnnxBackend, "__init__", opened)
    return asked


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [CPU]),
        (("--device", "cpu"), [CPU]),
        (("--device", "cuda"), [CUDA]),
        (("--device", "tensorrt"), [TENSORRT, CUDA]),
    ],
)
@pytest.mark.parametrize("name", ["predict", "bank"])
def test_the_option_chooses_the_provider(icnet, exports, asked, tmp_path, name, options, expected):
    """The bank export beside a model runs there, too."""
    path = exports
    assert icnet(*command(name, path, tmp_path / "out.npz"), *options)[0] == 0
    assert asked == [expected] * (3 if name == "predict" else 2)
    assert all(file.exists() for file in bank_files(path))


def test_evaluate_takes_it(icnet, exports, asked, tmp_path):
    assert icnet(*command("evaluate", exports, tmp_path / "x.json"), "--device", "cuda")[0] == 0
    assert asked == [[CUDA]]


@pytest.mark.parametrize("name", ["predict", "bank", "evaluate"])
def test_an_onnxruntime_without_cuda_is_one_line(icnet, exports, tmp_path, monkeypatch, name):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    code, _, err = icnet(*command(name, exports, tmp_path / "out.npz"), "--device", "cuda")
    assert code == 2
    assert err.startswith(f"icnet {name}: error: {CUDA}: not in this onnxruntime")
    assert "replace onnxruntime by onnxruntime-gpu (never both)" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_cuda_goes_through_the_bindings(icnet, exports, tmp_path, monkeypatch):
    """On a GPU, simulated by the CPU's provider, a call's tensors lie in page-locked memory."""
    gpu = install(Gpu(), monkeypatch)
    monkeypatch.setattr(backend, "CUDA", (CPU,))
    monkeypatch.setattr(backend, "DEVICE", "cpu")
    monkeypatch.setitem(place.__globals__["PROVIDERS"], "cuda", [CPU])
    assert icnet(*command("predict", exports, tmp_path / "out"), "--device", "cuda")[0] == 0
    assert gpu.made["page-locked memory"] > 0
    assert gpu.leaks() == {}


@pytest.mark.parametrize(
    ("file", "device", "message"),
    [
        ("icnet.engine", "cpu", "a TensorRT engine runs on the GPU; leave out --device"),
        ("icnet.plan", "cuda", "a TensorRT engine runs on the GPU; leave out --device"),
        ("icnet.mnn", "cuda", "an MNN file runs on the CPU; leave out --device"),
    ],
)
def test_files_that_run_elsewhere(icnet, tmp_path, file, device, message):
    path = tmp_path / file
    path.write_bytes(b"x")
    code, _, err = icnet(*command("predict", path, tmp_path / "out"), "--device", device)
    assert code == 2
    assert f"{path}: --device {device}: {message}" in err
    assert err.count("\n") == 1
