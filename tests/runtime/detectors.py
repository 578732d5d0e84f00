"""Small ONNX files of detectors, of all the shapes that people have them in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.detector import Detector, finished
from runtime.grey import save_grey

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
WEIGHTS = np.array([2.0, 1.0, -1.5])  # of the channels; the map is high where an image is red
BIAS = -0.4


def detector_file(
    path: Path,
    *,
    layout: str = "NCHW",
    dtype: str = "float32",
    batch: int | str = 1,
    size: tuple[int | str, int | str] = (32, 48),
    tail: str | None = "Sigmoid",
    maps: int = 1,
    channels: int = 1,
    weights: np.ndarray = WEIGHTS,
    bias: float = BIAS,
    image_channels: int | str = 3,
    names: tuple[str, str] = ("input", "output"),
) -> Path:
    """Write a detector whose map is tail(weights · pixel + bias).

    Args:
        path: the file.
        layout: "NCHW" or "NHWC".
        dtype: of the image.
        batch: fixed, or the name of an axis.
        size: height and width, likewise.
        tail: the last operation; None for logits.
        maps: outputs; those after the first are empty of meaning.
        channels: of the first output.
        weights: of the channels.
        bias: of the map.
        image_channels: of the image.
        names: of the input and of the first output.
    """
    shape = [batch, image_channels, *size] if layout == "NCHW" else [batch, *size, image_channels]
    count = image_channels if isinstance(image_channels, int) else 3
    kernel = np.zeros((channels, count, 1, 1), np.float32)
    kernel[:, : len(weights)] = np.asarray(weights)[None, :count, None, None]
    nodes = [helper.make_node("Cast", [names[0]], ["cast"], to=TensorProto.FLOAT)]
    last = "cast"
    if dtype == "uint8":
        nodes.append(helper.make_node("Div", ["cast", "scale"], ["scaled"]))
        last = "scaled"
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", [last], ["planes"], perm=[0, 3, 1, 2]))
        last = "planes"
    nodes.append(helper.make_node("Conv", [last, "kernel", "bias"], ["score"]))
    outputs = [names[1], *(f"side{i}" for i in range(1, maps))]
    nodes.append(helper.make_node(tail or "Identity", ["score"], [names[1]]))
    nodes += [helper.make_node("Mul", [names[1], "half"], [name]) for name in outputs[1:]]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info(names[0], TYPES[dtype], shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, *size]) for name in outputs],
        [
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.full(channels, bias, np.float32), "bias"),
            numpy_helper.from_array(np.float32(255), "scale"),
            numpy_helper.from_array(np.float32(0.5), "half"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def map_by_hand(pixels: np.ndarray) -> np.ndarray:
    """The map, float64 [H, W], of normalised pixels [H, W, 3]."""
    return 1 / (1 + np.exp(-(pixels.astype(np.float64) @ WEIGHTS + BIAS)))


def picture(seed: int = 0, size: tuple[int, int] = (60, 40)) -> np.ndarray:
    """An image of noise, uint8 [height, width, 3], of that width and height."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)


def kept(detector: Detector, images: Sequence[Any], folder: Path) -> list[Path]:
    """The detector by hand, its SISMs saved as files."""
    seen = [detector.look(image) for image in images]
    for i, (image, found) in enumerate(zip(seen, detector(seen), strict=True)):
        save_grey(finished(image, found), folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(images))]
