"""OpenVINO's Python API, as running and building need it: compiling in a file's precision, notes, tensors, errors."""

import json
import logging
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from runtime.contract import CALIBRATED_FOR, CARD, WEIGHTS, TensorSpec
from runtime.errors import ModelError, one_line

logger = logging.getLogger(__name__)

CPU = "CPU"  # OpenVINO's names of devices
COMPOSED = ("AUTO", "BATCH", "HETERO", "MULTI")  # devices that stand for others
NOTES = ["icnet", "notes"]  # where the notes of `icnet build` are, as JSON, in the file's `rt_info`
ONNX_NOTES = "framework"  # where OpenVINO puts the metadata of an ONNX file
PRECISION, BIN_DIGEST = "precision", "bin_sha256"  # keys of the notes
HINTS = {"fp32": "f32", "bf16": "bf16"}  # how OpenVINO calls the precisions of files


def compiled(core: Any, model: Any, precision: str | None, threads: int | None, device: str, path: Path) -> Any:
    """A model as every Predictor compiles it.

    Args:
        core: an `openvino.Core`.
        model: from `core.read_model`.
        precision: a key of `HINTS`, for what the model has in FP32; None for "fp32". OpenVINO alone would round to 16
            bits wherever the device is faster with them.
        threads: CPU threads; None for OpenVINO's choice.
        device: OpenVINO's name for it.
        path: the model's file, for messages.

    Raises:
        ModelError: OpenVINO can't compile it.
    """
    hint = HINTS.get(precision or "fp32", "f32")
    if hint == "bf16" and not has_bf16(core, device):
        logger.warning("%s: this %s has no BF16: computing in FP32", path, device)
        hint = "f32"
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if device == CPU:
        options["ENABLE_CPU_PINNING"] = False  # pinned, the threads of two Predictors would share the same cores
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
    try:
        return core.compile_model(model, device, options)
    except Exception as error:
        raise ModelError(f"{path}: OpenVINO can't run it on {device}: {reason(error)}") from error


def has_bf16(core: Any, device: str = CPU) -> bool:
    """Whether a device computes in BF16; True for one that stands for others."""
    return device.partition(":")[0] in COMPOSED or "BF16" in core.get_property(device, "OPTIMIZATION_CAPABILITIES")


def specs(ports: Any) -> list[TensorSpec]:
    """Names, types and shapes of a model's inputs or outputs."""
    return [
        TensorSpec(
            port.any_name if port.names else "?",
            str(port.element_type.to_dtype()),
            tuple(None if d.is_dynamic else d.get_length() for d in port.partial_shape),
        )
        for port in ports
    ]


def read_notes(model: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The notes of `icnet build` in a model, and the metadata of the ONNX file that it was made from; as far as any."""
    notes: Any = {}
    if model.has_rt_info(NOTES):
        try:
            notes = json.loads(str(model.get_rt_info(NOTES).value))
        except ValueError:
            notes = {}
    of_onnx = {}
    for key in (WEIGHTS, CALIBRATED_FOR, CARD):
        if model.has_rt_info([ONNX_NOTES, key]):
            of_onnx[key] = str(model.get_rt_info([ONNX_NOTES, key]).value)
    return notes if isinstance(notes, dict) else {}, of_onnx


def noted_precision(path: Path) -> str | None:
    """The precision that a file of ours notes, "fp32", "bf16" or "int8"; None if it does not, or is none."""
    try:
        notes = ElementTree.parse(path).getroot().find("rt_info")
        of_onnx = None if notes is None else notes.find(f"{ONNX_NOTES}/{PRECISION}")
        if of_onnx is not None and of_onnx.get("value") == "int8":
            return "int8"
        own = None if notes is None else notes.find("/".join(NOTES))
        return None if own is None else str(json.loads(own.get("value", ""))[PRECISION])
    except (OSError, ElementTree.ParseError, ValueError, KeyError, TypeError):
        return None


def reason(error: Exception) -> str:
    """The last line of an OpenVINO error; those before it say where in OpenVINO it was raised."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else type(error).__name__
