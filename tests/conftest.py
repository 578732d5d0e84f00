import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image, ImageDraw

import icnet_cli
from export.checkpoint import save_checkpoint
from export.icnet import ICNet
from export.to_mnn import build_mnn, convert
from export.to_onnx import weights_digest, write_onnx
from runtime import Predictor
from runtime.contract import WEIGHTS

DATA = Path(__file__).parent / "data"
BIRDS = DATA / "bird"
HAS_TENSORRT_RTX = sys.platform == "linux" and platform.machine() == "x86_64"  # where it must be installed
WIDTH = 0.125  # of the networks that most tests run


def random_network(width: float = WIDTH, seed: int = 0) -> ICNet:
    """A network with random weights and biases, and batch-norm statistics that are not the identity."""
    torch.manual_seed(seed)
    network = ICNet(width)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


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
def model_file(request: pytest.FixtureRequest) -> Path:
    """The ONNX file; where a test is parametrised with "mnn_file", that."""
    path: Path = request.getfixturevalue(getattr(request, "param", "onnx_file"))
    return path


def damage(model: onnx.ModelProto) -> None:
    """Put a NaN into an export's first bias."""
    first = next(i for i in model.graph.initializer if i.name.endswith("vgg.0.bias"))
    values = onnx.numpy_helper.to_array(first).copy()
    values[0] = np.nan
    first.CopyFrom(onnx.numpy_helper.from_array(values, first.name))


def convert_to_mnn(path: Path) -> None:
    """Replace an ONNX file by what MNN's converter makes of it, unchecked; any other file stays as it is."""
    pytest.importorskip("MNN", reason="MNN is not installed")
    try:
        model = onnx.load(path)
    except Exception:
        return
    if model.graph.node:
        convert(path, model, path, "", [])


@pytest.fixture(scope="session")
def predictor(model_file: Path) -> Iterator[Predictor]:
    with Predictor(model_file) as predictor:
        yield predictor


def write_exports(folder: Path, network: ICNet) -> Path:
    """The four exports of a network, as `icnet export` names them, and how the plain one is called."""
    for name, interface in {"": "uint8", ".packed": "packed", ".intra": "intra", ".banked": "banked"}.items():
        write_onnx(network, folder / f"icnet{name}.onnx", interface, {WEIGHTS: weights_digest(network)})
    return folder / "icnet.onnx"


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """icnet.onnx of a narrow network; beside it icnet.packed.onnx, icnet.intra.onnx and icnet.banked.onnx."""
    return write_exports(tmp_path_factory.mktemp("exports"), random_network(1 / 32))


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


def build_with_tensorrt(
    path: Path, profile: tuple[int, int, int] = (1, 5, 32), bank: tuple[int, int, int] = (1, 20, 300)
) -> tuple[int, list[str]]:
    """Parse and build a file with TensorRT-RTX, which needs no GPU for it.

    Returns the engine's size in bytes (0 if it was refused), and the parser's errors.
    """
    if not HAS_TENSORRT_RTX:
        pytest.skip("tensorrt-rtx has no wheel for this platform")
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return 0, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        lengths = bank if tensor.name == "bank" else profile
        shapes.set_shape(tensor.name, *[(n, *tuple(tensor.shape)[1:]) for n in lengths])
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    return (0 if engine is None else engine.nbytes), []
