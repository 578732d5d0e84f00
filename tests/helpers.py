"""What several tests use: networks with random weights, exports of them, and a TensorRT builder."""

import platform
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.checkpoint import weights_digest
from export.egnet import EGNet
from export.egnet_onnx import smooth_images
from export.icnet import ICNet
from export.to_mnn import convert
from export.to_onnx import write_onnx
from runtime.contract import IMAGE_BYTES, INTERFACES, RGBS, WEIGHTS, ExportKind

DATA = Path(__file__).parent / "data"
BIRDS = DATA / "bird"
HAS_TENSORRT_RTX = sys.platform == "linux" and platform.machine() == "x86_64"  # where it must be installed
WIDTH = 0.125  # of the networks that most tests run
EGNET_WIDTH = 1 / 16


def random_network(width: float = WIDTH, seed: int = 0) -> ICNet:
    """A network with random weights and biases, and batch-norm statistics that are not the identity."""
    torch.manual_seed(seed)
    network = ICNet(width)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.bias is not None
            torch.nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def random_egnet(width: float = EGNET_WIDTH, seed: int = 0) -> EGNet:
    """Random weights and biases whose activations grow like a trained network's and whose SISMs span most of [0, 1]."""
    torch.manual_seed(seed)
    network = EGNet(width).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, 0, 0.1)
    with torch.inference_mode():
        score = network.merge2.final_score[-1]
        seen: list[torch.Tensor] = []
        assert isinstance(score, torch.nn.Conv2d)
        assert score.bias is not None
        hook = score.register_forward_hook(lambda _m, _i, output: seen.append(output))
        network(torch.from_numpy(smooth_images(1, 64, 64, 9)))
        hook.remove()
        score.bias.data -= seen[0].mean()
        for p in score.parameters():
            p.data *= 2 / seen[0].std()
    return network


def group(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 224, 224, 3] and SISMs uint8 [n, 224, 224] of noise."""
    rng = np.random.default_rng((n, seed))
    return rng.integers(0, 256, (n, 224, 224, 3), np.uint8), rng.integers(0, 256, (n, 224, 224), np.uint8)


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    """A copy with one bit flipped."""
    copy = bytearray(data)
    copy[position] ^= 1 << int(bit)
    return bytes(copy)


def damage(model: onnx.ModelProto) -> None:
    """Put a NaN into an export's first bias."""
    first = next(i for i in model.graph.initializer if i.name.endswith("vgg.0.bias"))
    values = onnx.numpy_helper.to_array(first).copy()
    values[0] = np.nan
    first.CopyFrom(onnx.numpy_helper.from_array(values, first.name))


def joined(requests: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What Triton's ragged batching makes of requests, uint8 [b, n, 224, 224, 4]: `rgbs`, and `shapes` by item."""
    items = [item for request in requests for item in request]
    return np.concatenate([request.ravel() for request in requests]), np.array([i.shape for i in items], np.int32)


def convert_to_mnn(path: Path) -> None:
    """Replace an ONNX file by what MNN's converter makes of it, unchecked; any other file stays as it is."""
    pytest.importorskip("MNN", reason="MNN is not installed")
    try:
        model = onnx.load(path)
    except Exception:
        return
    if model.graph.node:
        convert(path, model, path, "", [])


def write_exports(folder: Path, network: ICNet) -> Path:
    """The four exports of a network, as `icnet export` names them, and how the plain one is called."""
    for interface in INTERFACES:
        name = "icnet.onnx" if interface.kind is ExportKind.PLAIN else f"icnet.{interface.kind}.onnx"
        write_onnx(network, folder / name, interface.kind, {WEIGHTS: weights_digest(network)})
    return folder / "icnet.onnx"


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
        if tensor.name == RGBS.name:
            lengths = (profile[0] * IMAGE_BYTES, profile[1] * IMAGE_BYTES, profile[2] * IMAGE_BYTES)
        shapes.set_shape(tensor.name, *[(n, *tuple(tensor.shape)[1:]) for n in lengths])
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    return (0 if engine is None else engine.nbytes), []
