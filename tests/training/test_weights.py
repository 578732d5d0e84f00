"""The demo checkpoint does what its card says, on groups of classes that it has never seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.dataset import evaluate, find_dataset
from evaluation.metrics import Metrics
from export.checkpoint import load_checkpoint, read_card, read_checkpoint, weights_digest
from export.detector import load_detector
from export.detector_onnx import SISMS, compare, samples
from export.fp16 import half_precision
from export.icnet import Uint8Interface
from export.onnx_file import load_model, metadata
from export.proof import check
from export.samples import smooth_group
from export.to_onnx import write_onnx
from runtime import Predictor
from runtime.contract import WEIGHTS as DIGEST
from runtime.files import digest
from runtime.preprocess import restore_map
from tests.helpers import DATA

WEIGHTS = Path(__file__).parents[2] / "weights"
CHECKPOINT = WEIGHTS / "icnet_demo.pth"
METRICS = ("s", "max_f", "max_e", "mae")


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> dict[str, Metrics]:
    """Scores on the sample groups: of the SISMs, and of the checkpoint in both precisions."""
    folder = tmp_path_factory.mktemp("weights")
    network = load_checkpoint(CHECKPOINT)
    write_onnx(network, folder / "fp32.onnx")
    write_onnx(half_precision(network), folder / "fp16.onnx")
    dataset = find_dataset(DATA / "pasted", DATA / "pasted" / "sism")
    found = {"sisms": evaluate(dataset, dataset.read(sisms for _, sisms in dataset.inputs()))}
    for name in ("fp32", "fp16"):
        with Predictor(folder / f"{name}.onnx") as predictor:
            found[name] = evaluate(dataset, predictor.predict_groups(dataset.inputs()))
    return found


def test_it_is_small():
    assert CHECKPOINT.stat().st_size <= 4e6


def test_it_has_the_digest_of_its_weights():
    assert read_checkpoint(CHECKPOINT)[DIGEST] == weights_digest(load_checkpoint(CHECKPOINT))


def test_it_says_what_it_is_for():
    assert "drawings" in (read_card(CHECKPOINT) or "")


def test_its_maps_are_better_than_the_sisms_that_it_is_given(scores):
    assert scores["fp32"].mae < 0.55 * scores["sisms"].mae
    assert scores["fp32"].max_f > scores["sisms"].max_f + 0.05
    assert scores["fp32"].s > scores["sisms"].s


def test_half_precision_costs_next_to_nothing(scores):
    for metric in METRICS:
        assert getattr(scores["fp16"], metric) == pytest.approx(getattr(scores["fp32"], metric), abs=5e-3)


def test_the_sample_is_of_classes_that_were_held_out():
    from training.cutouts import held_out

    classes = [path.name for path in (DATA / "pasted" / "img").iterdir()]
    assert held_out(classes) == set(classes)


@pytest.mark.parametrize("document", ["docs/evaluate.md", "weights/README.md"])
def test_the_scores_in_the_documents_are_those_that_were_measured(document):
    text = (WEIGHTS.parent / document).read_text()
    heldout = json.loads((WEIGHTS / "heldout.json").read_text())["datasets"][0]
    assert f"{heldout['groups']} held-out groups" in text
    for row in heldout["maps"]:
        assert "| " + " | ".join(f"{row[metric]:.3f}" for metric in METRICS) + " |" in text, row["name"]
    blind = json.loads((WEIGHTS / "robustness.json").read_text())["scores"]["fp32.onnx, SISM = 1"][0]
    assert "| " + " | ".join(f"{blind[metric]:.3f}" for metric in METRICS) + " |" in text


def test_half_precision_keeps_the_order_of_the_pixels():
    """In a flat part of an image the correlation maps differ by less than FP16 can tell."""
    network, group = load_checkpoint(CHECKPOINT), smooth_group(5, seed=0)
    images, sisms = torch.from_numpy(group.images), torch.from_numpy(group.sisms)
    with torch.inference_mode():
        maps = [Uint8Interface(n)(images, sisms) for n in (network, half_precision(network))]
    assert (maps[0] - maps[1]).abs().mean() < 1e-3


def test_what_int8_costs_is_what_was_measured():
    text = (WEIGHTS.parent / "docs/int8.md").read_text()
    rows = {row["name"]: row for row in json.loads((WEIGHTS / "int8.json").read_text())["datasets"][0]["maps"]}
    for method in ("minmax", "percentile", "entropy"):
        row = rows[f"int8.{method}.onnx"]
        cells = " | ".join(f"{row[metric]:.3f}" for metric in METRICS)
        assert any(f"`{method}`" in line and cells in line for line in text.splitlines()), method
    found = json.loads((WEIGHTS / "int8_search.json").read_text())["found"]
    assert f"{found['share']:.1%}".replace("%", " %") in text
    assert max(rows["fp32.onnx"][key] - rows["int8.onnx"][key] for key in ("s", "max_f")) <= 0.005


def test_how_large_a_bank_must_be_is_what_was_measured():
    text = (WEIGHTS.parent / "docs/banks-and-packing.md").read_text()
    scores = json.loads((WEIGHTS / "banks.json").read_text())["scores"]
    columns = ["1", "2", "5", "10", "20", "their own group", "SISMs"]
    for label, metric in (("max F ↑", "max_f"), ("MAE ↓", "mae")):
        assert f"| {label} | " + " | ".join(f"{scores[column][metric]:.3f}" for column in columns) + " |" in text


DETECTOR = WEIGHTS.parent / "runtime" / "models" / "detector.onnx"


def detector_scores(name):
    """The scores on cut-outs, whose masks are exact, and on photographs, that `weights/Makefile` measured."""
    cutouts, photographs = json.loads((WEIGHTS / name).read_text())["datasets"]
    assert (cutouts["name"], photographs["name"]) == ("photos_objects", "photos_alone")
    return cutouts["maps"][0], photographs["maps"][0]


def test_the_detector_that_is_shipped_is_the_checkpoint():
    checkpoint = WEIGHTS / "detector.pth"
    assert checkpoint.stat().st_size + DETECTOR.stat().st_size < 5e6
    network = load_detector(checkpoint)
    model = load_model(DETECTOR)
    assert metadata(model)[DIGEST] == weights_digest(network) == read_checkpoint(checkpoint)[DIGEST]
    inputs = {name: images for name, images in samples().items() if len(images) < 4}
    check(DETECTOR, compare(DETECTOR, network, inputs=inputs), subject=SISMS)


def test_the_detector_is_far_better_than_none_and_close_to_its_teacher():
    built_in, teacher = detector_scores("detector_builtin.json"), detector_scores("detector_u2netp.json")
    found = detector_scores("detector.json")
    assert found[0]["sha256"] == digest(DETECTOR)
    for of_none, of_teacher, ours in zip(built_in, teacher, found, strict=True):
        assert ours["max_f"] > of_none["max_f"] + 0.3
        assert ours["max_f"] > 0.85 * of_teacher["max_f"]
        assert ours["mae"] < of_none["mae"] / 2


def test_the_scores_on_the_detectors_card_are_those_that_were_measured():
    card = (WEIGHTS / "README.md").read_text()
    for name in ("detector.json", "detector_builtin.json", "detector_u2netp.json"):
        numbers = [f"{row[metric]:.3f}" for row in detector_scores(name) for metric in ("max_f", "mae")]
        assert "| " + " | ".join(numbers) + " |" in card, name


PHOTOS = WEIGHTS / "icnet_photos.pth"
SHIPPED = DETECTOR.with_name("icnet.onnx")


def test_the_network_that_is_shipped_is_the_checkpoint_for_photographs():
    assert (
        metadata(load_model(SHIPPED))[DIGEST]
        == weights_digest(load_checkpoint(PHOTOS))
        == read_checkpoint(PHOTOS)[DIGEST]
    )
    with Predictor(SHIPPED) as predictor:
        assert predictor.card == read_card(PHOTOS)
    assert "does not tell two in one photograph apart" in (read_card(PHOTOS) or "")


def test_nothing_is_hollowed_out_that_the_detector_marks():
    photos = sorted((DATA / "photos/fish").glob("*.jpg"))
    with Predictor(SHIPPED, sism_model=DETECTOR) as chain:
        maps = chain(photos)
        sisms = [restore_map(image, size) for image, size in detected(chain, photos)]
    kept = [(m >= 0.5) & (s >= 0.5) for m, s in zip(maps, sisms, strict=True)]
    either = [(m >= 0.5) | (s >= 0.5) for m, s in zip(maps, sisms, strict=True)]
    assert np.median([a.sum() / b.sum() for a, b in zip(kept, either, strict=True)]) >= 0.85


def detected(chain, photos):
    """What the detector of a Predictor makes of photographs, and their sizes."""
    seen = [chain.detector.look(photo) for photo in photos]
    return zip(chain.detector(seen), [image.size for image in seen], strict=True)
