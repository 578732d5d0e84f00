"""The networks of a comparison as files, and whether the runners that run them agree.

The bound is that of `export.proof` for FP32, on the mean of |Δ|: four times the noise floor, which is measured on the
comparison's own network, one floor per precision. Like there, and for the same reason, differences are pooled over
groups: before the comparison all runners compute the groups that the floor is measured on. For FP16 it is four times
its floor too, not three as for a file of ours: other ways to compute in FP16 (PyTorch's autocast) round in other
places. That does not excuse everything: on a trained network autocast, which correlates in FP16, was a hundred floors
away.

The floor of INT8 is the reference whose convolutions read what they read, and have their weights, in 8 bits (but for
those that `icnet calibrate` leaves in floating point), against the plain reference. Calibrated files were 0.8 to 1.4 of
these floors away (three networks, one of them trained, minmax and entropy), networks of other weights 14 to 230. That
of MNN's files, which are FP32 but round as Winograd's convolutions do, is the reference with as much noise
(`to_mnn.py`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.runners import CHECKPOINT, HALF_NETWORK, HALF_ONNX, OURS_ONNX, PACKED_ONNX, REFERENCE_ONNX, inputs
from export.checkpoint import load_checkpoint, save_checkpoint
from export.fp16 import fold_batch_norms, half_precision
from export.icnet import ICNet, Uint8Interface
from export.proof import NEGLIGIBLE_MEAN, references
from export.reference import ReferenceICNet
from export.to_mnn import WINOGRAD
from export.to_onnx import write_onnx
from runtime.predictor import MNN_SUFFIX

PRECISIONS = ("fp32", "fp16", "int8")
FLOORS = 4.0  # that the mean of |Δ| may be
GROUPS = (1, 2, 5, 1, 2, 5)  # sizes of those that are judged
NOT_INT8 = ("vgg.vgg.0", "get_pred_4.pred.0", "refine_1.pred.pred.0")  # as in calibration.graph
LEVELS = 127  # of INT8, on one side of 0


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
        write_onnx(typed, folder / PACKED_ONNX, "packed")
        torch.save(typed, folder / HALF_NETWORK)
    return network


def precision_of(path: Path) -> str:
    """The precision by which a model file is to be judged: what it says of itself, or INT8's if it says nothing.

    An export says it in its metadata, an engine of ours in NAME.engine.json beside it; MNN's are FP32 by Winograd.
    """
    if path.suffix.lower() == MNN_SUFFIX:
        return "winograd"
    try:
        notes = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    except Exception:  # not an ONNX file; whether it is a model at all shows when it is started
        try:
            notes = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))["onnx_metadata"] or {}
        except (OSError, ValueError, KeyError, TypeError):
            notes = {}
    precision = notes.get("precision")
    return precision if precision in PRECISIONS else "int8"


def judged(largest: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The groups, of at most so many images, that the floor is measured and all runners are judged on."""
    return [inputs(min(n, largest), seed) for seed, n in enumerate(GROUPS, 1)]


def bounds(
    network: ICNet, precisions: Iterable[str], groups: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
) -> dict[str, float]:
    """How large the mean of |Δ| over these groups may be by rounding alone, by precision: see above."""
    reference = Uint8Interface(ReferenceICNet.of(network))
    changes = {"int8": _in_int8, "winograd": _by_winograd}
    others = {
        p: Uint8Interface(changes[p](ReferenceICNet.of(network))) if p in changes else references(network, p)[1]
        for p in precisions
    }
    differences: dict[str, list[Tensor]] = {p: [] for p in others}
    for group in groups:
        tensors = [torch.from_numpy(array) for array in group]
        with torch.inference_mode():
            maps = reference(*tensors)
            for p, other in others.items():
                differences[p].append((maps - other(*tensors)).abs().double().flatten())
    return {p: max(FLOORS * float(torch.cat(d).mean()), NEGLIGIBLE_MEAN) for p, d in differences.items()}


def _in_int8(network: ReferenceICNet) -> ReferenceICNet:
    """The network with its convolutions' weights and inputs rounded to INT8, in place; per output channel."""

    def rounded(x: Tensor, limit: Tensor) -> Tensor:
        scale = limit.clamp_min(torch.finfo(x.dtype).tiny) / LEVELS
        return (x / scale).round().clamp(-LEVELS, LEVELS) * scale

    fold_batch_norms(network)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name not in NOT_INT8:
            weight = module.weight.data
            module.weight.data = rounded(weight, weight.abs().amax(dim=(1, 2, 3), keepdim=True))
            module.register_forward_pre_hook(lambda _module, inputs: (rounded(inputs[0], inputs[0].abs().max()),))
    return network


def _by_winograd(network: ReferenceICNet) -> ReferenceICNet:
    """The network with what Winograd's convolutions round, as noise on their outputs, in place; as in `to_mnn.py`."""
    generator = torch.Generator().manual_seed(0)

    def noisy(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output * (1 + WINOGRAD * torch.randn(output.shape, generator=generator))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(noisy)
    return network


@dataclass
class Agreement:
    """How far one runner's maps are from the reference, over all groups so far; and how far they may be."""

    bound: float | None
    total: float = 0.0
    pixels: int = 0

    def add(self, difference: NDArray[np.float32]) -> bool | None:
        """One more group's |Δ|: whether the mean over all is within the bound; None if there is no bound."""
        self.total += float(difference.sum(dtype=np.float64))
        self.pixels += difference.size
        return None if self.bound is None else self.total / self.pixels <= self.bound
