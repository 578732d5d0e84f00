"""The options about SISMs: where they come from, and the detector that makes them."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from runtime.detector_families import PRESETS
from runtime.errors import InputError, printable
from runtime.files import bundled
from runtime.groups import check_folder
from runtime.predictor import BUILTIN as BUILTIN

logger = logging.getLogger("runtime.detector")


def add_detector_arguments(add: Callable[..., Any]) -> None:
    """The options of a command about its detector, by its parser's `add_argument`."""
    add(
        "--sism-model",
        metavar="FILE",
        help="an ONNX file of a detector (U²-Net, IS-Net, BiRefNet, EGNet …), which makes the SISMs",
    )
    add(
        "--sism-normalise",
        metavar="HOW",
        help=f"how its pixels are normalised, if the file's name does not tell: {', '.join(PRESETS)}, or MEAN,STD",
    )
    add(
        "--sism-minmax",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="stretch each of its maps to 0 … 1 (default: as the detector's authors do)",
    )


def sism_source(path: Path, sisms: str | None, sism_model: str | None) -> tuple[Path | None, str | Path | None]:
    """Where the SISMs of what is at `path` come from: their folder, or what makes them (a file, or "builtin").

    Args:
        path: a group, an image or a data set.
        sisms: the value of --sisms.
        sism_model: the value of --sism-model.

    Raises:
        InputError: both options were given, or there is nothing to predict at `path`.
    """
    check_folder(path)
    if sisms is not None and sism_model is not None:
        raise InputError("--sisms and --sism-model: give one, the SISMs or the detector that makes them")
    if sism_model is not None:
        return None, sism_model
    if sisms is not None or has_sisms(path):
        folder = sism_folder(path, sisms)
        return folder, BUILTIN if folder is None else None
    return None, default_detector(path)


def default_detector(source: object) -> str | Path:
    """What makes SISMs if nothing was said: the detector that comes with this package, or the built-in one, named."""
    if (detector := bundled("detector.onnx")) is not None:
        return detector
    logger.warning(
        "%s: no SISMs: OpenCV's static saliency takes their place, a weak stand-in; name their folder with --sisms, or "
        "a detector with --sism-model FILE",
        source,
    )
    return BUILTIN


def sism_folder(path: Path, sisms: str | None) -> Path | None:
    """The folder of the SISMs of what is at `path`, given --sisms; None for built-in ones.

    Raises:
        InputError: there is none, or nothing to predict at `path`.
    """
    check_folder(path)
    if sisms == BUILTIN:
        return None
    if sisms is not None:
        return Path(sisms)
    if has_sisms(path):
        return path / "sism"
    raise InputError(f"{path}: no SISMs: name their folder with --sisms DIR, or take --sisms {BUILTIN}")


def has_sisms(path: Path) -> bool:
    """Whether there is a data set with SISMs at `path`."""
    return (path / "img").is_dir() and (path / "sism").is_dir()


@contextmanager
def speaking(console: Console, prog: str) -> Iterator[None]:
    """Print what is said about detectors and their SISMs, each a line on standard error."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"{prog}: {printable(record.getMessage())}", markup=False)

    lines, level = Lines(), logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate, propagates = False, logger.propagate
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        logger.propagate = propagates
