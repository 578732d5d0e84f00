"""Exported files: what is in the graph, that TensorRT takes it, and that the proof catches a wrong one."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.checkpoint import save_checkpoint
from export.fp16 import half_precision
from export.icnet import ICNet, Uint8Interface
from export.onnx_file import cpu_session
from export.proof import Difference, allowed, check, compare
from export.reference import ReferenceICNet
from export.samples import samples, smooth_group
from export.to_onnx import EXPORTS, write_onnx
from runtime import ModelError, Predictor
from runtime.contract import FILE_DIGEST, INPUTS, OUTPUTS, ExportKind
from runtime.files import check_seal
from tests.helpers import build_with_tensorrt, flipped, joined, random_network

CASES = [(kind, width, "fp32") for kind in (ExportKind.PLAIN, ExportKind.FLOAT32) for width in (0.25, 1.0)]
CASES += [(ExportKind.PLAIN, 0.25, "fp16"), (ExportKind.PLAIN, 1.0, "fp16"), (ExportKind.FLOAT32, 0.25, "fp16")]
SEVERAL = (ExportKind.PACKED, ExportKind.RAGGED, ExportKind.BANKED)
CASES += [(kind, 0.25, precision) for kind in SEVERAL for precision in ("fp32", "fp16")]


@pytest.fixture(scope="module", params=CASES, ids=lambda p: "-".join(map(str, p)))
def exported(request, tmp_path_factory):
    kind, width, precision = request.param
    path = tmp_path_factory.mktemp("export") / "icnet.onnx"
    network = random_network(width)
    typed = half_precision(network) if precision == "fp16" else network
    write_onnx(typed, path, kind, {"precision": precision})
    return path, network, kind, precision


@pytest.fixture(scope="module")
def intra(exported, tmp_path_factory):
    """The file that makes the banks of the banked one; None for the others."""
    _, network, kind, precision = exported
    if kind is not ExportKind.BANKED:
        return None
    path = tmp_path_factory.mktemp("intra") / "intra.onnx"
    write_onnx(half_precision(network) if precision == "fp16" else network, path, ExportKind.INTRA)
    return path


def test_tensorrt_parses_and_builds_it(exported, intra):
    for path in (exported[0], intra) if intra else exported[:1]:
        size, errors = build_with_tensorrt(path, profile=(1, 5, 32))
        assert errors == []
        assert size > path.stat().st_size / 2


def test_tensorrt_refuses_the_papers_network(tmp_path):
    """The reason for the rewrite: a convolution whose number of output channels is the group's size."""
    path = tmp_path / "reference.onnx"
    write_onnx(ReferenceICNet.of(random_network(0.25)), path)
    size, errors = build_with_tensorrt(path)
    assert size == 0
    assert "Invalid number of output channels: -1" in errors[0]


def test_the_graph_has_no_computed_kernel_and_no_pixels_by_pixels_tensor(exported):
    model = onnx.load(exported[0])
    weights = {i.name for i in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    # VGG16, compression, 3 co-saliency modules, merging, map_4, 3 decoder blocks, map_1: each layer once
    assert len(convolutions) == 13 + 6 + 3 * 5 + 5 + 1 + 3 * 3 + 1
    assert all(n.input[1] in weights for n in convolutions)
    assert not {n.op_type for n in model.graph.node} & {
        "GatherElements",
        "GatherND",
        "BatchNormalization",
        "If",
        "Loop",
    }

    lengths = {"bank": 4, "rgbs": 3 * 224 * 224 * 4}
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = lengths.get(value.name, 3)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    assert any(784 in shape for shape in shapes.values())  # the shapes are known
    assert not [name for name, shape in shapes.items() if shape.count(784) > 1]


def test_the_file_explains_itself(exported):
    path, _, kind, precision = exported
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    expected = [*INPUTS, *OUTPUTS] if kind is ExportKind.PLAIN else [*EXPORTS[kind][0], *EXPORTS[kind][1]]
    sizes = {"S": 1280 * 0.25}
    for spec, value in zip(expected, [*model.graph.input, *model.graph.output], strict=True):
        assert value.name == spec.name
        assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == np.dtype(spec.dtype)
        shape = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in shape] == [sizes.get(d, d) for d in spec.shape]
    notes = {p.key: p.value for p in model.metadata_props}
    assert len(notes.pop(FILE_DIGEST)) == 64
    check_seal(path)
    with pytest.raises(ModelError, match="damaged, or edited"):
        check_seal(path, flipped(path.read_bytes(), path.stat().st_size // 2))
    assert notes == {"precision": precision}
    assert not any(i.external_data for i in model.graph.initializer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert b"icnet.py" not in path.read_bytes()  # nor where the sources lie: the same export elsewhere is the same file


def test_it_computes_what_the_paper_computes(exported, intra):
    """At full width on few images; the next test has more of them."""
    path, network, kind, precision = exported
    check(path, compare(path, network, kind, precision, groups=samples(sizes=(1, 2)), intra=intra), precision)


def test_exported_at_one_size_and_right_at_any(model_file, network):
    differences = compare(model_file, network, groups=samples(sizes=(1, 2, 17, 64)))
    assert [d.name for d in differences][:4] == ["N = 1", "N = 2", "N = 17", "N = 64"]
    check(model_file, differences)


def wrong_order(network):
    """Ascending instead of descending: RSCF's 1×1 convolution sees its rows reversed."""
    for module in (network.Co6, network.Co5, network.Co4):
        weight = module.cosal_feat.conv[0].weight
        weight.data = weight.data.flip(1)


def without_background(network):
    for module in (network.Co6, network.Co5, network.Co4):
        module.conv[0].weight.data[:, module.conv[0].out_channels :] = 0


def wrong_statistics(network):
    network.refine_1.merge_conv[1].running_var *= 1.1


@pytest.mark.parametrize("mistake", [wrong_order, without_background, wrong_statistics])
def test_the_proof_refuses_a_file_that_computes_something_else(mistake, tmp_path):
    network, wrong = random_network(), random_network()
    mistake(wrong)
    path = tmp_path / "wrong.onnx"
    write_onnx(wrong, path)
    differences = compare(path, network, groups=samples(sizes=(1, 3)))
    with pytest.raises(ModelError, match="differ from the paper's network"):
        check(path, differences)


def test_the_proof_refuses_maps_that_are_not_finite(tmp_path):
    """An optimiser that drops the ε of the min–max gives NaN on degenerate inputs, and only there."""
    path = tmp_path / "reference.onnx"
    network = random_network()
    write_onnx(ReferenceICNet.of(network), path)  # written with "+ 1e-12", which the exporter's optimiser drops
    differences = compare(path, network, groups=samples(sizes=(2,)))
    assert np.isfinite(differences[0].max)
    assert differences[-1].max == np.inf
    with pytest.raises(ModelError):
        check(path, differences)


@pytest.mark.parametrize(("precision", "optimised"), [("fp32", True), ("fp16", False)])
def test_an_fp16_file_is_proved_with_every_rounding(model_file, network, monkeypatch, precision, optimised):
    """ONNX Runtime's optimiser takes roundings out of FP16 graphs on a CPU, and so hides an overflow."""
    seen = []

    def noted(*args, **options):
        seen.append(options["optimised"])
        return cpu_session(*args, **options)

    monkeypatch.setattr("export.proof.cpu_session", noted)
    compare(model_file, network, precision=precision, groups=samples(sizes=(1,)))
    assert seen == [optimised]


def test_the_bound_follows_the_floor():
    noisy = Difference("all", max=0.0, mean=0.0, floor_max=0.02, floor_mean=0.003)
    assert allowed(noisy) == pytest.approx((0.08, 0.012))
    quiet = Difference("all", max=0.0, mean=0.0, floor_max=0.0, floor_mean=0.0)
    assert allowed(noisy, "fp16") == pytest.approx((0.06, 0.009))
    assert allowed(quiet) == allowed(quiet, "fp16") == (1e-2, 1e-4)  # what no 8-bit map can show passes


def test_differences_are_pooled_over_images_not_over_groups(model_file, network):
    one, three, overall = compare(model_file, network, groups=[smooth_group(1, seed=1), smooth_group(3, seed=3)])
    assert overall.max == max(one.max, three.max)
    assert overall.mean == pytest.approx((one.mean + 3 * three.mean) / 4)
    assert overall.floor_mean == pytest.approx((one.floor_mean + 3 * three.floor_mean) / 4)


def test_preprocessing_in_the_graph_is_the_authors(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    sisms = np.random.default_rng(1).integers(0, 256, (2, 224, 224), dtype=np.uint8)
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, s):
            seen["x"], seen["s"] = x, s
            return s

    Uint8Interface(Spy())(torch.from_numpy(images), torch.from_numpy(sisms))
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(seen["x"].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_allclose(seen["s"].numpy()[:, 0], sisms / 255, atol=1e-7)


@pytest.mark.parametrize(("io", "precision"), [("uint8", "fp32"), ("float32", "fp32"), ("uint8", "fp16")])
def test_icnet_export(icnet, checkpoint, tmp_path, io, precision):
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "new" / "icnet.onnx")
    code, out, _ = icnet("export", *arguments, "--io", io, "--precision", precision)
    assert code == 0
    assert all(f"N = {n} " in out for n in (1, 2, 5, 10, 17))
    assert "noise floor" in out
    notes = {p.key: p.value for p in onnx.load(tmp_path / "new" / "icnet.onnx").metadata_props}
    assert (notes["io"], notes["precision"]) == (io, precision)
    assert notes["width"] == "0.125"
    assert len(notes["checkpoint_sha256"]) == 64
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["icnet.onnx"]


def test_icnet_export_of_banks_and_packs(icnet, tmp_path):
    save_checkpoint(tmp_path / "icnet.pth", random_network(1 / 32), card="drawings, a demo")
    arguments = ("--checkpoint", tmp_path / "icnet.pth", "--output", tmp_path / "new" / "icnet.onnx")
    code, out, _ = icnet("export", *arguments, "--banked", "--precision", "fp16")
    assert code == 0
    assert all(f"N = {n} " in out for n in (1, 2, 5, 10, 17))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["icnet.banked.onnx", "icnet.intra.onnx"]
    assert icnet("export", *arguments, "--packed")[0] == 0
    files = [tmp_path / "new" / f"icnet{kind}.onnx" for kind in ("", ".intra", ".banked")]
    notes = [{p.key: p.value for p in onnx.load(file).metadata_props} for file in files]
    assert [n["precision"] for n in notes] == ["fp32", "fp16", "fp16"]
    assert len({n["weights_sha256"] for n in notes}) == 1  # one network, whatever the precision
    assert [n["icnet_card"] for n in notes] == ["drawings, a demo"] * 3
    inputs = [[value.name for value in onnx.load(file).graph.input] for file in files]
    assert inputs == [["images", "sisms", "groups"], ["images", "sisms"], ["images", "sisms", "bank"]]


def test_a_failed_proof_of_a_bank_export_leaves_neither_file(icnet, tmp_path, monkeypatch):
    def sabotaged(network, path, kind, *args):
        wrong = random_network(1 / 32, seed=1) if kind is ExportKind.INTRA else network
        return write_onnx(wrong, path, kind, *args)

    monkeypatch.setattr("export.to_onnx.write_onnx", sabotaged)
    monkeypatch.setattr("export.to_onnx.samples", lambda: samples(sizes=(3,)))
    save_checkpoint(tmp_path / "icnet.pth", random_network(1 / 32))
    code, _, err = icnet("export", "--checkpoint", tmp_path / "icnet.pth", "--output", tmp_path / "x.onnx", "--banked")
    assert code == 2
    assert "x.banked.onnx: not written: its maps differ" in err
    assert [p.name for p in tmp_path.iterdir()] == ["icnet.pth"]


def test_the_proof_refuses_a_packed_file_that_mixes_its_groups(tmp_path, monkeypatch):
    network, path = random_network(1 / 32), tmp_path / "mixed.onnx"
    monkeypatch.setattr("export.icnet.Packed.forward", lambda self, images, sisms, groups: self.interface(
        images, sisms, member_mask=groups.unsqueeze(1) >= groups.unsqueeze(0)
    ))  # fmt: skip
    write_onnx(network, path, ExportKind.PACKED)
    differences = compare(path, network, ExportKind.PACKED, groups=samples(sizes=(2, 5)))
    with pytest.raises(ModelError, match="differ from the paper's network"):
        check(path, differences)


@pytest.fixture(scope="module")
def ragged(ragged_file, exports):
    """What runs requests in one execution of a ragged export; and what computes one group, of the same network."""
    packed, session = cpu_session(exports.with_suffix(".packed.onnx")), cpu_session(ragged_file)

    def alone(group):
        labels = np.zeros(len(group), np.int32)
        return packed.run(None, {"images": group[..., :3], "sisms": group[..., 3], "groups": labels})[0]

    def run(*requests):
        """The maps of requests in one execution, cut up as Triton does it."""
        rgbs, shapes = joined(requests)
        maps = session.run(None, {"rgbs": rgbs, "shapes": shapes})[0]
        ends = np.cumsum([b * n for b, n, *_ in (request.shape for request in requests)])
        return [m.reshape(*r.shape[:4]) for r, m in zip(requests, np.split(maps, ends[:-1]), strict=True)]

    return run, alone


def request_of(b, n, seed=0):
    return np.random.default_rng((b, n, seed)).integers(0, 256, (b, n, 224, 224, 4), np.uint8)


def test_a_ragged_export_takes_requests_as_triton_joins_them(ragged):
    """Of several sizes, empty ones, and several groups in one request: each group's maps are its own."""
    run, alone = ragged
    requests = [request_of(b, n) for b, n in ((1, 3), (1, 0), (2, 2), (1, 1), (3, 0), (1, 4), (1, 0))]
    for request, maps in zip(requests, run(*requests), strict=True):
        assert maps.shape == request.shape[:4]
        for group, found in zip(request, maps, strict=True):
            if len(group):
                assert abs(found - alone(group)).max() < 2e-2
                assert abs(found - alone(group)).mean() < 1e-4  # by what is packed with it, attention rounds
    assert run(request_of(1, 0), request_of(2, 0))[1].shape == (2, 0, 224, 224)


def test_a_request_of_two_groups_is_not_one_group_of_twice_the_size(ragged):
    run, alone = ragged
    request = request_of(2, 2)
    (maps,) = run(request)
    assert (
        abs(maps.reshape(4, 224, 224) - alone(request.reshape(4, 224, 224, 4))).mean() > 5e-4
    )  # where another packing gives 1e-4 at most


def test_the_runtime_says_what_a_ragged_export_is_for(ragged_file):
    with pytest.raises(ModelError, match=r"exported with --ragged, for a server .*--packed for several"):
        Predictor(ragged_file)


def test_the_proof_refuses_a_ragged_file_that_counts_wrong(tmp_path, monkeypatch):
    """The first image of a group is counted to the one before."""

    def late(shapes, images):
        ends = shapes[:, 0].cumsum(0, dtype=torch.int32)
        return (torch.arange(images).unsqueeze(1) > ends.unsqueeze(0)).int().sum(1, dtype=torch.int32)

    monkeypatch.setattr("export.ragged.groups_of", late)
    network, path = random_network(1 / 32), tmp_path / "wrong.onnx"
    write_onnx(network, path, ExportKind.RAGGED)
    differences = compare(path, network, ExportKind.RAGGED, groups=samples(sizes=(2, 5)))
    with pytest.raises(ModelError, match="differ from the paper's network"):
        check(path, differences)


def test_icnet_export_ragged(icnet, tmp_path):
    save_checkpoint(tmp_path / "icnet.pth", random_network(1 / 32))
    code, out, _ = icnet("export", "-c", tmp_path / "icnet.pth", "-o", tmp_path / "icnet.ragged.onnx", "--ragged")
    assert code == 0
    assert "any number of groups, for Triton" in out
    assert all(f"N = {n} " in out for n in (1, 2, 5, 10, 17))


def test_a_failed_proof_leaves_no_file_and_exits_with_2(icnet, checkpoint, tmp_path, monkeypatch):
    def sabotaged(network, path, *args):
        model = write_onnx(network, path, *args)
        last = [n for n in model.graph.node if n.op_type == "Conv"][-1]
        bias = next(i for i in model.graph.initializer if i.name == last.input[2])
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, path)

    monkeypatch.setattr("export.to_onnx.write_onnx", sabotaged)
    before = tmp_path / "icnet.onnx"
    before.write_text("the export of yesterday")
    code, _, err = icnet("export", "--checkpoint", checkpoint, "--output", before)
    assert code == 2
    assert err.startswith("icnet export: error: ")
    assert "not written" in err
    assert before.read_text() == "the export of yesterday"
    assert list(tmp_path.iterdir()) == [before]


def test_weights_that_give_nan_are_named_as_the_reason(icnet, tmp_path):
    network = random_network(1 / 32)
    network.vgg.vgg[0].weight.data.fill_(3e38)
    save_checkpoint(tmp_path / "huge.pth", network)
    code, _, err = icnet("export", "--checkpoint", tmp_path / "huge.pth", "--output", tmp_path / "x.onnx")
    assert code == 2
    assert "with these weights the paper's network itself computes NaN" in err


def test_export_errors_are_one_line(icnet, tmp_path, checkpoint):
    bad = tmp_path / "bad.pth"
    save_checkpoint(bad, ICNet(1 / 32))
    state = torch.load(bad, weights_only=True)["state_dict"]
    del state["Co4.conv.0.weight"]
    torch.save({"state_dict": state}, bad)
    (tmp_path / "file").touch()
    for arguments, message in [
        (("--checkpoint", tmp_path / "none.pth", "--output", tmp_path / "x.onnx"), "none.pth: no such file"),
        (("--checkpoint", bad, "--output", tmp_path / "x.onnx"), "missing 1 tensor: Co4.conv.0.weight"),
        (("--checkpoint", checkpoint, "--output", checkpoint), "is an input of this run"),
        (("--checkpoint", tmp_path, "--output", tmp_path / "x.onnx"), "not a file"),
        (("--checkpoint", checkpoint, "--output", tmp_path), "it is a folder"),
        (("--checkpoint", checkpoint, "--output", ""), "it is a folder"),
        (("--checkpoint", checkpoint, "--output", "/dev/null"), "it is not a regular file"),
        (("--checkpoint", checkpoint, "--output", tmp_path / "file" / "x.onnx"), "is not a folder"),
        (("--checkpoint", checkpoint, "--output", tmp_path, "--banked"), "it is a folder"),
        (("--checkpoint", checkpoint, "--output", tmp_path / "x.onnx", "--packed", "--io", "float32"), "uint8 only"),
        (("--checkpoint", checkpoint, "--output", tmp_path / "x.onnx", "--ragged", "--io", "float32"), "uint8 only"),
    ]:
        code, _, err = icnet("export", *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "x.onnx").exists()
