"""The search for the layers that stay in floating point, and the plan that it writes."""

import json

import onnx
import pytest
from PIL import Image

from calibration.graph import ExportedModel, int8_share
from calibration.sensitivity import Point, PrecisionPlan, read_precision_plan, search
from runtime import InputError


class Metrics:
    def __init__(self, s, max_f=0.8):
        self.s, self.max_f, self.max_e, self.mae = s, max_f, 0.9, 0.1


def searched(narrow, losses, max_drop, metric="s"):
    """Search a model in which each layer, if it is int8, costs what `losses` has for it, of one of the metrics."""
    model = ExportedModel(narrow)
    all_int8 = dict.fromkeys(model.tensors(), 1.0)

    def score(candidate, what):
        if candidate == narrow:
            return Metrics(0.9)
        weights = {i.name for i in candidate.graph.initializer}
        drop = sum(v for k, v in losses.items() if f"network.{k}.weight_quantized" in weights)
        return Metrics(0.9 - drop) if metric == "s" else Metrics(0.9, 0.8 - drop)

    return model, search(model, all_int8, max_drop, score)


def test_the_search_keeps_the_fewest_costly_layers(narrow):
    losses = {"vgg.vgg.7": 0.02, "Co4.conv.0": 0.01, "refine_3.cmprs": 0.004, "conv5_cmprs": 0.0005}
    model, found = searched(narrow, losses, 0.005)
    assert isinstance(found, PrecisionPlan)
    assert found.reached
    assert set(found.found.float_layers) == {"vgg.vgg.7", "Co4.conv.0"}
    assert found.found.loss == pytest.approx(0.0045)
    assert found.found.share == pytest.approx(found.path[0].share - model.share(found.found.float_layers))
    assert len(found.costs) == len(model.candidates)
    assert found.costs["Co4.conv.0"].loss == pytest.approx(0.01)
    assert [len(p.float_layers) for p in found.path] == [0, 1, 2, 1]
    shares = [p.share for p in found.curve]
    assert 0 < shares[0] <= 0.25 < shares[1] <= 0.5 < shares[2] <= 0.75
    _, nothing = searched(narrow, losses, 0.05)
    assert nothing.reached
    assert nothing.found.float_layers == ()
    assert isinstance(nothing.found, Point)


def test_a_plan_with_less_than_half_of_the_operations_in_int8_has_failed(narrow):
    """The largest layers cost so much that, without those that would do, less than half is left in INT8."""
    model = ExportedModel(narrow)
    losses, share = {}, model.share([layer.name for layer in model.candidates])
    for layer in sorted(model.candidates, key=lambda layer: -layer.macs):
        if share >= 0.5:
            losses[layer.name] = 0.02 - 0.001 * len(losses)
            share -= model.share([layer.name])
    _, found = searched(narrow, losses, 0.005)
    assert (found.found.share, found.found.loss) == pytest.approx((share, 0))
    assert share < 0.5
    assert not found.reached


def test_a_layer_that_costs_nothing_beside_others_goes_back_to_int8(narrow):
    """By itself one layer costs the most, and so it is the first to return to floating point."""
    model = ExportedModel(narrow)

    def score(candidate, what):
        if candidate == narrow:
            return Metrics(0.9)
        weights = {i.name for i in candidate.graph.initializer if i.name.endswith(".weight_quantized")}
        if weights == {"network.vgg.vgg.7.weight_quantized"}:
            return Metrics(0.88)
        return Metrics(0.89 if "network.Co4.conv.0.weight_quantized" in weights else 0.9)

    found = search(model, dict.fromkeys(model.tensors(), 1.0), 0.005, score)
    assert found.reached
    assert [p.float_layers for p in found.path] == [
        (), ("vgg.vgg.7",), ("vgg.vgg.7", "Co4.conv.0"), ("Co4.conv.0",),
    ]  # fmt: skip
    assert found.found == found.path[-1]


@pytest.mark.parametrize("metric", ["s", "max_f"])
def test_a_max_drop_that_can_not_be_reached(narrow, metric):
    model = ExportedModel(narrow)
    losses = {layer.name: 0.01 for layer in model.candidates}
    _, found = searched(narrow, losses, 0.005, metric)
    assert not found.reached
    assert found.found.loss == min(p.loss for p in found.path)


def test_icnet_calibrate_searches_and_applies_what_it_found(icnet, narrow, groups, validation, tmp_path, monkeypatch):
    monkeypatch.setattr(ExportedModel, "candidates", property(few_candidates))
    monkeypatch.setattr("calibration.sensitivity.LEAST_SHARE", 0)
    output, plot = tmp_path / "x.onnx", tmp_path / "x.png"
    arguments = ("--onnx", narrow, "--groups", groups, "--method", "minmax")
    max_drop = ("--max-drop", 0.5, "--validation", validation, "--plot", plot)
    code, out, _ = icnet("calibrate", *arguments, "--output", output, *max_drop)
    assert code == 0
    assert "all int8" in out
    plan = json.loads((tmp_path / "x.onnx.json").read_text())
    assert plan["float_layers"] == []
    assert plan["found"]["share"] == pytest.approx(int8_share(onnx.load(output)))
    assert set(plan["layers"]) == {"vgg.vgg.2", "Co5.conv.0", "refine_1.cmprs"}
    assert Image.open(plot).format == "PNG"
    plan["float_layers"] = ["Co5.conv.0"]
    (tmp_path / "d.json").write_text(json.dumps(plan))
    applied = tmp_path / "applied.onnx"
    assert icnet("calibrate", *arguments, "--output", applied, "--precision-plan", tmp_path / "d.json")[0] == 0
    names = {i.name for i in onnx.load(applied).graph.initializer}
    assert "network.Co5.conv.0.weight" in names
    assert "network.vgg.vgg.2.weight_quantized" in names
    assert {p.key: p.value for p in onnx.load(applied).metadata_props}["float_layers"] == "Co5.conv.0"


def test_the_best_found_is_written_and_the_exit_code_says_so(icnet, narrow, groups, validation, tmp_path, monkeypatch):
    monkeypatch.setattr(ExportedModel, "candidates", property(few_candidates))
    monkeypatch.setattr("calibration.sensitivity.LEAST_SHARE", 2.0)  # nothing is int8 enough
    arguments = ("--onnx", narrow, "--groups", groups, "--method", "minmax", "--output", tmp_path / "x.onnx")
    code, out, err = icnet("calibrate", *arguments, "--max-drop", 0, "--validation", validation)
    assert code == 1
    assert "error: --max-drop 0 was not reached: the best model loses" in err
    assert "in int8" in out
    assert (tmp_path / "x.onnx").exists()
    assert not json.loads((tmp_path / "x.onnx.json").read_text())["reached"]


def few_candidates(model):
    return tuple(x for x in model.layers if x.name in ("vgg.vgg.2", "Co5.conv.0", "refine_1.cmprs"))


def test_a_plan_needs_a_list_of_layers(tmp_path, narrow):
    (tmp_path / "x.json").write_text('{"float_layers": 3}')
    with pytest.raises(InputError, match="precision plan"):
        read_precision_plan(tmp_path / "x.json", ExportedModel(narrow))
