"""What `icnet bench gpu-check` checks: a network with its exports, its engines and the CPU's maps."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.agreement import Agreement, bounds, judged
from benchmarks.runners import inputs
from calibration.graph import ExportedModel
from calibration.ranges import collect
from export.checkpoint import load_checkpoint, weights_digest
from export.fp16 import half_precision
from export.tensorrt_engine import Options, Profile, build_engine
from export.to_onnx import write_onnx
from runtime import ModelError, Predictor
from runtime.contract import WEIGHTS, ExportKind

LARGE = 16  # images of the largest group
PROFILES = (Profile(1, 1, 1), Profile(2, 5, 8), Profile(9, 16, 32))
BANKS = Profile(1, LARGE, 64)

Figures = dict[str, float]


class Subject:
    """What the checks run: a network, its exports and engines, each made when first asked for, and the CPU's maps.

    Args:
        folder: where the files are made.
        checkpoint: the network's weights.
        calls: groups in the long stream.

    Raises:
        CheckpointError: the checkpoint can't be loaded.
    """

    def __init__(self, folder: Path, checkpoint: Path, calls: int) -> None:
        self.folder, self.calls = folder, calls
        self.network = load_checkpoint(checkpoint).eval()
        self.groups = [*judged(max(p.opt for p in PROFILES[:2])), inputs(LARGE, 7)]

    @cached_property
    def expected(self) -> list[NDArray[np.float32]]:
        """The CPU's maps of the groups."""
        with Predictor(self.onnx("fp32")) as cpu:
            return [cpu.predict_tensors(*group) for group in self.groups]

    @cached_property
    def bounds(self) -> dict[str, float]:
        """How large the mean of |Δ| may be, per precision."""
        return bounds(self.network, ("fp32", "tf32", "fp16", "int8"), self.groups)

    def onnx(self, precision: str, kind: ExportKind = ExportKind.PLAIN) -> Path:
        """An export; INT8 is calibrated on the groups that are judged."""
        path = self.folder / f"{precision}.{kind}.onnx"
        if path.exists():
            return path
        if precision == "int8":
            model = ExportedModel(self.onnx("fp32"), "tensorrt")
            feeds = [{"images": images, "sisms": sisms} for images, sisms in self.groups]
            ranges = collect(model.path, model.model, model.tensors(), lambda _: feeds, "minmax")
            onnx.save(model.quantised(ranges), path)
        else:
            network = half_precision(self.network) if precision == "fp16" else self.network
            write_onnx(network, path, kind, {WEIGHTS: weights_digest(self.network)})
        return path

    def engine(self, precision: str, kind: ExportKind = ExportKind.PLAIN, tf32: bool = False) -> Path:
        """A TensorRT engine of an export."""
        path = self.folder / f"{precision}.{kind}{'.tf32' if tf32 else ''}.engine"
        if not path.exists():
            options = Options(bank=BANKS if kind is ExportKind.BANKED else None, tf32=tf32)
            build_engine(self.onnx(precision, kind), path, PROFILES, options)
        return path

    def banks(self, precision: str) -> tuple[Path, Path]:
        """The engines of a bank export."""
        return self.engine(precision, ExportKind.INTRA), self.engine(precision, ExportKind.BANKED)

    def judge(
        self, precision: str, found: Iterable[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]] = ()
    ) -> Figures:
        """Compare maps with the CPU's.

        Args:
            precision: of what computed them.
            found: maps of the groups, in their order.
            expected: what they should be; empty for `self.expected`.

        Raises:
            ModelError: they differ by more than rounding explains.
        """
        agreement, largest, fine = Agreement(self.bounds[precision]), 0.0, None
        for maps, right in zip(found, expected or self.expected, strict=True):
            difference = np.abs(maps - right)
            largest, fine = max(largest, float(difference.max())), agreement.add(difference)
        mean = agreement.total / agreement.pixels
        if not fine:
            raise ModelError(
                f"|Δ| to the CPU's maps: {mean:.1e} on average, where rounding explains {agreement.bound:.1e}"
            )
        return {"mean_difference": mean, "bound": self.bounds[precision], "max_difference": largest}
