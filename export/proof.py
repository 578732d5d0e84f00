"""Proof that an exported file computes what the paper's network does.

The file is run by ONNX Runtime and compared with the reference, the network as the paper writes it, in FP32. How much
may they differ? The order in which RSCF puts the pixels is discontinuous: two sums that differ in their last bit can
swap two near-equal pixels, and a swap can move a pixel of the output by 1e-2 or more. So no fixed tolerance is right;
but the same happens to the reference itself: its FP32 against its FP64, on the same weights and inputs, is the noise
floor.

With e(x) = |x - FP64|, the triangle inequality gives |file - reference| ≤ e(file) + e(reference). A correct file rounds
as often as the reference does, so its e is another draw from the distribution of which the floor is one: expected,
|file - reference| ≤ 2 floors. One group alone is no fair draw (with a swap its floor is 1e-2, without one 1e-6), so
both are pooled over all groups. Pooled like this, |file - reference| of correct files was 0.7 to 2.7 floors in 40
measurements (maximum and mean, 20 networks of random weights), while the mean of wrong formulas was 200 to 3000 floors
away. Hence the bound: twice the triangle's 2. Differences that no 8-bit map can show (a 40th of a grey level on
average, two or three levels in single pixels) pass in any case, because the floor of a network that happens to have no
swap is nearly zero.

An FP16 file is no draw from that distribution: it keeps 11 bits where FP32 keeps 24. Its floor is the reference that
rounds its weights, and what goes into and comes out of every convolution, to 11 bits, against the plain reference in
FP32. The reference's own e is nothing beside it; but the file rounds at more places, within the products of RSCF. The
mean was 0.7 to 2.0 floors (5 networks, two of them trained, by PyTorch and by ONNX Runtime), so it may be three. A file
that computed the order of the pixels in FP16 was 29 floors away, on a trained network; on random ones it did not show.
The rounding leaves the range alone: a file whose activations overflow FP16 has no such excuse.

The reference takes one group at a time. A packed file gets two at once, their images mixed; the two files of a bank
export get a group in two chunks, with the SIVs of both as the bank. The maps must be those of the reference, group by
group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import nn

from export.fp16 import fold_batch_norms, round_to_half
from export.icnet import WIDTH_STEPS, ICNet, Uint8Interface
from export.reference import ReferenceICNet
from export.samples import Sample, samples
from runtime.errors import ModelError

ALLOWED_FLOORS = {"fp32": 4.0, "fp16": 3.0}
NEGLIGIBLE_MEAN = 1e-4
NEGLIGIBLE_MAX = 1e-2


@dataclass(frozen=True)
class Difference:
    """|Δ| of maps in [0, 1] on one group, or over all: the file against the reference, and its noise floor."""

    name: str
    max: float
    mean: float
    floor_max: float
    floor_mean: float


def compare(
    path: Path,
    network: ICNet,
    interface: str = "uint8",
    precision: str = "fp32",
    groups: Sequence[Sample] | None = None,
    step: Callable[[], object] = lambda: None,
    intra: Path | None = None,
) -> list[Difference]:
    """Run a file in ONNX Runtime beside the reference with the network's weights.

    Args:
        path: an ONNX file from `write_onnx`.
        network: the network in FP32 that it was made from.
        interface: as for `write_onnx`.
        precision: "fp32" or "fp16"; decides what the noise floor is.
        groups: what to compare on; None for `samples()`.
        step: called after every group.
        intra: the file that makes the banks of a "banked" one.

    Returns:
        One difference per group, and last the one over all images of all groups. A map that is not finite has a
        difference of infinity.
    """
    reference, other = references(network, precision)
    groups = samples() if groups is None else groups
    all_maps = _run([path] if intra is None else [path, intra], groups, interface, precision)
    differences, errors, floors = [], [], []
    for group, maps in zip(groups, all_maps, strict=True):
        images, sisms = torch.from_numpy(group.images), torch.from_numpy(group.sisms)
        with torch.inference_mode():
            expected = reference(images, sisms).numpy()
            floor = np.abs(other(images, sisms).numpy() - expected)
        found = maps.reshape(expected.shape)
        error = np.where(np.isfinite(found), np.abs(found - expected), math.inf)
        differences.append(_difference(group.name, error, floor))
        errors.append(error)
        floors.append(floor)
        step()
    return [*differences, _difference("all", np.concatenate(errors), np.concatenate(floors))]


def references(network: ICNet, precision: str) -> tuple[Uint8Interface, Uint8Interface]:
    """The reference in FP32, and the one whose difference from it is the noise floor of `precision` (see above)."""
    reference = Uint8Interface(ReferenceICNet.of(network))
    if precision == "fp16":
        return reference, Uint8Interface(_rounding(ReferenceICNet.of(network)))
    return reference, Uint8Interface(ReferenceICNet.of(network)).double()


def _run(
    paths: Sequence[Path], groups: Sequence[Sample], interface: str, precision: str
) -> Iterator[NDArray[np.float32]]:
    """The files' maps of each group, [N, …]."""
    options = onnxruntime.SessionOptions()
    if precision == "fp16":  # optimised, a CPU skips roundings that a GPU makes, and so hides an overflow
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]

    def run(session: onnxruntime.InferenceSession, *tensors: NDArray) -> NDArray[np.float32]:
        names = [tensor.name for tensor in session.get_inputs()]
        return session.run(None, dict(zip(names, tensors, strict=True)))[0]

    if interface == "packed":
        for one, other in zip_longest(groups[::2], groups[1::2]):
            both = [one] if other is None else [one, other]
            labels = np.repeat(np.array([7, -3][: len(both)], np.int32), [len(group.images) for group in both])
            order = np.random.default_rng(0).permutation(len(labels))
            images, sisms = (np.concatenate([getattr(group, name) for group in both]) for name in ("images", "sisms"))
            maps = np.empty(sisms.shape, np.float32)
            maps[order] = run(sessions[0], images[order], sisms[order], labels[order])
            yield from np.split(maps, [len(one.images)])[: len(both)]
        return
    normalise = Uint8Interface(ICNet(1 / WIDTH_STEPS)).normalise
    for group in groups:
        tensors: tuple[NDArray, ...] = (group.images, group.sisms)
        if interface == "float32":
            tensors = tuple(t.numpy() for t in normalise(*map(torch.from_numpy, tensors)))
        if interface != "banked":
            yield run(sessions[0], *tensors)
            continue
        chunks = list(zip(*(np.array_split(t, min(2, len(t))) for t in tensors), strict=True))
        bank = np.concatenate([run(sessions[1], *chunk) for chunk in chunks])
        yield np.concatenate([run(sessions[0], *chunk, bank) for chunk in chunks])


def _rounding(network: ReferenceICNet) -> ReferenceICNet:
    """The network with its convolutions' weights, inputs and outputs rounded to the 11 bits of FP16, in place."""
    fold_batch_norms(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters():
                parameter.data = round_to_half(parameter.data)
            module.register_forward_pre_hook(lambda _module, inputs: tuple(map(round_to_half, inputs)))
            module.register_forward_hook(lambda _module, _inputs, output: round_to_half(output))
    return network


def _difference(name: str, error: NDArray[np.floating], floor: NDArray[np.floating]) -> Difference:
    return Difference(name, float(error.max()), float(error.mean()), float(floor.max()), float(floor.mean()))


def allowed(overall: Difference, precision: str = "fp32") -> tuple[float, float]:
    """The largest maximum and mean that the noise floor allows (see above)."""
    factor = ALLOWED_FLOORS[precision]
    return max(factor * overall.floor_max, NEGLIGIBLE_MAX), max(factor * overall.floor_mean, NEGLIGIBLE_MEAN)


def check(path: object, differences: Sequence[Difference], precision: str = "fp32") -> None:
    """Raise ModelError unless the last difference, the one over all groups, is within what the noise floor allows."""
    overall = differences[-1]
    most, mean = allowed(overall, precision)
    if not math.isfinite(overall.floor_max):
        raise ModelError(f"{path}: not written: with these weights the paper's own network computes NaN or infinity")
    if not (overall.max <= most and overall.mean <= mean):
        raise ModelError(
            f"{path}: not written: its maps differ from the paper's network by {overall.max:.1e} at most and "
            f"{overall.mean:.1e} on average, where rounding explains {most:.1e} and {mean:.1e}"
        )


def table(differences: Sequence[Difference], precision: str = "fp32") -> Table:
    """The differences and the bound, for a terminal."""
    grid = Table(title="ONNX Runtime against the paper's network: |Δ| of the maps, which lie in [0, 1]")
    grid.add_column("group")
    for column in ("max", "mean", "noise floor, max", "noise floor, mean"):
        grid.add_column(column, justify="right")
    for d in differences:
        grid.add_row(d.name, *(f"{v:.1e}" for v in (d.max, d.mean, d.floor_max, d.floor_mean)))
    most, mean = allowed(differences[-1], precision)
    grid.add_section()
    grid.add_row("allowed", f"{most:.1e}", f"{mean:.1e}")
    return grid
