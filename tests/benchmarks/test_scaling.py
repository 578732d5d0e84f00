import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import scaling
from benchmarks.describe import PAGES
from benchmarks.render import to_markdown, to_png


def test_icnet_scaling(icnet, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "available_memory", lambda: 10**12)
    output = tmp_path / "x.json"
    code, out, _ = icnet(
        "bench", "scaling", model_file, "--sizes", 1, 4, 6, "--calls", 2, "--threads", 1, "--output", output
    )
    assert code == 0
    (found,) = json.loads(output.read_text())["models"]
    assert [row["n"] for row in found["sizes"]] == [1, 4, 6]
    assert all(row["first_map_s"] > row["median_s"] > 0 for row in found["sizes"])
    assert found["memory_per_image_bytes"] > 224 * 224 * 4
    assert "per image" in out


def test_scaling_in_chunks_and_by_packed_groups(icnet, exports, tmp_path):
    """The exports lie beside the model: what is larger than a chunk runs both ways, and groups share calls."""
    output = tmp_path / "scaling_x.json"
    options = ("--sizes", 2, 12, "--calls", 2, "--chunk", 2, "--packs", 1, 3, "--pack-size", 2, "--threads", 1)
    code, out, _ = icnet("bench", "scaling", exports, *options, "--output", output)
    assert code == 0
    results = json.loads(output.read_text())
    plain, chunked = results["models"]
    assert [row["n"] for row in plain["sizes"]] == [2, 12]
    assert chunked["name"] == "icnet.onnx, chunks of 2"
    assert [row["n"] for row in chunked["sizes"]] == [12]
    assert chunked["sizes"][0]["peak_memory_bytes"] < plain["sizes"][1]["peak_memory_bytes"]
    assert [(row["groups"], row["images"]) for row in plain["packs"]] == [(1, 2), (3, 6)]
    for row in plain["packs"]:
        assert row["mean_difference"] < 1e-3
        assert row["ratio"] == pytest.approx(row["one_by_one_s"] / row["packed_s"])
        assert row["peak_memory_bytes"] > 30e6  # of a whole process
    assert "icnet.onnx, groups of 2 in one call of its packed export, and one by one" in " ".join(out.split())
    page = PAGES["scaling"](results)
    to_png(page.plot, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as plot:
        assert plot.width > 3 * plot.height  # three panels
    text = "\n".join(to_markdown(page, "x.png"))
    assert "icnet.onnx, groups of 2 in one call of its packed export" in text


def test_a_size_that_would_not_fit_is_not_tried(icnet, model_file, tmp_path, monkeypatch):
    def alone(name, setting, n, calls):
        assert n < 300
        return {"first_map_s": 1.0, "times_s": [0.1 * n], "peak_memory_bytes": 10**8 + n * 10**8}

    monkeypatch.setattr(scaling, "alone", alone)
    monkeypatch.setattr(scaling, "available_memory", lambda: 20 * 10**9)
    output = tmp_path / "x.json"
    code, out, _ = icnet("bench", "scaling", model_file, "--sizes", 300, 10, 5, 1, "--output", output)
    assert code == 0
    (found,) = json.loads(output.read_text())["models"]
    assert found["not_run"] == {"300": "would take 30 GB; 20 GB are free, of which a size may take 80%"}
    assert found["time_per_image_s"] == pytest.approx(0.1)
    assert found["memory_per_image_bytes"] == pytest.approx(1e8)
    assert "group of 300: would take 30 GB" in out


def test_if_no_model_runs_there_is_an_error_and_no_results(icnet, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"junk")
    output = tmp_path / "x.json"
    code, _, err = icnet("bench", "scaling", tmp_path / "x.onnx", "--sizes", 1, 2, "--output", output)
    assert (code, err.count("\n")) == (2, 1)
    assert "x.onnx: not an ONNX model" in err
    assert not output.exists()


def test_scaling_that_is_interrupted_keeps_what_it_has(icnet, model_file, tmp_path, monkeypatch):
    def alone(name, setting, n, calls):
        if n == 3:
            raise KeyboardInterrupt
        return {"first_map_s": 1.0, "times_s": [0.1 * n], "peak_memory_bytes": n}

    monkeypatch.setattr(scaling, "alone", alone)
    code, out, _ = icnet("bench", "scaling", model_file, "--sizes", 1, 2, 3, 4, "--output", tmp_path / "x.json")
    assert code == 130
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["interrupted"]
    assert [row["n"] for row in results["models"][0]["sizes"]] == [1, 2]
    assert "interrupted: this is what was measured" in out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory it has")
def test_memory_does_not_grow_with_the_number_of_groups(exports):
    """In a process of its own: resident memory at the end, as a multiple of that half way."""
    program = """
import sys
from benchmarks.runners import inputs
from runtime import Predictor

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

with Predictor(sys.argv[1], threads=1) as predictor:
    groups = [inputs(n) for n in (1, 2, 3, 5, 8)]
    for i in range(60):
        predictor.predict_tensors(*groups[i % 5])
        if i == 29:
            half = resident()
    print(resident() / half)
"""
    done = subprocess.run([sys.executable, "-c", program, exports], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.02  # allocators vary by less
