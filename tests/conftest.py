import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import icnet_cli
from export.checkpoint import save_checkpoint
from export.detector_onnx import write_onnx as write_detector
from export.egnet import EGNet
from export.icnet import ICNet
from export.to_mnn import build_mnn
from export.to_onnx import write_onnx
from runtime import Predictor
from runtime.contract import ExportKind
from tests.export_cache import ExportCache
from tests.helpers import random_egnet, random_network, write_exports
from tests.runtime.browser import launched


@pytest.fixture(scope="session", autouse=True)
def export_cache() -> Iterator[None]:
    """No test traces what another one, or an earlier run, has traced already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", ExportCache(torch.onnx.export))
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell's background jobs inherit that Ctrl-C is ignored; tests that send it need Python's handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def network() -> ICNet:
    return random_network()


@pytest.fixture(scope="session")
def checkpoint(network: ICNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "icnet.pth"
    save_checkpoint(path, network)
    return path


@pytest.fixture(scope="session")
def onnx_file(network: ICNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `network`, as `icnet export` writes it."""
    path = tmp_path_factory.mktemp("model") / "icnet.onnx"
    write_onnx(network, path)
    return path


@pytest.fixture(scope="session")
def mnn_file(onnx_file: Path) -> Path:
    """The same for MNN, as `icnet build --backend mnn` writes it."""
    pytest.importorskip("MNN", reason="MNN is not installed")
    path = onnx_file.with_suffix(".mnn")
    build_mnn(onnx_file, path)
    return path


@pytest.fixture(scope="session")
def egnet() -> EGNet:
    return random_egnet()


@pytest.fixture(scope="session")
def egnet_file(egnet: EGNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `egnet`, as `icnet export` writes it, under a name that tells nothing."""
    path = tmp_path_factory.mktemp("egnet") / "any_name.onnx"
    write_detector(egnet, path)
    return path


@pytest.fixture(scope="session")
def model_file(request: pytest.FixtureRequest) -> Path:
    """The ONNX file; where a test is parametrised with "mnn_file", that."""
    path: Path = request.getfixturevalue(getattr(request, "param", "onnx_file"))
    return path


@pytest.fixture(scope="session")
def predictor(model_file: Path) -> Iterator[Predictor]:
    with Predictor(model_file) as predictor:
        yield predictor


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """icnet.onnx of a narrow network; beside it icnet.packed.onnx, icnet.intra.onnx and icnet.banked.onnx."""
    return write_exports(tmp_path_factory.mktemp("exports"), random_network(1 / 32))


@pytest.fixture(scope="session")
def ragged_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the network that `exports` are of."""
    path = tmp_path_factory.mktemp("ragged") / "icnet.ragged.onnx"
    write_onnx(random_network(1 / 32), path, ExportKind.RAGGED)
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright: tests that need it are skipped where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra web-test")
    with playwright.sync_playwright() as started:
        browser = launched(started)
        yield browser
        browser.close()


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of small noise images: image_folder("img/cats", "a.jpg", "b.jpg")."""
    rng = np.random.default_rng(0)

    def make(folder: str, *names: str, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        for name in names:
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(path / name)
        return path

    return make


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cut-outs of one white and five black classes, and two backgrounds."""
    folder = tmp_path_factory.mktemp("paste")
    for k, name in enumerate(["white", "ant", "bee", "cow", "dog", "elk"]):
        for i in range(3):
            cutout = Image.new("RGBA", (64, 48))
            shape = (4 + 2 * i, 4, 60, 30 + 3 * k)
            ImageDraw.Draw(cutout).ellipse(shape, fill=(255, 255, 255, 255) if name == "white" else (0, 0, 0, 255))
            path = folder / "cutouts" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cutout.save(path)
    for i, colour in enumerate([(90, 120, 140), (140, 110, 90)]):
        path = folder / "backgrounds" / "deep" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (500, 500), colour).save(path)
    return folder / "cutouts", folder / "backgrounds"


@pytest.fixture
def icnet(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = icnet_cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run
