"""The networks of a comparison as files, and the bounds within which the runners of them must agree.

The bound is on the mean of |Δ|: four of the noise floors of `export.noise`, measured on the comparison's own network,
one floor per precision. As in `export.proof`, differences are pooled over groups: before the comparison all runners
compute the groups that the floor is measured on. A file of ours in FP16 may be three floors away, a runner four: other
ways to compute in FP16 (PyTorch's autocast) round in other places. A real fault is far beyond: on a trained network
autocast, which correlates in FP16, was a hundred floors away.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.runners import CHECKPOINT, HALF_NETWORK, HALF_ONNX, OURS_ONNX, PACKED_ONNX, REFERENCE_ONNX, inputs
from export.checkpoint import load_checkpoint, save_checkpoint
from export.fp16 import half_precision
from export.icnet import ICNet
from export.noise import NEGLIGIBLE_MEAN, reference, variant
from export.onnx_file import load_model, metadata
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime.backends.opening import MNN_SUFFIX, OPENVINO_SUFFIX
from runtime.contract import ExportKind
from runtime.errors import ModelError
from runtime.openvino_library import noted_precision

PRECISIONS = ("fp32", "fp16", "int8")  # in the notes of an export
FLOORS = 4.0  # of noise, that the mean of |Δ| may reach
GROUPS = (1, 2, 5, 1, 2, 5)  # sizes of the groups that are judged


def prepare(folder: Path, checkpoint: Path | None, half: bool = False) -> ICNet:
    """Write the files that the runners read: a checkpoint, the paper's network and ours as ONNX, and ours in FP16.

    Args:
        folder: where to.
        checkpoint: None for random weights of width 1.
        half: whether FP16 is wanted.

    Returns:
        The network.

    Raises:
        CheckpointError: the checkpoint can't be loaded.
    """
    torch.manual_seed(0)
    network = ICNet().eval() if checkpoint is None else load_checkpoint(checkpoint)
    save_checkpoint(folder / CHECKPOINT, network)
    write_onnx(network, folder / OURS_ONNX)
    write_onnx(ReferenceICNet.of(network), folder / REFERENCE_ONNX)
    if half:
        typed = half_precision(network)
        write_onnx(typed, folder / HALF_ONNX)
        write_onnx(typed, folder / PACKED_ONNX, ExportKind.PACKED)
        torch.save(typed, folder / HALF_NETWORK)
    return network


def precision_of(path: Path) -> str:
    """The precision by which a model file is judged: the one that it notes, or INT8 without a note.

    An export notes it in its metadata, an engine of ours in NAME.engine.json; MNN's files are FP32 by Winograd.
    """
    if path.suffix.lower() == MNN_SUFFIX:
        return "winograd"
    if path.suffix.lower() == OPENVINO_SUFFIX:
        return noted_precision(path) or "int8"
    try:
        notes = metadata(load_model(path, weights=False))
    except ModelError:  # not an ONNX file; whether it is a model at all shows when it is started
        try:
            record = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
            notes, options = record["onnx_metadata"] or {}, record.get("options") or {}
            if notes.get("precision") == "fp32" and options.get("tf32"):
                return "tf32"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            notes = {}
    precision = notes.get("precision")
    return precision if precision in PRECISIONS else "int8"


def judged(largest: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The groups of at most `largest` images on which the floor is measured and all runners are judged."""
    return [inputs(min(n, largest), seed) for seed, n in enumerate(GROUPS, 1)]


def bounds(
    network: ICNet, precisions: Iterable[str], groups: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
) -> dict[str, float]:
    """The largest mean of |Δ| over these groups that rounding explains, per precision."""
    expected_by, others = reference(network), {p: variant(network, p) for p in precisions}
    differences: dict[str, list[Tensor]] = {p: [] for p in others}
    for group in groups:
        tensors = [torch.from_numpy(array) for array in group]
        with torch.inference_mode():
            maps = expected_by(*tensors)
            for p, other in others.items():
                differences[p].append((maps - other(*tensors)).abs().double().flatten())
    return {p: max(FLOORS * float(torch.cat(d).mean()), NEGLIGIBLE_MEAN) for p, d in differences.items()}


@dataclass
class Agreement:
    """How far one runner's maps are from the reference.

    Attributes:
        bound: how large the mean of |Δ| may be; None if the maps are not judged.
        total: the sum of |Δ| over all groups so far; `pixels` is their number.
    """

    bound: float | None = None
    total: float = 0.0
    pixels: int = 0

    def add(self, difference: NDArray[np.float32]) -> bool | None:
        """Add one more group's |Δ|: whether the mean over all is within the bound; None if there is no bound."""
        self.total += float(difference.sum(dtype=np.float64))
        self.pixels += difference.size
        return None if self.bound is None else self.total / self.pixels <= self.bound
