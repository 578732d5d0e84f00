"""Where the ranges of activations come from, and their cache."""

import json
import shutil
import weakref

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration import ranges as ranges_module
from calibration.graph import ExportedModel
from calibration.groups import open_groups, read
from calibration.ranges import METHODS, collect, histogram, read_cache, write_cache
from export.onnx_file import cpu_session, save_model
from export.samples import smooth_group
from runtime import ModelError, Predictor
from runtime.threads import Workers


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_groups_changes_nothing(method, narrow, groups):
    model = ExportedModel(narrow)
    chosen = open_groups(groups, groups / "sism")
    feeds = [*chosen.feeds()]
    tensors = model.tensors()[::9]
    found = [
        collect(narrow, model.model, tensors, lambda _, order=order: iter(order), method)
        for order in (feeds, feeds[::-1], [feeds[1], feeds[2], feeds[0]])
    ]
    assert found[0] == found[1] == found[2]
    assert all(limit > 0 for limit in found[0].values())


def changed(source, path, **weights):
    """A copy of a file in which functions have changed initialisers."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if change := weights.get(tensor.name.removeprefix("network.vgg.vgg.").replace(".", "_")):
            array = numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    save_model(model, path)


def test_percentile_and_entropy_beat_min_max_where_an_activation_is_an_outlier(narrow, tmp_path):
    """The first channel of the first layer answers to pure red only, enormously, and nobody listens."""
    path = tmp_path / "icnet.onnx"

    def only_red(weight):
        weight[0] = 0
        weight[0, 0, 1, 1] = 20_000

    def above_252(bias):
        bias[0] = -20_000 * 2.2  # normalised

    def deaf(weight):
        weight[:, 0] = 0

    changed(narrow, path, **{"0_weight": only_red, "0_bias": above_252, "2_weight": deaf})
    model = ExportedModel(path)
    feeds = []
    for seed in range(3):
        group = smooth_group(2, seed)
        feeds.append({"images": np.minimum(group.images, 245), "sisms": group.sisms})
    clean = {name: array.copy() for name, array in feeds[0].items()}
    feeds[0]["images"][0, 100, 100] = (255, 0, 0)
    with Predictor(path) as predictor:
        expected = predictor.predict_tensors(**clean)
    errors = {}
    for method in METHODS:
        found = collect(path, model.model, model.tensors(), lambda _: iter(feeds), method)
        onnx.save(model.quantised(found), tmp_path / "int8.onnx")
        # Not optimised, it computes what the file says: int8 kernels of a CPU without VNNI saturate in 16 bits.
        session = cpu_session(tmp_path / "int8.onnx", optimised=False)
        errors[method] = np.abs(session.run(None, clean)[0] - expected).mean()
    assert errors["percentile"] < 0.5 * errors["minmax"]
    assert errors["entropy"] < 0.5 * errors["minmax"]


def test_limits_of_known_distributions():
    x = np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32)
    x[0, 0] = 64
    counts = histogram(x, 64.0)
    assert counts.sum() == x.size
    assert ranges_module._percentile_limit(counts, 64.0, 99.9) == pytest.approx(3.29, abs=0.1)
    assert ranges_module._percentile_limit(counts, 64.0, 100) == 64
    assert 3 < ranges_module._entropy_limit(counts, 64.0) < 8
    nothing = histogram(np.zeros((1, 9), np.float32), 0.0)
    assert ranges_module._percentile_limit(nothing, 0.0, 99) == ranges_module._entropy_limit(nothing, 0.0) == 0


def test_one_group_is_in_memory_at_a_time(narrow, groups):
    model = ExportedModel(narrow)
    made = []

    def feeds():
        for group in open_groups(groups, groups / "sism").groups * 3:
            feed = read(group, workers)
            made.append(weakref.ref(feed["images"]))
            yield feed
            del feed
            assert sum(ref() is not None for ref in made) <= 1

    with Workers(2) as workers:
        collect(narrow, model.model, ["relu_12"], lambda _: feeds(), "percentile")
    assert len(made) == 18


def test_activations_that_are_not_finite_are_named(narrow, groups, tmp_path):
    path = tmp_path / "icnet.onnx"
    changed(narrow, path, **{"5_weight": lambda weight: weight.fill(np.inf)})
    model = ExportedModel(path)
    chosen = open_groups(groups, groups / "sism")
    with pytest.raises(ModelError, match="tensor relu_2 holds NaN or infinity"):
        collect(path, model.model, ["relu_2"], lambda _: chosen.feeds(), "minmax")


def test_the_cache_is_used_for_the_same_model_groups_and_method_only(icnet, narrow, groups, tmp_path, monkeypatch):
    cache = tmp_path / "cache.json"
    arguments = ("--onnx", narrow, "--groups", groups, "--output", tmp_path / "x.onnx", "--cache", cache)
    assert "there is none yet" in icnet("calibrate", *arguments)[1]
    first = (tmp_path / "x.onnx").read_bytes()
    out = icnet("calibrate", *arguments)[1]
    assert "ranges reused" in out
    assert (tmp_path / "x.onnx").read_bytes() == first
    assert "of another method" in icnet("calibrate", *arguments, "--method", "minmax")[1]
    more = shutil.copytree(groups, tmp_path / "more")
    shutil.rmtree(more / "img" / "a")
    other = ("--onnx", narrow, "--groups", more, "--output", tmp_path / "x.onnx", "--cache", cache)
    assert "of another data and method" in icnet("calibrate", *other)[1]
    changed(narrow, tmp_path / "other.onnx", **{"0_bias": lambda bias: bias.fill(0)})
    other = ("--onnx", tmp_path / "other.onnx", *other[2:])
    assert "of another model" in icnet("calibrate", *other)[1]
    cache.write_text("[]")
    assert "not a calibration cache" in icnet("calibrate", *other)[1]
    assert set(json.loads(cache.read_text())) == {"key", "ranges"}


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), -1.0])
def test_a_cache_with_limits_that_are_none_is_not_used(limit, tmp_path):
    write_cache(tmp_path / "cache.json", {}, {"a": 1.0, "b": limit})
    assert read_cache(tmp_path / "cache.json", {}) == (None, "it is not a calibration cache")
