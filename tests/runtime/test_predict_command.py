"""`icnet predict` on folders: what it writes, how it goes on, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.to_onnx import write_onnx
from runtime import Predictor
from runtime.backends.onnx import Finished, OnnxBackend
from runtime.commands.results import GroupResults, _is_result
from runtime.contract import CARD
from runtime.groups import SUFFIXES, find_groups
from runtime.sisms import builtin_sism
from tests.helpers import BIRDS, random_network

ROOT = Path(__file__).parents[2]
DOGS = ["dogs/c.png", "dogs/contact_sheet.jpg", "dogs/icnet.json"]
BUILTIN = ("--sisms", "builtin")
CATS = ["cats/a.png", "cats/b.png", "cats/contact_sheet.jpg", "cats/icnet.json"]


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
    assert files(out) == sorted([*(f"bird/{n}.png" for n in names), "bird/contact_sheet.jpg", "bird/icnet.json"])
    assert str(out) in text
    for name in names:
        image, found = Image.open(BIRDS / f"{name}.jpg"), Image.open(out / "bird" / f"{name}.png")
        assert (found.size, found.mode) == (image.size, "L")


@pytest.mark.parametrize("model_file", ["onnx_file", "mnn_file"], indirect=True, ids=["onnx", "mnn"])
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
    assert files(out) == [*CATS, *DOGS]
    assert Image.open(out / "dogs/c.png").size == (30, 50)
    made_from = json.loads((out / "dogs/icnet.json").read_text())["made_from"]
    assert made_from["sisms"] == {"c.png": sha256((dataset / "sism/dogs/c.png").read_bytes()).hexdigest()}


def test_the_contact_sheet_shows_image_sism_map_and_overlay(icnet, model_file, image_folder, tmp_path):
    folder = image_folder("one")
    Image.new("RGB", (300, 200), (255, 0, 0)).save(folder / "red.png")
    sisms = tmp_path / "sisms"
    sisms.mkdir()
    Image.new("L", (30, 20), 200).save(sisms / "red.png")
    assert icnet("predict", folder, "--model", model_file, "--sisms", sisms, "--output", tmp_path / "out")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "out/one/contact_sheet.jpg")).astype(int)
    row = sheet[48 + 75]  # through the middle of the first row's cells, 200 pixels wide with gaps of 6
    assert abs(row[112] - (255, 0, 0)).max() < 12
    assert abs(row[112 + 206] - 200).max() < 12
    map_level = np.asarray(Image.open(tmp_path / "out/one/red.png"))[100, 150]
    assert abs(row[112 + 2 * 206] - map_level).max() < 16


def test_contact_sheets_of_any_group_size_show_every_image():
    from runtime.commands.contact_sheet import contact_sheet

    for n in (1, 2, 7, 40, 300):
        images = np.full((n, 224, 224, 3), (0, 255, 0), np.uint8)
        sheet = contact_sheet(
            images, np.zeros((n, 224, 224), np.uint8), np.zeros((n, 224, 224), np.float32), [(8, 8)] * n, "g"
        )
        green = (np.asarray(sheet) == (0, 255, 0)).all(2).sum()
        assert green == n * 150 * 150
        assert max(sheet.size) < 10_000


def predicted(icnet, monkeypatch, *arguments):
    """Run `icnet predict`; the exit code and the groups that were computed."""
    seen = []
    begin = GroupResults.begin
    with monkeypatch.context() as patch:

        def seen_by(results):
            seen.append(results.folder.name)
            begin(results)

        patch.setattr(GroupResults, "begin", seen_by)
        code, out, _ = icnet("predict", *arguments)
    return code, seen, out


def stop_at(images, monkeypatch):
    """Interrupt the first call of so many images."""
    submit = OnnxBackend.submit

    def stopping(backend, *tensors, last=False):
        if len(tensors[0]) == images:
            raise KeyboardInterrupt
        return submit(backend, *tensors, last=last)

    monkeypatch.setattr(OnnxBackend, "submit", stopping)


def test_resume_goes_on_where_it_stopped(icnet, model_file, dataset, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = (dataset, "--model", model_file, "--output", out)
    with monkeypatch.context() as patch:
        stop_at(1, patch)  # that of the dogs
        code, _, err = icnet("predict", *arguments)
    assert code == 130
    assert "stopped" in err
    assert files(out) == [*CATS, "dogs/icnet.json"]  # results appear as they are ready
    before = (out / "cats/a.png").stat().st_mtime_ns

    code, seen, text = predicted(icnet, monkeypatch, *arguments, "--resume")
    assert (code, seen) == (0, ["dogs"])
    assert "1 of 2 groups were finished already" in text
    assert (out / "cats/a.png").stat().st_mtime_ns == before
    assert predicted(icnet, monkeypatch, *arguments, "--resume")[:2] == (0, [])
    assert predicted(icnet, monkeypatch, *arguments)[:2] == (0, ["cats", "dogs"])


def change_model(out, dataset, arguments, tmp_path):
    other = tmp_path / "other.onnx"
    write_onnx(random_network(1 / 32), other)
    arguments[2] = other


def change_sisms(out, dataset, arguments, tmp_path):
    arguments += ["--sisms", "builtin"]


def change_an_image(out, dataset, arguments, tmp_path):
    for group in ("cats/b.png", "dogs/c.JPEG"):
        Image.new("RGB", (50, 60), (1, 200, 3)).save(dataset / "img" / group)


def change_a_sism(out, dataset, arguments, tmp_path):
    for group in ("cats/b.png", "dogs/c.png"):
        Image.new("L", (50, 60), 77).save(dataset / "sism" / group)


def remove_records(out, dataset, arguments, tmp_path):
    for record in out.glob("*/icnet.json"):
        record.unlink()
    for file in out.glob("*/*.*"):
        file.unlink()


def corrupt_a_map(out, dataset, arguments, tmp_path):
    (out / "cats/a.png").write_bytes(b"")
    (out / "dogs/c.png").unlink()


@pytest.mark.parametrize(
    "change", [change_model, change_sisms, change_an_image, change_a_sism, remove_records, corrupt_a_map]
)
def test_resume_computes_anew_what_would_come_out_otherwise(icnet, model_file, dataset, tmp_path, monkeypatch, change):
    out = tmp_path / "out"
    arguments = [dataset, "--model", model_file, "--output", out]
    assert predicted(icnet, monkeypatch, *arguments)[0] == 0
    change(out, dataset, arguments, tmp_path)
    assert predicted(icnet, monkeypatch, *arguments, "--resume")[:2] == (0, ["cats", "dogs"])
    resumed = {name: (out / name).read_bytes() for name in files(out)}
    assert predicted(icnet, monkeypatch, *arguments)[0] == 0
    assert resumed == {name: (out / name).read_bytes() for name in files(out)}


def test_a_group_that_lost_an_image_is_computed_anew_and_its_old_map_goes(
    icnet, model_file, dataset, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = (dataset, "--model", model_file, "--output", out)
    assert predicted(icnet, monkeypatch, *arguments)[0] == 0
    (dataset / "img/cats/a.jpg").unlink()
    assert predicted(icnet, monkeypatch, *arguments, "--resume")[:2] == (0, ["cats"])
    assert files(out / "cats") == ["b.png", "contact_sheet.jpg", "icnet.json"]


def test_two_runs_at_once_are_not_taken_for_one(icnet, model_file, dataset, tmp_path, monkeypatch):
    """The other run's maps lie there, this run's record comes last: not finished."""
    out = tmp_path / "out"
    arguments = (dataset, "--model", model_file, "--output", out)
    finish = GroupResults.finish

    def overtaken(results):
        for path in results.folder.glob("*.png"):
            Image.new("L", (5, 5)).save(path)
        finish(results)

    with monkeypatch.context() as patch:
        patch.setattr(GroupResults, "finish", overtaken)
        assert icnet("predict", *arguments)[0] == 0
    assert predicted(icnet, monkeypatch, *arguments, "--resume")[1] == ["cats", "dogs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "img/cats/b.png").write_bytes(b""), "b.png: the file is empty"),
        (lambda d: (d / "img/cats/b.png").write_bytes(b"P6\nabc 12 255\nxxxx"), "b.png: damaged or truncated"),
        (lambda d: (d / "img/cats/a.jfif").symlink_to("nowhere"), "both become a.png"),
        (lambda d: (d / "img/cats/z.jpe").symlink_to("nowhere"), "z.jpe: no SISM for it"),
        (lambda d: (d / "sism/cats/b.png").unlink(), "b.png: no SISM for it: expected"),
        (lambda d: [p.unlink() for p in (d / "img/cats").iterdir()], "cats: no images in it"),
        (lambda d: ((d / "img/cats/a.jpg").unlink(), os.mkfifo(d / "img/cats/a.jpg")), "a.jpg: not a regular file"),
    ],
)
def test_a_bad_group_does_not_stop_the_others(icnet, model_file, dataset, tmp_path, change, message):
    out = tmp_path / "out"
    change(dataset)
    code, text, err = icnet("predict", dataset, "--model", model_file, "--output", out)
    assert code == 2
    assert message in err
    assert "1 of 2 groups failed" in err
    assert [name for name in files(out) if name.startswith("dogs")] == DOGS
    assert not list(out.glob("cats/*.png"))
    assert str(out) in text


def test_hidden_files_and_folders_are_passed_over(image_folder):
    """Such as the ._NAME.jpg that macOS leaves on foreign disks."""
    data = image_folder("data/img/cats", "a.jpg", "._a.jpg", ".b.jpg").parents[1]
    image_folder("data/img/.trash", "c.jpg")
    (group,) = find_groups(data, None)
    assert (group.name, [image.name for image in group.images]) == ("cats", ["a.jpg"])


def test_an_interrupted_write_leaves_nothing_half_written(model_file, dataset, tmp_path, monkeypatch, icnet):
    fsync = os.fsync

    def full_disk(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.parent.name == "dogs" and path.suffix != ".json":
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    out = tmp_path / "out"
    code, _, err = icnet("predict", dataset, "--model", model_file, "--output", out)
    assert code == 2
    assert "c.png: can't be written: No space left on device" in err.replace("\n", "")
    assert files(out) == [*CATS, "dogs/icnet.json"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: None, ("nowhere", "--sisms", "builtin"), "nowhere: no such folder"),
        (lambda d: (d / "empty").mkdir(), ("data/empty", "--sisms", "builtin"), "empty: no images in it"),
        (lambda d: None, ("data/img/cats", "--sisms", "nowhere"), "nowhere: no such folder (it should hold the SISMs)"),
        (
            lambda d: (d / "img/cats/a.png").write_bytes(b""),
            ("data/img/cats", "--sisms", "builtin"),
            "a.jpg and a.png would both become a.png",
        ),
        (
            lambda d: (d / "sism/cats/a.jpg").write_bytes(b""),
            ("data/img/cats", "--sisms", "data/sism/cats"),
            "a.jpg and a.png could both be the SISM of a",
        ),
        (
            lambda d: (d / "img/cats/a.jpg").write_bytes(b"x"),
            ("data/img/cats", "--sisms", "builtin"),
            "a.jpg: not an image",
        ),
        (lambda d: None, ("data", "--model", "none.onnx"), "none.onnx: no such model file"),
        (lambda d: None, ("data", "--model", "none.pth"), "none.pth: no such model file"),
        (
            lambda d: (d / "x.pth").touch(),
            ("data", "--model", "data/x.pth"),
            "data/x.pth: a checkpoint; export it first: icnet export --checkpoint data/x.pth --output x.onnx",
        ),
        (
            lambda d: None,
            ("data/img", *BUILTIN),
            "data/img: no images in it, but folders (cats, dogs). Name one of them, or arrange a data set: the images "
            "in data/img/img/GROUP/, their SISMs in data/img/sism/GROUP/",
        ),
        (
            lambda d: [(d / "many" / name).mkdir(parents=True) for name in "dcba"],
            ("data/many",),
            "data/many: no images in it, but folders (a, b, c, …)",
        ),
        (lambda d: (d / "a.txt").touch(), ("data/a.txt", *BUILTIN), "a.txt: neither a folder nor an image"),
        (
            lambda d: None,
            ("data/img/dogs/c.JPEG", "--sisms", "data/sism/cats"),
            "c.JPEG: no SISM for it: expected data/sism/cats/c.png",
        ),
        (lambda d: (d / "text.onnx").write_text("x"), ("data", "--model", "data/text.onnx"), "not an ONNX model"),
        (lambda d: (d / "file").touch(), ("data/img/cats", *BUILTIN, "--output", "data/file"), "is not a folder"),
        (lambda d: None, ("data/img/cats", *BUILTIN, "--output", "data/img"), "holds a.jpg, an input of this run"),
        (
            lambda d: None,
            ("data/img/cats", "--sisms", "data/sism/cats", "--output", "data/sism"),
            "holds a.png, an input",
        ),
        (lambda d: None, ("data/img/cats", *BUILTIN, "--output", "data/sism"), "a.png: was not made by icnet predict"),
        (
            lambda d: ((d / "o/cats").mkdir(parents=True), (d / "o/cats/icnet.json").write_text('{"mine": 1}')),
            ("data/img/cats", *BUILTIN, "--output", "data/o"),
            "icnet.json: was not made by icnet predict",
        ),
        (lambda d: (d / "loop").symlink_to("loop"), ("data/img/cats", *BUILTIN, "--output", "data/loop"), "loop"),
        (lambda d: None, ("a" * 300, *BUILTIN), "File name too long"),
        (lambda d: None, ("data/img/cats", *BUILTIN, "--model", "a" * 300), "File name too long"),
        (lambda d: None, ("data", "--threads", "0"), "threads=0: expected 1 to 1024"),
        (lambda d: None, ("data", "--threads", "2147483648"), "expected 1 to 1024"),
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
    after = {p: p.read_bytes() for p in dataset.rglob("*") if p.is_file()}
    assert before == {p: after[p] for p in before}


def test_the_model_is_not_overwritten_by_a_map(icnet, model_file, image_folder, tmp_path):
    folder = image_folder("one", "a.jpg")
    model = image_folder("out/one") / "a.png"
    model.write_bytes(model_file.read_bytes())
    code, _, err = icnet("predict", folder, "--model", model, *BUILTIN, "--output", tmp_path / "out")
    assert code == 2
    assert "holds a.png, an input of this run" in err
    assert model.read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize("sisms", ["builtin", "data/sism/cats", "data/sism/cats/a.png"])
def test_one_photograph_is_a_group_of_one(icnet, model_file, dataset, tmp_path, monkeypatch, sisms):
    monkeypatch.chdir(tmp_path)
    code, text, _ = icnet("predict", "data/img/cats/a.jpg", "--model", model_file, "--sisms", sisms, "--output", "out")
    assert code == 0
    assert files(tmp_path / "out") == ["a/a.png", "a/contact_sheet.jpg", "a/icnet.json"]
    assert "out/a/*.png" in text
    if sisms != "builtin":
        with Predictor(model_file) as predictor:
            (expected,) = predictor([dataset / "img/cats/a.jpg"], [dataset / "sism/cats/a.png"])
        assert abs(np.asarray(Image.open("out/a/a.png")) - expected * 255).max() <= 0.51


def test_names_that_rich_or_the_terminal_would_trip_over(icnet, model_file, image_folder, tmp_path):
    image_folder("data/img/[bold]x[y]", "a.jpg")
    image_folder("data/img/猫 cats", "ä [x] b.jpg")
    out = tmp_path / "[/out]"
    code, text, _ = icnet("predict", tmp_path / "data", "--model", model_file, *BUILTIN, "--output", out)
    assert code == 0
    assert str(out) in text
    assert (out / "猫 cats" / "ä [x] b.png").exists()


def test_a_terminal_that_can_not_print_a_name(model_file, image_folder, tmp_path):
    folder = image_folder("猫", "a.jpg")
    command = ["predict", folder, "--model", model_file, *BUILTIN, "--output", tmp_path / "日"]
    done = subprocess.run(
        [sys.executable, "-m", "icnet_cli", *map(str, command)],
        cwd=ROOT, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "日/猫/a.png").exists()


def test_builtin_sisms_mark_what_stands_out():
    image = np.full((100, 100, 3), 90, np.uint8)
    image[40:60, 40:60] = (250, 40, 40)
    sism = builtin_sism(image)
    assert (sism.shape, sism.dtype, sism.max()) == ((100, 100), np.uint8, 255)
    assert sism[42:58, 42:58].mean() > 3 * sism[:20, :20].mean() + 10
    assert (builtin_sism(np.zeros((50, 50, 3), np.uint8)) == 0).all()


ALL = ("--write", "maps,masks,cutouts,boxes")
ALL_CATS = sorted(
    [*CATS, "cats/boxes.json", *(f"cats/{folder}/{name}.png" for folder in ("masks", "cutouts") for name in "ab")]
)


@pytest.fixture
def opencv():
    pytest.importorskip("cv2")


def test_masks_cutouts_and_boxes(icnet, model_file, dataset, tmp_path, opencv):
    out = tmp_path / "out"
    turned = Image.open(dataset / "img/cats/a.jpg")
    exif = turned.getexif()
    exif[0x0112] = 8
    turned.save(dataset / "img/cats/a.jpg", exif=exif)
    code, text, _ = icnet("predict", dataset, "--model", model_file, "--output", out, *ALL, "--level", 0.4)
    assert code == 0
    assert [name for name in files(out) if name.startswith("cats")] == ALL_CATS
    assert "cutouts: " in text
    sizes = {"a": (40, 60), "b": (60, 40)}
    boxes = json.loads((out / "cats/boxes.json").read_text())
    assert set(boxes) == {"info", "licenses", "categories", "images", "annotations"}
    assert boxes["categories"] == [{"id": 1, "name": "co-salient", "supercategory": "object"}]
    assert boxes["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 40, "height": 60},
        {"id": 2, "file_name": "b.png", "width": 60, "height": 40},
    ]
    assert [one["id"] for one in boxes["annotations"]] == list(range(1, len(boxes["annotations"]) + 1))
    assert boxes["annotations"]
    for number, (name, size) in enumerate(sizes.items(), 1):
        map_, mask, cutout = (Image.open(out / f"cats/{folder}{name}.png") for folder in ("", "masks/", "cutouts/"))
        assert map_.size == mask.size == cutout.size == size
        assert (mask.mode, cutout.mode) == ("L", "RGBA")
        salient = np.asarray(map_) >= 0.4 * 255
        np.testing.assert_array_equal(np.asarray(mask), salient * np.uint8(255))
        inside = np.zeros(salient.shape, bool)
        for one in (one for one in boxes["annotations"] if one["image_id"] == number):
            assert set(one) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "score"}
            assert (one["category_id"], one["iscrowd"]) == (1, 0)
            assert 0.4 <= one["score"] <= 1
            x, y, width, height = one["bbox"]
            inside[y : y + height, x : x + width] = True
            assert one["area"] <= salient[y : y + height, x : x + width].sum()
        assert inside[salient].mean() > 0.95  # components that are too small have no box
    sheet = Image.open(out / "cats/contact_sheet.jpg")
    assert sheet.width > 5 * 200  # the cut-outs have a column


def test_only_what_is_asked_for_is_written_and_the_rest_of_ours_goes(
    icnet, model_file, dataset, tmp_path, monkeypatch, opencv
):
    out = tmp_path / "out"
    arguments = (dataset, "--model", model_file, "--output", out)
    assert predicted(icnet, monkeypatch, *arguments, *ALL)[0] == 0
    assert predicted(icnet, monkeypatch, *arguments, *ALL, "--resume")[:2] == (0, [])
    assert predicted(icnet, monkeypatch, *arguments, *ALL, "--level", 0.3, "--resume")[:2] == (0, ["cats", "dogs"])
    (out / "dogs/cutouts/mine.png").write_bytes(b"mine")
    masks = ("--write", "masks,cutouts", "--cutout-format", "webp")
    assert predicted(icnet, monkeypatch, *arguments, *masks, "--resume")[:2] == (0, ["cats", "dogs"])
    expected = ["contact_sheet.jpg", "cutouts/c.webp", "cutouts/mine.png", "icnet.json", "masks/c.png"]
    assert files(out / "dogs") == expected
    assert Image.open(out / "dogs/cutouts/c.webp").mode == "RGBA"
    (out / "dogs/masks/c.png").write_bytes(b"")
    assert predicted(icnet, monkeypatch, *arguments, *masks, "--resume")[:2] == (0, ["dogs"])


def test_masks_of_others_are_not_overwritten(icnet, model_file, dataset, tmp_path):
    mine = tmp_path / "out/cats/masks/b.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    arguments = ("predict", dataset, "--model", model_file, "--output", tmp_path / "out", "--write", "masks")
    code, _, err = icnet(*arguments)
    assert code == 2
    assert "masks/b.png: was not made by icnet predict" in err
    assert mine.read_bytes() == b"mine"
    assert files(tmp_path / "out/cats") == ["masks/b.png"]


def test_a_link_in_place_of_a_folder_of_results_is_refused(icnet, model_file, dataset, tmp_path):
    """A planted record can't have files deleted that lie elsewhere."""
    mine = tmp_path / "mine/a.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    out = tmp_path / "out/cats"
    out.mkdir(parents=True)
    (out / "masks").symlink_to(mine.parent)
    files = {"masks/a.png": sha256(b"mine").hexdigest()}
    (out / "icnet.json").write_text(json.dumps({"made_from": None, "files": files}))
    code, _, err = icnet("predict", dataset, "--model", model_file, "--output", tmp_path / "out")
    assert code == 2
    assert "cats/masks: is a link; remove it or choose another --output" in err
    assert mine.read_bytes() == b"mine"


def test_inputs_may_not_lie_where_cutouts_go(icnet, model_file, image_folder, tmp_path):
    folder = image_folder("out/masks/masks", "a.jpg")
    code, _, err = icnet("predict", folder, "--model", model_file, *BUILTIN, "--output", tmp_path / "out")
    assert code == 2
    assert "holds a.jpg, an input of this run" in err


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("a.png", True), ("masks/a.png", True), ("cutouts/a.webp", True), ("boxes.json", True), ("..png", True),
        ("contact_sheet.jpg", True), ("masks/..png", True),
        ("masks/../a.png", False), ("../a.png", False), ("/a.png", False), ("/masks/a.png", False), ("a.webp", False),
        ("masks/a.webp", False), ("masks/contact_sheet.jpg", False), ("other/a.png", False), ("masks//a.png", False),
        ("masks/masks/a.png", False), ("./a.png", False), ("masks/boxes.json", False), ("masks/", False), ("", False),
        ("a.png\0", False), ("masks/\0.png", False), ("icnet.json", False), ("..", False),
    ],
)  # fmt: skip
def test_names_that_a_record_can_have(name, ours):
    assert _is_result(name) == ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--write", "maps,mask"), "argument --write: expected some of maps, masks, cutouts, boxes, got 'mask'"),
        (("--write", ""), "argument --write: expected some of"),
        (("--level", "1.5"), "argument --level: expected a number from 0 to 1, got '1.5'"),
        (("--write", "cutouts", "--cutout-format", "jpg"), "'jpg' has no alpha channel, or is unknown; cut-outs are"),
    ],
)
def test_outputs_that_can_not_be(icnet, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        icnet("predict", tmp_path, "--model", "x.onnx", "--output", tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_format_of_cutouts_that_are_not_written(icnet, model_file, dataset, tmp_path):
    arguments = ("predict", dataset, "--model", model_file, "--output", tmp_path / "out", "--cutout-format", "webp")
    code, _, err = icnet(*arguments)
    assert code == 2
    assert "--cutout-format webp: no cut-outs are written; add cutouts to --write" in err
    assert not (tmp_path / "out").exists()


def test_cutouts_without_opencv(icnet, model_file, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    arguments = ("predict", dataset, "--model", model_file, "--output", tmp_path / "out", "--write")
    code, _, err = icnet(*arguments, "masks,cutouts")
    assert code == 2
    assert "--write cutouts need OpenCV with its contrib modules: pip install" in err
    assert not (tmp_path / "out").exists()
    assert icnet(*arguments, "maps,masks")[0] == 0


def test_the_summary_names_maps_that_are_nearly_empty_or_full(icnet, model_file, dataset, tmp_path, monkeypatch):
    values = []

    def submit(backend, images, sisms, last=False):
        return Finished(np.stack([np.full((224, 224), values.pop(0), np.float32) for _ in images]))

    monkeypatch.setattr(OnnxBackend, "submit", submit)
    values += [0.0, 1.0, 0.3]
    arguments = ("predict", dataset, "--model", model_file, "--output", tmp_path / "out")
    code, text, _ = icnet(*arguments)
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "2 groups, 3 images"
    assert "nearly empty, fewer than 0.1% of the pixels reach 0.5: 2 maps: cats/a, dogs/c" in lines
    assert "nearly full, more than 95% of the pixels reach 0.5: 1 map: cats/b" in lines
    values += [0.0, 1.0, 0.3]
    text = icnet(*arguments, "--level", 0.2)[1]
    assert "nearly full, more than 95% of the pixels reach 0.2: 2 maps: cats/b, dogs/c" in text.splitlines()


def test_the_summary_says_what_was_passed_over(icnet, model_file, dataset, tmp_path, monkeypatch):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "notes.txt", "._IMG_1.HEIC"):
        (dataset / "img/cats" / name).touch()
    (dataset / "img/cats/.hidden").mkdir()
    monkeypatch.setattr("runtime.groups.suffixes", lambda: frozenset(SUFFIXES))
    code, text, _ = icnet("predict", dataset, "--model", model_file, "--output", tmp_path / "out")
    assert code == 0
    expected = (
        "passed over, no image by its suffix: 3 files (.heic 2, .txt 1): IMG_1.HEIC, IMG_2.heic, notes.txt; "
        "to read HEIC and HEIF: pip install"
    )
    assert any(line.startswith(expected) and "[heif]" in line for line in text.splitlines()), text
    for file in (dataset / "img/cats").glob("?.*"):
        file.unlink()
    _, _, err = icnet("predict", dataset / "img/cats", *BUILTIN, "--model", model_file, "--output", tmp_path / "o")
    assert "cats: no images in it" in err
    assert "[heif]" in err


def test_heic_files_are_images_where_they_can_be_read(icnet, model_file, image_folder, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    folder = image_folder("phone", "a.jpg")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 10, 10))).save(folder / "b.HEIC")
    code, text, _ = icnet("predict", folder, "--model", model_file, *BUILTIN, "--output", tmp_path / "out")
    assert code == 0
    assert "passed over" not in text
    assert Image.open(tmp_path / "out/phone/b.png").size == (64, 48)
    (folder / "c.heic").write_bytes((folder / "b.HEIC").read_bytes()[:-200])
    _, _, err = icnet("predict", folder, "--model", model_file, *BUILTIN, "--output", tmp_path / "out")
    assert "c.heic: " in err


def test_what_the_checkpoint_is_for_is_said(icnet, dataset, tmp_path):
    model = tmp_path / "x.onnx"
    write_onnx(random_network(1 / 32), model, provenance={CARD: "drawings, a\n demo\x1b"})
    code, text, _ = icnet("predict", dataset, "--model", model, "--output", tmp_path / "out")
    assert code == 0
    assert text.splitlines()[-1] == "x.onnx is for: drawings, a\\n demo\\x1b"
