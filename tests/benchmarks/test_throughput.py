import json
import sys
import time

import pytest
from rich.progress import Progress

from benchmarks import throughput
from benchmarks.describe import PAGES
from benchmarks.render import to_markdown
from benchmarks.throughput import read_histogram, stream
from runtime import InputError, ModelError


class Slow:
    """A Predictor that takes 20 ms a group, and notes how many groups it has at once."""

    def __init__(self, error=None):
        self.at_once, self.most, self.order, self.error = 0, 0, [], error

    def predict_tensors(self, images, sisms):
        self.order.append(len(images))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(0.02)
        self.at_once -= 1
        if self.error and len(self.order) == 3:
            raise self.error


def run(predictor, sizes, arrivals, callers):
    return stream(predictor, sizes, arrivals, callers, Progress(disable=True), on_gpu=False)


def test_groups_wait_in_the_order_of_their_arrival():
    slow = Slow()
    found = run(slow, [3, 1, 2, 4], [0.001, 0.002, 0.003, 0.3], callers=1)
    assert slow.order == [3, 1, 2, 4]
    assert found["groups"] == 4
    assert found["images"] == 10
    assert found["queue_s"]["p99"] > 0.03  # the third waited for two
    assert found["latency_s"]["p99"] > found["queue_s"]["p99"]
    assert found["groups_per_s"] < 4 / 0.3
    assert found["idle_share"] > 0.5  # it sleeps


def test_all_at_once_keeps_every_caller_busy_and_nothing_waits():
    slow = Slow()
    found = run(slow, [1] * 12, [0.0] * 12, callers=3)
    assert slow.most == 3
    assert found["queue_s"]["p99"] == 0
    assert found["groups_per_s"] > 60  # three at once, 20 ms each: 150; one at once: 50


def test_a_group_that_fails_ends_the_stream():
    slow = Slow(ModelError("broken"))
    with pytest.raises(ModelError, match="broken"):
        run(slow, [1] * 50, [0.0] * 50, callers=2)
    assert len(slow.order) < 10


def test_ctrl_c_ends_the_waiting_for_groups_that_are_not_there_yet():
    slow = Slow(KeyboardInterrupt())
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(slow, [1] * 6, [0.001, 0.002, 0.003, 60.0, 60.0, 60.0], callers=2)
    assert time.perf_counter() - start < 10


def test_icnet_throughput(icnet, exports, tmp_path):
    """Both models get the same groups, and the histogram of the results can be read again."""
    histogram = tmp_path / "sizes.json"
    histogram.write_text('{"2": 3, "1": 1, "7": 0}')
    options = ("--sizes", histogram, "--groups", 6, "--callers", 2, "--threads", 1, "--output", tmp_path / "x.json")
    packed = exports.with_name("icnet.packed.onnx")
    code, out, _ = icnet("bench", "throughput", exports, packed, *options)
    assert code == 0
    assert "2 callers, groups of 1 to 2" in " ".join(out.split())
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["histogram"] == {"1": 1, "2": 3}
    assert read_histogram(str(tmp_path / "x.json")) == {1: 1, 2: 3}
    assert [found["name"] for found in results["models"]] == ["icnet.onnx", "icnet.packed.onnx"]
    for found in results["models"]:
        for row in found["streams"].values():
            assert row["groups"] == 6
            assert row["images"] == results["models"][0]["streams"]["capacity"]["images"]
            assert 0 <= row["idle_share"] < 1
    text = "\n".join(to_markdown(PAGES["throughput"](results), ""))
    assert "| icnet.packed.onnx | all at once |" in text


def test_the_sizes_of_a_data_set(image_folder, tmp_path):
    image_folder("img/a", "1.jpg", "2.jpg")
    image_folder("img/b", "1.jpg", "2.jpg")
    image_folder("img/c", "1.jpg", "2.jpg", "3.jpg")
    assert read_histogram(str(tmp_path)) == {2: 2, 3: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[3, 4]", "not a histogram"),
        ("{", "not a histogram"),
        ('{"x": 1}', "not a histogram"),
        ('{"0": 1}', "sizes must be 1 to"),
        ('{"3": 0}', "sizes must be 1 to"),
        ('{"3": 1.5}', "sizes must be 1 to"),
    ],
)
def test_histograms_that_are_none(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_histogram(str(tmp_path / "x.json"))
    with pytest.raises(InputError, match="no such file"):
        read_histogram("cosal")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for nvidia-smi")
def test_a_gpus_idle_share_is_what_nvidia_smi_samples(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '80\\n60\\n[N/A]\\n'\nexec sleep 10\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sampler = throughput._Sampler()
    time.sleep(0.3)
    assert sampler.stop() == pytest.approx(0.3)
    monkeypatch.setenv("PATH", "")
    assert throughput._Sampler().stop() is None
