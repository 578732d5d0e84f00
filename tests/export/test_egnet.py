"""EGNet against a second writing of it, its checkpoint, its exports, and that the proof catches wrong ones."""

import copy
import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto

from export.checkpoint import load_checkpoint, save_checkpoint
from export.detector_onnx import KINDS, SISMS, compare, write_onnx
from export.egnet import EGNet, load_egnet
from export.egnet_onnx import half_precision, samples, smooth_images
from export.fp16 import TARGET
from export.proof import check
from runtime import CheckpointError, ModelError
from runtime.files import check_seal, digest
from tests.helpers import DATA, EGNET_WIDTH, HAS_TENSORRT_RTX, flipped, random_network

RELEASED = json.loads((DATA / "egnet_vgg_state_dict.json").read_text())


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request, egnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("egnet") / "egnet.onnx"
    write_onnx(half_precision(egnet) if request.param == "fp16" else egnet, path, {"precision": request.param})
    return path, request.param


def second_writing(w, images):
    """EGNet from its description, on a dict of tensors: uint8 RGB [B, H, W, 3] → [B, H, W]."""

    def conv(x, name):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, w.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def three(x, name):
        for i in (0, 2, 4):
            x = conv(x, f"{name}.{i}").relu()
        return x

    def grow(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

    rgb = images.double()
    bgr = torch.stack([rgb[..., 2] - 104.00699, rgb[..., 1] - 116.66877, rgb[..., 0] - 122.67892], 1)
    x, taken = bgr.to(w["base.base.0.weight"].dtype), []
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        for i in stage:
            x = conv(x, f"base.base.{i}").relu()
        taken.append(x)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    _, x0, x1, x2, x3 = taken
    x4 = three(x, "base.base_ex.ex")
    s4 = three(x4, "merge1.up.4")
    s3 = three(x3 + grow(s4, x3), "merge1.up.3")
    s2 = three(x2 + grow(s3, x2), "merge1.up.2")
    s1 = three(x1 + grow(conv(s2, "merge1.trans.1.0").relu(), x1), "merge1.up.1")
    e = three(x0 + grow(conv(s4, "merge1.trans.2.0").relu(), x0), "merge1.up.0")
    t = []
    for j, s in enumerate((s1, s2, s3, s4)):
        t.append(three(grow(conv(s, f"merge2.trans.0.{j}.0").relu(), e) + e, f"merge2.up.0.{j}"))
    g = t[0]
    for other in t[1:]:
        g = (g + grow(other, t[0])).relu()
    score = conv(conv(g, "merge2.final_score.0").relu(), "merge2.final_score.2")
    return grow(score, bgr).sigmoid()[:, 0]


@pytest.mark.parametrize("shape", [(2, 97, 131), (1, 64, 64), (1, 33, 80), (3, 1, 1), (1, 2, 70)])
def test_computes_what_the_second_writing_computes(egnet, shape):
    images = torch.from_numpy(smooth_images(*shape, seed=5))
    double = copy.deepcopy(egnet).double()
    with torch.inference_mode():
        found, expected = double(images), second_writing(double.state_dict(), images)
        assert (found.dtype, tuple(found.shape)) == (torch.float64, shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert (egnet(images) - expected).abs().max() < 1e-4
    if min(shape[1:]) > 30:
        assert expected.max() - expected.min() > 0.3  # maps on which a difference shows


def test_pixels_become_bgr_minus_the_mean(egnet):
    images = torch.tensor([[[[10, 20, 30], [255, 0, 128]]]], dtype=torch.uint8)  # one image, 1×2
    blue, green, red = egnet.normalise(images)[0, :, 0].tolist()
    assert blue == pytest.approx([30 - 104.00699, 128 - 104.00699], abs=1e-5)
    assert green == pytest.approx([20 - 116.66877, -116.66877], abs=1e-5)
    assert red == pytest.approx([10 - 122.67892, 255 - 122.67892], abs=1e-5)
    half = copy.deepcopy(egnet).half().normalise(images)
    assert half.dtype == torch.float32  # in FP16 the mean of blue would be 104.0
    assert torch.equal(half, egnet.normalise(images))


def test_sizes_are_halved_and_rounded_up(egnet):
    with torch.inference_mode():
        sizes = [tuple(x.shape[2:]) for x in egnet.base(torch.zeros(1, 3, 97, 130))]
    assert sizes == [(49, 65), (25, 33), (13, 17), (7, 9), (4, 5)]


def test_has_the_names_and_shapes_of_the_released_checkpoint():
    with torch.device("meta"):
        state = EGNet().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == RELEASED
    assert len(state) == 112
    assert sum(t.numel() for t in state.values()) == pytest.approx(108.07e6, rel=1e-4)


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state}], ids=["bare", "state_dict"])
def test_a_checkpoint_is_loaded_whole(egnet, tmp_path, wrap):
    loaded = load_egnet(save(tmp_path / "x.pth", wrap(egnet.state_dict())))
    assert (loaded.width, loaded.training) == (EGNET_WIDTH, False)
    assert all(torch.equal(t, egnet.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(egnet, tmp_path):
    state = egnet.state_dict()
    state["merge3.bias"] = state.pop("merge2.final_score.0.bias")
    state["merge1.trans.1.0.weight"] = state["merge1.trans.1.0.weight"].transpose(0, 1)
    with pytest.raises(CheckpointError) as error:
        load_egnet(save(tmp_path / "x.pth", state))
    assert "x.pth: does not fit" in str(error.value)
    assert "missing 1 tensor: merge2.final_score.0.bias" in str(error.value)
    assert "unexpected 1 tensor: merge3.bias" in str(error.value)
    assert "misshapen 1 tensor: merge1.trans.1.0.weight [32, 16, 1, 1] (expected [16, 32, 1, 1])" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": torch.zeros(1)},
            "not an EGNet checkpoint: it has no 4-D tensor base.base.0.weight (it has 1",
        ),
        ([1], "not a state dict but list"),
        ({"base.base.0.weight": 3}, "is int, not a tensor"),
        ({"base.base.0.weight": torch.zeros(3, 3, 3, 3)}, "has 3 output channels; an EGNet has 64 times its width"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError) as error:
        load_egnet(save(tmp_path / "x.pth", content))
    assert message in str(error.value)


def test_nan_is_refused(egnet, tmp_path):
    state = copy.deepcopy(egnet.state_dict())
    state["merge1.up.3.2.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensor: merge1\.up\.3\.2\.bias"):
        load_egnet(save(tmp_path / "x.pth", state))


def test_the_two_networks_checkpoints_are_told_apart(egnet, tmp_path):
    save_checkpoint(tmp_path / "icnet.pth", random_network(1 / 32))
    with pytest.raises(CheckpointError, match="of an ICNet, not of an EGNet: icnet export --network icnet takes it"):
        load_egnet(tmp_path / "icnet.pth")
    for content in (egnet.state_dict(), {"state_dict": egnet.state_dict()}):
        with pytest.raises(CheckpointError, match="of an EGNet, not of an ICNet: icnet export --network egnet takes"):
            load_checkpoint(save(tmp_path / "egnet.pth", content))


def test_one_file_for_any_batch_and_size(exported, egnet):
    path, precision = exported
    differences = compare(path, egnet, precision)
    check(path, differences, precision, SISMS)
    assert len(differences) == len(samples()) + 1
    session = onnxruntime.InferenceSession(path)
    (image,), (sism,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("images", "tensor(uint8)", ["B", "H", "W", 3])
    assert (sism.name, sism.type, sism.shape) == ("sisms", "tensor(float)", ["B", "H", "W"])
    images = smooth_images(3, 47, 62, seed=8)
    together = session.run(None, {"images": images})[0]
    alone = np.concatenate([session.run(None, {"images": images[i : i + 1]})[0] for i in range(3)])
    assert together.shape == (3, 47, 62)
    assert np.abs(together - alone).max() < 1e-5  # no image sees another
    assert session.run(None, {"images": images[:, :1, :1]})[0].shape == (3, 1, 1)


def test_what_is_in_the_graph(exported):
    path, precision = exported
    model = onnx.load(path)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info} | {
        i.name: i.data_type for i in graph.initializer
    }
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    # VGG16, sixth stage, PSFEM and NLSEM, O2OGM, fusion: the side losses' layers are not there
    assert len(convolutions) == 13 + 3 + 5 * 3 + 2 + 4 * (1 + 3) + 2
    assert not [i.name for i in graph.initializer if "merge1.score" in i.name or "merge2.score" in i.name]
    expected = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    for node in convolutions:
        assert {types[name] for name in (*node.input, *node.output) if name} == {expected}, node.name
    for node in graph.node:
        if node.op_type in {"Sub", "Sigmoid"}:
            assert types[node.input[0]] == TensorProto.FLOAT
    assert {p.key: p.value for p in model.metadata_props}["precision"] == precision
    check_seal(path)
    with pytest.raises(ModelError, match="damaged, or edited"):
        check_seal(path, flipped(path.read_bytes(), path.stat().st_size // 2))


@pytest.mark.skipif(not HAS_TENSORRT_RTX, reason="tensorrt-rtx has no wheel for this platform")
def test_tensorrt_parses_and_builds_it_for_batches_and_sizes(exported):
    import tensorrt_rtx as trt

    path, _ = exported
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert tuple(network.get_output(0).shape) == (-1, -1, -1)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 32, 32, 3), (1, 300, 400, 3), (8, 640, 640, 3))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > path.stat().st_size / 2


def loud(network, factor):
    """The same function of the image with all activations `factor` times as large."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.bias.data *= factor
    network.base.base[0].weight.data *= factor
    score = network.merge2.final_score[-1]
    score.weight.data /= factor
    score.bias.data /= factor
    return network


@pytest.mark.parametrize("factor", [1e-4, 1e5])
def test_half_precision_fits_activations_of_any_scale(egnet, factor):
    scaled, images = loud(egnet, factor), torch.from_numpy(smooth_images(1, 64, 80, seed=0))
    half = half_precision(scaled)
    largest = []
    for module in half.modules():
        if isinstance(module, torch.nn.Conv2d) and module.out_channels > 1:
            module.register_forward_hook(lambda _m, _i, output: largest.append(output.abs().max().item()))
    with torch.inference_mode():
        assert (scaled(images) - egnet(images)).abs().max() < 1e-4
        error = (half(images) - scaled(images)).abs()
    assert max(largest) <= 2 * TARGET
    assert error.max() < 0.02  # 11 bits, through 50 layers


def wrong_resize(model):
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = b"half_pixel"


def wrong_order(model):
    """RGB where BGR is expected: the Slice that turns the channels round, as one that does not."""
    flip = next(node for node in model.graph.node if node.op_type == "Slice")
    model.graph.node.insert(
        list(model.graph.node).index(flip), onnx.helper.make_node("Identity", flip.input[:1], flip.output[:1])
    )
    model.graph.node.remove(flip)


@pytest.mark.parametrize("spoil", [wrong_resize, wrong_order])
def test_the_proof_finds_a_wrong_formula(exported, egnet, tmp_path, spoil):
    path, precision = exported
    model = onnx.load(path)
    spoil(model)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="not written: its SISMs differ"):
        check(path, compare(tmp_path / "x.onnx", egnet, precision), precision, SISMS)


def test_the_command_writes_a_file_that_says_what_it_is(icnet, egnet, tmp_path):
    checkpoint = save(tmp_path / "EGNet.pth", egnet.state_dict())
    output = tmp_path / "new" / "egnet.onnx"
    code, out, err = icnet(
        "export", "--network", "egnet", "--checkpoint", checkpoint, "--output", output, "--precision", "fp16"
    )
    assert (code, err) == (0, "")
    assert "97×131" in out
    assert "EGNet, fp16, width 0.0625, any batch, height and width" in out
    properties = {p.key: p.value for p in onnx.load(output).metadata_props}
    assert properties["network"] == "egnet"
    assert properties["checkpoint_sha256"] == digest(checkpoint)
    assert properties["precision"] == "fp16"
    assert properties["producer"].startswith("icnet-deploy ")


def test_a_file_that_overflows_is_not_written(icnet, egnet, tmp_path, monkeypatch):
    unscaled = dataclasses.replace(KINDS["egnet"], half_precision=lambda network: copy.deepcopy(network).half())
    monkeypatch.setitem(KINDS, "egnet", unscaled)
    checkpoint = save(tmp_path / "EGNet.pth", loud(egnet, 1e5).state_dict())
    output = tmp_path / "out" / "egnet.onnx"
    code, out, err = icnet(
        "export", "--network", "egnet", "--checkpoint", checkpoint, "--output", output, "--precision", "fp16"
    )
    assert code == 2
    assert "egnet.onnx: not written: its SISMs differ from the PyTorch network by inf at most" in err
    assert "allowed" in out  # the table, to see where
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("options", [["--packed"], ["--banked"], ["--io", "float32"]])
def test_options_of_icnet_are_refused(icnet, tmp_path, options):
    code, _, err = icnet(
        "export", "--network", "egnet", "--checkpoint", tmp_path / "x.pth", "--output", tmp_path / "x.onnx", *options
    )
    assert code == 2
    assert err == (
        f"icnet export: error: {' '.join(options)}: not with --network egnet, which takes single images as uint8\n"
    )


def test_the_checkpoint_is_not_overwritten(icnet, egnet, tmp_path):
    checkpoint = save(tmp_path / "EGNet.pth", egnet.state_dict())
    code, _, err = icnet("export", "--network", "egnet", "--checkpoint", checkpoint, "--output", checkpoint)
    assert code == 2
    assert "is an input of this run" in err
    load_egnet(checkpoint)
