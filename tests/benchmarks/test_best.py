"""`icnet bench latency --best`: what it makes, leaves out and names."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import best
from evaluation.metrics import Metrics


@pytest.fixture
def data(tmp_path):
    """Two groups of one image with SISMs and ground truths."""
    rng = np.random.default_rng(0)
    for group in ("a", "b"):
        for kind, shape in (("img", (48, 64, 3)), ("sism", (48, 64)), ("gt", (48, 64))):
            path = tmp_path / "data" / kind / group / "x.png"
            path.parent.mkdir(parents=True)
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels if kind != "gt" else np.where(pixels > 127, 255, 0).astype(np.uint8)).save(path)
    return tmp_path / "data"


def test_everything_installed_is_made_scored_and_raced(icnet, exports, data, tmp_path):
    output = tmp_path / "results.json"
    code, out, _ = icnet(
        *("bench", "latency", exports, "--best", "--data", data, "--max-drop", 0.9),
        *("--sizes", 1, "--rounds", 3, "--threads", 1, "--output", output),
    )
    assert code == 0
    (group,) = json.loads(output.read_text())["groups"]
    expected = {best.FIRST, "onnxruntime.int8.onnx"}
    for package, files in {
        "MNN": {"mnn.fp32.mnn"},
        "openvino": {"openvino.fp32.xml", "openvino.int8.fp32.xml"},
    }.items():
        if find_spec(package):
            expected |= files
    assert expected <= {*group["runners"]}
    winner = min(group["runners"], key=lambda name: group["runners"][name]["median_s"])
    assert winner in out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("icnet ")]
    assert commands[0][:2] == ["icnet", "export"]
    assert all("/tmp" not in word or word == str(data) for command in commands for word in command)
    assert commands[-1][commands[-1].index("--output") + 1] == winner


def test_what_loses_too_much_or_can_not_be_made_is_left_out(icnet, exports, data, monkeypatch):
    made, real = best._make, best.candidates

    def make(candidate):
        return "it is not installed" if candidate.path.suffix == ".mnn" else made(candidate)

    def score(value):
        return Metrics(1, 0, 0.1, value, value, value, *np.zeros((3, 256)))

    scores = iter([score(0.9), *[score(0.8)] * 9])
    monkeypatch.setattr(best, "_make", make)
    monkeypatch.setattr(best, "evaluate", lambda *_: next(scores))
    monkeypatch.setattr(best, "candidates", lambda *a: [c for c in real(*a) if "int8" not in c.path.name])
    code, out, _ = icnet(
        *("bench", "latency", exports, "--best", "--data", data, "--sizes", 1, "--rounds", 3, "--threads", 1)
    )
    assert code == 0
    assert "mnn.fp32.mnn: left out: it is not installed" in out
    if find_spec("openvino"):
        assert "openvino.fp32.xml: left out: loses 0.1000 of S or max F, more than 0.005" in out
    assert "1 images can't tell a drop of 0.005 for sure" in out


def test_half_of_the_groups_calibrate_and_the_others_score(data, tmp_path):
    dataset, folder = best._halves(data, tmp_path / "calibration")
    assert [group.name for group in dataset.groups] == ["b"]
    assert [path.relative_to(folder) for path in sorted(folder.rglob("*.png"))] == [
        Path("img/a/x.png"), Path("sism/a/x.png"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--best takes one ONNX export or a --checkpoint"),
        (("MODEL", "--only", "ours"), "--best takes one ONNX export"),
        (("MODEL", "--max-drop", 0.1), "give --data"),
    ],
)
def test_options_that_do_not_go_together(icnet, exports, arguments, message):
    code, out, err = icnet("bench", "latency", "--best", *(exports if a == "MODEL" else a for a in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_data_goes_with_best(icnet, exports, data):
    code, _, err = icnet("bench", "latency", exports, "--data", data)
    assert code == 2
    assert "--data and --max-drop go with --best" in err
