"""The examples, run on the sample data with a narrow network."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from runtime import Predictor
from tests.batch_runs import LOOPBACK, command_line, descendants, environment, listeners
from tests.helpers import DATA

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLE = DATA / "pasted"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_of_groups(exports: Path, tmp_path: Path) -> None:
    load("folder_of_groups").main(exports, SAMPLE, tmp_path)
    sources = sorted(SAMPLE.glob("img/*/*.jpg"))
    assert len(sources) == len(list(tmp_path.glob("*/*.png"))) == 24
    owls = sorted(SAMPLE.glob("img/owl/*.jpg"))
    with Predictor(exports) as predictor:
        expected = predictor(owls, sorted(SAMPLE.glob("sism/owl/*.png")))
    for source, found in zip(owls, expected, strict=True):
        with Image.open(source) as image, Image.open(tmp_path / f"owl/{source.stem}.png") as written:
            assert written.size == image.size
            assert abs(np.asarray(written) - found * 255).max() <= 0.51


def test_a_bank(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, file = load("bank").main, tmp_path / "crabs.npz"
    main(exports, "make", SAMPLE / "img/crab", SAMPLE / "sism/crab", file)
    assert "8 images" in capsys.readouterr().out
    main(exports, "compare", SAMPLE / "img/owl", SAMPLE / "sism/owl", file)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [f"00{i}.jpg" for i in range(1, 9)]


def test_masks_of_rembg(exports: Path, tmp_path: Path) -> None:
    """Masks as rembg writes them: NAME.png, grey, upright, of the photograph's size, hard-edged."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    rng, turned = np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 6
    for name, exif in (("a.jpg", None), ("b.jpeg", turned)):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(photos / name, exif=exif or b"")
        mask = np.zeros((60, 40) if exif else (40, 60), np.uint8)
        mask[10:30, 5:25] = 255
        Image.fromarray(mask).save(masks / f"{Path(name).stem}.png")
    (photos / "notes.txt").touch()
    main = load("rembg_masks").main
    main(exports, photos, masks, tmp_path / "out")
    sources = [photos / "a.jpg", photos / "b.jpeg"]
    with Predictor(exports) as predictor:
        expected = predictor(sources, [masks / "a.png", masks / "b.png"])
    for name, found in zip("ab", expected, strict=True):
        with Image.open(tmp_path / f"out/{name}.png") as written:
            assert abs(np.asarray(written) - found * 255).max() <= 0.51
    Image.new("L", (60, 40)).save(masks / "b.png")
    with pytest.raises(SystemExit, match=r"b\.png: L, \(60, 40\): not the mask of .*b\.jpeg \(40, 60\)"):
        main(exports, photos, masks, tmp_path / "out")
    (masks / "a.png").unlink()
    with pytest.raises(SystemExit, match=r"a\.jpg: no mask .*a\.png; rembg p -om"):
        main(exports, photos, masks, tmp_path / "out")


def archive(images: np.ndarray, sisms: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.savez(body, images=images, sisms=sisms)
    return body.getvalue()


def status(address: str, body: bytes) -> int | bytes:
    """What a service answers; the status of a refusal."""
    try:
        with urllib.request.urlopen(address, body, timeout=120) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.code


def test_ray_serve(exports: Path, tmp_path: Path) -> None:
    """On a real Ray: batches, a full queue, a replica that dies, the end."""
    for package in ("ray.serve", "starlette", "fastapi", "aiohttp"):
        pytest.importorskip(package, reason="ray[serve] is not installed")
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 256, (n, 40, 50, 4), dtype=np.uint8) for n in (1, 3, 2, 4)]
    with Predictor(exports) as plain:
        expected = [plain(group[..., :3], group[..., 3]) for group in groups]
    bodies = [archive(group[..., :3], group[..., 3]) for group in groups]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = Path("/tmp") / f"icnet-s{os.getpid()}"  # short, for Ray's sockets
    place.mkdir()
    argv = [EXAMPLES / "ray_serve.py", exports.with_suffix(".packed.onnx"), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        env = environment(TMPDIR=str(place), HOME=str(tmp_path))
        process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    try:
        assert process.stdout is not None
        address = next((line.strip() for line in process.stdout if line.startswith("http")), "")
        assert address, (tmp_path / "log").read_text()
        below = descendants(process.pid)
        others = [pid for pid in below if b"ServeReplica" not in command_line(pid)]  # theirs: the example says so
        assert len(others) == len(below) - 2
        assert listeners([process.pid, *others]) <= LOOPBACK
        with ThreadPoolExecutor(40) as pool:
            for answer, maps in zip(pool.map(lambda body: status(address, body), bodies), expected, strict=True):
                assert isinstance(answer, bytes)
                assert abs(np.load(io.BytesIO(answer))["maps"] - np.stack(maps)).mean() < 1e-3
            for body in (
                b"no archive",
                archive(groups[1][..., :3], groups[0][..., 3]),
                archive(groups[0][0], groups[0]),
            ):
                assert status(address, body) == 400
            big = rng.integers(0, 256, (16, 224, 224, 4), dtype=np.uint8)
            body = archive(big[..., :3], big[..., 3])
            answers = list(pool.map(lambda _: status(address, body), range(40)))
            assert {answer for answer in answers if isinstance(answer, int)} == {503}
            assert sum(isinstance(answer, bytes) for answer in answers) >= 2
        replicas = [pid for pid in descendants(process.pid) if b"ServeReplica" in command_line(pid)]
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        end = time.monotonic() + 120
        while [pid for pid in descendants(process.pid) if b"ServeReplica" in command_line(pid)][1:] == []:
            assert time.monotonic() < end, "no replica took the place of the one that died"
            time.sleep(0.2)
        assert isinstance(status(address, bodies[0]), bytes)
        process.terminate()
        assert process.wait(timeout=120) == 0
        assert list(place.iterdir()) == []
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
    finally:
        process.kill()
        shutil.rmtree(place, ignore_errors=True)


def test_a_threaded_service(exports: Path) -> None:
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 256, (n, 40, 50, 4), dtype=np.uint8) for n in (1, 3, 2, 4)]

    def ask(body: bytes) -> bytes:
        with urllib.request.urlopen(address, body, timeout=60) as answer:
            return answer.read()

    def refusal(body: bytes) -> str:
        with pytest.raises(urllib.error.HTTPError, match="400") as error:
            ask(body)
        return error.value.read().decode()

    with Predictor(exports) as plain:
        expected = [plain(group[..., :3], group[..., 3]) for group in groups]
    with (
        Predictor(exports.with_suffix(".packed.onnx"), max_delay_ms=5) as predictor,
        load("threaded_service").make_server(predictor) as server,
    ):
        address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with ThreadPoolExecutor(len(groups)) as pool:
                answers = list(pool.map(ask, [archive(group[..., :3], group[..., 3]) for group in groups]))
            for answer, maps in zip(answers, expected, strict=True):
                assert abs(np.load(io.BytesIO(answer))["maps"] - np.stack(maps)).mean() < 1e-3
            assert "every image needs its own" in refusal(archive(groups[1][..., :3], groups[0][..., 3]))
            npy = io.BytesIO()
            np.save(npy, groups[0])
            for body in (b"no archive", b"", npy.getvalue(), archive(groups[0], groups[0])[:100]):
                assert "NumPy archive" in refusal(body)
        finally:
            server.shutdown()
            thread.join()
