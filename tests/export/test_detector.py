"""The demo's detector: its encoder is EfficientNet-Lite0's, its exports are proved, and they can be compact."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from export.checkpoint import load_checkpoint, save_checkpoint
from export.detector import BLOCKS, Detector, load_detector, load_encoder
from export.detector_onnx import KINDS, SISMS, compare, half_precision, samples, write_onnx
from export.egnet_onnx import smooth_images
from export.onnx_file import load_model
from export.proof import check
from runtime import CheckpointError, ModelError
from tests.helpers import build_with_tensorrt, random_network

WIDTH = 1 / 8


def random_detector(width=WIDTH, seed=0):
    """Random weights and biases, and SISMs that span much of [0, 1]."""
    torch.manual_seed(seed)
    network = Detector(width).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.normal_(module.bias, 0, 0.1)
    with torch.inference_mode():
        scores = network.scores(torch.from_numpy(smooth_images(1, 224, 224, 9)))
        network.score.bias.data -= scores.mean()
        for parameter in network.score.parameters():
            parameter.data *= 2 / scores.std()
    return network


@pytest.fixture(scope="module")
def detector():
    return random_detector()


def pretrained(path, seed=0):
    """A state dict with the names and shapes of EfficientNet-PyTorch's Lite0, as far as they are used, and more."""
    rng = torch.Generator().manual_seed(seed)
    state = {"_fc.weight": torch.zeros(1000, 1280)}

    def layer(conv, norm, outputs, inputs, kernel):
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=rng) / inputs**0.5 / kernel
        for part in ("weight", "running_var"):
            state[f"{norm}.{part}"] = torch.rand(outputs, generator=rng) + 0.5
        for part in ("bias", "running_mean"):
            state[f"{norm}.{part}"] = torch.randn(outputs, generator=rng) / 2
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    layer("_conv_stem", "_bn0", 32, 3, 3)
    channels = 32
    for i, (factor, kernel, _, outputs) in enumerate(BLOCKS):
        inner = channels * factor
        if factor != 1:
            layer(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", inner, channels, 1)
        layer(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", inner, 1, kernel)
        layer(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", outputs, inner, 1)
        channels = outputs
    torch.save(state, path)
    return state


def efficientnet_lite(state, x):
    """Features at strides 2 to 32, from EfficientNet-Lite's description, batch norms and all."""

    def layer(x, conv, norm, stride=1):
        kernel = state[f"{conv}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        mean, var, gain, shift = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, shift, eps=1e-3)

    x = layer(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    found = []
    for i, (factor, _, stride, _) in enumerate(BLOCKS):
        name, before = f"_blocks.{i}", x
        if stride == 2:
            found.append(x)
        if factor != 1:
            x = layer(x, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
        x = layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride).clamp(0, 6)
        x = layer(x, f"{name}._project_conv", f"{name}._bn2")
        if x.shape == before.shape:
            x = x + before
    return [*found, x]


def test_the_encoder_is_efficientnet_lite0(tmp_path):
    state, network = pretrained(tmp_path / "lite0.pth"), Detector()
    decoder = copy.deepcopy(network.mix.state_dict())
    load_encoder(network, tmp_path / "lite0.pth")
    images = torch.from_numpy(smooth_images(1, 64, 96, 0))
    with torch.inference_mode():
        found = network.encoder(network.normalise(images))
        expected = efficientnet_lite(state, (images.permute(0, 3, 1, 2).float() - 127) / 128)
    assert [tuple(f.shape) for f in found] == [
        (1, 16, 32, 48), (1, 24, 16, 24), (1, 40, 8, 12), (1, 112, 4, 6), (1, 192, 2, 3),
    ]  # fmt: skip
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() < 1e-4 * e.abs().max()
        assert e.std() > 0.05
    assert all(torch.equal(t, decoder[name]) for name, t in network.mix.state_dict().items())


def test_other_weights_for_the_encoder_are_refused(tmp_path):
    state = pretrained(tmp_path / "x.pth")
    del state["_blocks.3._bn1.running_var"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not EfficientNet-Lite0's .* no tensor _blocks\.3\._bn1\.running_var"):
        load_encoder(Detector(), tmp_path / "x.pth")
    pretrained(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="misshapen"):
        load_encoder(Detector(0.5), tmp_path / "x.pth")


def test_released_weights_fit_into_the_repository():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Detector().parameters())
    assert 2 * parameters < 2.2e6  # bytes, in FP16


def test_a_checkpoint_is_loaded_whole_and_told_apart(detector, tmp_path):
    save_checkpoint(tmp_path / "d.pth", detector)
    loaded = load_detector(tmp_path / "d.pth")
    assert (loaded.width, loaded.training) == (WIDTH, False)
    assert all(torch.equal(t, detector.state_dict()[name]) for name, t in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match="of a detector, not of an ICNet: icnet export --network detector takes"):
        load_checkpoint(tmp_path / "d.pth")
    save_checkpoint(tmp_path / "i.pth", random_network(1 / 32))
    with pytest.raises(CheckpointError, match="of an ICNet, not of a detector: icnet export --network icnet takes it"):
        load_detector(tmp_path / "i.pth")
    changed = torch.load(tmp_path / "d.pth", weights_only=True)
    changed["state_dict"]["score.bias"] += 1
    torch.save(changed, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="damaged, or edited"):
        load_detector(tmp_path / "d.pth")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request, detector, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    write_onnx(half_precision(detector) if request.param == "fp16" else detector, path)
    return path, request.param


def test_one_file_for_any_batch(exported, detector):
    path, precision = exported
    differences = compare(path, detector, precision)
    check(path, differences, precision, SISMS)
    assert len(differences) == len(samples()) + 1
    session = onnxruntime.InferenceSession(path)
    (image,), (sism,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("images", "tensor(uint8)", ["B", 224, 224, 3])
    assert (sism.name, sism.type, sism.shape) == ("sisms", "tensor(float)", ["B", 224, 224])
    images = smooth_images(4, 224, 224, seed=8)
    together = session.run(None, {"images": images})[0]
    alone = np.concatenate([session.run(None, {"images": images[i : i + 1]})[0] for i in range(4)])
    assert np.abs(together - alone).max() < 1e-5  # no image sees another
    assert together.max() - together.min() > 0.3


def test_the_proof_finds_a_wrong_formula(exported, detector, tmp_path):
    path, precision = exported
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = b"align_corners"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="not written: its SISMs differ"):
        check(path, compare(tmp_path / "x.onnx", detector, precision), precision, SISMS)


def test_tensorrt_builds_it(exported):
    engine, errors = build_with_tensorrt(exported[0])
    assert (errors, engine > 0) == ([], True)


def test_a_compact_file_computes_the_same_from_half_the_bytes(detector, tmp_path):
    released = copy.deepcopy(detector).half().float()  # weights that FP16 holds
    plain, compact = tmp_path / "plain.onnx", tmp_path / "compact.onnx"
    write_onnx(released, plain)
    write_onnx(released, compact, compact=True)
    large = sum(i.ByteSize() for i in load_model(plain).graph.initializer if np.prod(i.dims) > 1024)
    assert plain.stat().st_size - compact.stat().st_size == pytest.approx(large / 2, rel=0.2)
    images = {"images": smooth_images(2, 224, 224, seed=3)}
    maps = [onnxruntime.InferenceSession(path).run(None, images)[0] for path in (plain, compact)]
    assert np.array_equal(*maps)
    # Read by our own tools, it is the plain model again.
    weights = [
        {i.name: onnx.numpy_helper.to_array(i) for i in load_model(p).graph.initializer} for p in (plain, compact)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(array, weights[1][name]) for name, array in weights[0].items())
    assert [n.op_type for n in load_model(compact).graph.node] == [n.op_type for n in load_model(plain).graph.node]
    # Weights that FP16 can't hold stay as they are.
    write_onnx(detector, tmp_path / "rounded.onnx", compact=True)
    assert tmp_path.joinpath("rounded.onnx").stat().st_size == pytest.approx(plain.stat().st_size, rel=0.01)


def test_the_command_writes_a_file_that_says_what_it_is(icnet, detector, tmp_path):
    save_checkpoint(tmp_path / "d.pth", copy.deepcopy(detector).half())
    output = tmp_path / "new" / "detector.onnx"
    code, out, err = icnet(
        "export", "--network", "detector", "--checkpoint", tmp_path / "d.pth", "--output", output, "--compact"
    )
    assert (code, err) == (0, "")
    assert "5 images" in out
    assert "demo detector, fp32, width 0.125, any batch" in out
    assert {p.key: p.value for p in onnx.load(output).metadata_props}["network"] == "detector"
    assert any(name.endswith(".fp16") for name in (i.name for i in onnx.load(output).graph.initializer))
    assert KINDS["detector"].load(tmp_path / "d.pth").width == WIDTH
