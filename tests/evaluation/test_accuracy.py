"""`icnet evaluate` on folders: what it writes, and what it says when something is wrong."""

import json
import subprocess
import sys
import weakref
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
from PIL import Image

from evaluation.dataset import evaluate, find_dataset
from evaluation.metrics import Scores
from evaluation.record import labels, recording
from export.onnx_file import save_model
from export.to_onnx import write_onnx
from runtime import InputError, Predictor
from runtime.errors import how_to_install
from tests.helpers import random_network

ROOT = Path(__file__).parents[2]
NAMES = ("mae", "max_f", "s", "max_e")


def values(metrics):
    return [getattr(metrics, name) for name in NAMES]


@pytest.fixture
def dataset(image_folder, tmp_path):
    """img/, gt/ and sism/ with two groups, in the layout of the co-saliency data sets."""
    image_folder("data/img/cats", "a.jpg", "b.png", size=(60, 40))
    image_folder("data/img/dogs", "c.JPEG", size=(30, 50))
    image_folder("data/sism/cats", "a.png", "b.png", mode="L")
    image_folder("data/sism/dogs", "c.png", mode="L", size=(70, 90))
    for name, size in (("cats/a", (60, 40)), ("cats/b", (60, 40)), ("dogs/c", (30, 50))):
        gt = Image.new("L", size)
        gt.paste(255, (5, 10, 25, 30))
        path = tmp_path / f"data/gt/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gt.save(path)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "other.onnx"
    write_onnx(random_network(1 / 32, seed=3), path)
    return path


def grey(path, size=None):
    image = Image.open(path).convert("L")
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size else image)


def test_evaluate_writes_table_json_and_plot(icnet, model_file, other_model, dataset, tmp_path):
    maps, output, plot = tmp_path / "my maps", tmp_path / "out/results.json", tmp_path / "out/pr.png"
    assert icnet("predict", dataset, "--model", model_file, "--output", maps)[0] == 0
    models = (model_file, other_model, maps)
    code, out, err = icnet("evaluate", dataset, "--models", *models, "--output", output, "--plot", plot)
    assert (code, err) == (0, "")
    results = json.loads(output.read_text())
    assert {"python", "icnet-deploy", "numpy", "pillow", "onnxruntime"} <= set(results["versions"])
    assert results["date"].count("-") == 2
    (found,) = results["datasets"]
    assert (found["name"], found["groups"], found["images"], found["empty_ground_truths"]) == ("data", 2, 3, 0)
    assert found["path"] == str(dataset)
    sisms, first, second, ready = found["maps"]
    assert [row["name"] for row in found["maps"]] == ["SISMs", "icnet.onnx", "other.onnx", "my maps"]
    assert first["sha256"] == sha256(model_file.read_bytes()).hexdigest()
    assert sisms["sha256"] is ready["sha256"] is None
    for row in found["maps"]:
        assert row["name"] in out
        assert all(f"{row[name]:.4f}" in out for name in NAMES)
        assert len(row["precision"]) == len(row["recall"]) == 256
        assert row["recall"][0] == 1
    assert {k: ready[k] for k in (*NAMES, "precision")} == {k: first[k] for k in (*NAMES, "precision")}
    assert first["s"] != second["s"] != sisms["s"]
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert sorted(p.name for p in output.parent.iterdir()) == ["pr.png", "results.json"]


def test_the_sisms_are_scored_at_the_size_of_the_ground_truth(icnet, dataset, tmp_path):
    assert icnet("evaluate", dataset, "--output", tmp_path / "r.json")[0] == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["datasets"][0]["maps"]
    names = ("cats/a", "cats/b", "dogs/c")
    expected = Scores()
    for name in names:
        gt = grey(dataset / f"gt/{name}.png")
        expected.add(grey(dataset / f"sism/{name}.png", gt.shape[::-1]), gt)
    assert [row[name] for name in NAMES] == values(expected.results())


def test_the_python_function_gives_what_the_command_does(icnet, model_file, dataset, tmp_path):
    assert icnet("evaluate", dataset, "--models", model_file, "--output", tmp_path / "r.json")[0] == 0
    row = json.loads((tmp_path / "r.json").read_text())["datasets"][0]["maps"][1]
    listed = find_dataset(dataset, dataset / "sism")
    with Predictor(model_file) as predictor:
        found = evaluate(listed, predictor.predict_groups(listed.inputs()))
    assert [row[name] for name in NAMES] == values(found)


def test_builtin_sisms_are_those_of_predict(icnet, model_file, dataset, tmp_path):
    builtin, maps, output = ("--sisms", "builtin"), tmp_path / "maps", tmp_path / "r.json"
    assert icnet("predict", dataset, "--model", model_file, "--output", maps, *builtin)[0] == 0
    assert icnet("evaluate", dataset, "--models", model_file, maps, *builtin, "--output", output)[0] == 0
    sisms, first, ready = json.loads(output.read_text())["datasets"][0]["maps"]
    assert sisms["path"] == "builtin"
    assert [first[n] for n in NAMES] == [ready[n] for n in NAMES] != [sisms[n] for n in NAMES]


def test_several_data_sets_and_ready_maps_without_sisms(icnet, dataset, tmp_path):
    (tmp_path / "more").mkdir()
    for folder in ("img", "gt"):
        (tmp_path / "more" / folder).symlink_to(dataset / folder)
    for name in ("data", "more"):
        (tmp_path / "maps").mkdir(exist_ok=True)
        (tmp_path / "maps" / name).symlink_to(dataset / ("gt" if name == "more" else "sism"))
    output, plot = tmp_path / "r.json", tmp_path / "pr.png"
    arguments = ("--models", tmp_path / "maps", "--output", output, "--plot", plot)
    assert icnet("evaluate", dataset, tmp_path / "more", *arguments)[0] == 0
    first, second = json.loads(output.read_text())["datasets"]
    sisms, ready = first["maps"]
    assert [sisms[n] for n in NAMES] == [ready[n] for n in NAMES]
    assert [row["name"] for row in second["maps"]] == ["maps"]
    assert (second["maps"][0]["mae"], second["maps"][0]["max_f"], second["maps"][0]["s"]) == (0, 1, 1)
    with Image.open(plot) as image:
        assert image.width > 1.5 * image.height  # a panel each
    code, out, _ = icnet("evaluate", tmp_path / "more", "--models", tmp_path / "maps")  # of one, either layout will do
    assert code == 0
    assert "0.0000" in out


def test_empty_ground_truths_are_told(icnet, dataset, tmp_path):
    Image.new("L", (60, 40)).save(dataset / "gt/cats/a.png")
    code, out, _ = icnet("evaluate", dataset, "--output", tmp_path / "r.json")
    assert code == 0
    assert "count for MAE only: 1" in " ".join(out.split())
    assert json.loads((tmp_path / "r.json").read_text())["datasets"][0]["empty_ground_truths"] == 1


def test_names_that_rich_or_matplotlib_would_trip_over(icnet, dataset, tmp_path):
    folder = dataset.rename(tmp_path / "[bold]_$x^")
    (tmp_path / "_$[y]_{").symlink_to(folder / "gt")
    arguments = ("--models", tmp_path / "_$[y]_{", "--plot", tmp_path / "pr.png")
    code, out, err = icnet("evaluate", folder, *arguments)
    assert (code, err) == (0, "")
    assert "[bold]_$x^" in out
    assert "_$[y]_{" in out


def test_models_of_one_name_are_told_apart_by_their_paths(icnet, dataset, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "maps").symlink_to(dataset / ("gt" if name == "a" else "sism"))
    models = (tmp_path / "a/maps", tmp_path / "b/maps")
    assert icnet("evaluate", dataset, "--models", *models, "--output", tmp_path / "r.json")[0] == 0
    rows = json.loads((tmp_path / "r.json").read_text())["datasets"][0]["maps"]
    assert [row["name"] for row in rows] == ["SISMs", *map(str, models)]


def test_a_model_with_the_name_of_the_baseline_is_told_apart_from_it():
    assert labels([Path("a/x.onnx"), Path("b/y.onnx")]) == ["x.onnx", "y.onnx"]
    assert labels([Path("a/SISMs"), Path("b/y.onnx")]) == ["a/SISMs", "b/y.onnx"]


@pytest.mark.parametrize(("keep", "kept"), [(None, False), (lambda: False, False), (lambda: True, True)])
def test_ctrl_c_keeps_what_there_is_to_keep(tmp_path, keep, kept):
    output = tmp_path / "x.json"
    with (
        nullcontext() if kept else pytest.raises(KeyboardInterrupt),
        recording({"rows": [1]}, output, keep=keep),
    ):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["x.json"] if kept else [])
    assert not kept or json.loads(output.read_text()) == {"rows": [1], "interrupted": True}


def test_maps_are_read_as_they_come_and_let_go(image_folder, tmp_path):
    for i in range(20):
        image_folder(f"data/img/{i:02}", "a.png")
        (tmp_path / f"data/gt/{i:02}").mkdir(parents=True)
        Image.fromarray(np.tri(40, 60, dtype=bool)).save(tmp_path / f"data/gt/{i:02}/a.png")
    made = []

    def maps():
        for _ in range(20):
            map_ = np.tri(40, 60)
            made.append(weakref.ref(map_))
            yield [map_]
            del map_
            assert sum(ref() is not None for ref in made) <= 1

    found = evaluate(find_dataset(tmp_path / "data", None), maps())
    assert (found.images, found.s) == (20, 1)


def test_photographs_that_lie_on_their_side_are_set_upright(dataset, model_file):
    """What cameras write: stored sideways, with an orientation. The ground truth is of the upright size."""
    photo = dataset / "img/cats/a.jpg"
    upright = Image.open(photo).convert("RGB")
    before = next(iter(found_maps(dataset, model_file)))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif, quality=100, subsampling=0)
    assert Image.open(photo).size == (40, 60)
    listed = find_dataset(dataset, dataset / "sism")
    assert len([*listed.check()]) == 2
    after = next(iter(found_maps(dataset, model_file)))
    assert after[0].shape == before[0].shape == (40, 60)
    assert np.abs(after[0] - before[0]).mean() < 0.02
    gt = dataset / "gt/cats/a.png"
    Image.open(gt).transpose(Image.Transpose.ROTATE_90).save(gt)
    with pytest.raises(InputError, match=r"a\.png: 40×60 pixels, but .*a\.jpg has 60×40"):
        list(listed.check())


def found_maps(path, model):
    with Predictor(model, threads=1) as predictor:
        return list(predictor.predict_groups(find_dataset(path, path / "sism").inputs()))


def test_a_group_without_maps_is_an_error(dataset):
    listed = find_dataset(dataset, None)
    full = [[grey(gt) for gt in group] for group in listed.ground_truths]
    assert evaluate(listed, full).mae == 0
    for maps in (full[:1], [full[0], []]):
        with pytest.raises(InputError, match=r"^data, group dogs: 0 maps for 1 images"):
            evaluate(listed, maps)


def test_a_data_set_listed_without_sisms_has_none_for_a_model(dataset):
    with pytest.raises(InputError, match="listed without SISMs"):
        next(find_dataset(dataset, None).inputs())


def test_a_group_that_the_model_can_not_run_is_named(icnet, dataset, tmp_path, network):
    write_onnx(network, tmp_path / "one.onnx")
    model = onnx.load(tmp_path / "one.onnx")
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 2
    save_model(model, tmp_path / "two.onnx")
    code, _, err = icnet("evaluate", dataset, "--models", tmp_path / "two.onnx", "--output", tmp_path / "r.json")
    assert code == 2
    assert err.startswith("icnet evaluate: error: data, group dogs: ")
    assert not (tmp_path / "r.json").exists()


def drop(path):
    return lambda d: (d / path).unlink()


def blank(path, size):
    return lambda d: Image.new("L", size).save(d / path)


MAPS = ("data", "--models", "data/gt")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: None, ("nowhere",), "nowhere: no such data set"),
        (lambda d: None, ("data/gt", "--sisms", "data/sism"), "data/gt: no img folder in it"),
        (lambda d: (d / "gt").rename(d / "masks"), ("data",), "data: no gt folder in it: expected data/gt/GROUP"),
        (lambda d: (d / "gt/dogs").rename(d / "gt/pets"), ("data",), "c.JPEG: no ground truth for it: expected data"),
        (drop("gt/cats/b.png"), ("data",), "b.png: no ground truth for it: expected data/gt/cats/b.png"),
        (drop("sism/cats/b.png"), ("data",), "img/cats/b.png: no SISM for it: expected data/sism/cats/b.png"),
        (blank("gt/cats/b.png", (40, 60)), ("data",), "gt/cats/b.png: 40×60 pixels, but data/img/cats/b.png has 60×40"),
        (lambda d: (d / "gt/dogs/c.png").write_bytes(b"x"), ("data",), "data/gt/dogs/c.png: not an image"),
        (lambda d: (d / "img/dogs/c.JPEG").write_bytes(b"x"), ("data",), "data/img/dogs/c.JPEG: not an image"),
        (lambda d: (d / "sism/dogs/c.png").write_bytes(b"x"), ("data",), "group dogs: data/sism/dogs/c.png: not an"),
        (
            lambda d: Image.fromarray(np.eye(50, 30, dtype=np.uint8)).save(d / "gt/dogs/c.png"),
            ("data",),
            "gt/dogs/c.png: its values are 0 and 1 of 255",
        ),
        (
            lambda d: [
                blank(p, Image.open(d / p).size)(d) for p in ("gt/cats/a.png", "gt/cats/b.png", "gt/dogs/c.png")
            ],
            ("data",),
            "data: no foreground in any of 3 ground truths",
        ),
        (lambda d: (d / "sism").rename(d / "s"), ("data",), "data: no SISMs: name their folder with --sisms DIR"),
        (lambda d: None, ("data", "--models", "none.onnx"), "none.onnx: no such model file or folder of maps"),
        (lambda d: (d / "x.onnx").write_text("x"), ("data", "--models", "data/x.onnx"), "x.onnx: not an ONNX model"),
        (lambda d: None, (*MAPS, "data/../data/gt"), "data/../data/gt: the same model twice"),
        (lambda d: None, ("data", "data", "--models", "data/gt"), "data: the same data set twice"),
        (
            lambda d: None,
            ("data", "--models", "data/img/dogs"),
            "no map for 2 of 2 images (a.jpg, b.png): expected data/img/dogs/cats/a",
        ),
        (
            lambda d: ((d / "m").mkdir(), (d / "m/cats").symlink_to(d / "gt/cats")),
            ("data", "--models", "data/m"),
            "c.JPEG: no map for it: expected data/m/dogs/c.png",
        ),
        (lambda d: None, ("--models", "x.onnx"), "give either DATA, or --corrupt-sisms or --bank-sizes"),
        (lambda d: None, ("data", "--bank-sizes", "3"), "give either DATA, or --corrupt-sisms or --bank-sizes"),
        (lambda d: None, ("--bank-sizes", "3"), "need --cutouts, --backgrounds and --models"),
        (lambda d: None, ("data", "--cutouts", "data"), "--cutouts and --backgrounds go with --corrupt-sisms"),
        (lambda d: None, (*MAPS, "--plot", "pr.txt"), "pr.txt: --plot writes .pdf, .png, .svg"),
        (lambda d: None, (*MAPS, "--plot", "x.png", "--output", "x.png"), "x.png: is another file of this run"),
        (
            lambda d: (d / "x.onnx").write_text("x"),
            ("data", "--models", "data/x.onnx", "--output", "data/x.onnx"),
            "data/x.onnx: is an input of this run; choose another name",
        ),
        (
            lambda d: (d / "link.json").symlink_to("gt/cats/a.png"),
            ("data", "--output", "data/link.json"),
            "data/link.json: is an input of this run",
        ),
        (lambda d: None, ("data", "--output", "data/img/dogs/c.JPEG"), "c.JPEG: is an input of this run"),
        (lambda d: None, ("data", "--plot", "data/sism/cats/b.png"), "b.png: is an input of this run"),
        (lambda d: (d / "m").symlink_to("gt"), (*MAPS, "data/m", "--plot", "data/m/cats/b.png"), "same model twice"),
        (
            lambda d: copytree(d / "gt", d / "m"),
            (*MAPS, "data/m", "--plot", "data/m/cats/b.png"),
            "data/m/cats/b.png: is an input of this run",
        ),
        (lambda d: None, ("data", "--models", "data/gt", "--output", "data"), "data: can't be written: it is a folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(icnet, dataset, tmp_path, monkeypatch, change, arguments, message):
    monkeypatch.chdir(tmp_path)
    change(dataset)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, out, err = icnet("evaluate", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("icnet evaluate: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_without_matplotlib_only_the_plot_is_missing(dataset):
    code = (
        "import sys; sys.modules['matplotlib'] = None; import icnet_cli; "
        "sys.exit(icnet_cli.main(['evaluate', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(dataset)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SISMs" in done.stdout
    done = subprocess.run([*command, "--plot", "x.png"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"icnet evaluate: error: --plot needs matplotlib: {how_to_install('evaluate')}\n"
