import argparse
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import training.train
from export.checkpoint import load_backbone, load_checkpoint, read_card, read_checkpoint, save_checkpoint
from export.icnet import MEAN, STD, ICNet
from export.to_onnx import write_onnx
from runtime import InputError, Predictor
from runtime.preprocess import image_tensor
from tests.helpers import random_network
from training.batches import Batch, DataSetBatches
from training.pretrain import Classifier, backbone
from training.progress import half_cosine
from training.train import AttentionLoss, iou_loss

SMALL = ["--width", 0.0625, "--images", 3, "--lr", 1e-3, "--init", "he"]


@pytest.fixture
def pasted(material):
    return ["--cutouts", material[0], "--backgrounds", material[1], *SMALL]


@pytest.fixture
def dataset(tmp_path):
    """Groups of 4, 3 and 1 images; grey levels tell the images apart, and so do their masks and SISMs."""
    level = 0
    for group, n in {"cat": 4, "cow": 3, "solo": 1}.items():
        for i in range(n):
            level += 20
            ramp = np.tile(np.linspace(0, 60, 50).astype(np.uint8), (40, 1))
            for kind, suffix in (("img", "jpg"), ("gt", "png"), ("sism", "png")):
                path = tmp_path / "data" / kind / group / f"{i}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(ramp + np.uint8(level))
                picture.convert("RGB" if kind == "img" else "L").save(path, quality=95)
    return tmp_path / "data"


def test_iou_loss_on_numbers():
    truth = torch.zeros(2, 1, 224, 224)
    truth[0, :, :, :112] = 1
    truth[1] = 1
    half = torch.full((2, 1, 28, 28), 0.5)  # IoU: 0.5·½ / (½ + 0.5·½) = 1/3, and 1/2
    assert iou_loss((half,), truth).item() == pytest.approx(1 - (1 / 3 + 1 / 2) / 2)
    assert iou_loss((half, truth), truth).item() == pytest.approx(1 - (1 / 3 + 1 / 2 + 1 + 1) / 4)
    assert torch.isfinite(iou_loss((half,), torch.zeros_like(truth)))


def test_attention_loss_is_of_both_kinds_of_sivs_at_every_level():
    network = random_network(1 / 16).train()
    loss = AttentionLoss(network)
    images, sisms = torch.randn(3, 3, 224, 224), torch.rand(3, 1, 224, 224)
    truth = torch.zeros(3, 1, 224, 224)
    truth[..., :112] = 1
    expected = []
    for module in (network.Co6, network.Co5, network.Co4):

        def spy(inputs, fusion=module.cosal_feat):
            f = torch.nn.functional.normalize(inputs[0].flatten(2), dim=1)
            half = torch.zeros(fusion.size, fusion.size)
            half[:, : fusion.size // 2] = 1
            if fusion.size % 2:
                half[:, fusion.size // 2] = 0.5
            for marked in (inputs[1], truth):
                csa = fusion.attention(f, fusion.sivs(f, marked))[:, 0].view(3, fusion.size, fusion.size)
                low, high = torch.minimum(csa, half), torch.maximum(csa, half)
                expected.append(1 - (low.sum((1, 2)) / high.sum((1, 2))).mean().item())

        module.cosal_feat.register_forward_pre_hook(lambda _module, inputs, spy=spy: spy(inputs))
    network(images, sisms)
    assert len(expected) == 6
    assert loss(truth).item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_attention_loss_reaches_the_features():
    network = random_network(1 / 16).train()
    loss = AttentionLoss(network)
    network(torch.randn(2, 3, 224, 224), torch.rand(2, 1, 224, 224))
    loss(torch.ones(2, 1, 224, 224)).backward()
    assert all(
        layer.weight.grad.abs().sum() > 0 for layer in (network.conv4_cmprs, network.conv5_cmprs, network.vgg.vgg[0])
    )
    assert network.refine_1.cmprs.weight.grad is None  # what makes the maps is not trained by it


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [half_cosine(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30)
    assert 0.99 < max(rates) <= 1
    assert rates.index(max(rates)) < 40
    assert rates[40:] == sorted(rates[40:], reverse=True)
    assert rates[-1] < 1e-5


def test_an_epoch_sees_every_image_once_and_skips_single_ones(dataset):
    batches = DataSetBatches(dataset, seed=0, images=3, epochs=2)
    assert batches.skipped == ["solo"]
    assert len(batches) == 2 * batches.per_epoch
    assert batches.per_epoch == 2  # cat 3 (its fourth alone is skipped), cow 3
    seen = {}
    for step in range(2):
        batch = batches[step]
        assert [tuple(t.shape) for t in (batch.images, batch.sisms, batch.masks)] == [
            (3, 224, 224, 3),
            (3, 224, 224),
            (3, 224, 224),
        ]
        seen[batch.name] = {int(image.float().mean()) for image in batch.images}
    assert {name: len(levels) for name, levels in seen.items()} == {"cat": 3, "cow": 3}
    orders = [[batches[step].images.float().mean((1, 2, 3)).tolist() for step in (e, e + 1)] for e in (0, 2)]
    assert orders[0] != orders[1]
    again = DataSetBatches(dataset, seed=0, images=3, epochs=2)
    assert torch.equal(again[3].images, batches[3].images)


def test_image_sism_and_mask_are_mirrored_together(dataset):
    batches = DataSetBatches(dataset, seed=1, images=4, epochs=10)
    directions = []
    for step in range(8):
        batch = batches[step]
        for image, sism, mask in zip(
            batch.images.float().mean(3), batch.sisms.float(), batch.masks.float(), strict=True
        ):
            ways = {bool(t[:, 0].mean() < t[:, -1].mean()) for t in (image, sism, mask)}
            assert len(ways) == 1
            directions.append(ways.pop())
    assert 0.2 < np.mean(directions) < 0.8


def test_training_sees_the_pixels_of_prediction(dataset):
    """Also those of transparent pixels, which show white."""
    path = dataset / "img/cow/1.jpg"
    path.unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    pixels[:, :25, 3] = 0
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    batches = DataSetBatches(dataset, seed=0, images=4, epochs=1)
    batch = next(b for b in (batches[i] for i in range(len(batches))) if b.name == "cow")
    expected, _ = image_tensor(path.with_suffix(".png"))
    assert (expected[:, :100] == 255).all()
    either_way = (expected, expected[:, ::-1])
    assert any(np.array_equal(image, way) for image in batch.images.numpy() for way in either_way)


@pytest.mark.parametrize("kind", ["gt", "sism"])
def test_a_mask_of_0_and_1_is_refused_in_training_too(dataset, icnet, tmp_path, kind):
    Image.fromarray(np.eye(40, 50, dtype=np.uint8)).save(dataset / kind / "cow/1.png")
    code, _, err = icnet("train", "--data", dataset, *SMALL, "--output", tmp_path / "out.pth")
    assert (code, err.count("error:")) == (2, 1)
    assert "cow/1.png: its values are 0 and 1 of 255" in err


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda d: (d / "gt/cow/1.png").unlink(), "1.jpg: no ground truth for it"),
        (lambda d: (d / "sism/cow/1.png").unlink(), "1.jpg: no SISM for it"),
        (lambda d: Image.new("L", (9, 8)).save(d / "gt/cow/1.png"), "1.png: 9×8 pixels, but its image"),
        (lambda d: Image.new("L", (9, 8)).save(d / "sism/cow/1.png"), "1.png: 9×8 pixels, but its image"),
        (lambda d: (d / "gt/cow/1.png").write_bytes(b"x"), "1.png: not an image"),
        (lambda d: (d / "img").rename(d / "images"), "it has no folder 'img'"),
    ],
)
def test_bad_data_is_named_before_training(corrupt, message, dataset, icnet, tmp_path):
    corrupt(dataset)
    code, _, err = icnet("train", "--data", dataset, *SMALL, "--output", tmp_path / "out.pth")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_damaged_image_ends_training_with_its_name(dataset, icnet, tmp_path):
    path = dataset / "img/cat/2.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:-20])  # the size can still be read
    code, _, err = icnet("train", "--data", dataset, *SMALL, "--output", tmp_path / "out.pth")
    assert code == 2
    assert "cat/2.jpg: damaged or truncated" in err


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_images_that_lie_on_their_side_are_trained_on_upright(tmp_path, suffix):
    """Of an image with an EXIF orientation, masks and SISMs of the upright size are taken, and none of the other."""
    ramp = np.add.outer(np.arange(60), 3 * np.arange(40)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("img", "sism", "gt"):
        (tmp_path / kind / "g").mkdir(parents=True)
        for name in "ab":
            if kind == "img":
                side = Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90)
                side.save(tmp_path / f"img/g/{name}.{suffix}", exif=exif)
            else:
                Image.fromarray(ramp).save(tmp_path / f"{kind}/g/{name}.png")
    batch = DataSetBatches(tmp_path, seed=0, images=2, epochs=1)[0]
    for image, sism, mask in zip(batch.images, batch.sisms, batch.masks, strict=True):
        assert (image[..., 0].float() - sism.float()).abs().mean() < 4
        assert torch.equal(sism, mask)
    Image.fromarray(ramp).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "gt/g/b.png")
    with pytest.raises(InputError, match=rf"b\.png: 60×40 pixels, but its image .*\.{suffix} has 40×60; save it"):
        DataSetBatches(tmp_path, seed=0, images=2, epochs=1)


def test_only_single_images(tmp_path, dataset):
    for group in ("cat", "cow"):
        (dataset / "img" / group).rename(tmp_path / group)
    with pytest.raises(InputError, match="no group has two images; training takes groups of two"):
        DataSetBatches(dataset, seed=0, images=3, epochs=1)


def test_training_learns_and_its_result_is_exported(icnet, material, tmp_path):
    """One group over and over, so that the loss of every step is of the same images."""
    output, weights, data = tmp_path / "out.pth", tmp_path / "weights.pth", tmp_path / "data"
    assert icnet(
        "data", "paste", "--cutouts", material[0], "--backgrounds", material[1], "--classes", "white", "--images", 3,
        "--corrupted", 0, "--output", data,
    )[0] == 0  # fmt: skip
    options = ["--data", data, *SMALL, "--lr", 3e-3, "--epochs", 40]
    card = "white shapes, a test"
    code, out, err = icnet("train", *options, "--output", output, "--weights", weights, "--card", card)
    assert (code, err) == (0, "")
    assert read_card(output) == read_card(weights) == card
    losses = read_checkpoint(output)["training"]["losses"]
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
    assert Image.open(output.with_suffix(".png")).size[0] > 500
    assert "step 40 of 40, loss" in out
    assert weights.stat().st_size < 0.25 * output.stat().st_size
    network = load_checkpoint(output)
    write_onnx(load_checkpoint(weights), tmp_path / "icnet.onnx")
    rng = np.random.default_rng(0)
    images, sisms = rng.integers(0, 256, (3, 224, 224, 3), np.uint8), rng.integers(0, 256, (3, 224, 224), np.uint8)
    with Predictor(tmp_path / "icnet.onnx") as predictor, torch.inference_mode():
        interface = training.train.Uint8Interface(network)
        expected = interface(torch.from_numpy(images), torch.from_numpy(sisms)).numpy()
        difference = np.abs(predictor.predict_tensors(images, sisms) - expected)
    assert difference.mean() < 0.005 < 0.05 < expected.std()  # FP16 weights swap a few near-equal pixels


def test_an_interrupted_training_goes_on_bit_exactly(icnet, pasted, tmp_path, monkeypatch):
    options = [*pasted, "--steps", 6, "--schedule", "cosine", "--attention-loss", 1, "--clip", 1, "--amp"]
    assert icnet("train", *options, "--output", tmp_path / "whole.pth")[0] == 0
    step = training.train._step
    taken = []

    def interrupted_step(*args):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the third
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.train, "_step", interrupted_step)
        assert icnet("train", *options, "--output", tmp_path / "parts.pth", "--card", "shapes")[0] == 130
    assert len(read_checkpoint(tmp_path / "parts.pth")["training"]["losses"]) == 3
    assert icnet("train", *options, "--output", tmp_path / "parts.pth", "--resume")[0] == 0
    assert read_card(tmp_path / "parts.pth") == "shapes"  # it need not be given again
    whole, parts = (read_checkpoint(tmp_path / f"{name}.pth") for name in ("whole", "parts"))
    assert whole["training"] == parts["training"]
    assert all(torch.equal(t, parts["state_dict"][name]) for name, t in whole["state_dict"].items())
    for k, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(t, parts["optimizer"]["state"][k][name]) for name, t in state.items())


def test_the_options_of_the_optimiser_reach_it_and_survive_a_resume(icnet, pasted, tmp_path, monkeypatch):
    seen = []

    def spy(args, network, optimizer, batches, losses, *_):
        backbone = {id(parameter) for parameter in network.vgg.parameters()}
        for group in optimizer.param_groups:
            of_backbone = {id(parameter) in backbone for parameter in group["params"]}
            seen.append((of_backbone, len(group["params"]), group["lr"], group["weight_decay"]))
        losses.append(0.5)
        training.train._save(args, network, optimizer, losses, [])

    monkeypatch.setattr(training.train, "train", spy)
    options = ["train", *pasted, "--steps", 2, "--output", tmp_path / "out.pth"]
    options += ["--backbone-lr", 2e-4, "--weight-decay", 0.03, "--attention-loss", 0.5]
    assert icnet(*options)[0] == 0
    network = ICNet(0.0625)
    backbone = len(list(network.vgg.parameters()))
    rest = len(list(network.parameters())) - backbone
    assert seen == [({False}, rest, 1e-3, 0.03), ({True}, backbone, 2e-4, 0.03)]
    assert icnet(*options, "--resume")[0] == 0
    assert seen[2:] == seen[:2]
    for option, value in ("--backbone-lr", 2e-4), ("--weight-decay", 0.03), ("--attention-loss", 0.5):
        code, _, err = icnet(*options, "--resume", option, 0.7)
        assert code == 2
        assert f"was trained with other settings: {option} {value}; give these again" in err


def test_the_attention_loss_counts_as_often_as_its_weight_says():
    """With plain gradient descent at a rate of 1 the weights move by the gradient of that loss, times its weight."""
    rng = np.random.default_rng(0)
    pixels = (rng.integers(0, 256, (2, 224, 224, *c), np.uint8) for c in ((3,), (), ()))
    batch = Batch("g", *map(torch.from_numpy, pixels))
    weights = []
    for factor in (0, 0.25):
        network = random_network(1 / 32).train()
        weight = network.vgg.vgg[0].weight
        args = argparse.Namespace(device="cpu", amp=False, clip=None, attention_loss=factor)
        optimizer = torch.optim.SGD(network.parameters(), 1)
        interface = training.train.Uint8Interface(network)
        training.train._step(args, interface, optimizer, batch, lambda _truth, weight=weight: weight.sum())
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0] - weights[1], torch.full_like(weights[0], 0.25), atol=1e-3, rtol=0)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(icnet, pasted, tmp_path, monkeypatch):
    losses = []

    def bad_loss(maps, truth):
        losses.append(1)
        return iou_loss(maps, truth) * (float("nan") if len(losses) == 4 else 1)

    monkeypatch.setattr(training.train, "iou_loss", bad_loss)
    code, _, err = icnet("train", *pasted, "--steps", 9, "--save-every", 2, "--output", tmp_path / "out.pth")
    assert (code, err.count("\n")) == (2, 1)
    assert "loss nan in step 4, group '" in err
    assert "out.pth holds an earlier step" in err
    assert len(read_checkpoint(tmp_path / "out.pth")["training"]["losses"]) == 2
    load_checkpoint(tmp_path / "out.pth")


def test_the_papers_start(tmp_path):
    save_checkpoint(tmp_path / "whole.pth", random_network(0.25))
    vgg = random_network(0.25).vgg.vgg
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    network = training.train._network(
        argparse.Namespace(width=0.25, init="paper", backbone=tmp_path / "vgg.pth", start=None)
    )
    assert all(torch.equal(a, b) for a, b in zip(vgg.parameters(), network.vgg.vgg.parameters(), strict=True))
    weight, bias = network.Co5.conv[0].weight, network.Co5.conv[0].bias
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not bias.any()
    assert network.refine_1.merge_conv[1].weight.eq(1).all()  # batch norms start as the identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "paper"], "needs a pretrained --backbone"),
        (["--width", 0.3], "not a positive multiple of 1/32"),
        (["--data", "x"], "give either --data, or"),
        (["--device", "cuda:7"], "finds no usable GPU"),
        (["--device", "quantum"], "not a device of PyTorch's"),
        (["--backbone", "gone.pth"], "gone.pth: no such file"),
    ],
)
def test_bad_options(options, message, icnet, pasted, tmp_path):
    code, _, err = icnet("train", *pasted, "--steps", 2, "--output", tmp_path / "out.pth", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--images", 1, "a whole number from 2"),
        ("--lr", 0, "a number above 0"),
        ("--lr", "nan", "a number above 0"),
        ("--steps", 0, "a whole number from 1"),
        ("--epochs", 0, "a whole number from 1"),
        ("--save-every", 0, "a whole number from 1"),
    ],
)
def test_numbers_out_of_range(option, value, expected, icnet, capsys, pasted, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        icnet("train", *pasted, "--steps", 2, "--output", tmp_path / "out.pth", option, value)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"argument {option}: expected {expected}, got '{value}'" in err
    assert not (tmp_path / "out.pth").exists()


def test_what_can_not_be_resumed(icnet, pasted, tmp_path):
    output = tmp_path / "out.pth"
    save_checkpoint(output, ICNet(0.0625))
    options = ["train", *pasted, "--steps", 2, "--output", output]
    assert "is there already; --resume" in icnet(*options)[2]
    assert "has no state of a training to resume" in icnet(*options, "--resume")[2]
    output.unlink()
    assert icnet(*options)[0] == 0
    assert (
        "was trained with other settings: --seed 0; give these again, or" in icnet(*options, "--resume", "--seed", 1)[2]
    )


def test_a_pretrained_backbone_is_what_was_trained_with_its_norms_folded(icnet, material, tmp_path):
    output = tmp_path / "vgg.pth"
    code, out, err = icnet(
        "data", "pretrain", "--cutouts", material[0], "--backgrounds", material[1], "--output", output,
        "--width", 0.0625, "--steps", 3, "--batch", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "step 3 of 3, loss" in out
    load_backbone(ICNet(0.0625), output)

    torch.manual_seed(0)
    model = Classifier(0.125, 5).train()
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    for _ in range(3):
        model(images)  # statistics that are not the identity
    model.eval()
    x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model.features(x)
        torch.testing.assert_close(backbone(model.features, 0.125)(x), expected, rtol=1e-4, atol=1e-4)
