"""Proof that a file for another CPU engine computes what ONNX Runtime computes from the ONNX file it was made from.

Both run the same calls. They may differ by some noise floors of the file's precision (`ALLOWED_FLOORS`), measured on
these calls: ONNX Runtime against itself with that precision's rounding (see `export.noise`). Of maps, differences that
no 8-bit map can show pass in any case; SIVs are computed before the order of the pixels, and their floor is never
nearly zero.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.noise import ALLOWED_FLOORS, NEGLIGIBLE_MAX, NEGLIGIBLE_MEAN
from export.onnx_file import cpu_session
from runtime.contract import SIZE, ExportKind, Interface
from runtime.detector_contract import channels_first, fixed
from runtime.errors import ModelError, one_line

GROUP_SIZES = (1, 2, 5, 12)
DETECTOR_SIZES = ((1, 224, 224), (2, 128, 96), (3, 96, 160))  # images, width, height; where a detector leaves them open

Call = dict[str, NDArray[Any]]  # an array for each input
Outputs = list[NDArray[np.float32]]


def check_dynamic(path: Path, interface: Interface) -> None:
    """Raise ModelError for an ICNet that was exported for groups or banks of one size."""
    if interface.kind is ExportKind.DETECTOR:
        return
    if static := [spec for spec in interface.inputs if isinstance(spec.shape[0], int)]:
        raise ModelError(
            f"{path}: exported for a fixed size, {static[0]}; export it with dynamic axes (icnet export does)"
        )


def sample_calls(interface: Interface) -> list[Call]:
    """Seeded groups of smooth noise, and degenerate ones: a black image, SISMs of all 0 and of all 1.

    A detector gets images of several sizes, as far as it takes them.
    """
    rng = np.random.default_rng(0)

    def smooth(n: int, channels: int, cells: int, size: tuple[int, int] = (SIZE, SIZE)) -> NDArray[np.uint8]:
        pixels = rng.integers(0, 256, (n, cells, cells, channels), np.uint8)
        return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pixels])

    if interface.kind is ExportKind.DETECTOR:
        spec = interface.inputs[0]
        first = channels_first(spec)
        height, width = map(fixed, spec.shape[2:] if first else spec.shape[1:3])
        pixels: list[NDArray[Any]] = [
            smooth(interface.size or n, 3, 12, (width or w, height or h)) for n, w, h in DETECTOR_SIZES
        ]
        pixels.append(np.zeros_like(pixels[0]))
        if spec.dtype != "uint8":  # about as most detectors' pixels are normalised
            pixels = [((p / np.float32(255) - np.float32(0.45)) / np.float32(0.225)).astype(spec.dtype) for p in pixels]
        return [{spec.name: np.ascontiguousarray(p.transpose(0, 3, 1, 2) if first else p)} for p in pixels]
    groups = [(smooth(n, 3, 12), smooth(n, 3, 6)[..., 0]) for n in GROUP_SIZES]
    images, sisms = groups[1]
    black = images.copy()
    black[1] = 0
    groups += [(black, sisms), (images, np.zeros_like(sisms)), (images, np.full_like(sisms, 255))]
    calls: list[Call] = [{"images": images, "sisms": sisms} for images, sisms in groups]
    for call in calls:
        n = len(call["images"])
        if interface.kind is ExportKind.PACKED:
            call["groups"] = rng.choice(np.array([7, -3], np.int32), n)
        if interface.kind is ExportKind.BANKED:
            call["bank"] = rng.standard_normal((n * n, interface.inputs[-1].sizes[0]), np.float32)
    return calls


def prove(
    output: Path, engine: str, interface: Interface, precision: str, found: Outputs, expected: Outputs, noisy: Outputs
) -> dict[str, float]:
    """Compare an engine's outputs with ONNX Runtime's.

    Args:
        output: the engine's file, for messages.
        engine: its name, likewise.
        interface: the model's.
        precision: a key of `ALLOWED_FLOORS`.
        found: the engine's outputs.
        expected: ONNX Runtime's.
        noisy: ONNX Runtime's with the rounding of the precision.

    Returns:
        `max` and `mean` of |Δ|.

    Raises:
        ModelError: they differ by more than rounding explains, or are not finite.
    """
    if not all(np.isfinite(array).all() for array in expected):
        raise ModelError(
            f"{output}: not written: the ONNX file computes NaN or infinite values; its weights may be damaged"
        )
    delta, floor = _difference(found, expected), _difference(noisy, expected)
    factor = ALLOWED_FLOORS[precision]
    most, mean = factor * floor.max(), factor * floor.mean()
    if interface.kind is not ExportKind.INTRA:
        most, mean = max(most, NEGLIGIBLE_MAX), max(mean, NEGLIGIBLE_MEAN)
    if not (delta.max() <= most and delta.mean() <= mean):
        raise ModelError(
            f"{output}: not written: {engine}'s {interface.output.name} differ from ONNX Runtime's by "
            f"{delta.max():.1e} at most and {delta.mean():.1e} on average, where rounding explains {most:.1e} and "
            f"{mean:.1e}"
        )
    return {"max": float(delta.max()), "mean": float(delta.mean())}


def run_onnx(onnx_path: Path, data: bytes, calls: Sequence[Call], output: str, optimised: bool = True) -> Outputs:
    """ONNX Runtime's outputs for the calls.

    Args:
        onnx_path: the model's file, for messages.
        data: the model.
        calls: see `sample_calls`.
        output: which output.
        optimised: whether ONNX Runtime may rewrite the graph; not, it computes Q/DQ to the letter.

    Raises:
        ModelError: it can't run the model.
    """
    session = cpu_session(onnx_path, data, optimised=optimised)
    try:
        return [session.run([output], call)[0] for call in calls]
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"{onnx_path}: ONNX Runtime can't run it: {one_line(error)}") from error


def _difference(found: Outputs, expected: Outputs) -> NDArray[np.floating]:
    """|Δ| of all values of all calls; infinite where a value is not finite, or an output has another shape."""
    pairs = zip(found, expected, strict=True)
    deltas = [np.abs(f - e) if f.shape == e.shape else np.full(e.shape, np.inf) for f, e in pairs]
    delta = np.concatenate([each.ravel() for each in deltas])
    return np.where(np.isfinite(delta), delta, np.inf)
