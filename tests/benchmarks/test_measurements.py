"""Timing, counting, scaling, throughput, roofline and the report; the comparison itself is in test_benchmarks.py."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline, scaling, throughput, timing
from benchmarks.report import BLOCK, RENDER, RESULTS
from benchmarks.throughput import Stream, read_histogram
from export.icnet import Uint8Interface
from export.onnx_file import Node, count, total_flop
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime import InputError, ModelError

ROOT = Path(__file__).parents[2]


# Timing.


def test_every_round_calls_all_in_an_order_of_its_own():
    order, times = [], {}
    calls = {name: (lambda name=name: order.append(name)) for name in "abcde"}
    for _ in timing.interleaved(calls, times, rounds=20):
        pass
    rounds = [tuple(order[i : i + 5]) for i in range(0, 100, 5)]
    assert all(sorted(names) == list("abcde") for names in rounds)
    assert len(set(rounds)) > 10
    assert {name: len(took) for name, took in times.items()} == dict.fromkeys("abcde", 20)


def test_a_round_that_is_broken_off_does_not_count():
    calls, times = iter(range(5)), {}

    def third_stops():
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in timing.interleaved({"a": lambda: None, "b": third_stops}, times, rounds=9):
            pass
    assert len(times["a"]) == len(times["b"]) == 2


def test_no_round_begins_after_the_limit_but_three_there_are():
    times = {}
    for _ in timing.interleaved({"a": lambda: time.sleep(0.01)}, times, rounds=100, limit=0.001):
        pass
    assert len(times["a"]) == 3


def test_warm_up_goes_on_until_calls_are_no_faster(monkeypatch):
    clock, took = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += took.pop(0)

    took[:] = [4.0, 2.0, 1.0, 0.984375, 0.5]
    assert timing.warm_up(call) == 0.984375
    assert took == [0.5]
    took[:] = [2.0, 2.0, 2.0, 2.0]
    assert timing.warm_up(call, fewest=3) == 2.0
    assert took == [2.0]
    took[:] = [11.0, 5.0]
    assert timing.warm_up(call) == 11.0  # ten seconds have passed
    took[:] = [0.5**i for i in range(20)]
    timing.warm_up(call)
    assert len(took) == 8


def test_the_interval_is_of_pairs():
    """What slows a round slows both: a ratio that is the same in every round is certain, however the times vary."""
    times = np.random.default_rng(0).uniform(1, 9, 7)
    exact = timing.ratio(2 * times, times)
    assert exact == pytest.approx({"ratio": 2, "ratio_low": 2, "ratio_high": 2})
    found = timing.ratio(np.random.default_rng(1).uniform(1, 9, 7), times)
    assert found["ratio_low"] < found["ratio"] < found["ratio_high"]


def test_a_line_through_points_on_a_line():
    assert timing.line([1, 2, 300], [5, 7, 603]) == pytest.approx((3, 2))


# Operations.


@pytest.fixture(scope="module")
def reference_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.onnx"
    write_onnx(ReferenceICNet.of(network), path)
    return path


def flop_of(module, n):
    images = torch.zeros((n, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Uint8Interface(module)(images, images[..., 0])
    return counter.get_total_flops()


@pytest.mark.parametrize("n", [1, 3])
def test_flop_are_those_of_torchs_counter(network, model_file, reference_file, n):
    assert total_flop(model_file, n) == flop_of(network, n)
    # The paper computes the self-correlation once per polarity; the exporter sees that it is twice the same.
    channels = (round(128 * network.width), round(256 * network.width), round(256 * network.width))
    twice = sum(2 * n * c * (side * side) ** 2 for c, side in zip(channels, (7, 14, 28), strict=True))
    assert total_flop(reference_file, n) == flop_of(ReferenceICNet.of(network), n) - twice


def test_flop_of_a_packed_export_are_those_of_a_plain_one(exports):
    """One group: the mask hides nothing. Its sort takes a shape that the graph computes."""
    assert total_flop(exports.with_name("icnet.packed.onnx"), 3) == total_flop(exports, 3)


def test_nodes_by_part_of_the_network(network, model_file, reference_file):
    by_level = roofline.levels({"ours": count(model_file, 2), "paper": count(reference_file, 2)})
    assert {"vgg", "Co4", "Co5", "Co6", "refine_1"} <= set(by_level)
    assert by_level["vgg"]["ours"] == by_level["vgg"]["paper"]
    assert by_level["Co4"]["ours"] < by_level["Co4"]["paper"] / 2
    assert all(node.module for node in count(model_file, 2) if node.flop)


def test_bytes_of_a_small_graph(tmp_path):
    """Conv [N,3,4,4] → [N,2,4,4], ReLU, reshape: counted by hand."""
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.zeros((2, 3, 3, 3), np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([0, 32]), "s")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
        helper.make_node("Reshape", ["z", "s"], ["out"], name="view"),
    ]
    tensors = [helper.make_tensor_value_info(k, 1, s) for k, s in (("x", ["N", 3, 4, 4]), ("out", ["N", 32]))]
    model = helper.make_model(helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [weight, shape]))
    onnx.save(model, tmp_path / "x.onnx")
    conv, relu, view = count(tmp_path / "x.onnx", 5)
    assert conv == Node("conv", "Conv", "", 5 * 2 * (3 * 9) * 32, 0, 4 * (5 * 48 + 54 + 5 * 32))
    assert relu == Node("relu", "Relu", "", 0, 160, 4 * 2 * 160)
    assert view == Node("view", "Reshape", "", 0, 0, 0)
    assert relu.level == "rest"


def test_what_can_not_be_counted(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match="not an ONNX model"):
        count(path, 1)
    helper = onnx.helper
    node = helper.make_node("NonZero", ["x"], ["y"])
    tensors = [helper.make_tensor_value_info("x", 1, ["N", 3]), helper.make_tensor_value_info("y", 7, [2, "9**9**9"])]
    onnx.save(helper.make_model(helper.make_graph([node], "g", tensors[:1], tensors[1:])), path)
    with pytest.raises(ModelError, match=r"the shape of y \(NonZero\) does not follow from the group's size"):
        count(path, 1)


# Roofline.


@pytest.fixture
def small_works(monkeypatch):
    monkeypatch.setattr("benchmarks.machine.SIDES", {"cpu": 64})
    monkeypatch.setattr("benchmarks.machine.COPIED", {"cpu": 1 << 20})


def test_icnet_roofline(icnet, model_file, small_works, tmp_path):
    output, plot = tmp_path / "x.json", tmp_path / "x.png"
    options = ("--size", 2, "--rounds", 2, "--threads", 1, "--output", output, "--plot", plot)
    code, out, _ = icnet("bench", "roofline", model_file, *options)
    assert code == 0
    results = json.loads(output.read_text())
    assert results["flop"] == total_flop(model_file, 2)
    # Every convolution and product that was counted is found in what ONNX Runtime executed, each once.
    assert sum(row["flop"] for row in results["nodes"]) == results["flop"]
    seconds = [row["seconds"] for row in results["nodes"]]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] > 0
    assert results["bound_s"] < results["bound_by_node_s"]
    assert results["share_of_bound"] == results["bound_s"] / results["median_s"]
    assert "GFLOP/s (matrix product)" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_roofline_that_is_interrupted_keeps_what_it_has(icnet, model_file, small_works, tmp_path, monkeypatch):
    """The rounds are whole; of the nodes there is nothing yet."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "profile", interrupted)
    folder = tmp_path / "benchmarks" / "results"
    output, plot = folder / "roofline_x.json", tmp_path / "x.png"
    options = ("--size", 1, "--rounds", 2, "--threads", 1, "--output", output, "--plot", plot)
    code, out, _ = icnet("bench", "roofline", model_file, *options)
    assert code == 130
    assert "interrupted: this is what was measured until then" in out
    results = json.loads(output.read_text())
    assert results["interrupted"]
    assert results["median_s"] > 0
    assert results["nodes"] == []
    assert plot.read_bytes().startswith(b"\x89PNG")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: roofline_x -->\n<!-- end of results -->\n")
    assert icnet("bench", "report", "--readme", readme)[0] == 0
    assert "Interrupted before its end." in readme.read_text()


def test_a_roofline_that_is_interrupted_before_the_first_round(icnet, model_file, small_works, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "interleaved", interrupted)
    code, _, _ = icnet("bench", "roofline", model_file, "--size", 1, "--threads", 1, "--output", tmp_path / "x.json")
    assert code == 130
    assert not any(tmp_path.iterdir())


def test_the_bound_of_a_card(icnet, model_file, tmp_path):
    code, out, _ = icnet("bench", "roofline", model_file, "--card", "h100-sxm", "--size", 7, "-o", tmp_path / "x.json")
    assert code == 0
    assert "h100-sxm, fp32: 67000 GFLOP/s" in out
    results = json.loads((tmp_path / "x.json").read_text())
    compute = results["flop"] / 67e12
    move = (results["weight_bytes"] + 7 * 224 * 224 * (3 + 1 + 4)) / 3350e9
    assert results["bound_s"] == pytest.approx(max(compute, move))
    assert "h100-sxm, fp32" in "\n".join(RENDER["roofline"](results, "roofline_x"))


def test_a_nodes_bound_is_its_products_or_its_bytes():
    nodes = [Node("a", "Conv", "", 100, 0, 10), Node("b", "Add", "", 0, 9, 60)]
    assert roofline.bound(nodes, flop_per_s=10, bytes_per_s=20) == 10 + 3


# Scaling.


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
    assert "3 × 2 images packed: " in out
    scaling.draw(results, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as plot:
        assert plot.width > 3 * plot.height  # three panels
    text = "\n".join(RENDER["scaling"](results, "scaling_x"))
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
    assert found["not_run"] == {"300": "would take 30 GB of the 20 GB free"}
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


def test_memory_over_many_groups_is_watched(icnet, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "_measure", lambda *_: None)
    used = iter([100, 130, *range(140, 990, 10)])
    monkeypatch.setattr(scaling, "memory", lambda field: next(used))
    monkeypatch.setattr(scaling, "RECORDS", 4)
    code, out, _ = icnet("bench", "scaling", model_file, "--groups", 8, "--threads", 1, "--output", tmp_path / "x.json")
    assert code == 1
    assert "after 8 groups, 1.071 times as much as half way: it grows" in out
    records = json.loads((tmp_path / "x.json").read_text())["models"][0]["stream"]["records"]
    assert [(r["groups"], r["memory_bytes"]) for r in records] == [(2, 100), (4, 130), (6, 140), (8, 150)]


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


# Throughput.


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


class Bar:
    def add_task(self, *_, **__):
        return 0

    def update(self, *_, **__):
        pass


def test_groups_wait_in_the_order_of_their_arrival():
    slow = Slow()
    found = Stream(slow, [3, 1, 2, 4], [0.001, 0.002, 0.003, 0.3], callers=1).run(Bar(), on_gpu=False)
    assert slow.order == [3, 1, 2, 4]
    assert found["groups"] == 4
    assert found["images"] == 10
    assert found["queue_s"]["p99"] > 0.03  # the third waited for two
    assert found["latency_s"]["p99"] > found["queue_s"]["p99"]
    assert found["groups_per_s"] < 4 / 0.3
    assert found["idle_share"] > 0.5  # it sleeps


def test_all_at_once_keeps_every_caller_busy_and_nothing_waits():
    slow = Slow()
    found = Stream(slow, [1] * 12, [0.0] * 12, callers=3).run(Bar(), on_gpu=False)
    assert slow.most == 3
    assert found["queue_s"]["p99"] == 0
    assert found["groups_per_s"] > 60  # three at once, 20 ms each: 150; one at once: 50


def test_a_group_that_fails_ends_the_stream():
    with pytest.raises(ModelError, match="broken"):
        Stream(Slow(ModelError("broken")), [1] * 50, [0.0] * 50, callers=2).run(Bar(), on_gpu=False)


def test_icnet_throughput(icnet, exports, tmp_path):
    """Both models get the same groups, and what is written of a histogram can be read again."""
    histogram, saved = tmp_path / "sizes.json", tmp_path / "saved.json"
    histogram.write_text('{"2": 3, "1": 1, "7": 0}')
    options = ("--sizes", histogram, "--groups", 6, "--callers", 2, "--threads", 1, "--output", tmp_path / "x.json")
    packed = exports.with_name("icnet.packed.onnx")
    code, out, _ = icnet("bench", "throughput", exports, packed, *options, "--save-sizes", saved)
    assert code == 0
    assert "2 callers, groups of 1 to 2" in " ".join(out.split())
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["histogram"] == {"1": 1, "2": 3}
    assert read_histogram(str(saved)) == {1: 1, 2: 3}
    assert [found["name"] for found in results["models"]] == ["icnet.onnx", "icnet.packed.onnx"]
    for found in results["models"]:
        for stream in found["streams"].values():
            assert stream["groups"] == 6
            assert stream["images"] == results["models"][0]["streams"]["capacity"]["images"]
            assert 0 <= stream["idle_share"] < 1
    text = "\n".join(RENDER["throughput"](results, "throughput_x"))
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


# The report.


def test_readmes_tables_and_plots_are_those_of_the_results(icnet, monkeypatch):
    """And no results on a CPU lie there that README does not show."""
    monkeypatch.chdir(ROOT)
    code, out, _ = icnet("bench", "report", "--check")
    assert (code, out) == (0, "")
    shown = {match[2] for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))}
    found = {path.stem for kind in RENDER for path in (ROOT / RESULTS).glob(f"{kind}_*cpu.json")}
    assert found <= shown


def test_a_readme_that_differs_is_found_and_mended(icnet, tmp_path):
    source = tmp_path / "benchmarks" / "results" / "latency_x.json"
    source.parent.mkdir(parents=True)
    row = {"median_s": 0.2, "p90_s": 0.3, "images_per_s": 5.0, "share_of_matrix_product": 0.9, "agrees": True}
    first = row | {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "peak_memory_bytes": 5e8}
    other = row | {"ratio": 2.25, "ratio_low": 2.0, "ratio_high": 2.5, "agrees": False}
    machine = {"cpu": "CPU", "threads": 2, "date": "2026-01-01", "python": "3.11", "torch": "2.13"}
    results = {"machine": machine, "first": "paper", "not_run": {"x": "no x"}, "end_to_end": []}
    results["groups"] = [{"n": 5, "runners": {"paper": first, "ours": other}}]
    source.write_text(json.dumps(results))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: latency_x -->\nold\n<!-- end of results -->\nafter\n")

    code, out, _ = icnet("bench", "report", "--check", "--readme", readme)
    assert code == 1
    assert "README.md: differs from the results" in out
    assert "latency_x.png: differs from the results" in out
    assert "old" in readme.read_text()
    assert icnet("bench", "report", "--readme", readme)[0] == 0
    text = readme.read_text()
    assert text.startswith(
        "before\n<!-- results: latency_x -->\nCPU, 2 threads; 2026-01-01; Python 3.11, torch 2.13.\n"
    )
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "| ours | 2.25 [2.00, 2.50] (disagrees) |" in text
    assert "| paper | 500 |" in text
    assert "- Not run: x: no x" in text
    assert "Interrupted" not in text
    assert "old" not in text
    assert icnet("bench", "report", "--check", "--readme", readme)[0] == 0

    results["groups"][0]["runners"]["ours"]["ratio"] = 123.45
    source.write_text(json.dumps(results))
    assert icnet("bench", "report", "--check", "--readme", readme)[0] == 1


def test_a_readme_that_names_no_results(icnet, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: latency_x -->\n<!-- end of results -->\n")
    code, _, err = icnet("bench", "report", "--readme", readme)
    assert code == 2
    assert "latency_x.json: can't be read as results" in err
    readme.write_text("<!-- results: speed_x -->\n<!-- end of results -->\n")
    code, _, err = icnet("bench", "report", "--readme", readme)
    assert code == 2
    assert "no such kind of results; there are latency, gpu" in err
