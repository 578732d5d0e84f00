import json
from pathlib import Path

import numpy as np

from benchmarks.contenders import CONTENDERS, inputs, peak_memory


def test_icnet_bench_races_every_contender_on_the_same_inputs(icnet, checkpoint, tmp_path):
    path = tmp_path / "results" / "latency.json"
    arguments = ("--checkpoint", checkpoint, "--sizes", 1, 3, "--rounds", 2, "--output", path)
    code, out, _ = icnet("bench", *arguments)
    assert code == 0
    assert all(label in out for label in CONTENDERS)
    results = json.loads(path.read_text())
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
    from conftest import random_network

    from benchmarks.latency import prepare
    from export.checkpoint import save_checkpoint
    from export.to_onnx import write_onnx

    save_checkpoint(tmp_path / "x.pth", network)
    prepare(tmp_path, tmp_path / "x.pth")
    write_onnx(random_network(seed=1), tmp_path / "icnet.onnx")
    maps = {label: start(tmp_path, 1)(*inputs(2)) for label, start in CONTENDERS.items()}
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
