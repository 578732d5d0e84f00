"""`icnet batch` on a real Ray, started once; where Ray is not installed, only what it needs no Ray for."""

import os
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from icnet_cli import main
from tests.batch_runs import (
    LOOPBACK,
    Cluster,
    actors,
    check,
    descendants,
    disturbed,
    ended,
    environment,
    listeners,
    start,
)
from tests.faults.lab import make_data, same_tree, tree

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray", reason="Ray is not installed")
GROUPS = {f"g{i:02}": 1 + i % 3 for i in range(12)}
LARGE = 40  # images of a group that takes long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("batch") / "data", GROUPS)


@pytest.fixture(scope="module")
def expected(data, exports, tmp_path_factory):
    """What `icnet predict` writes."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    assert main(["predict", str(data), "-m", str(exports), "-t", "1", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def cluster():
    folder = Path("/tmp") / f"icnet-test-{os.getpid()}"  # short, for Ray's sockets
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


def rows_of(data):
    images = sorted(data.glob("img/*/*"))
    sisms = [data / "sism" / image.parent.name / f"{image.stem}.png" for image in images]
    return [
        {"group": image.parent.name, "image": str(image), "sism": str(sism)}
        for image, sism in zip(images, sisms, strict=True)
    ]


def table(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def status_of(folder):
    return {row["group"]: row for row in pq.read_table(folder / "status.parquet").to_pylist()}


def test_a_table_gives_what_predict_gives_and_a_bad_group_is_a_row(cluster, data, expected, exports, tmp_path):
    """Relative paths; the images of one group in an archive, by URLs; a group whose SISMs a detector makes."""
    rows = [row | {"image": row["image"].removeprefix(f"{data}/"), "sism": row["sism"]} for row in rows_of(data)]
    with zipfile.ZipFile(tmp_path / "g05.zip", "w") as archive:
        for image in (data / "img/g05").iterdir():
            archive.write(image, image.name)
    for row in rows:
        if row["group"] == "g05":
            row["image"] = f"zip://{Path(row['image']).name}::{tmp_path / 'g05.zip'}"
        if row["group"] == "g07":
            row["image"] = "img/g07/none.jpg" if row["image"].endswith("00.png") else row["image"]
        if row["group"] == "g09" or (row["group"] == "g08" and row["image"].endswith("00.png")):
            row["sism"] = None
    groups = table(data / "groups.parquet", rows)
    argv = (groups, "-m", exports, "-o", tmp_path / "out", "-t", 1, "--actors", 2, "--address", cluster.address)
    code, out, err = ended(start(*argv, env=cluster.env))
    assert code == 2
    assert sorted(err.splitlines()) == [
        "2 of 12 groups failed; mend them and go on with --resume",
        f"icnet batch: error: {groups}: the group g08 has 3 images but 2 SISMs",
        f"icnet batch: error: {data}/img/g07/none.jpg: can't be read: No such file or directory",
    ]
    assert out.splitlines() == [f"12 groups: {tmp_path}/out/GROUP", f"status: {tmp_path}/out/status.parquet"]
    found = status_of(tmp_path / "out")
    assert list(found) == list(GROUPS)
    assert {name for name, row in found.items() if row["status"] == "failed"} == {"g07", "g08"}
    assert all(row["engine"] == "ONNX Runtime" and row["seconds"] > 0 for row in found.values())
    assert all((row["error"] is None) == (row["status"] == "ok") for row in found.values())
    wanted = {name: content for name, content in tree(expected).items() if name[:3] not in ("g07", "g08", "g09")}
    assert main(["predict", str(data / "img/g09"), "-m", str(exports), "-t", "1", "-o", str(tmp_path / "alone")]) == 0
    wanted |= tree(tmp_path / "alone")
    (tmp_path / "out/status.parquet").unlink()
    assert tree(tmp_path / "out") == wanted


def test_killed_actors_and_a_killed_driver_change_nothing(cluster, data, expected, exports, tmp_path):
    argv = (data, "-m", exports, "-o", tmp_path / "out", "-t", 1, "--actors", 2, "--address", cluster.address)
    killed = disturbed(
        np.random.default_rng(1), argv, tmp_path / "out", len(GROUPS), 1, cluster.env, cluster.process.pid
    )
    assert killed == 1
    check(tmp_path / "out", expected)


def test_a_group_that_ends_its_process_is_a_row_and_stops_nobody(cluster, data, expected, exports, tmp_path):
    """The process is killed whenever the large group has begun, which is told by its record."""
    make_data(tmp_path / "large", {"large": LARGE})
    rows = [row for row in rows_of(data) if row["group"] in ("g01", "g02")]
    groups = table(tmp_path / "groups.parquet", rows[:1] + rows_of(tmp_path / "large") + rows[1:])
    out, record, done = tmp_path / "out", tmp_path / "out/large/icnet.json", threading.Event()
    deaths = []

    def kill():
        seen = None
        while not done.wait(0.002):
            with suppress(OSError):
                if (written := record.stat().st_mtime_ns) != seen and "null" in record.read_text():
                    for pid in actors(cluster.process.pid):
                        os.kill(pid, signal.SIGKILL)
                    seen, _ = written, deaths.append(written)

    killer = threading.Thread(target=kill)
    killer.start()
    process = start(groups, "-m", exports, "-o", out, "-t", 1, "--address", cluster.address, env=cluster.env)
    code, _, err = ended(process)
    done.set()
    killer.join()
    assert code == 2
    assert "icnet batch: error: large: the process that computes it died 2 times\n" in err
    assert len(deaths) == 3  # once among others
    assert {name: row["status"] for name, row in status_of(out).items()} == {
        "g01": "ok",
        "large": "failed",
        "g02": "ok",
    }
    for name in ("g01", "g02"):
        same_tree(out / name, expected / name)


def test_on_this_machine_nothing_is_reached_from_elsewhere_or_left(data, expected, exports, tmp_path):
    """Without --address, with the results of a run of `icnet predict` that are kept."""
    shutil.copytree(expected, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/g02")
    (tmp_path / "home").mkdir()
    temporary = Path("/tmp") / f"icnet-t{os.getpid()}"
    (temporary / "icnet-ray-dead").mkdir(parents=True)  # of a killed run
    env = environment(HOME=str(tmp_path / "home"), TMPDIR=str(temporary))
    listening = set()
    try:
        process = start(data, "-m", exports, "-o", tmp_path / "out", "-t", 1, "--resume", env=env)
        while process.poll() is None:
            listening |= listeners([process.pid, *descendants(process.pid)])
            time.sleep(0.3)
        code, out, err = ended(process)
        assert (code, err) == (0, "")
        assert out.startswith("1 groups, and 11 were finished already: ")
        assert list(temporary.iterdir()) == []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert listening
    assert listening <= LOOPBACK
    assert list((tmp_path / "home").iterdir()) == []
    seconds = {name for name, row in status_of(tmp_path / "out").items() if row["seconds"] is not None}
    assert seconds == {"g02"}
    check(tmp_path / "out", expected)


BAD = [
    ([{"name": "a"}], "has no column 'group'; a row is an image"),
    ([{"group": "a"}], "has no column 'image'"),
    ([{"group": "a", "image": "x.jpg"}] * 2, "row 1: x.jpg is in the group a twice"),
    ([{"group": None, "image": "x.jpg"}], "row 0 has no group"),
    ([{"group": "a", "image": ""}], "row 0 has no image"),
    ([{"group": "../a", "image": "x.jpg"}], "row 0: '../a' can't be the name of a group's folder"),
    ([{"group": "status.parquet", "image": "x.jpg"}], "'status.parquet' can't be the name of a group's folder"),
    ([{"group": "a", "image": [1]}], "can't be read as a table"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_bad_tables(icnet, onnx_file, tmp_path, rows, message):
    code, _, err = icnet("batch", table(tmp_path / "t.parquet", rows), "-m", onnx_file, "-o", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"t.parquet: {message}" in err or message in err
    assert not (tmp_path / "out").exists()


def test_bad_options(icnet, data, onnx_file, tmp_path):
    groups, out = table(tmp_path / "t.parquet", rows_of(data)), tmp_path / "out"
    (tmp_path / "theirs").mkdir()
    table(tmp_path / "theirs/status.parquet", [{"a": 1}])
    (tmp_path / "no.parquet").write_text("a,b")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
    for argv, message in (
        ((tmp_path / "no.parquet", "-m", onnx_file, "-o", out), "no.parquet: can't be read as a table: "),
        ((tmp_path / "none.parquet", "-m", onnx_file, "-o", out), "none.parquet: no such table"),
        (("memory://none.parquet", "-m", onnx_file, "-o", out), "memory://none.parquet: no such table"),
        ((groups, "-m", tmp_path / "no.onnx", "-o", out), "no.onnx: no such model file"),
        ((groups, "-m", onnx_file, "-o", "s3://bucket/out"), "--output s3://bucket/out: results are renamed"),
        ((groups, "-m", onnx_file, "-o", tmp_path / "theirs"), "status.parquet: was not made by icnet batch"),
        ((groups, "-m", onnx_file, "-o", out, "--sisms", data), "a table names its SISMs itself"),
        ((groups, "-m", onnx_file, "-o", out, "--address", "auto"), "--address: say with --threads"),
        ((groups, "-m", onnx_file, "-o", out, "--address", closed), f"--address {closed}: expected HOST:PORT of a Ray"),
    ):
        code, _, err = icnet("batch", *argv)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not out.exists()
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["status.parquet"]


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_without_ray(icnet, data, onnx_file, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = icnet("batch", data, "-m", onnx_file, "-o", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"icnet batch: error: {package} is not installed: pip install")
    assert "[cpu,ray]'" in err
