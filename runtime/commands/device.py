"""The option --device: where a model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.backends.onnx import CPU
from runtime.backends.onnx_gpu import Provider
from runtime.errors import InputError
from runtime.predictor import ENGINE_SUFFIXES, MNN_SUFFIX

PROVIDERS: dict[str, list[Provider]] = {
    "cpu": [CPU],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}


def add_device_argument(add: Callable[..., Any]) -> None:
    """The option of a command, by its parser's `add_argument`."""
    add(
        "--device",
        choices=PROVIDERS,
        help="where ONNX files run; cuda and tensorrt need onnxruntime-gpu (default: cpu). Engines need none: they run "
        "on the GPU",
    )


def providers(device: str | None, *models: Path) -> list[Provider]:
    """ONNX Runtime's execution providers for --device; None for the CPU.

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
    return PROVIDERS[device or "cpu"]
