"""`icnet predict` on folders: what it writes, how it goes on, and what it says when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BIRDS
from PIL import Image

import runtime.predict
from runtime import Predictor
from runtime.sisms import builtin_sism

ROOT = Path(__file__).parents[1]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def dataset(image_folder):
    """img/ and sism/ with two groups, in the layout of the co-saliency data sets."""
    image_folder("data/img/cats", "a.jpg", "b.png", size=(60, 40))
    image_folder("data/img/dogs", "c.JPEG", size=(30, 50))
    image_folder("data/sism/cats", "a.png", "b.png", mode="L")
    return image_folder("data/sism/dogs", "c.png", mode="L").parents[1]


def test_one_folder_of_photographs(icnet, model_file, tmp_path):
    out = tmp_path / "out"
    code, text, _ = icnet("predict", BIRDS, "--model", model_file, "--sisms", "builtin", "--output", out)
    assert code == 0
    names = sorted(p.stem for p in BIRDS.glob("*.jpg"))
    assert files(out) == ["bird.jpg", *(f"bird/{n}.png" for n in names), "icnet.json"]
    assert str(out) in text
    for name in names:
        image, found = Image.open(BIRDS / f"{name}.jpg"), Image.open(out / "bird" / f"{name}.png")
        assert (found.size, found.mode) == (image.size, "L")


def test_maps_are_those_of_the_predictor(icnet, model_file, dataset, tmp_path):
    assert icnet("predict", dataset, "--model", model_file, "--output", tmp_path / "out")[0] == 0
    with Predictor(model_file) as predictor:
        images = [dataset / "img/cats/a.jpg", dataset / "img/cats/b.png"]
        expected = predictor(images, [dataset / "sism/cats/a.png", dataset / "sism/cats/b.png"])
    for name, map_ in zip("ab", expected, strict=True):
        written = np.asarray(Image.open(tmp_path / f"out/cats/{name}.png"))
        assert abs(written - map_ * 255).max() <= 0.51


def test_a_data_set_finds_its_own_sisms(icnet, model_file, dataset, tmp_path):
    out = tmp_path / "out"
    assert icnet("predict", dataset, "--model", model_file, "--output", out)[0] == 0
    assert files(out) == ["cats.jpg", "cats/a.png", "cats/b.png", "dogs.jpg", "dogs/c.png", "icnet.json"]
    assert Image.open(out / "dogs/c.png").size == (30, 50)
    settings = json.loads((out / "icnet.json").read_text())
    assert settings["sisms"] == str(dataset / "sism")


def test_the_contact_sheet_shows_image_sism_map_and_overlay(icnet, model_file, image_folder, tmp_path):
    folder = image_folder("one")
    Image.new("RGB", (300, 200), (255, 0, 0)).save(folder / "red.png")
    sisms = tmp_path / "sisms"
    sisms.mkdir()
    Image.new("L", (30, 20), 200).save(sisms / "red.png")
    assert icnet("predict", folder, "--model", model_file, "--sisms", sisms, "--output", tmp_path / "out")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "out/one.jpg")).astype(int)
    row = sheet[48 + 75]  # through the middle of the first row's cells, 200 pixels wide with gaps of 6
    assert abs(row[112] - (255, 0, 0)).max() < 12
    assert abs(row[112 + 206] - 200).max() < 12
    map_level = np.asarray(Image.open(tmp_path / "out/one/red.png"))[100, 150]
    assert abs(row[112 + 2 * 206] - map_level).max() < 16


def test_contact_sheets_of_any_group_size_show_every_image():
    from runtime.contact_sheet import contact_sheet

    for n in (1, 2, 7, 40, 300):
        images = np.full((n, 224, 224, 3), (0, 255, 0), np.uint8)
        sheet = contact_sheet(
            images, np.zeros((n, 224, 224), np.uint8), np.zeros((n, 224, 224), np.float32), [(8, 8)] * n, "g"
        )
        green = (np.asarray(sheet) == (0, 255, 0)).all(2).sum()
        assert green == n * 150 * 150
        assert max(sheet.size) < 10_000


def test_resume_goes_on_where_it_stopped(icnet, model_file, dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ("predict", dataset, "--model", model_file, "--output", out)
    predict_group = runtime.predict.predict_group

    def stopped_at_dogs(predictor, group, output):
        if group.name == "dogs":
            raise KeyboardInterrupt
        predict_group(predictor, group, output)

    monkeypatch.setattr(runtime.predict, "predict_group", stopped_at_dogs)
    code, _, err = icnet(*arguments)
    assert code == 130
    assert "stopped" in err
    assert "cats.jpg" in files(out)  # results appear as they are ready
    done = (out / "cats.jpg").stat().st_mtime_ns

    seen = []
    monkeypatch.setattr(runtime.predict, "predict_group", lambda p, g, o: (seen.append(g.name), predict_group(p, g, o)))
    code, _, err = icnet(*arguments, "--resume")
    assert code == 0
    assert seen == ["dogs"]
    assert "1 of 2 groups are finished already" in err
    assert (out / "cats.jpg").stat().st_mtime_ns == done
    assert icnet(*arguments, "--resume")[0] == 0
    assert seen == ["dogs"]
    assert icnet(*arguments)[0] == 0
    assert seen == ["dogs", "cats", "dogs"]


def test_a_stopped_new_run_does_not_pass_old_results_off_as_its_own(icnet, model_file, dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert icnet("predict", dataset, "--model", model_file, "--output", out)[0] == 0
    monkeypatch.setattr(runtime.predict, "predict_group", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert icnet("predict", dataset, "--model", model_file, "--sisms", "builtin", "--output", out)[0] == 130
    monkeypatch.undo()
    _, _, err = icnet("predict", dataset, "--model", model_file, "--sisms", "builtin", "--output", out, "--resume")
    assert "finished already" not in err


def test_resume_refuses_results_of_other_settings(icnet, model_file, dataset, tmp_path):
    out = tmp_path / "out"
    assert icnet("predict", dataset, "--model", model_file, "--output", out)[0] == 0
    arguments = ("predict", dataset, "--model", model_file, "--sisms", "builtin", "--output", out, "--resume")
    code, _, err = icnet(*arguments)
    assert code == 2
    assert "made with another sisms" in err
    (out / "icnet.json").write_text("[]")
    code, _, err = icnet(*arguments)
    assert code == 2
    assert "made with another path, sisms, model_sha256" in err


def test_a_bad_group_does_not_stop_the_others(icnet, model_file, dataset, tmp_path):
    (dataset / "img/cats/b.png").write_bytes(b"")
    out = tmp_path / "out"
    code, text, err = icnet("predict", dataset, "--model", model_file, "--output", out)
    assert code == 2
    assert "b.png: the file is empty" in err
    assert "1 of 2 groups failed" in err
    assert files(out) == ["dogs.jpg", "dogs/c.png", "icnet.json"]
    assert str(out) in text


def test_an_interrupted_write_leaves_nothing_half_written(model_file, dataset, tmp_path, monkeypatch, icnet):
    save = Image.Image.save

    def full_disk(image, path, *args, **kwargs):
        save(image, path, *args, **kwargs)
        if Path(path).parent.name == "dogs":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    out = tmp_path / "out"
    code, _, err = icnet("predict", dataset, "--model", model_file, "--output", out)
    assert code == 2
    assert "c.png: can't be written: No space left on device" in err.replace("\n", "")
    assert files(out) == ["cats.jpg", "cats/a.png", "cats/b.png", "icnet.json"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: None, ("nowhere", "--sisms", "builtin"), "nowhere: no such folder"),
        (lambda d: (d / "empty").mkdir(), ("data/empty", "--sisms", "builtin"), "empty: no images in it"),
        (lambda d: None, ("data/img/cats",), "no SISMs: name their folder with --sisms DIR"),
        (lambda d: None, ("data/img/cats", "--sisms", "nowhere"), "nowhere: no such folder (it should hold the SISMs)"),
        (lambda d: (d / "sism/cats/b.png").unlink(), ("data",), "b.png: no SISM for it: expected"),
        (lambda d: (d / "img/cats/a.png").write_bytes(b""), ("data",), "a.jpg and a.png would both become a.png"),
        (lambda d: (d / "sism/cats/a.jpg").write_bytes(b""), ("data",), "a.jpg and a.png could both be the SISM of a"),
        (
            lambda d: (d / "img/cats/a.jpg").write_bytes(b"x"),
            ("data/img/cats", "--sisms", "builtin"),
            "a.jpg: not an image",
        ),
        (lambda d: None, ("data", "--model", "none.onnx"), "none.onnx: no such model file"),
        (lambda d: (d / "text.onnx").write_text("x"), ("data", "--model", "data/text.onnx"), "not an ONNX model"),
        (lambda d: (d / "file").touch(), ("data", "--output", "data/file"), "file is not a folder"),
        (
            lambda d: None,
            ("data/img/cats", "--sisms", "data/sism/cats", "--output", "data/img"),
            "would overwrite this input",
        ),
        (lambda d: None, ("data", "--threads", "0"), "threads=0: expected at least 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    icnet, model_file, dataset, tmp_path, monkeypatch, change, arguments, message
):
    monkeypatch.chdir(tmp_path)
    change(dataset)
    before = {p: p.read_bytes() for p in dataset.rglob("*") if p.is_file()}
    code, out, err = icnet("predict", "--model", model_file, "--output", "out", *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("out/**/*.png"))
    assert before == {p: p.read_bytes() for p in dataset.rglob("*") if p.is_file()}


def test_builtin_sisms_mark_what_stands_out():
    image = np.full((100, 100, 3), 90, np.uint8)
    image[40:60, 40:60] = (250, 40, 40)
    sism = builtin_sism(image)
    assert (sism.shape, sism.dtype, sism.max()) == ((100, 100), np.uint8, 255)
    assert sism[42:58, 42:58].mean() > 3 * sism[:20, :20].mean() + 10
    assert (builtin_sism(np.zeros((50, 50, 3), np.uint8)) == 0).all()


@pytest.mark.parametrize("command", [[], ["predict"], ["export"]])
def test_help_tells_what_there_is(command):
    done = subprocess.run(
        [sys.executable, "-m", "icnet_cli", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: icnet")


def test_the_export_script_is_the_command(tmp_path):
    """From anywhere, without the package being installed on the path."""
    script = ROOT / "export" / "to_onnx.py"
    done = subprocess.run(
        [sys.executable, str(script), "--checkpoint", "none.pth", "--output", "x.onnx"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "icnet export: error: none.pth: no such file\n"


def test_a_missing_package_is_named_with_its_extra():
    code = "import sys; sys.modules['torch'] = None; import icnet_cli; sys.exit(icnet_cli.main(['export']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "icnet export: error: torch is not installed: pip install 'icnet-deploy[cpu,export]'\n"
