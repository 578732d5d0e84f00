"""Training of the demo's detector, and the targets that it learns from."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import training.detector
from export.checkpoint import read_card, read_checkpoint
from export.detector import Detector, load_detector
from export.detector_onnx import write_onnx
from runtime import InputError
from training.detector import Scenes, SingleImages, crop, find_views, loss_of
from training.targets import photographs, target, views

SMALL = ["--width", 1 / 8, "--batch", 2, "--lr", 1e-2, "--encoder-lr", 3e-3]


@pytest.fixture(scope="module")
def view_folder(tmp_path_factory):
    """Two views of a bright disc, and their maps."""
    folder = tmp_path_factory.mktemp("views")
    for k in range(2):
        for kind, mode, colour in (("img", "RGB", (250, 220, 60)), ("sism", "L", 255)):
            picture = Image.new(mode, (320, 320))
            ImageDraw.Draw(picture).ellipse((60, 60 + 40 * k, 200, 200 + 40 * k), fill=colour)
            path = folder / kind / "sun" / f"{k}.{'jpg' if kind == 'img' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return folder


@pytest.fixture
def options(material, view_folder):
    return ["--cutouts", material[0], "--backgrounds", material[1], "--views", view_folder, *SMALL]


def test_a_scene_and_a_view_come_with_masks_of_their_objects(material, view_folder):
    scenes = Scenes(*material)
    shares = []
    for seed in range(20):
        image, mask = scenes.scene(np.random.default_rng(seed))
        assert (image.shape, image.dtype, mask.shape) == ((224, 224, 3), np.uint8, (224, 224))
        inside, outside = image[mask > 0.95], image[mask < 0.01]
        if len(inside) > 200:
            assert np.abs(inside.mean(0) - outside.mean(0)).max() > 10  # white or black on grey
        shares.append((mask > 0.5).mean())
    assert 0.02 < min(shares) < 0.12 < 0.25 < max(shares)
    image, mask = crop(np.random.default_rng(0), *find_views(view_folder)[1])
    bright = image.mean(2) > image.mean()
    assert ((mask > 0.5) == bright).mean() > 0.97


def test_a_batch_depends_on_its_number_alone_and_is_half_views(material, view_folder):
    batches = SingleImages(Scenes(*material), find_views(view_folder), 0, 5, 4)
    images, targets = batches[3]
    assert (images.shape, targets.shape) == ((4, 224, 224, 3), (4, 224, 224))
    assert (images.dtype, targets.dtype) == (torch.uint8, torch.uint8)
    again, other = batches[3][0], batches[4][0]
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    blue = images[..., 2].float().mean((1, 2)) / images[..., 0].float().mean((1, 2)).clamp_min(1)
    assert (blue[1::2] < blue[::2]).all()  # views are yellow on black


def test_the_loss_on_numbers():
    network = Detector(1 / 8)
    for parameter in network.score.parameters():
        torch.nn.init.zeros_(parameter)  # scores of 0: SISMs of ½
    images, targets = torch.zeros(2, 224, 224, 3, dtype=torch.uint8), torch.zeros(2, 224, 224, dtype=torch.uint8)
    targets[0, :112] = targets[1] = 255
    # log 2; and soft IoU (½·½) / (½ + ½·½) = 1/3 and ½
    assert loss_of(network, images, targets).item() == pytest.approx(np.log(2) + 1 - (1 / 3 + 1 / 2) / 2, rel=1e-4)


def test_training_learns_and_its_weights_are_exact_in_fp16(icnet, options, tmp_path):
    output, weights = tmp_path / "out.pth", tmp_path / "weights.pth"
    code, _, err = icnet("data", "detector", *options, "--steps", 60, "--output", output, "--weights", weights)
    assert (code, err) == (0, "")
    losses = read_checkpoint(output)["training"]["losses"]
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < np.mean(losses[:15]) - 0.15
    assert weights.stat().st_size < 0.3 * output.stat().st_size
    assert read_card(weights) == "SISMs of photographs and drawings (a demo)"
    trained, released = load_detector(output), load_detector(weights)
    assert all(torch.equal(p, p.half().float()) for p in released.parameters())
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert (trained(images) - released(images)).abs().max() < 0.02


def test_an_interrupted_training_goes_on_bit_exactly(icnet, options, tmp_path, monkeypatch):
    options = ["data", "detector", *options, "--steps", 4]
    assert icnet(*options, "--output", tmp_path / "whole.pth")[0] == 0
    taken = []

    def interrupted(*args):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the second
        return loss_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training.detector, "loss_of", interrupted)
        assert icnet(*options, "--output", tmp_path / "parts.pth")[0] == 130
    assert len(read_checkpoint(tmp_path / "parts.pth")["training"]["losses"]) == 2
    code, _, err = icnet(*options, "--output", tmp_path / "parts.pth")
    assert (code, "parts.pth: is there already; --resume to go on" in err) == (2, True)
    code, _, err = icnet(*options, "--output", tmp_path / "parts.pth", "--resume", "--seed", 1)
    assert (code, "parts.pth: was trained with" in err) == (2, True)
    assert icnet(*options, "--output", tmp_path / "parts.pth", "--resume")[0] == 0
    whole, parts = (read_checkpoint(tmp_path / f"{name}.pth") for name in ("whole", "parts"))
    assert whole["training"] == parts["training"]
    assert all(torch.equal(t, parts["state_dict"][name]) for name, t in whole["state_dict"].items())


def test_a_loss_that_is_not_finite_ends_training(icnet, options, tmp_path, monkeypatch):
    monkeypatch.setattr(training.detector, "loss_of", lambda *_: torch.tensor(torch.nan))
    code, _, err = icnet("data", "detector", *options, "--steps", 3, "--output", tmp_path / "out.pth")
    assert (code, "loss nan in step 1; try a lower --lr" in err) == (2, True)
    assert not (tmp_path / "out.pth").exists()


def test_a_folder_without_views_is_refused(tmp_path):
    (tmp_path / "img" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "img" / "a" / "0.jpg")  # its map is missing
    with pytest.raises(InputError, match="make them with icnet data targets"):
        find_views(tmp_path)


def test_targets_are_what_the_teacher_finds_and_are_kept(icnet, tmp_path):
    """The teacher is an export of this project; its maps of the views are those of a session by hand."""
    torch.manual_seed(0)
    network = Detector(1 / 8).eval()
    write_onnx(network, tmp_path / "teacher.onnx")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rng.integers(0, 256, (160, 200, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    options = [tmp_path / "photos", "--teacher", tmp_path / "teacher.onnx", "--output", tmp_path / "out"]
    assert icnet("data", "targets", *options, "--views", 2)[0] == 0
    pairs = find_views(tmp_path / "out")
    assert [(image.name, sism.name) for image, sism in pairs] == [("0.jpg", "0.png"), ("1.jpg", "1.png")]
    with torch.inference_mode():
        view = dict(views(tmp_path / "photos" / "a.png", [1]))[1].resize((224, 224), Image.Resampling.BILINEAR)
        found = network(torch.from_numpy(np.array(view))[None])[0].numpy()
    expected = np.asarray(Image.fromarray(found).resize((320, 320), Image.Resampling.BILINEAR))
    kept = np.asarray(Image.open(pairs[1][1]))
    assert np.abs(kept - target(np.rint(expected * 255).astype(np.uint8)).astype(float)).max() <= 2
    kept_at = pairs[1][1].stat().st_mtime_ns
    assert icnet("data", "targets", *options, "--views", 3)[0] == 0
    assert len(find_views(tmp_path / "out")) == 3
    assert pairs[1][1].stat().st_mtime_ns == kept_at


def test_photographs_are_opaque_and_large(tmp_path):
    for name, mode, size, colour in (
        ("a.png", "RGB", (200, 160), 9), ("b.png", "RGBA", (200, 160), (9, 9, 9, 255)),
        ("shard.png", "RGBA", (200, 160), (9, 9, 9, 0)), ("small.png", "RGB", (200, 149), 9),
    ):  # fmt: skip
        (tmp_path / "deep").mkdir(exist_ok=True)
        Image.new(mode, size, colour).save(tmp_path / "deep" / name)
    assert [path.name for path in photographs(tmp_path)] == ["a.png", "b.png"]


def test_views_are_the_whole_and_crops_of_it(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1))
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "a.png")
    found = dict(views(tmp_path / "a.png", [0, 1, 2, 3, 4, 5]))
    assert {image.size for image in found.values()} == {(320, 320)}
    spans = [np.ptp(np.asarray(image)[..., 0]) for image in found.values()]
    assert spans[0] >= 250
    assert all(0.3 * 255 < span < 255 for span in spans[1:])  # shares of the width
    again = dict(views(tmp_path / "a.png", [4]))
    assert np.array_equal(again[4], found[4])  # whatever else is asked for


def test_a_sure_map_is_stretched_and_a_faint_one_is_not():
    assert target(np.array([[10, 200]], np.uint8)).tolist() == [[0, 255]]
    assert target(np.array([[10, 100]], np.uint8)).tolist() == [[10, 100]]
    assert target(np.array([[200, 200]], np.uint8)).tolist() == [[200, 200]]
