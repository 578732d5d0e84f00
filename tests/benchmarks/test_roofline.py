import json

import pytest

from benchmarks import roofline
from benchmarks.describe import PAGES
from benchmarks.render import to_markdown
from export.onnx_file import Node, count, total_flop
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx


def test_icnet_roofline(icnet, model_file, tmp_path):
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


def test_a_roofline_that_is_interrupted_keeps_what_it_has(icnet, model_file, tmp_path, monkeypatch):
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
    page = tmp_path / "page.md"
    page.write_text("<!-- results: roofline_x -->\n<!-- end of results -->\n")
    assert icnet("bench", "report", page, "--results", folder)[0] == 0
    assert "interrupted: this is what was measured until then" in page.read_text()


def test_a_roofline_that_is_interrupted_before_the_first_round(icnet, model_file, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "interleaved", interrupted)
    code, _, _ = icnet("bench", "roofline", model_file, "--size", 1, "--threads", 1, "--output", tmp_path / "x.json")
    assert code == 130
    assert not any(tmp_path.iterdir())


def test_the_bound_of_a_card(icnet, model_file, tmp_path):
    code, out, _ = icnet(
        "bench", "roofline", model_file, "--card", "h100-sxm", "--size", 7, "--output", tmp_path / "x.json"
    )
    assert code == 0
    assert "h100-sxm, fp32: 67000 GFLOP/s" in out
    results = json.loads((tmp_path / "x.json").read_text())
    compute = results["flop"] / 67e12
    move = (results["weight_bytes"] + 7 * 224 * 224 * (3 + 1 + 4)) / 3350e9
    assert results["bound_s"] == pytest.approx(max(compute, move))
    assert "h100-sxm, fp32" in "\n".join(to_markdown(PAGES["roofline"](results), "x.png"))


def test_a_nodes_bound_is_its_products_or_its_bytes():
    nodes = [Node("a", "Conv", "", 100, 0, 10), Node("b", "Add", "", 0, 9, 60)]
    assert roofline.bound(nodes, flop_per_s=10, bytes_per_s=20) == 10 + 3


def test_nodes_by_part_of_the_network(network, model_file, tmp_path):
    reference_file = tmp_path / "reference.onnx"
    write_onnx(ReferenceICNet.of(network), reference_file)
    by_level = roofline.levels({"ours": count(model_file, 2), "paper": count(reference_file, 2)})
    assert {"vgg", "Co4", "Co5", "Co6", "refine_1"} <= set(by_level)
    assert by_level["vgg"]["ours"] == by_level["vgg"]["paper"]
    assert by_level["Co4"]["ours"] < by_level["Co4"]["paper"] / 2
    assert all(node.module for node in count(model_file, 2) if node.flop)
