"""`icnet predict`, `bank` and `evaluate` with a detector: what they write, keep, use again and say."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Bank, Predictor
from runtime.detector import Detector
from runtime.files import model_digest
from tests.runtime.detectors import detector_file


@pytest.fixture
def detector(tmp_path):
    return detector_file(tmp_path / "u2net.onnx", batch="B")


@pytest.fixture
def photos(image_folder):
    image_folder("data/img/cats", "a.jpg", "b.png", size=(60, 40))
    return image_folder("data/img/dogs", "c.JPEG", size=(30, 50)).parents[1]


@pytest.fixture
def detected(monkeypatch):
    """The names of the images that detectors saw, in the order in which they did."""
    names = []
    real = Detector.__call__

    def noted(self, images):
        names.extend(Path(image.name).name for image in images)
        return real(self, images)

    monkeypatch.setattr(Detector, "__call__", noted)
    return names


def pngs(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_photographs_alone_are_enough(icnet, onnx_file, photos, detector, tmp_path):
    arguments = (photos, "--model", onnx_file, "--sism-model", detector)
    code, _, err = icnet("predict", *arguments, "--output", tmp_path / "out", "--keep-sisms")
    assert code == 0
    (line,) = err.strip().splitlines()
    assert line.startswith(
        f"icnet predict: {detector}: its pixels normalised as 'u2net' (taken for U²-Net by its name)"
    )
    assert list(pngs(tmp_path / "out")) == [
        "cats/a.png", "cats/b.png", "cats/sisms/a.png", "cats/sisms/b.png", "dogs/c.png", "dogs/sisms/c.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "out/dogs/sisms/c.png").size == (30, 50)

    # the SISMs that were kept, given as files
    for group in ("cats", "dogs"):
        sisms = ("--sisms", tmp_path / "out" / group / "sisms")
        output = tmp_path / "again" / group
        assert icnet("predict", photos / "img" / group, "-m", onnx_file, *sisms, "-o", output.parent)[0] == 0
        for path in output.glob("*.png"):
            assert path.read_bytes() == (tmp_path / "out" / group / path.name).read_bytes()

    # and without keeping them
    assert icnet("predict", *arguments, "--output", tmp_path / "bare")[0] == 0
    kept = pngs(tmp_path / "out")
    assert pngs(tmp_path / "bare") == {name: kept[name] for name in ("cats/a.png", "cats/b.png", "dogs/c.png")}


def test_kept_sisms_are_used_again_for_the_same_images_and_detector(
    icnet, exports, onnx_file, photos, detector, detected, tmp_path
):
    out = tmp_path / "out"

    def run(*options, model=onnx_file, sism_model=detector):
        del detected[:]
        assert icnet("predict", photos, "-m", model, "--sism-model", sism_model, "-o", out, *options)[0] == 0
        return sorted(detected)

    assert run("--keep-sisms") == ["a.jpg", "b.png", "c.JPEG"]
    first = pngs(out)
    assert run("--keep-sisms") == []
    assert pngs(out) == first
    assert run(model=exports) == []  # another network; the SISMs stay, though nobody asked again
    assert {name for name in pngs(out) if "sisms" in name} == {name for name in first if "sisms" in name}
    assert pngs(out)["cats/a.png"] != first["cats/a.png"]
    assert run("--resume", model=exports) == []

    Image.new("RGB", (20, 20), (200, 0, 0)).save(photos / "img/cats/b.png")
    assert run("--keep-sisms") == ["b.png"]
    assert Image.open(out / "cats/sisms/b.png").size == (20, 20)
    (out / "cats/sisms/a.png").write_bytes(b"edited")
    assert run("--keep-sisms", "--resume") == ["a.jpg"]
    assert run("--keep-sisms", "--resume") == []
    assert run("--keep-sisms", "--no-sism-minmax") == ["a.jpg", "b.png", "c.JPEG"]  # other SISMs
    other = detector_file(tmp_path / "isnet.onnx")
    assert run("--keep-sisms", "--resume", sism_model=other) == ["a.jpg", "b.png", "c.JPEG"]
    (photos / "img/cats/a.jpg").unlink()
    assert run(sism_model=other) == []
    assert "cats/sisms/a.png" not in pngs(out)


def test_resume_computes_again_if_the_detector_is_another(icnet, onnx_file, photos, detector, detected, tmp_path):
    out = tmp_path / "out"
    arguments = ("predict", photos, "-m", onnx_file, "--sism-model", detector, "-o", out, "--resume")
    for expected in (3, 0):
        del detected[:]
        assert icnet(*arguments)[0] == 0
        assert len(detected) == expected
    made_from = json.loads((out / "dogs/icnet.json").read_text())["made_from"]
    assert made_from["models"]["detector"] == sha256(detector.read_bytes()).hexdigest()
    assert "u2net" in made_from["sisms"]
    detector_file(detector, batch="B", bias=0.3)
    del detected[:]
    assert icnet(*arguments)[0] == 0
    assert len(detected) == 3


def test_kept_sisms_as_input_are_not_deleted(icnet, onnx_file, photos, detector, tmp_path):
    out, group = tmp_path / "out", photos / "img/cats"
    assert icnet("predict", group, "-m", onnx_file, "--sism-model", detector, "-o", out, "--keep-sisms")[0] == 0
    before = pngs(out)
    code, _, err = icnet("predict", group, "-m", onnx_file, "--sisms", out / "cats/sisms", "-o", out)
    assert code == 2
    assert "out/cats/sisms: holds a.png, an input of this run; choose another --output" in err
    assert pngs(out) == before


def test_with_nothing_said(icnet, onnx_file, photos, detector, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.files.__file__", str(tmp_path / "runtime/files.py"))  # a package without models
    for path in (photos, photos / "img/cats", photos / "img/cats/a.jpg"):
        code, _, err = icnet("predict", path, "-m", onnx_file, "-o", tmp_path / "out")
        assert code == 0
        assert f"{path}: no SISMs: OpenCV's static saliency takes their place, a weak stand-in" in err
        assert "name their folder with --sisms" in err
        assert len(err.strip().splitlines()) == 1
    assert json.loads((tmp_path / "out/dogs/icnet.json").read_text())["made_from"]["sisms"] == "builtin"

    code, _, err = icnet("predict", photos, "-m", onnx_file, "--keep-sisms", "-o", tmp_path / "kept")
    assert (code, "--keep-sisms keeps the SISMs of a detector: name its file" in err) == (2, True)
    code, _, err = icnet("predict", photos, "-o", tmp_path / "out")
    assert (code, "no model: name one with --model" in err) == (2, True)

    models = tmp_path / "runtime/models"  # the models that come with the package
    models.mkdir(parents=True)
    shutil.copy(onnx_file, models / "icnet.onnx")
    detector_file(models / "detector.onnx", dtype="uint8")
    assert icnet("predict", photos, "-o", tmp_path / "bundled")[0] == 0
    made_from = json.loads((tmp_path / "bundled/dogs/icnet.json").read_text())["made_from"]
    for role, name in (("model", "icnet.onnx"), ("detector", "detector.onnx")):
        assert made_from["models"][role] == sha256((models / name).read_bytes()).hexdigest()


def test_a_bank_of_photographs(icnet, exports, photos, detector, tmp_path):
    arguments = (photos / "img/cats", "--model", exports, "--sism-model", detector)
    code, _, err = icnet("bank", *arguments, "--output", tmp_path / "cats.npz")
    assert code == 0
    assert "icnet bank: " in err
    files = (exports.with_suffix(".intra.onnx"), exports.with_suffix(".banked.onnx"))
    with Predictor(bank_export=files, sism_model=detector) as predictor:
        expected = predictor.bank([photos / "img/cats/a.jpg", photos / "img/cats/b.png"])
    assert np.array_equal(Bank.load(tmp_path / "cats.npz").sivs, expected.sivs)
    bank = ("--bank", tmp_path / "cats.npz")
    assert icnet("predict", *arguments, *bank, "--output", tmp_path / "out")[0] == 0
    code, _, err = icnet("bank", *arguments, "--output", detector)
    assert (code, "is an input of this run" in err) == (2, True)


def test_packed_groups(icnet, exports, photos, detector, tmp_path):
    packed = exports.with_suffix(".packed.onnx")
    arguments = (photos, "--sism-model", detector, "--output")
    assert icnet("predict", *arguments, tmp_path / "out", "--model", packed, "--pack")[0] == 0
    assert icnet("predict", *arguments, tmp_path / "plain", "--model", exports)[0] == 0
    found, expected = pngs(tmp_path / "out"), pngs(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name in found:
        pair = [np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("out", "plain")]
        assert abs(pair[0] - pair[1]).max() <= 1


def test_a_flat_sism_is_said_by_name(icnet, onnx_file, tmp_path, detector):
    (tmp_path / "fog").mkdir()
    Image.new("RGB", (30, 20), (90, 90, 90)).save(tmp_path / "fog/grey.png")
    code, _, err = icnet("predict", tmp_path / "fog", "-m", onnx_file, "--sism-model", detector, "-o", tmp_path / "out")
    assert code == 0
    assert f"icnet predict: {tmp_path / 'fog/grey.png'}: nothing stands out in it: its SISM is flat" in err


@pytest.mark.parametrize(("backend", "suffix"), [("openvino", ".xml"), ("mnn", ".mnn")])
def test_detectors_for_other_engines(icnet, onnx_file, photos, detector, tmp_path, backend, suffix):
    """Built, and run beside a model for ONNX Runtime; what is built under another name is of the same family."""
    pytest.importorskip({".xml": "openvino", ".mnn": "MNN"}[suffix], reason="it is not installed")
    built = tmp_path / f"detector{suffix}"
    assert icnet("build", "--backend", backend, "--onnx", detector, "-o", built)[0] == 0
    found = {}
    for path in (detector, built):
        out = tmp_path / f"out{path.suffix}"
        code, _, err = icnet("predict", photos, "-m", onnx_file, "--sism-model", path, "-o", out, "--keep-sisms")
        assert code == 0
        assert "(taken for U²-Net by its name)" in err
        found[path] = {name: np.asarray(Image.open(out / name), int) for name in pngs(out)}
    assert found[detector].keys() == found[built].keys()
    for name, image in found[detector].items():
        if "sisms" in name:
            assert abs(image - found[built][name]).max() <= 1
    record = json.loads((tmp_path / f"out{suffix}/dogs/icnet.json").read_text())["made_from"]
    assert record["models"]["detector"] == model_digest(built)
    code, _, err = icnet("predict", photos, "-m", built, "--sism-model", detector, "-o", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "a detector goes in sism_model (--sism-model)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sisms", "data/sism", "--sism-model", "u2net.onnx"), "--sisms and --sism-model: give one"),
        (("--sism-model", "none.onnx"), "none.onnx: no such model file"),
        (("--sism-model", "u2net.onnx", "--sism-normalise", "nonsense"), "normalisation 'nonsense': expected imagenet"),
        (("--sisms", "builtin", "--keep-sisms"), "--keep-sisms keeps the SISMs of a detector"),
        (("--sisms", "builtin", "--sism-minmax"), "sism_normalise and sism_minmax are for a detector"),
        (("--sisms", "few"), "data/img/cats: no SISM for 2 of 3 images (a.jpg, b.png): expected few/cats/a.png and so"),
    ],
)
def test_what_does_not_go(icnet, onnx_file, photos, detector, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20)).save("data/img/cats/c.png")
    (tmp_path / "few/cats").mkdir(parents=True)
    Image.new("L", (30, 20), 255).save("few/cats/c.png")
    code, _, err = icnet("predict", "data", "--model", onnx_file, "--output", "out", *arguments)
    assert code == 2
    assert message in err


def test_evaluate_scores_the_detector_and_the_chain(icnet, exports, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        image = rng.integers(60, 90, (40, 60, 3), dtype=np.uint8)
        gt = np.zeros((40, 60), np.uint8)
        gt[8:30, 10 * i : 10 * i + 20] = 255
        image[gt > 0] = (220, 40, 30)
        for kind, array in (("img", image), ("gt", gt)):
            path = tmp_path / f"data/{kind}/red/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    detector = detector_file(tmp_path / "u2net.onnx", size=(64, 64))
    arguments = ("evaluate", tmp_path / "data", "--sism-model", detector, "--models", exports)
    code, text, err = icnet(*arguments, "--output", tmp_path / "scores.json")
    assert code == 0, err
    assert "SISMs" in text
    assert "icnet.onnx" in text
    sisms, chain = json.loads((tmp_path / "scores.json").read_text())["datasets"][0]["maps"]
    assert (sisms["path"], sisms["sha256"]) == (str(detector), sha256(detector.read_bytes()).hexdigest())
    assert sisms["max_f"] > 0.9
    assert sisms["mae"] < 0.1

    # the same by way of kept SISMs
    out = tmp_path / "out"
    assert icnet("predict", *arguments[1:4], "-m", exports, "-o", out, "--keep-sisms")[0] == 0
    (tmp_path / "data/sism").mkdir()
    (out / "red/sisms").rename(tmp_path / "data/sism/red")
    again = ("evaluate", tmp_path / "data", "--models", exports, out, "--output", tmp_path / "again.json")
    assert icnet(*again)[0] == 0
    by_files, model, maps = json.loads((tmp_path / "again.json").read_text())["datasets"][0]["maps"]
    for key in ("mae", "max_f", "s", "max_e"):
        assert by_files[key] == sisms[key]
        assert model[key] == chain[key] == maps[key]


def test_maps_of_icnet_predict_are_ground_truths_though_nearly_empty(icnet, image_folder, tmp_path):
    from runtime.preprocess import save_map

    image_folder("data/img/cats", "a.jpg", "b.jpg")
    folder = tmp_path / "data/gt/cats"
    folder.mkdir(parents=True)
    nearly = np.zeros((40, 60), np.float32)
    nearly[4, 5:9] = 1 / 255
    save_map(nearly, folder / "a.png")
    save_map((nearly > 0).astype(np.float32), folder / "b.png")
    image_folder("maps/cats", "a.png", "b.png", mode="L")
    code, text, err = icnet("evaluate", tmp_path / "data", "--models", tmp_path / "maps")
    assert code == 0, err
    assert "ground truths without foreground, which count for MAE only: 1" in " ".join(text.split())
