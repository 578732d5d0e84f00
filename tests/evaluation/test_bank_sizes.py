import argparse
import json

import pytest
from PIL import Image
from rich.progress import Progress

from evaluation import accuracy, bank_sizes
from runtime.files import bank_files
from training.paste import CutPaste

OPTIONS = ["--groups", 2, "--new", 3, "--bank-sizes", 1, 4]


@pytest.fixture(scope="module")
def options(material):
    return ["--cutouts", material[0], "--backgrounds", material[1], *OPTIONS]


def test_scores_by_the_size_of_the_bank(icnet, options, exports, tmp_path):
    files = {name: tmp_path / name for name in ("r.json", "r.png", "r.jpg")}
    outputs = zip(("--output", "--plot", "--picture"), files.values(), strict=True)
    code, out, err = icnet("evaluate", "-m", exports, *options, *(part for pair in outputs for part in pair))
    assert (code, err) == (0, "")
    results = json.loads(files["r.json"].read_text())
    scores = results["scores"]
    assert list(scores) == ["SISMs", "their own group", "1", "4"]
    assert len({s["mae"] for s in scores.values()}) == 4  # the bank is seen
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["4", *(f"{scores['4'][key]:.3f}" for key in ("s", "max_f", "max_e", "mae"))] in rows
    assert Image.open(files["r.png"]).size[0] > 500
    assert Image.open(files["r.jpg"]).size[1] > 3 * 150


def test_the_new_images_are_never_in_the_bank(options, material, tmp_path):
    """A bank of the new images' own SIVs would see the answer."""

    class Spy:
        def bank(self, images, sisms):
            self.kept = images
            return range(len(images))

        def predict_tensors(self, images, sisms, bank=None):
            assert not any((image == kept).all() for image in images for kept in self.kept)
            return sisms / 255

    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    model = tmp_path / "x.onnx"
    for path in bank_files(model):
        path.touch()
    args = parser.parse_args([str(option) for option in ("--models", model, *options)])
    results = bank_sizes.score(args, CutPaste(*material), Spy(), Progress(disable=True))
    assert results.scores["1"] == results.scores["SISMs"]  # all that this one knows


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--show", "gnu"], "no class gnu in it"),
        (["--cutouts", "gone"], "gone: no such folder"),
        (["--models", "gone.onnx"], "gone.intra.onnx: no such model file"),
        (["--models", "one.onnx", "two.onnx"], "--bank-sizes takes one model: a bank export"),
        (["--picture", "x.txt"], "x.txt: --picture writes .jpeg, .jpg, .png"),
    ],
)
def test_bad_options(extra, message, icnet, options, exports):
    code, _, err = icnet("evaluate", "--models", exports, *options, *extra)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
