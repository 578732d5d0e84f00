import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.agreement import precision_of
from benchmarks.machine import Work, matrix_product, peak_memory
from benchmarks.runners import GPU_RUNNERS, RUNNERS, Died, Setting, alone, inputs
from export.to_onnx import write_onnx
from runtime import DependencyError, ModelError
from tests.helpers import random_network


def test_every_runner_runs_what_it_is_called(prepared, tmp_path):
    """Each is told from the others by its maps, when each reads a file of its own."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    write_onnx(random_network(seed=1), tmp_path / "icnet.onnx")
    maps = {}
    for label in ("paper, PyTorch", "ours, PyTorch", "paper, ONNX Runtime", "ours, ONNX Runtime"):
        with RUNNERS[label].start(Setting(tmp_path, 1, [2])) as runner:
            maps[label] = runner(*inputs(2))
    others = [m for label, m in maps.items() if label != "ours, ONNX Runtime"]
    assert all(np.abs(m - others[0]).mean() < 5e-3 for m in others)
    assert np.abs(maps["ours, ONNX Runtime"] - others[0]).mean() > 1e-2


def test_openvino_computes_what_the_paper_does(prepared):
    pytest.importorskip("openvino")
    maps = []
    for label in ("paper, PyTorch", "ours, OpenVINO", "ours, OpenVINO BF16", "ours, OpenVINO by hand"):
        with RUNNERS[label].start(Setting(prepared, 1, [2])) as runner:
            maps.append(runner(*inputs(2)))
    differences = [np.abs(m - maps[0]).mean() for m in maps]
    assert differences[1] < 1e-3
    assert max(differences) < 2e-2
    for precision in ("fp32", "bf16"):
        assert precision_of(prepared / f"icnet.{precision}.xml") == precision


def test_torch_compile_without_a_compiler(prepared, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    start = RUNNERS["ours, torch.compile"].start(Setting(prepared, 1, [1]))
    with pytest.raises(DependencyError, match="a C\\+\\+ compiler, and there is no no-such-compiler"), start:
        pass


@pytest.mark.parametrize(
    ("name", "content", "beside", "precision"),
    [
        ("x.engine", b"\0", {"onnx_metadata": {"precision": "fp16"}}, "fp16"),
        ("x.engine", b"\0", {"onnx_metadata": {"precision": "fp32"}, "options": {"tf32": False}}, "fp32"),
        ("x.engine", b"\0", {"onnx_metadata": {"precision": "fp32"}, "options": {"tf32": True}}, "tf32"),
        ("x.mnn", b"\0", None, "winograd"),
        ("x.engine", b"\0", None, "int8"),
        ("x.engine", b"\0", {"onnx_metadata": None}, "int8"),
        ("x.onnx", b"", None, "int8"),
    ],
)
def test_the_precision_that_a_file_notes(tmp_path, name, content, beside, precision):
    (tmp_path / name).write_bytes(content)
    if beside:
        (tmp_path / f"{name}.json").write_text(json.dumps(beside, indent=2))
    assert precision_of(tmp_path / name) == precision


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("end", "why"), [("os.abort()", "killed by signal 6"), ("os._exit(3)", "its process failed")])
def test_a_process_of_its_own_that_dies(tmp_path, monkeypatch, end, why):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport os\n{end}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Died, match=why):
        alone("anything", Setting(tmp_path, 1, [1]), 1)


def test_a_process_of_its_own_that_fails(tmp_path):
    with pytest.raises(ModelError, match=r"^no such model file"):
        alone(str(tmp_path / "absent.onnx"), Setting(tmp_path, 1, [1]), 1)


def test_peak_memory_sees_what_was_allocated_and_freed():
    before = peak_memory()
    block = np.ones(max(0, before - _resident()) // 8 + 25_000_000)  # 200 MB above the peak so far
    del block
    assert peak_memory() > before + 150e6


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_no_engine_is_built_where_none_can_run(built, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    start = GPU_RUNNERS["ours, TensorRT FP32"].start(Setting(tmp_path, 1, [1]))
    with pytest.raises(DependencyError, match="pycuda is not installed"), start:
        pass
    assert built == []


def test_pytorchs_maps_are_the_callers_own(prepared):
    for label in (label for label in GPU_RUNNERS if "PyTorch" in label):
        with GPU_RUNNERS[label].start(Setting(prepared, 1, [1, 3])) as runner:
            maps = runner(*inputs(3))
            before = maps.copy()
            assert np.abs(runner(*inputs(1)) - maps[:1]).mean() > 1e-4
            np.testing.assert_array_equal(maps, before)
            assert (maps.dtype, maps.shape) == (np.float32, (3, 224, 224))


def test_a_gpus_memory_is_watched_from_outside(monkeypatch):
    free = iter([1000, *range(900, 400, -100), *[950] * 10**6])  # the process takes up to 500, and gives it back
    monkeypatch.setattr(gpu, "free_memory", lambda: next(free))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"], text=True) as process:
        assert gpu.most_memory(process) == 500


@pytest.mark.parametrize("slower", ["_by_pytorch", "_by_onnxruntime"])
def test_a_matrix_product_is_as_large_as_it_says_and_the_faster_one(slower, monkeypatch):
    monkeypatch.setattr(f"benchmarks.machine.{slower}", lambda *_: Work(1, lambda: time.sleep(0.1)))
    work = matrix_product("cpu", 1)
    assert work.amount == 2 * 64**3
    with FlopCounterMode(display=False) as counter:
        work.run()
    assert counter.get_total_flops() == (work.amount if slower == "_by_onnxruntime" else 0)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), (" Tesla T4/", "tesla_t4"), ("显卡", "unknown")],
)
def test_a_gpus_name_for_a_file(name, slug):
    assert gpu.slug(name) == slug
