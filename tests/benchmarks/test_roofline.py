import json

import pytest

from benchmarks import roofline
from benchmarks.cards import CARDS
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
    page = "\n".join(to_markdown(PAGES["roofline"](results), "x.png"))
    assert "h100-sxm, fp32" in page
    most = 7 / results["bound_s"]
    assert f"at most {most:.0f} images/s" in page
    assert f"30% to 70% of that: {0.3 * most:.0f} to {0.7 * most:.0f} images/s" in page
    # The first convolution of VGG16's second layer has the largest tensors: width · 64 channels, in and out, in FP32.
    largest = 2 * 7 * 8 * 224 * 224 * 4
    assert results["least_memory_bytes"] >= results["weight_bytes"] + largest
    assert "of 80 GB" in page


def test_a_rate_that_is_not_known_is_said(icnet, model_file):
    code, _, err = icnet("bench", "roofline", model_file, "--card", "rtx-3090", "--precision", "int8")
    assert code == 2
    assert err.endswith("--card rtx-3090: its int8 rate is not known; give --precision fp32 and fp16\n")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_figures_of_a_card(card):
    """Plausible, in the right units, and each with an address."""
    assert 5e12 <= card.rates["fp32"] <= 2e14
    assert card.rates.get("fp16", card.rates["fp32"] * 4) >= 3 * card.rates["fp32"]
    assert card.rates.get("int8", 1e18) >= 1.5 * card.rates.get("fp16", 0)
    assert 1e11 < card.bytes_per_s < 1e13
    assert 8e9 <= card.memory_bytes < 1e12
    assert card.sources
    assert all(source.startswith("http") for source in card.sources)


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
