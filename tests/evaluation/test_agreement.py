"""`icnet evaluate --reference`: models against one of them, on photographs without ground truths."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluation.agreement import ImageAgreement, ModelAgreement, iou
from evaluation.metrics import Scores
from export.to_onnx import write_onnx
from runtime import Predictor
from runtime.files import bundled, digest
from runtime.preprocess import read_pixels, stack
from tests.helpers import random_network

NAMES = ("cats/a", "cats/b", "dogs/c")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "other.onnx"
    write_onnx(random_network(1 / 32, seed=3), path)
    return path


@pytest.fixture
def photographs(image_folder, tmp_path):
    """img/ and sism/ with two groups, and no ground truths."""
    for name, images in {"cats": ("a.jpg", "b.jpg"), "dogs": ("c.jpg",)}.items():
        image_folder(f"photos/img/{name}", *images)
        image_folder(f"photos/sism/{name}", *(image.replace("jpg", "png") for image in images), mode="L")
    return tmp_path / "photos"


def levels(model, folder):
    """The maps of `photographs` in 8 bits as the network gives them, by a way of their own."""
    found = []
    with Predictor(model) as predictor:
        for group in ("cats", "dogs"):
            names = [name for name in NAMES if name.startswith(group)]
            pixels = stack([read_pixels(folder / f"img/{n}.jpg", folder / f"sism/{n}.png") for n in names])
            found += [np.rint(m * 255).astype(np.uint8) for m in predictor.predict_tensors(pixels.images, pixels.sisms)]
    return found


def test_models_are_compared_with_the_reference_image_by_image(icnet, model_file, other_model, photographs, tmp_path):
    output, sheet = tmp_path / "out/r.json", tmp_path / "out/worst.png"
    options = ("--reference", model_file, "--output", output, "--picture", sheet)
    code, out, err = icnet("evaluate", photographs, "--models", other_model, model_file, *options)
    assert (code, err) == (0, "")
    results = json.loads(output.read_text())
    assert results["reference"] == "icnet.onnx"
    assert [one["sha256"] for one in results["models"].values()] == [digest(model_file), digest(other_model)]
    (dataset,) = results["datasets"]
    assert (dataset["name"], dataset["groups"], dataset["images"]) == ("photos", 2, 3)
    itself, other = dataset["models"]
    assert (itself["name"], other["name"]) == ("icnet.onnx", "other.onnx")
    assert (itself["iou"], itself["mean_difference"]) == (1, 0)

    expected, found = levels(model_file, photographs), levels(other_model, photographs)
    scores = Scores()
    values = {image["name"]: image for image in other["images"]}
    assert set(values) == set(NAMES)
    for name, one, two in zip(NAMES, expected, found, strict=True):
        scores.add(two, one >= 127.5)
        both, either = ((one > 127) & (two > 127)).sum(), ((one > 127) | (two > 127)).sum()
        assert values[name]["iou"] == pytest.approx(both / either)
        assert values[name]["mean_difference"] == pytest.approx(np.abs(one / 255 - two / 255).mean())
    assert other["s"] == pytest.approx(scores.results().s)
    assert other["s"] < itself["s"]
    ious = [image["iou"] for image in other["images"]]
    assert ious == sorted(ious)
    assert other["iou"] == pytest.approx(np.mean(ious))
    worst = other["images"][0]
    assert f"other.onnx: against icnet.onnx, 3 images of photos: IoU at 0.5 {other['iou']:.3f}, the lowest " in out
    assert f"the lowest {worst['iou']:.3f} ({worst['name']})" in out
    assert ("warning: other.onnx: of 3 images" in out) == (worst["iou"] < 0.5)

    with Image.open(sheet) as image:
        pixels = np.asarray(image).astype(int)
    # Its first row is the worst image: image, SISM, the reference's map and the other's, in cells of 200×150.
    index = NAMES.index(worst["name"])
    for column, maps in ((2, expected), (3, found)):
        cell = pixels[48 : 48 + 150, 12 + 206 * column : 12 + 206 * column + 200].mean(2)
        shown = np.asarray(Image.fromarray(maps[index]).resize((200, 133), Image.Resampling.BICUBIC))
        assert np.abs(cell[8 : 8 + 133] - shown).mean() < 1


def test_without_sisms_one_detector_makes_those_of_all_models(icnet, model_file, other_model, photographs, tmp_path):
    arguments = ("--models", other_model, "--reference", model_file, "--output", tmp_path / "r.json")
    code, out, _ = icnet("evaluate", photographs / "img/cats", *arguments)
    assert code == 0
    assert str(bundled("detector.onnx")) in "".join(out.split("\n"))
    (found,) = json.loads((tmp_path / "r.json").read_text())["datasets"]
    assert [image["name"] for image in found["models"][0]["images"]] == ["cats/a", "cats/b"]
    assert icnet("evaluate", photographs / "img/cats", *arguments, "--sisms", photographs / "sism/cats")[0] == 0
    (other,) = json.loads((tmp_path / "r.json").read_text())["datasets"]
    assert found["models"][1]["mean_difference"] != other["models"][1]["mean_difference"]


def test_iou_of_masks():
    empty, full, half, dot = np.zeros((4, 100, 100), bool)
    full[:], half[:50], dot[0, :9] = True, True, True
    assert [iou(full, half), iou(half, half), iou(half, ~half), iou(empty, half)] == [0.5, 1, 0, 0]
    assert iou(empty, empty) == iou(empty, dot) == 1  # nine pixels of ten thousand are nothing


def test_a_model_with_an_image_below_a_half_is_poor():
    good = ModelAgreement("int8.onnx", 0.8, None, 0.01, [ImageAgreement("g/a", 0.5, 0.1), ImageAgreement("g/b", 1, 0)])
    reference = replace(good, name="icnet.onnx")
    assert good.warning(reference) is None
    poor = replace(good, images=[ImageAgreement("g/c", 0.2, 0.3), *good.images])
    assert poor.warning(reference) == (
        "warning: int8.onnx: of 3 images 1 have an IoU below 0.5 with icnet.onnx (g/c: 0.20)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL", "--plot", "x.png"), "--reference compares models on DATA, without curves"),
        (("MODEL", "--report", "pages"), "--reference compares models on DATA, without curves"),
        ((), "--reference: name the models to compare with it with --models"),
        (("none.onnx",), "none.onnx: no such model file"),
        (("photos",), "photos: a folder of maps; --reference compares model files"),
        (("MODEL", "--picture", "x.gif"), "x.gif: --picture writes .jpeg, .jpg, .png"),
        (("MODEL", "--picture", "photos/img/cats/a.jpg"), "a.jpg: is an input of this run"),
        (("MODEL", "--sisms", "none"), "none: no such folder (it should hold the SISMs)"),
        (("MODEL", "--sisms", "builtin", "--sism-model", "x.onnx"), "--sisms and --sism-model: give one"),
    ],
)
def test_errors_are_one_line(icnet, model_file, other_model, photographs, monkeypatch, arguments, message):
    monkeypatch.chdir(photographs.parent)
    models = [other_model if word == "MODEL" else word for word in arguments]
    options = ("--models", *models) if models else ()
    code, out, err = icnet("evaluate", "photos", "--reference", model_file, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
