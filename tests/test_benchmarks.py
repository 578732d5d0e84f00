import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import simulated_gpu
import torch
from conftest import random_network

from benchmarks import gpu, latency
from benchmarks.contenders import CONTENDERS, GPU_CONTENDERS, Setting, inputs, peak_memory
from benchmarks.gpu import Gpu
from benchmarks.latency import prepare
from export.checkpoint import save_checkpoint
from export.to_onnx import write_onnx
from runtime import DependencyError


def test_icnet_bench_races_every_contender_on_the_same_inputs(icnet, checkpoint, tmp_path):
    path = tmp_path / "results" / "latency.json"
    arguments = ("--checkpoint", checkpoint, "--sizes", 1, 3, "--rounds", 2, "--output", path)
    code, out, _ = icnet("bench", *arguments)
    assert code == 0
    assert all(label in out for label in CONTENDERS)
    results = json.loads(path.read_text())
    assert results["not_run"] == {}
    assert [group["n"] for group in results["groups"]] == [1, 3]
    for group in results["groups"]:
        assert list(group["contenders"]) == list(CONTENDERS)
        base = group["contenders"]["paper, PyTorch"]["median_s"]
        for row in group["contenders"].values():
            assert row["ratio"] == base / row["median_s"]
            assert row["median_s"] <= row["p90_s"]
            assert row["mean_difference"] < 5e-3  # nobody computes something else
            assert 20e6 < row["peak_memory_bytes"] < 2e9
    assert {"cpu", "threads", "date", "torch", "onnxruntime"} <= set(results["machine"])


def test_every_contender_runs_what_it_is_called(tmp_path, network):
    """Each is told from the others by its maps, when each reads a file of its own."""
    save_checkpoint(tmp_path / "x.pth", network)
    prepare(tmp_path, tmp_path / "x.pth")
    write_onnx(random_network(seed=1), tmp_path / "icnet.onnx")
    maps = {}
    for label, start in CONTENDERS.items():
        with start(Setting(tmp_path, 1, [2])) as runner:
            maps[label] = runner(*inputs(2))
    others = [m for label, m in maps.items() if label != "ours, ONNX Runtime"]
    assert all(np.abs(m - others[0]).mean() < 5e-3 for m in others)
    assert np.abs(maps["ours, ONNX Runtime"] - others[0]).mean() > 1e-2


def test_peak_memory_sees_what_was_allocated_and_freed():
    before = peak_memory()
    block = np.ones(max(0, before - _resident()) // 8 + 25_000_000)  # 200 MB above the peak so far
    del block
    assert peak_memory() > before + 150e6


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_options_below_1(icnet):
    code, _, err = icnet("bench", "--sizes", 0)
    assert code == 2
    assert err == "icnet bench: error: --sizes, --rounds and --threads take numbers from 1 (--threads to 1024)\n"


# The GPU's race. PyTorch stays on the CPU, TensorRT's engines run on a simulated GPU.


@pytest.fixture
def card(monkeypatch):
    card = Gpu("NVIDIA GeForce RTX 4090", "8.9", "580.65.06", 24 << 30, device="cpu")
    monkeypatch.setattr(gpu, "find", lambda: card)
    monkeypatch.setattr(gpu, "SIDE", 64)
    return card


@pytest.fixture
def built(monkeypatch):
    """Engines that the simulated TensorRT was asked to build: (file, profiles)."""
    built = []

    def build_engine(onnx_path, output, profiles):
        built.append((output.name, [str(profile) for profile in profiles]))
        simulated_gpu.engine_file(output, onnx_path, [(p.min, p.opt, p.max) for p in profiles])

    monkeypatch.setattr("export.build_engine.build_engine", build_engine)
    return built


def test_the_race_on_a_gpu(icnet, checkpoint, card, built, tmp_path, monkeypatch):
    simulated = simulated_gpu.install(simulated_gpu.Gpu(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    options = ("--sizes", 3, 1, "--rounds", 2, "--threads", 1, "--no-memory")
    code, out, _ = icnet("bench", "--device", "cuda", "--checkpoint", checkpoint, *options)
    assert code == 0
    path = Path("benchmarks/results/gpu_nvidia_geforce_rtx_4090.json")
    assert f"{path}: written" in out
    results = json.loads(path.read_text())

    absent = {label for label in GPU_CONTENDERS if "ONNX Runtime" in label}  # this onnxruntime is the CPU's
    assert set(results["not_run"]) == absent
    for label in absent:
        assert "CUDAExecutionProvider: not in this onnxruntime" in results["not_run"][label]
        assert f"not run: {label}: CUDAExecutionProvider" in out
    assert built == [(f"icnet{half}.engine", ["1:1:1", "2:3:3"]) for half in ("", ".fp16")]
    assert simulated.leaks() == {}  # all contenders were closed

    assert results["machine"]["gpu"] == card.name
    assert results["machine"]["compute_capability"] == "8.9"
    assert results["machine"]["driver"] == "580.65.06"
    assert {"cuda", "cudnn", "torch", "onnxruntime", "tensorrt-rtx", "date"} <= set(results["machine"])
    assert results["flop_per_image"] == gpu.flop_per_image(0.125)
    assert [group["n"] for group in results["groups"]] == [3, 1]
    for group in results["groups"]:
        assert list(group["contenders"]) == [label for label in GPU_CONTENDERS if label not in absent]
        base = group["contenders"]["paper, PyTorch FP32"]["median_s"]
        for label, row in group["contenders"].items():
            assert row["ratio"] == base / row["median_s"]
            assert row["images_per_s"] == group["n"] / row["median_s"]
            flops = results["flop_per_image"] * row["images_per_s"]
            assert row["share_of_matrix_product"] == flops / group["matrix_product_flop_per_s"]
            assert row["mean_difference"] < 2e-2
            assert row["mean_difference_from_cpu"] < (2e-2 if "FP16" in label else 5e-3)
            assert "peak_memory_bytes" not in row


@pytest.mark.parametrize(
    ("built_for", "message"),
    [(None, "it is built without CUDA; install PyTorch's CUDA build"), ("12.8", "no NVIDIA driver or GPU; see")],
)
def test_no_gpu_is_one_line(icnet, monkeypatch, tmp_path, built_for, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.chdir(tmp_path)
    code, out, err = icnet("bench", "--device", "cuda")
    assert (code, out) == (2, "")
    assert err.startswith("icnet bench: error: --device cuda: no GPU that PyTorch ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    """The folder of a race on a GPU."""
    folder = tmp_path_factory.mktemp("race")
    prepare(folder, checkpoint, half=True)
    return folder


def contender(run):
    @contextmanager
    def start(setting):
        yield run

    return start


def refusing(error):
    def start(setting):
        raise error

    return start


def grey(images, sisms):
    return np.full(sisms.shape, 0.5, np.float32)


def only_small_groups(images, sisms):
    if len(images) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    return grey(images, sisms)


@pytest.fixture
def race_of(card, network, prepared, monkeypatch):
    """Let other contenders race."""

    def prepare(folder, checkpoint, half):
        shutil.copy(prepared / "icnet.onnx", folder)
        return network

    def replace(contenders):
        monkeypatch.setattr(latency, "GPU_CONTENDERS", contenders)
        monkeypatch.setattr(latency, "prepare", prepare)

    return replace


def test_who_fails_on_the_way_is_listed_with_the_reason(card, race_of):
    contenders = {
        "first": contender(only_small_groups),
        "good": contender(grey),
        "broken": contender(lambda images, sisms: grey(images, sisms) * np.nan),
        "absent": refusing(DependencyError("not here")),
    }
    race_of(contenders)
    results = latency.race(None, [1, 2], 1, 1, card, memory=False)
    assert results["not_run"] == {
        "absent": "not here",
        "broken, group of 1": "its maps hold NaN or infinite values",
        "first, group of 2": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "broken, group of 2": "its maps hold NaN or infinite values",
    }
    one, two = (group["contenders"] for group in results["groups"])
    assert list(one) == ["first", "good"]
    assert one["good"]["mean_difference"] == 0
    assert list(two) == ["good"]
    assert (two["good"]["ratio"], two["good"]["mean_difference"]) == (None, None)
    assert two["good"]["mean_difference_from_cpu"] > 0
    json.dumps(results, allow_nan=False)


def test_without_the_first_contender_there_is_no_race(icnet, race_of, tmp_path):
    race_of({"first": refusing(RuntimeError("no kernel\nfor sm_30")), "good": contender(grey)})
    code, _, err = icnet("bench", "--device", "cuda", "--output", tmp_path / "x.json")
    assert code == 2
    reason = "RuntimeError: no kernel for sm_30"
    assert err == f"icnet bench: error: first does not run, and all others are compared with it: {reason}\n"
    assert list(tmp_path.iterdir()) == []


def test_no_engine_is_built_where_none_can_run(built, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    start = GPU_CONTENDERS["ours, TensorRT FP32"](Setting(tmp_path, 1, [1]))
    with pytest.raises(DependencyError, match="pycuda is not installed"), start:
        pass
    assert built == []


def test_pytorchs_maps_are_the_callers_own(prepared):
    for label in (label for label in GPU_CONTENDERS if "PyTorch" in label):
        with GPU_CONTENDERS[label](Setting(prepared, 1, [1, 3])) as runner:
            maps = runner(*inputs(3))
            before = maps.copy()
            assert np.abs(runner(*inputs(1)) - maps[:1]).mean() > 1e-4
            np.testing.assert_array_equal(maps, before)
            assert (maps.dtype, maps.shape) == (np.float32, (3, 224, 224))


def test_a_gpus_memory_is_watched_from_outside(card, prepared, monkeypatch):
    free = iter([1000, *range(900, 400, -100), *[950] * 10**6])  # the process takes up to 500, and gives it back
    monkeypatch.setattr(gpu, "free_memory", lambda: next(free))
    setting = Setting(prepared, 1, [1], "cpu")
    assert latency._peak_memory("ours, PyTorch FP16", setting, 1, card) == 500
    assert latency._peak_memory("ours, ONNX Runtime FP16", setting, 1, card) is None  # it fails here


def test_a_matrix_product_is_as_large_as_it_says(monkeypatch):
    monkeypatch.setattr(gpu, "SIDE", 16)
    flop, run = gpu.matrix_product("cpu")
    assert flop == 2 * 16**3
    with gpu.FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == flop


def test_what_the_papers_network_computes_per_image():
    assert gpu.flop_per_image(1.0) == pytest.approx(49.4e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), (" Tesla T4/", "tesla_t4"), ("显卡", "unknown")],
)
def test_a_gpus_name_for_a_file(name, slug):
    assert Gpu(name, "9.0", None, 1).slug == slug
