"""`icnet bench latency --best`: which engine and precision is the fastest here, within a drop of accuracy?

Everything that is installed is made by the commands that a user would type, scored on a data set with ground truths,
and raced. Half of the data set's groups calibrate INT8, the other half score; without a data set there is no INT8, and
files are as accurate as their proofs say.
"""

import argparse
import io
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from benchmarks.records import Latency
from benchmarks.render import wide_console
from evaluation.dataset import BUILTIN, Dataset, evaluate, find_dataset
from evaluation.metrics import Metrics
from runtime import ICNetError, InputError, Predictor
from runtime.commands.detector import sism_folder
from runtime.openvino_library import has_bf16

FIRST = "onnxruntime.fp32.onnx"  # the default, with which all are compared
MAX_DROP = 0.005
ENOUGH = 300  # images that score; fewer can't tell a drop of 0.005 (docs/int8.md)
STOPPED = (130, 143)  # exit codes


@dataclass(frozen=True)
class Candidate:
    """A file in a folder, and the commands of `icnet` that make it."""

    path: Path
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Entry:
    """A candidate that was made.

    candidate: the file. loss: the larger of what S-measure and max F lose against `FIRST`; None if nothing scores them.
    """

    candidate: Candidate
    loss: float | None


class Comparison(Protocol):
    """What `benchmarks.latency` has for the race."""

    def run(self, memory: Sequence[int] | None, files: Sequence[int] | None, output: Path | None) -> Latency:
        """Race the files, and print and write the results."""
        ...


def run(args: argparse.Namespace, comparison: Callable[[list[Path]], Comparison]) -> int:
    """Race everything that can be made of a checkpoint or an export, and name the winners.

    Args:
        args: the options of `icnet bench latency`.
        comparison: of these files, the first of which is what the others are compared with.

    Returns:
        0, or 130 if the race was interrupted.

    Raises:
        InputError: options that don't go together, or a data set that can't be used.
        ICNetError: the default can't be made, or does not run.
    """
    if args.device != "cpu" or args.only or len(args.models) + (args.checkpoint is not None) != 1:
        raise InputError("--best takes one ONNX export or a --checkpoint, for the CPU, and no --only")
    if args.max_drop is not None and not args.data:
        raise InputError("--max-drop is measured on a data set: give --data")
    console = wide_console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.models:
            shutil.copyfile(args.models[0], folder / FIRST)
        source = ("export", "--checkpoint", str(args.checkpoint or "CHECKPOINT"))
        drop = MAX_DROP if args.max_drop is None else args.max_drop
        entries = enter(source, folder, args.data, drop, args.threads, console)
        race = comparison([entry.candidate.path for entry in entries.values()])
        results = race.run(args.memory or [0], args.files or [0], args.output)
        table, commands = conclusion(results, entries, folder, args.data)
    console.print(table)
    for command in commands:
        print(command)
    return 130 if results["interrupted"] else 0


def candidates(source: tuple[str, ...], folder: Path, groups: Path | None) -> Iterator[Candidate]:
    """The files to race, the default first.

    Args:
        source: the command, without its output, that makes the FP32 export.
        folder: where files go.
        groups: what INT8 is calibrated on; None for no INT8.
    """
    onnx = folder / FIRST
    export = (*source, "--output", str(onnx))

    def build(backend: str, file: Path, output: Path, *options: str) -> tuple[str, ...]:
        return ("build", "--backend", backend, "--onnx", str(file), "--output", str(output), *options)

    yield Candidate(onnx, (export,))
    yield Candidate(folder / "mnn.fp32.mnn", (export, build("mnn", onnx, folder / "mnn.fp32.mnn")))
    floats = ("fp32", "bf16") if _bf16() else ("fp32",)
    for precision in floats:
        path = folder / f"openvino.{precision}.xml"
        yield Candidate(path, (export, build("openvino", onnx, path, "--precision", precision)))
    for engine in ("onnxruntime", "openvino") if groups else ():
        int8 = folder / f"{engine}.int8.onnx"
        calibrate = ("calibrate", "--onnx", str(onnx), "--groups", str(groups), "--engine", engine)
        made = (export, (*calibrate, "--output", str(int8)))
        if engine == "onnxruntime":
            yield Candidate(int8, made)
            continue
        for precision in floats:
            path = folder / f"openvino.int8.{precision}.xml"
            yield Candidate(path, (*made, build("openvino", int8, path, "--precision", precision)))


def enter(
    source: tuple[str, ...], folder: Path, data: Path | None, max_drop: float, threads: int, console: Console
) -> dict[str, Entry]:
    """Make and score every candidate, by its file's name; those that fail or lose more are named and left out.

    Raises:
        InputError: the data set can't be used.
        ICNetError: the default can't be made.
    """
    dataset, groups = _halves(data, folder / "calibration") if data else (None, None)
    if dataset is not None and dataset.images < ENOUGH:
        console.print(f"note: {dataset.images} images can't tell a drop of {max_drop:g} for sure; {ENOUGH} may")
    found: dict[str, Entry] = {}
    default: Metrics | None = None
    for candidate in candidates(source, folder, groups):
        name = candidate.path.name
        with console.status(f"making {name}"):
            why = _make(candidate)
        if why is not None and name == FIRST:
            raise ICNetError(why)
        if why is not None:
            console.print(f"{name}: left out: {why}", markup=False)
            continue
        loss = None
        if dataset is not None:
            with console.status(f"scoring {name}"), Predictor(candidate.path, threads=threads) as predictor:
                scores = evaluate(dataset, predictor.predict_groups(dataset.inputs()))
            default = default or scores
            loss = max(default.s - scores.s, default.max_f - scores.max_f)
            if loss > max_drop:
                console.print(f"{name}: left out: loses {loss:.4f} of S or max F, more than {max_drop:g}")
                continue
        found[name] = Entry(candidate, loss)
    return found


def conclusion(results: Latency, entries: dict[str, Entry], folder: Path, data: Path | None) -> tuple[Table, list[str]]:
    """The winner of every group size, and the commands that make the winners, as they would be typed."""
    table = Table(title="The fastest by group size")
    for column in ("N", "file", "ms", "× ONNX Runtime FP32", "lost"):
        table.add_column(column, justify="left" if column == "file" else "right")
    commands: dict[str, None] = {}
    for group in results["groups"]:
        rows = group["runners"]
        if not rows:  # too large for the memory
            continue
        label = min(rows, key=lambda name: rows[name]["median_s"])
        entry, time = entries[label], rows[label]["median_s"]
        gain = f"{rows[FIRST]['median_s'] / time:.2f}" if FIRST in rows else "–"
        loss = "–" if entry.loss is None else f"{entry.loss:+.4f}"
        table.add_row(str(group["n"]), label, f"{1000 * time:.0f}", gain, loss)
        for command in entry.candidate.commands:
            text = shlex.join(("icnet", *command)).replace(str(folder / "calibration"), shlex.quote(str(data)))
            commands[text.replace(f"{folder}/", "")] = None
    return table, [*commands]


def _bf16() -> bool:
    try:
        import openvino
    except ImportError:
        return False
    return has_bf16(openvino.Core())


def _make(candidate: Candidate) -> str | None:
    """Run a candidate's commands, but those whose file is there already; returns why it could not be made."""
    from icnet_cli import main

    for command in candidate.commands:
        if Path(command[command.index("--output") + 1]).exists():
            continue
        said = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = main(command)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code:
            return said.getvalue().strip().rpartition("\n")[2].partition("error: ")[2] or f"exit code {code}"
    return None


def _halves(data: Path, folder: Path) -> tuple[Dataset, Path]:
    """Every other group of a data set, to score; and a folder of links to the rest, to calibrate on."""
    dataset = find_dataset(data, sism_folder(data, None) or BUILTIN)
    if len(dataset.groups) < 2:
        raise InputError(f"{data}: one group; --best takes some groups to calibrate on, and others to score")
    for group in dataset.groups[::2]:
        for kind, files in (("img", group.images), ("sism", group.sisms or ())):
            place = folder / kind / group.name
            place.mkdir(parents=True, exist_ok=True)
            for file in files:
                (place / Path(file).name).symlink_to(Path(file).absolute())
    return replace(dataset, groups=dataset.groups[1::2], ground_truths=dataset.ground_truths[1::2]), folder
