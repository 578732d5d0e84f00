"""What the commands of the four measurements have in common: options, progress, Ctrl-C, and results."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.describe import PAGES
from benchmarks.render import to_terminal, wide_console
from evaluation.record import recording
from runtime import InputError
from runtime.commands.options import number
from runtime.predictor import MAX_THREADS
from runtime.threads import cores


def add_common_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """The options --threads and --output; with `device` also --device."""
    add = parser.add_argument
    if device:
        add("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    add("-t", "--threads", type=number(1, MAX_THREADS), default=cores(), help="CPU threads of a call (default: all)")
    add("-o", "--output", type=Path, help="write the results as JSON")


def check_models(models: Sequence[Path]) -> None:
    """Raises InputError if one of the model files is missing."""
    for model in models:
        if not model.is_file():
            raise InputError(f"{model}: no such model file")


@contextmanager
def measuring(
    results: Mapping[str, Any],
    output: Path | None,
    *,
    inputs: Sequence[Path | None],
    keep: Callable[[], object],
    others: Mapping[Path, Callable[[Path], object]] | None = None,
) -> Iterator[Progress]:
    """Claim the outputs, measure, write the results, and print them; arguments and errors are those of `recording`."""
    console = wide_console()
    with recording(results, output, inputs=inputs, others=others, keep=keep, console=console) as progress:
        yield progress
    to_terminal(PAGES[results["kind"]](results), console)
