import json

import pytest
from PIL import Image

OPTIONS = ["--groups", 2, "--images", 3]


@pytest.fixture(scope="module")
def options(material):
    return ["--cutouts", material[0], "--backgrounds", material[1], *OPTIONS]


def test_scores_by_share(icnet, options, model_file, tmp_path):
    code, out, err = icnet(
        "evaluate", "--corrupt-sisms", "--models", model_file, *options,
        "--output", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["shares"] == [0, 0.2, 0.4, 0.6, 0.8]
    scores = results["scores"]
    assert set(scores) == {"SISMs", "icnet.onnx", "icnet.onnx, SISM = 1"}
    assert [len(row) for row in scores.values()] == [5, 5, 1]
    sisms = [s["mae"] for s in scores["SISMs"]]
    assert sisms[0] < sisms[-1]  # corrupted SISMs are worse ones
    assert len({s["mae"] for s in scores["icnet.onnx"]}) > 1  # the model saw them
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["SISMs", "MAE", "↓", *(f"{mae:.3f}" for mae in sisms)] in rows
    assert Image.open(tmp_path / "r.png").size[0] > 500


def test_shares_can_be_named_in_any_order(icnet, options, model_file, tmp_path):
    arguments = ("-m", model_file, *options, "--groups", 1, "--corrupt-sisms", 1, 0, "-o", tmp_path / "r.json")
    assert icnet("evaluate", *arguments)[0] == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["shares"] == [0, 1]
    clean, wrong = results["scores"]["SISMs"]
    assert clean["mae"] < wrong["mae"]


def test_the_same_scores_as_of_a_written_data_set(icnet, options, tmp_path):
    """`icnet data paste` and `icnet evaluate` on the same groups; only JPEG lies between, which SISMs do not pass."""
    from evaluation.dataset import evaluate, find_dataset
    from training.paste import CutPaste

    data = tmp_path / "data"
    assert icnet("data", "paste", *options, "--corrupted", 0.4, "--output", data)[0] == 0
    dataset = find_dataset(data, data / "sism")
    written = evaluate(dataset, dataset.read(sisms for _, sisms in dataset.inputs()))
    maker = CutPaste(options[1], options[3])
    groups = sorted((maker.nth(0, i, 3, (2, 3), 0.4) for i in range(2)), key=lambda group: group.name)
    assert [group.name for group in groups] == [group.name for group in dataset.groups]
    assert written.mae == pytest.approx(evaluate(dataset, [group.sisms for group in groups]).mae)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--distractors", 3, 1], "--distractors 3 1: expected MIN MAX with MIN ≤ MAX"),
        (["--cutouts", "gone"], "gone: no such folder"),
        (["--sisms", "gone"], "--sisms and --sism-model are of data sets"),
        (["--show", "ant"], "--picture goes with --bank-sizes or --reference, --show with --bank-sizes"),
    ],
)
def test_bad_options(extra, message, icnet, options, model_file):
    code, _, err = icnet("evaluate", "--corrupt-sisms", "--models", model_file, *options, *extra)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--groups", 0, "a whole number from 1"),
        ("--images", 0, "a whole number from 1"),
        ("--distractors", -1, "a whole number from 0"),
        ("--corrupt-sisms", 2, "a number from 0 to 1"),
        ("--corrupted", "nan", "a number from 0 to 1"),
        ("--seed", -1, "a whole number from 0"),
        ("--bank-sizes", 0, "a whole number from 1"),
        ("--new", 0, "a whole number from 1"),
    ],
)
def test_numbers_out_of_range(option, value, expected, icnet, capsys):
    with pytest.raises(SystemExit, match="2"):
        icnet("evaluate", "--models", "x.onnx", option, value, *([1] if option == "--distractors" else []))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"argument {option}: expected {expected}, got '{value}'" in err
