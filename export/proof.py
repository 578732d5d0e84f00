"""Proof that an exported file computes what the paper's network does.

The file is run by ONNX Runtime and compared with the oracle, the network as the paper writes it, in FP32. How much may
they differ? The order in which RSCF puts the pixels is discontinuous: two sums that differ in their last bit can swap
two near-equal pixels, and a swap can move a pixel of the output by 1e-2 or more. So no fixed tolerance is right; but
the same happens to the oracle itself: its FP32 against its FP64, on the same weights and inputs, is the noise floor.

With e(x) = |x - FP64|, the triangle inequality gives |file - oracle| ≤ e(file) + e(oracle). A correct file rounds as
often as the oracle does, so its e is another draw from the distribution of which the floor is one: expected,
|file - oracle| ≤ 2 floors. One case alone is no fair draw (with a swap its floor is 1e-2, without one 1e-6), so both
are pooled over all cases. Pooled like this, |file - oracle| of correct files was 0.7 to 2.7 floors in 40 measurements
(maximum and mean, 20 networks of random weights), while the mean of wrong formulas was 200 to 3000 floors away. Hence
the bound: twice the triangle's 2. Differences that no 8-bit map can show (a 40th of a grey level on average, two or
three levels in single pixels) pass in any case, because the floor of a network that happens to have no swap is nearly
zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.table import Table

from export.icnet import SIZE, ICNet, Uint8Interface
from export.reference import ReferenceICNet
from runtime.errors import ModelError

ALLOWED_FLOORS = 4.0
NEGLIGIBLE_MEAN = 1e-4
NEGLIGIBLE_MAX = 1e-2

GROUP_SIZES = (1, 2, 5, 10, 17)


@dataclass(frozen=True)
class Case:
    """Inputs to compare on: uint8 [N, 224, 224, 3] and uint8 [N, 224, 224]."""

    name: str
    images: NDArray[np.uint8]
    sisms: NDArray[np.uint8]


@dataclass(frozen=True)
class Difference:
    """|Δ| of maps in [0, 1] on one case, or over all: the file against the oracle, and the oracle's own noise floor."""

    name: str
    max: float
    mean: float
    floor_max: float
    floor_mean: float


def random_group(n: int, seed: int) -> Case:
    """A group of n smooth random images and SISMs."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(channels: int, cells: int) -> NDArray[np.uint8]:
        x = torch.rand(n, channels, cells, cells, generator=generator)
        x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1) * 255
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return Case(f"N = {n}", smooth(3, 12), smooth(1, 6)[..., 0])


def proof_cases(sizes: Sequence[int] = GROUP_SIZES) -> list[Case]:
    """Groups of several sizes, and the degenerate inputs that must still give finite, equal maps."""
    group = random_group(2, seed=100)
    images, sisms = group.images, group.sisms
    return [
        *(random_group(n, seed=n) for n in sizes),
        Case("one black image", np.stack([images[0], np.zeros_like(images[1])]), sisms),
        Case("SISMs all 0", images, np.zeros_like(sisms)),
        Case("SISMs all 1", images, np.full_like(sisms, 255)),
        Case("N = 1, all black", np.zeros_like(images[:1]), np.zeros_like(sisms[:1])),
    ]


def compare(
    path: Path,
    network: ICNet,
    interface: str = "uint8",
    cases: Sequence[Case] | None = None,
    step: Callable[[], object] = lambda: None,
) -> list[Difference]:
    """Run a file in ONNX Runtime beside the oracle with the network's weights.

    Args:
        path: an ONNX file from `write_onnx`.
        network: what it was made from.
        interface: as for `write_onnx`.
        cases: what to compare on; None for `proof_cases()`.
        step: called after every case.

    Returns:
        One difference per case, and last the one over all images of all cases. A map that is not finite has a
        difference of infinity.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    oracle32 = Uint8Interface(ReferenceICNet.of(network))
    oracle64 = Uint8Interface(ReferenceICNet.of(network)).double()

    differences, errors, floors = [], [], []
    for case in proof_cases() if cases is None else cases:
        images, sisms = torch.from_numpy(case.images), torch.from_numpy(case.sisms)
        with torch.inference_mode():
            expected = oracle32(images, sisms).numpy()
            exact = oracle64(images, sisms).numpy()
            inputs = (images, sisms) if interface == "uint8" else oracle32.normalise(images, sisms)
        feeds = dict(zip(("images", "sisms"), (t.numpy() for t in inputs), strict=True))
        found = session.run(["maps"], feeds)[0].reshape(expected.shape)
        error = np.where(np.isfinite(found), np.abs(found - expected), math.inf)
        floor = np.abs(expected - exact)
        differences.append(_difference(case.name, error, floor))
        errors.append(error)
        floors.append(floor)
        step()
    return [*differences, _difference("all", np.concatenate(errors), np.concatenate(floors))]


def _difference(name: str, error: NDArray[np.floating], floor: NDArray[np.floating]) -> Difference:
    return Difference(name, float(error.max()), float(error.mean()), float(floor.max()), float(floor.mean()))


def allowed(overall: Difference) -> tuple[float, float]:
    """The largest maximum and mean that the noise floor allows (see above)."""
    return (
        max(ALLOWED_FLOORS * overall.floor_max, NEGLIGIBLE_MAX),
        max(ALLOWED_FLOORS * overall.floor_mean, NEGLIGIBLE_MEAN),
    )


def check(path: object, differences: Sequence[Difference]) -> None:
    """Raise ModelError unless the last difference, the one over all cases, is within what the noise floor allows."""
    overall = differences[-1]
    most, mean = allowed(overall)
    if not (overall.max <= most and overall.mean <= mean):
        raise ModelError(
            f"{path}: not written: its maps differ from the paper's network by {overall.max:.1e} at most and "
            f"{overall.mean:.1e} on average, where rounding explains {most:.1e} and {mean:.1e}"
        )


def table(differences: Sequence[Difference]) -> Table:
    """The differences and the bound, for a terminal."""
    grid = Table(title="ONNX Runtime against the paper's network: |Δ| of the maps, which lie in [0, 1]")
    grid.add_column("case")
    for column in ("max", "mean", "noise floor, max", "noise floor, mean"):
        grid.add_column(column, justify="right")
    for d in differences:
        grid.add_row(d.name, *(f"{v:.1e}" for v in (d.max, d.mean, d.floor_max, d.floor_mean)))
    most, mean = allowed(differences[-1])
    grid.add_section()
    grid.add_row("allowed", f"{most:.1e}", f"{mean:.1e}")
    return grid
