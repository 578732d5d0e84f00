"""`icnet calibrate`: what is in an INT8 graph, where its ranges come from, what it costs, and bad input."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from calibration import ranges as ranges_module
from calibration.graph import FLOAT_LAYERS, ExportedModel, int8_share
from calibration.groups import open_groups
from calibration.ranges import METHODS, collect, histogram
from calibration.sensitivity import Decisions, Point, search
from export.fp16 import half_precision
from export.icnet import ICNet
from export.samples import smooth_group
from export.to_onnx import write_onnx
from runtime import InputError, ModelError, Predictor
from tests.helpers import build_with_tensorrt, random_network

NARROW = 1 / 16


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """An FP32 export of a narrow network."""
    path = tmp_path_factory.mktemp("narrow") / "icnet.onnx"
    write_onnx(random_network(NARROW), path, provenance={"precision": "fp32", "width": "0.0625"})
    return path


@pytest.fixture(scope="session")
def narrow_fp16(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "icnet.fp16.onnx"
    write_onnx(half_precision(random_network(NARROW)), path)
    return path


def save_group(folder, name, group, masks=None):
    for kind, pixels in {"img": group.images, "sism": group.sisms, "gt": masks}.items():
        for i, image in enumerate(() if pixels is None else pixels):
            path = folder / kind / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Three groups of two images, in the layout of the co-saliency data sets."""
    folder = tmp_path_factory.mktemp("groups")
    for seed, name in enumerate(("a", "b", "c")):
        save_group(folder, name, smooth_group(2, seed))
    return folder


@pytest.fixture(scope="session")
def validation(narrow, tmp_path_factory):
    """A group whose ground truths are what the network itself finds, so that it scores well."""
    folder = tmp_path_factory.mktemp("validation")
    group = smooth_group(2, 9)
    with Predictor(narrow) as predictor:
        maps = predictor.predict_tensors(group.images, group.sisms)
    levels = np.stack([np.where(m > np.median(m), 255, 0) for m in maps]).astype(np.uint8)
    save_group(folder, "v", group, levels)
    return folder


@pytest.fixture(scope="session")
def calibrated(narrow, groups):
    """The export and its min–max ranges."""
    model = ExportedModel(narrow)
    chosen = open_groups(groups, groups / "sism")
    return model, collect(narrow, model.model, model.tensors(), lambda _: chosen.feeds(), "minmax")


@pytest.fixture(scope="session")
def calibrated_fp16(narrow_fp16, groups):
    model = ExportedModel(narrow_fp16)
    chosen = open_groups(groups, groups / "sism")
    return model, collect(narrow_fp16, model.model, model.tensors(), lambda _: chosen.feeds(), "minmax")


def nodes_by_output(model):
    return {o: n for n in model.graph.node for o in n.output}


def attribute(node, name):
    return next(a.i for a in node.attribute if a.name == name)


def scale_of(model, tensor):
    """The scale of the Q/DQ pair through which a node reads `tensor`."""
    node = nodes_by_output(model)[tensor]
    assert node.op_type == "DequantizeLinear", tensor
    return next(float(numpy_helper.to_array(i)) for i in model.graph.initializer if i.name == node.input[1])


def test_every_convolution_but_three_is_int8_and_nothing_else_is_quantised(calibrated):
    model, ranges = calibrated
    quantised = model.quantised(ranges)
    onnx.checker.check_model(quantised, full_check=True)
    producers = nodes_by_output(quantised)
    weights = {i.name: i for i in quantised.graph.initializer}
    float_weights = set()
    for node in quantised.graph.node:
        if node.op_type != "Conv":
            continue
        activation, weight = (producers.get(name) for name in node.input[:2])
        if weight is None:
            float_weights.add(node.input[1].removeprefix("network.").removesuffix(".weight"))
            assert activation.op_type not in ("DequantizeLinear", "QuantizeLinear")
            continue
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        kernel = weights[weight.input[0]]
        assert kernel.data_type == onnx.TensorProto.INT8
        assert attribute(weight, "axis") == 0
        assert list(weights[weight.input[1]].dims) == [kernel.dims[0]]  # a scale per output channel
        assert not numpy_helper.to_array(weights[weight.input[2]]).any()
        assert not numpy_helper.to_array(weights[activation.input[2]]).any()
        assert len(node.input) < 3 or weights[node.input[2]].data_type == onnx.TensorProto.FLOAT
    assert float_weights == {*FLOAT_LAYERS}
    dequantised = {o for n in quantised.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    through = {n.op_type for n in quantised.graph.node if dequantised & {*n.input}}
    assert through == {"Conv", "Relu", "LeakyRelu", "MaxPool", "Resize", "Concat", "Add"}
    assert int8_share(quantised) == pytest.approx(model.share([layer.name for layer in model.candidates]))
    assert int8_share(quantised) > 0.9


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {"MaxPool": 5, "Resize": 5, "Concat": 3, "Add": 2, "LeakyRelu": 27}),
        ("fp16", {"MaxPool": 5, "Resize": 2, "Add": 2, "residual": 8}),
    ],
)
def test_what_is_pooled_resized_joined_or_added_is_on_one_scale(precision, expected, request):
    model, ranges = request.getfixturevalue("calibrated" if precision == "fp32" else "calibrated_fp16")
    quantised = model.quantised(ranges)
    readers = {i: n for n in quantised.graph.node for i in n.input}
    producers = nodes_by_output(quantised)
    seen = Counter()
    for node in quantised.graph.node:
        dequantised = [i for i in node.input if i in producers and producers[i].op_type == "DequantizeLinear"]
        if node.op_type in ("MaxPool", "Resize", "Concat", "LeakyRelu") and dequantised:
            after = readers[readers[node.output[0]].output[0]].output[0]
            inputs = node.input if node.op_type == "Concat" else node.input[:1]
            assert {scale_of(quantised, i) for i in inputs} == {scale_of(quantised, after)}
            seen[node.op_type] += 1
        if node.op_type == "Add" and dequantised:
            assert len({scale_of(quantised, i) for i in dequantised}) == 1
            others = [producers[i].op_type for i in node.input if i not in dequantised]
            assert others in ([], ["Conv"])  # a block's convolution is fused with the addition
            seen["residual" if others else "Add"] += 1
    assert seen == expected


def test_onnx_runtime_computes_nearly_all_of_it_in_int8(calibrated, tmp_path):
    model, ranges = calibrated
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    file = model.quantised(ranges).SerializeToString()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    kernels = {n.name.partition("_token_")[0] for n in optimised.graph.node if n.op_type == "QLinearConv"}
    assert sum(x.macs for x in model.layers if x.node in kernels) > 0.85 * sum(x.macs for x in model.layers)


def test_layers_that_stay_in_floating_point_read_tensors_as_they_are(calibrated):
    model, ranges = calibrated
    names = [layer.name for layer in model.candidates]
    for kept in (["refine_1.cmprs"], ["vgg.vgg.5"], ["refine_2.merge_conv.0"], names[:-1], names):
        int8 = [name for name in names if name not in kept]
        quantised = model.quantised(ranges, int8)
        onnx.checker.check_model(quantised, full_check=True)
        producers = nodes_by_output(quantised)
        convolutions = [n for n in quantised.graph.node if n.op_type == "Conv"]
        found = [n for n in convolutions if producers[n.input[0]].op_type == "DequantizeLinear"]
        assert len(found) == len(int8)
        assert int8_share(quantised) == pytest.approx(model.share(int8))
    assert "QuantizeLinear" not in {n.op_type for n in quantised.graph.node}


def test_operations_are_counted_per_image(calibrated):
    """Outputs × kernel; both polarities in a co-saliency module."""
    model, _ = calibrated
    macs = {layer.name: layer.macs for layer in model.layers}
    assert macs["vgg.vgg.2"] == 4 * 4 * 9 * 224**2
    assert macs["Co4.cosal_feat.conv.1.conv.0"] == 2 * 8 * 8 * 9 * 28**2
    assert macs["Co4.conv.0"] == 8 * 16 * 28**2  # joins the polarities
    assert macs["refine_1.cmprs"] == 4 * 2 * 224**2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_parses_and_builds_it(precision, request, groups, tmp_path, icnet):
    export = request.getfixturevalue("narrow" if precision == "fp32" else "narrow_fp16")
    arguments = ("--onnx", export, "--groups", groups, "--method", "minmax", "--rest", precision)
    code, _, _ = icnet("calibrate", *arguments, "--output", tmp_path / "int8.onnx")
    assert code == 0
    size, errors = build_with_tensorrt(tmp_path / "int8.onnx", profile=(1, 2, 4))
    assert errors == []
    assert size > 0
    group = smooth_group(2, 1)
    with Predictor(export) as float_, Predictor(tmp_path / "int8.onnx") as int8:
        maps = [p.predict_tensors(group.images, group.sisms) for p in (float_, int8)]
    assert 0 < np.abs(maps[0] - maps[1]).mean() < 0.05


def test_icnet_calibrate_writes_a_file_that_explains_itself(icnet, narrow, groups, tmp_path):
    output = tmp_path / "new" / "icnet.int8.onnx"
    code, out, err = icnet("calibrate", "--onnx", narrow, "--groups", groups, "--output", output)
    assert code == 0
    assert "3 groups to calibrate on; 8 are enough" in err
    assert "% of the convolutions' operations in int8, entropy" in out
    model = onnx.load(output)
    notes = {p.key: p.value for p in model.metadata_props}
    assert (notes["precision"], notes["rest"], notes["width"]) == ("int8", "fp32", "0.0625")
    assert (notes["calibration_groups"], notes["calibration_images"]) == ("3", "6")
    assert len(notes["source_sha256"]) == len(notes["calibration_sha256"]) == 64
    assert float(notes["int8_share"]) == pytest.approx(int8_share(model), abs=1e-4)
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    assert icnet("predict", groups, "--model", output, "--output", tmp_path / "maps")[0] == 0


def test_the_file_is_at_most_30_per_cent(tmp_path):
    torch.manual_seed(0)
    write_onnx(ICNet(0.25).eval(), tmp_path / "icnet.onnx")
    model = ExportedModel(tmp_path / "icnet.onnx")
    size = model.quantised(dict.fromkeys(model.tensors(), 1.0)).ByteSize()
    assert size < 0.3 * (tmp_path / "icnet.onnx").stat().st_size


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
    onnx.save(model, path)


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
        with Predictor(tmp_path / "int8.onnx") as predictor:
            errors[method] = np.abs(predictor.predict_tensors(**clean) - expected).mean()
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
    import weakref

    model = ExportedModel(narrow)
    made = []

    def feeds():
        for group in open_groups(groups, groups / "sism").groups * 3:
            from calibration.groups import read

            feed = read(group)
            made.append(weakref.ref(feed["images"]))
            yield feed
            del feed
            assert sum(ref() is not None for ref in made) <= 1

    collect(narrow, model.model, ["relu_12"], lambda _: feeds(), "percentile")
    assert len(made) == 18


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


class Metrics:
    def __init__(self, s, max_f=0.8):
        self.s, self.max_f, self.max_e, self.mae = s, max_f, 0.9, 0.1


def searched(narrow, losses, max_drop):
    """Search a model in which each layer, if it is int8, costs what `losses` has for it."""
    model = ExportedModel(narrow)
    all_int8 = dict.fromkeys(model.tensors(), 1.0)

    def score(candidate, what):
        if candidate == narrow:
            return Metrics(0.9)
        weights = {i.name for i in candidate.graph.initializer}
        return Metrics(0.9 - sum(v for k, v in losses.items() if f"network.{k}.weight_quantized" in weights))

    return model, search(model, all_int8, max_drop, score)


def test_the_search_keeps_the_fewest_costly_layers(narrow):
    losses = {"vgg.vgg.7": 0.02, "Co4.conv.0": 0.01, "refine_3.cmprs": 0.004, "conv5_cmprs": 0.0005}
    model, found = searched(narrow, losses, 0.005)
    assert isinstance(found, Decisions)
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


def test_a_budget_that_can_not_be_reached(narrow):
    model = ExportedModel(narrow)
    losses = {layer.name: 0.01 for layer in model.candidates}
    _, found = searched(narrow, losses, 0.005)
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
    decisions = json.loads((tmp_path / "x.onnx.json").read_text())
    assert decisions["float_layers"] == []
    assert decisions["found"]["share"] == pytest.approx(int8_share(onnx.load(output)))
    assert set(decisions["layers"]) == {"vgg.vgg.2", "Co5.conv.0", "refine_1.cmprs"}
    assert Image.open(plot).format == "PNG"
    decisions["float_layers"] = ["Co5.conv.0"]
    (tmp_path / "d.json").write_text(json.dumps(decisions))
    applied = tmp_path / "applied.onnx"
    assert icnet("calibrate", *arguments, "--output", applied, "--decisions", tmp_path / "d.json")[0] == 0
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
    assert "error: the max_drop of 0 was not reached: the best found loses" in err
    assert "in int8" in out
    assert (tmp_path / "x.onnx").exists()
    assert not json.loads((tmp_path / "x.onnx.json").read_text())["reached"]


def few_candidates(model):
    return tuple(x for x in model.layers if x.name in ("vgg.vgg.2", "Co5.conv.0", "refine_1.cmprs"))


def test_bad_groups_are_named_and_skipped_only_if_asked(icnet, narrow, groups, tmp_path):
    folder = shutil.copytree(groups, tmp_path / "groups")
    (folder / "img/b/1.png").write_bytes(b"x")
    (folder / "sism/c/0.png").unlink()
    arguments = ("--onnx", narrow, "--groups", folder, "--output", tmp_path / "x.onnx", "--method", "minmax")
    code, _, err = icnet("calibrate", *arguments)
    assert code == 2
    assert "img/b/1.png: not an image" in err
    assert "--skip-bad" in err
    assert not (tmp_path / "x.onnx").exists()
    code, _, err = icnet("calibrate", *arguments, "--skip-bad")
    assert code == 0
    assert "group b is left out" in err
    assert "group c is left out" in err
    assert {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["calibration_groups"] == "1"
    (folder / "img/a/1.png").write_bytes(b"x")
    code, _, err = icnet("calibrate", *arguments, "--skip-bad")
    assert code == 2
    assert "none of its 3 groups can be read" in err


def test_groups_are_known_by_what_is_in_them(groups, tmp_path):
    first = open_groups(groups, groups / "sism")
    other = shutil.copytree(groups, tmp_path / "other")
    for kind in ("img", "sism"):
        (other / kind / "a").rename(other / kind / "z")  # now the last
    assert open_groups(other, other / "sism").sha256 == first.sha256
    assert open_groups(other, None).sha256 != first.sha256
    shutil.copy(other / "img/b/0.png", other / "img/z/0.png")
    assert open_groups(other, other / "sism").sha256 != first.sha256


def test_models_that_can_not_be_calibrated(narrow, calibrated, tmp_path, checkpoint):
    model, ranges = calibrated
    onnx.save(model.quantised(ranges), tmp_path / "int8.onnx")
    float_io = tmp_path / "float.onnx"
    write_onnx(random_network(1 / 32), float_io, "float32")
    renamed = onnx.load(narrow)
    for tensor in renamed.graph.initializer:
        if tensor.name == "network.vgg.vgg.0.weight":
            tensor.name = "w"
    for node in renamed.graph.node:
        node.input[:] = ["w" if i == "network.vgg.vgg.0.weight" else i for i in node.input]
    onnx.save(renamed, tmp_path / "renamed.onnx")
    for path, message in [
        (tmp_path / "int8.onnx", "is quantised already; calibrate the export"),
        (float_io, "export it with --io uint8"),
        (tmp_path / "renamed.onnx", "not a graph that icnet export wrote: no layer vgg.vgg.0"),
        (checkpoint, "not an"),
        (tmp_path / "none.onnx", "no such model file"),
        (tmp_path, "not a model file"),
    ]:
        with pytest.raises(ModelError, match=message):
            ExportedModel(Path(path))


def test_activations_that_are_not_finite_are_named(narrow, groups, tmp_path):
    path = tmp_path / "icnet.onnx"
    changed(narrow, path, **{"5_weight": lambda weight: weight.fill(np.inf)})
    model = ExportedModel(path)
    chosen = open_groups(groups, groups / "sism")
    with pytest.raises(ModelError, match="tensor relu_2 holds NaN or infinity"):
        collect(path, model.model, ["relu_2"], lambda _: chosen.feeds(), "minmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", 0.01), "--max-drop and --validation go together"),
        (("--max-drop", -1, "--validation", "v"), "--max-drop -1: expected 0 to 1"),
        (("--max-drop", 0.1, "--validation", "v", "--decisions", "d"), "give one or the other"),
        (("--percentile", 0), "--percentile 0: expected more than 0"),
        (("--threads", 0), "--threads 0: expected 1"),
        (("--plot", "x.png"), "--plot draws what --max-drop found"),
        (("--rest", "fp16"), "is fp32, so what is not int8 can't be fp16: calibrate an export with --precision fp16"),
        (("--cache", "out.onnx"), "out.onnx: is another file of this run"),
        (("--decisions", "bad.json"), "bad.json: not decisions that icnet calibrate --max-drop wrote"),
        (("--decisions", "other.json"), "has no layer conv9"),
        (("--groups", "nowhere", "--sisms", "builtin"), "nowhere: no such folder"),
        (("--groups", "empty"), "empty: no images in it"),
        (("--groups", "empty", "--sisms", "builtin"), "empty: no images in it"),
        (("--sisms", "nowhere"), "nowhere: no such folder (it should hold the SISMs)"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(icnet, narrow, groups, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "other.json").write_text('{"float_layers": ["conv9"]}')
    (tmp_path / "empty" / "sism").mkdir(parents=True)
    arguments = ["--onnx", narrow, "--groups", groups, "--output", "out.onnx"]
    if "empty" in options and "--sisms" not in options:
        options = (*options, "--sisms", "empty/sism")
    code, _, err = icnet("calibrate", *arguments, *options)
    assert code == 2
    assert err.startswith("icnet calibrate: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out.onnx").exists()


def test_decisions_need_a_list_of_layers(tmp_path, narrow):
    from calibration.sensitivity import read_decisions

    (tmp_path / "x.json").write_text('{"float_layers": 3}')
    with pytest.raises(InputError, match="decisions"):
        read_decisions(tmp_path / "x.json", ExportedModel(narrow))
