"""Output files: whole or absent, never an input, and what killed runs leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import OutputError, files
from runtime.files import check_outputs, model_digest, replacing, write_bytes

LIMITED = """
import resource, sys
from functools import partial
from pathlib import Path
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from runtime import Bank, OutputError
from runtime.files import replacing, write_bytes, write_json, write_picture

folder = Path(sys.argv[1])
noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
figure = Figure()
figure.subplots().imshow(noise)

def write(path, writer, *args):
    with replacing(path) as temporary:
        writer(temporary, *args)

writers = {
    "image.jpg": partial(write, writer=lambda path: write_picture(path, Image.fromarray(noise).save, quality=90)),
    "plot.jpg": partial(write, writer=lambda path: write_picture(path, figure.savefig, dpi=120)),
    "plot.png": partial(write, writer=lambda path: write_picture(path, figure.savefig, dpi=120)),
    "a.json": partial(write, writer=lambda path: write_json(path, noise.tolist())),
    "a.onnx": partial(write, writer=lambda path: write_bytes(path, noise.tobytes())),
    "bank.npz": Bank((noise / 255).reshape(300, -1).astype(np.float32), "model").save,
}
for name in writers:
    (folder / name).write_text("the old content")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, 20_480))
for name, writer in writers.items():
    try:
        writer(folder / name)
        print(name, "written", (folder / name).stat().st_size)
    except OutputError as error:
        print(error)
"""
KILLED = """
import os, signal, sys, time
from runtime.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    if len(sys.argv) > 2:
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_a_file_size_limit_is_an_error_and_leaves_the_old_file(tmp_path):
    done = subprocess.run(python(LIMITED, tmp_path), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all("can't be written: File too large" in line for line in lines), done.stdout
    assert {path.read_text() for path in tmp_path.iterdir()} == {"the old content"}
    assert len(list(tmp_path.iterdir())) == 6


def test_a_short_write_is_an_error(tmp_path, monkeypatch):
    """On a file system that does not report it when writing."""
    fstat = os.fstat

    def short(descriptor):
        os.ftruncate(descriptor, 3)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", short)
    with (
        pytest.raises(OutputError, match="a: can't be written: 3 of 5 bytes were written"),
        replacing(tmp_path / "a") as temporary,
    ):
        write_bytes(temporary, b"12345")
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_sweeps_what_a_killed_one_left_but_not_what_a_living_one_writes(tmp_path, monkeypatch):
    others = tmp_path / ".icnet-notes.png"
    others.write_text("a user's")
    with subprocess.Popen(python(KILLED, tmp_path / "a.png", "wait"), stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        temporary = tmp_path / living.stdout.readline().strip()
        killed = subprocess.run(python(KILLED, tmp_path / "a.png"), capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL
        left = tmp_path / killed.stdout.strip()
        assert left.read_text() == temporary.read_text() == "half"
        monkeypatch.setattr(files, "_swept", set())
        with replacing(tmp_path / "b.png") as mine:
            assert sorted(tmp_path.iterdir()) == sorted([mine, temporary, others])
        monkeypatch.setattr(files, "_swept", set())
        with replacing(tmp_path / "c.png"), replacing(tmp_path / "d.png"):  # nor its own
            monkeypatch.setattr(files, "_swept", set())
            with replacing(tmp_path / "e.png"):
                assert len(list(tmp_path.iterdir())) == 6
        living.kill()
    monkeypatch.setattr(files, "_swept", set())
    with replacing(tmp_path / "b.png"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".icnet-notes.png", "b.png", "c.png", "d.png", "e.png"]


def test_a_temporary_file_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    flock, swept = files.fcntl.flock, []

    def overtaken(descriptor, operation):
        if not swept:
            swept.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            swept[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", overtaken)
    with replacing(tmp_path / "a") as temporary:
        write_bytes(temporary, b"whole")
    assert len(swept) == 1
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"whole")]


def test_a_signal_while_the_temporary_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    make = files.os.open

    def interrupted(path, *options):
        os.close(make(path, *options))
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a"):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_files_are_written_and_nothing_is_swept(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    left = tmp_path / ".icnet-0123456789abcdef.png"
    left.touch()
    with replacing(tmp_path / "a.png") as temporary:
        write_bytes(temporary, b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "a.png"]


@pytest.mark.parametrize(
    "path", ["in/a.png", "in/deep/b.jpg", "link.png", "hard.png", "in/loop/deep/b.jpg", "far/c.png", "m.onnx"]
)
def test_no_output_is_an_input(tmp_path, path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for name in ("in/a.png", "in/deep/b.jpg", "in/results.json", "m.onnx", "elsewhere.png", "far/c.png"):
        (tmp_path / name).touch()
    (tmp_path / "in/far").symlink_to(tmp_path / "far")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "link.png").symlink_to("in/a.png")
    (tmp_path / "in/far.png").symlink_to("../elsewhere.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "in/deep/b.jpg")
    inputs = [None, tmp_path / "none", tmp_path / "m.onnx", tmp_path / "in"]
    check_outputs([None, tmp_path / "in/results.json", tmp_path / "in/new.png", tmp_path / "x"], inputs)
    for output in (tmp_path / path, tmp_path / "elsewhere.png"):
        with pytest.raises(OutputError, match="is an input of this run"):
            check_outputs([tmp_path / "x", output], inputs)
    with pytest.raises(OutputError, match="is another file of this run"):
        check_outputs([tmp_path / "x", tmp_path / "in/../x"], [])


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.txt").write_bytes(b"of yesterday")
    (tmp_path / "a.txt").symlink_to("far/a.txt")
    with replacing(tmp_path / "a.txt") as temporary:
        write_bytes(temporary, b"new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "far/a.txt").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["a.txt"]


def test_no_folder_to_fill_holds_an_input(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").touch()
    (tmp_path / "a.png").symlink_to("out/a.png")
    check_outputs((), [tmp_path / "a.onnx"], [tmp_path / "out"])
    for file in (tmp_path / "out/a.png", tmp_path / "a.png", tmp_path / "out/none.png"):
        with pytest.raises(OutputError, match=r"out: holds (a|none)\.png, an input of this run"):
            check_outputs((), [file], [tmp_path / "out"])


def test_locked_folders_keep_others_out(tmp_path):
    code = "import sys, pathlib; from runtime.files import locked\nwith locked(pathlib.Path(sys.argv[1])): print(1)"
    with files.locked(tmp_path):
        other = subprocess.Popen(python(code, tmp_path), stdout=subprocess.PIPE)
        time.sleep(1.5)
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == b"1\n"


def test_both_files_of_an_openvino_model_are_its_digest(tmp_path):
    """An IR of others has no digest of its weights in it: `--resume` would take new weights for the old ones."""
    model, weights = tmp_path / "a.xml", tmp_path / "a.bin"
    model.write_text("<net/>")
    weights.write_bytes(bytes(8))
    before = model_digest(model)
    assert model_digest(model) == before != model_digest(weights)
    weights.write_bytes(bytes(7) + b"\1")
    assert model_digest(model) != before
    weights.write_bytes(bytes(8))
    model.write_text("<net />")
    assert model_digest(model) != before
