"""The option --device: where a model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import CPU
from runtime.backends.opening import ENGINE_SUFFIXES, MNN_SUFFIX, OPENVINO_SUFFIX, OTHER_SUFFIXES
from runtime.errors import InputError

PROVIDERS: dict[str, list[Provider]] = {
    "cpu": [CPU],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}


OPENVINO = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}  # its names of devices


def add_device_argument(add: Callable[..., Any]) -> None:
    """The option of a command, by its parser's `add_argument`."""
    add(
        "--device",
        choices=(*PROVIDERS, *(name for name in OPENVINO if name not in PROVIDERS)),
        help="where files run (default: cpu). ONNX files: cuda and tensorrt need onnxruntime-gpu. OpenVINO files: gpu "
        "and npu are Intel's. Engines need none: they run on the GPU",
    )


def place(device: str | None, *models: Path) -> dict[str, Any]:
    """What --device says to a Predictor: its arguments `providers` and `device`.

    Args:
        device: the option's value.
        models: the files that it is meant for.

    Raises:
        InputError: a file that does not run there.
    """
    for model in models:
        suffix = model.suffix.lower()
        if suffix in ENGINE_SUFFIXES and device not in (None, "tensorrt"):
            raise InputError(f"{model}: --device {device}: a TensorRT engine runs on the GPU; leave out --device")
        if suffix == MNN_SUFFIX and device not in (None, "cpu"):
            raise InputError(f"{model}: --device {device}: an MNN file runs on the CPU; leave out --device")
        if suffix == OPENVINO_SUFFIX and device not in (None, *OPENVINO):
            raise InputError(f"{model}: --device {device}: an OpenVINO file runs on {', '.join(OPENVINO)}")
        if suffix not in OTHER_SUFFIXES and device not in (None, *PROVIDERS):
            raise InputError(f"{model}: --device {device}: is for OpenVINO files; build one with icnet build")
    if models and all(model.suffix.lower() == OPENVINO_SUFFIX for model in models):
        return {"device": OPENVINO[device or "cpu"]}
    return {"providers": PROVIDERS[device or "cpu"]}
