"""Runs of `icnet predict` that are killed, stopped or run beside others, and folders that others have touched."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from export.onnx_file import save_model
from export.to_onnx import write_onnx
from runtime import ModelError, Predictor
from runtime.backends.onnx import OnnxBackend
from runtime.files import bank_files
from tests.helpers import random_network

BUILTIN = ("--sisms", "builtin")
STOPPED = """
import os, signal, sys, time
import icnet_cli
fsync, left = os.fsync, int(sys.argv[1])
name = sys.argv[2]

def stopping(descriptor):
    global left
    fsync(descriptor)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(2)  # in a thread: until the main thread has seen it

os.fsync = stopping
sys.exit(icnet_cli.main(sys.argv[3:]))
"""


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "icnet.onnx"
    write_onnx(random_network(1 / 32), path)
    return path


@pytest.fixture
def data(image_folder):
    """Two groups, of three images and of one."""
    image_folder("data/img/cats", "a.jpg", "b.png", "c.png")
    return image_folder("data/img/dogs", "d.jpg").parents[1]


@pytest.fixture
def predict(icnet, small_model, data, tmp_path):
    def run(*options):
        return icnet("predict", data, "--model", small_model, *BUILTIN, "--output", tmp_path / "out", *options)

    return run


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("moment", [2, 3, 5, 9])
def test_a_run_that_was_stopped_goes_on(predict, small_model, data, tmp_path, name, moment):
    out = tmp_path / "out"
    words = ("predict", data, "--model", small_model, *BUILTIN, "--output", out, "--threads", 1)
    command = [sys.executable, "-c", STOPPED, str(moment), name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[name], done.stderr
    temporary = [path for path in contents(out) if "/." in path]
    if name == "SIGTERM":
        assert "icnet predict: stopped" in done.stderr
        assert temporary == []
    else:
        assert len(temporary) >= 1
    for path in out.rglob("[!.]*.png"):
        Image.open(path).load()

    code, _, err = predict("--resume")
    assert code == 0, err
    found = contents(out)
    shutil.rmtree(out)
    assert predict()[0] == 0
    assert found == contents(out)


def test_two_runs_into_one_folder(predict, small_model, data, tmp_path):
    other = tmp_path / "other.onnx"
    write_onnx(random_network(1 / 32, seed=5), other)
    commands = [
        [sys.executable, "-m", "icnet_cli", "predict", data, "--model", model, *BUILTIN, "--output", tmp_path / "out"]
        for model in (small_model, other) * 2
    ]
    runs = [subprocess.Popen(list(map(str, c)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for c in commands]
    for run in runs:
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    found = contents(tmp_path / "out")
    assert set(found) == {
        *(f"cats/{n}" for n in ("a.png", "b.png", "c.png", "contact_sheet.jpg", "icnet.json")),
        *(f"dogs/{n}" for n in ("d.png", "contact_sheet.jpg", "icnet.json")),
    }
    assert predict("--resume")[0] == 0
    found = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert predict()[0] == 0
    assert found == contents(tmp_path / "out")


def test_a_file_size_limit_fails_the_groups_whose_results_are_too_large(small_model, image_folder, tmp_path):
    image_folder("data/img/large", "a.jpg", "b.jpg", size=(24, 18))
    command = ["predict", tmp_path / "data", "--model", small_model, *BUILTIN, "--output", tmp_path / "out"]
    code = (
        "import resource, sys, icnet_cli; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "sys.exit(icnet_cli.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "contact_sheet.jpg: can't be written: File too large" in done.stderr.replace("\n", "")
    assert not list(tmp_path.glob("out/*/*.jpg"))
    assert not list(tmp_path.glob("out/*/.*"))


def test_a_users_file_is_safe_after_a_group_has_failed(predict, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def failing(*_, **__):
            raise ModelError("no memory")

        patch.setattr(OnnxBackend, "submit", failing)
        assert predict()[0] == 2
    mine = tmp_path / "out/cats/b.png"
    mine.write_text("a user's")
    code, _, err = predict()
    assert code == 2
    assert "b.png: was not made by icnet predict" in err.replace("\n", "")
    assert mine.read_text() == "a user's"
    assert (tmp_path / "out/dogs/d.png").exists()
    mine.unlink()
    assert predict()[0] == 0


def test_a_link_in_the_place_of_a_result_is_not_ours(predict, tmp_path):
    assert predict()[0] == 0
    precious = tmp_path / "precious.png"
    (tmp_path / "out/cats/b.png").rename(precious)
    before = precious.read_bytes()
    (tmp_path / "out/cats/b.png").symlink_to(precious)
    code, _, err = predict()
    assert code == 2
    assert "b.png: was not made by icnet predict" in err.replace("\n", "")
    assert precious.read_bytes() == before


PRECIOUS = "../precious.png"


def record(*names, made_from=None):
    return json.dumps({"made_from": made_from or {}, "files": dict.fromkeys(names, "0" * 64)})


@pytest.mark.parametrize(
    "plant",
    [
        lambda p: p.write_text(record(PRECIOUS)),
        lambda p: p.write_text(record(str(p.parents[1] / "precious.png"))),
        lambda p: p.write_text(record("a.png") + "\n" + json.dumps({PRECIOUS: "0" * 64})),
        lambda p: p.write_text(record("notes.txt")),
        lambda p: p.write_text(record("../" + p.parent.name + "/notes.txt")),
        lambda p: p.write_text(record("..")),
        lambda p: p.write_text(record("a\0.png")),
        lambda p: p.write_text(record("\ud800.png")),
        lambda p: p.write_text('{"made_from": {}, "files": ' + "[" * 200_000),
        lambda p: p.write_text('{"made_from": {}, "files": ' + '{"a":' * 200_000),
        lambda p: p.write_text('{"made_from": {}, "files": {"a.png": [1]}}'),
        lambda p: p.write_text('{"made_from": {}, "files": {"a.png": ' + "1" * 5000 + "}}"),
        lambda p: p.write_bytes(b"\xff\xfe"),
        lambda p: p.write_text("[]"),
        lambda p: os.mkfifo(p),
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.symlink_to(p),
        lambda p: p.mkdir(),
    ],
)
def test_a_planted_record_is_not_ours(predict, tmp_path, plant):
    folder = tmp_path / "out/cats"
    folder.mkdir(parents=True)
    for path in (tmp_path / "out/precious.png", folder / "notes.txt"):
        path.write_text("precious")
    plant(folder / "icnet.json")
    for options in ((), ("--resume",)):
        code, _, err = predict(*options)
        assert code == 2
        assert "cats/icnet.json: was not made by icnet predict" in err.replace("\n", "")
        assert "1 of 2 groups failed" in err
    assert (tmp_path / "out/precious.png").read_text() == (folder / "notes.txt").read_text() == "precious"
    assert (tmp_path / "out/dogs/d.png").exists()


def test_only_files_with_our_content_are_deleted(predict, data, tmp_path):
    """The map of an image that left the group, with a user's file in its place."""
    assert predict()[0] == 0
    (data / "img/cats/c.png").unlink()
    (tmp_path / "out/cats/c.png").write_text("a user's")
    assert predict("--resume")[0] == 0
    assert (tmp_path / "out/cats/c.png").read_text() == "a user's"


def test_an_unfinished_record_is_never_taken_for_a_finished_one(predict, tmp_path):
    """One run has finished, another has begun to write over it."""
    assert predict()[0] == 0
    path = tmp_path / "out/cats/icnet.json"
    files = json.loads(path.read_text())["files"]
    assert "2 of 2 groups were finished already" in predict("--resume")[1]
    path.write_text(path.read_text() + "\n" + json.dumps({"a.png": files["a.png"]}))
    assert "1 of 2 groups were finished already" in predict("--resume")[1]
    path.write_text(path.read_text() + '\n{"a.png": "12')  # cut off
    assert "1 of 2 groups were finished already" in predict("--resume")[1]
    record = json.loads(path.read_text())
    del record["files"]["a.png"]  # one that does not name all maps
    path.write_text(json.dumps(record))
    (path.parent / "a.png").unlink()
    assert "1 of 2 groups were finished already" in predict("--resume")[1]
    assert (path.parent / "a.png").exists()


def unreadable(monkeypatch, name):
    """Make a folder unreadable; for root too, which may read everything."""
    listdir, scandir, stat, mkdir, opened = os.listdir, os.scandir, os.stat, os.mkdir, os.open

    def refusing(call):
        def refuse(path, *args, **kwargs):
            text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            if f"/{name}/" in text or (text.endswith(f"/{name}") and call is not stat):
                raise PermissionError(13, "Permission denied", text)
            return call(path, *args, **kwargs)

        return refuse

    for attribute, call in (("listdir", listdir), ("scandir", scandir), ("stat", stat), ("mkdir", mkdir)):
        monkeypatch.setattr(os, attribute, refusing(call))
    monkeypatch.setattr(os, "open", refusing(opened))


@pytest.mark.parametrize("folder", ["data/img/cats", "out/cats"])
def test_an_unreadable_folder_fails_its_group_only(predict, tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as patch:
        unreadable(patch, folder)
        code, _, err = predict()
    assert code == 2
    assert "Permission denied" in err
    assert "1 of 2 groups failed" in err
    assert sorted(p.name for p in (tmp_path / "out/dogs").iterdir()) == ["contact_sheet.jpg", "d.png", "icnet.json"]


@pytest.mark.parametrize("put", [lambda p: p.touch(), lambda p: p.symlink_to(p), lambda p: os.mkfifo(p)])
def test_what_is_no_folder_fails_its_group_only(predict, tmp_path, put):
    (tmp_path / "out").mkdir()
    put(tmp_path / "out/cats")
    code, _, err = predict()
    assert code == 2
    assert "cats/icnet.json: can't be written" in err.replace("\n", "")
    assert "1 of 2 groups failed" in err
    assert (tmp_path / "out/dogs/d.png").exists()


@pytest.mark.parametrize(
    ("plain", "role"), [(True, "model"), (True, "intra"), (True, "banked"), (False, "intra"), (False, "banked")]
)
def test_resume_sees_every_file_of_the_model(icnet, data, tmp_path, exports, role, plain):
    model = tmp_path / "model/icnet.onnx"
    model.parent.mkdir()
    files = dict(zip(("model", "intra", "banked"), (exports, *bank_files(exports)), strict=True))
    if not plain:
        del files["model"]
    for path in files.values():
        shutil.copy(path, model.with_name(path.name))
    words = ("predict", data, "--model", model, *BUILTIN, "--output", tmp_path / "out")
    assert icnet(*words)[0] == 0
    assert "2 of 2 groups were finished already" in icnet(*words, "--resume")[1]
    changed = onnx.load(files[role])
    changed.doc_string = "another file"
    save_model(changed, model.with_name(files[role].name))
    code, text, _ = icnet(*words, "--resume")
    assert code == 0
    assert "finished already" not in text


def test_the_bank_is_not_written_over_the_models_that_make_it(icnet, data, tmp_path, exports):
    for path in (exports, *bank_files(exports)):
        shutil.copy(path, tmp_path / path.name)
    model = tmp_path / exports.name
    for output in (model, *bank_files(model), data / "img/cats/a.jpg"):
        before = output.read_bytes()
        code, _, err = icnet("bank", data / "img/cats", "--model", model, *BUILTIN, "--output", output)
        assert code == 2
        assert f"{output}: is an input of this run" in err
        assert output.read_bytes() == before
    with Predictor(model) as predictor:
        (map_,) = predictor([data / "img/dogs/d.jpg"], [np.zeros((5, 5), np.uint8)])
    assert map_.shape == (40, 60)
