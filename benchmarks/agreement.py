"""The networks of a race as files, and whether the contenders that run them agree.

The bound is that of `export.proof` for FP32, on the mean of |Δ|: four times the noise floor, which is measured on the
race's own network and inputs. Like there, differences are pooled over groups. For FP16 it is four times its floor too,
not two as for a file of ours: other ways to compute in FP16 (PyTorch's autocast) round in other places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from benchmarks.contenders import CHECKPOINT, HALF_NETWORK, HALF_ONNX, ORACLE_ONNX, OURS_ONNX, inputs
from export.checkpoint import load_checkpoint, save_checkpoint
from export.fp16 import half_precision
from export.icnet import ICNet
from export.proof import ALLOWED_FLOORS, NEGLIGIBLE_MEAN, oracles
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx

FLOOR_SIZES = (1, 2, 5)  # of the groups that the noise floor is measured on


def prepare(folder: Path, checkpoint: Path | None, half: bool = False) -> ICNet:
    """Write the files that the contenders read: a checkpoint, the paper's network and ours as ONNX, and ours in FP16.

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
    write_onnx(ReferenceICNet.of(network), folder / ORACLE_ONNX)
    if half:
        typed = half_precision(network)
        write_onnx(typed, folder / HALF_ONNX)
        torch.save(typed, folder / HALF_NETWORK)
    return network


def precision_of(path: Path) -> str | None:
    """What an export says of itself; None where a file says nothing, or names a precision that has no bound."""
    try:
        properties = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    except Exception:  # not an ONNX file; whether it is a model at all shows when it is started
        return None
    precision = properties.get("precision")
    return precision if precision in ALLOWED_FLOORS else None


def bound(network: ICNet, precision: str, sizes: Sequence[int] = FLOOR_SIZES) -> float:
    """How large the mean of |Δ| may be by rounding alone: see `export.proof`."""
    oracle, other = oracles(network, precision)
    differences = []
    for n in sizes:
        tensors = [torch.from_numpy(array) for array in inputs(n)]
        with torch.inference_mode():
            differences.append((oracle(*tensors) - other(*tensors)).abs().double().flatten())
    return max(ALLOWED_FLOORS["fp32"] * float(torch.cat(differences).mean()), NEGLIGIBLE_MEAN)


@dataclass
class Agreement:
    """How far one contender's maps are from the reference, over all groups so far; and how far they may be."""

    bound: float | None
    total: float = 0.0
    pixels: int = 0

    def add(self, difference: NDArray[np.float32]) -> bool | None:
        """One more group's |Δ|: whether the mean over all is within the bound; None if there is no bound."""
        self.total += float(difference.sum(dtype=np.float64))
        self.pixels += difference.size
        return None if self.bound is None else self.total / self.pixels <= self.bound
