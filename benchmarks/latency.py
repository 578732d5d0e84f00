"""`icnet bench latency`: how fast is each way to run ICNet on this machine, and how much memory does it take?

All runners run interleaved in one process, in a new random order every round, on the same inputs, once they are warm.
A large matrix product runs among them, for the share of the machine's best rate. Memory is the peak of a process that
runs one runner alone; the time of the first map is counted from the start of that process. `agreement.py` judges the
maps. Last, groups are timed from files to files (`end_to_end.py`). docs/benchmarks.md has the details.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet bench latency`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["bench", "latency", *sys.argv[1:]]))

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape

from benchmarks import best, end_to_end, gpu
from benchmarks.agreement import Agreement, bounds, judged, precision_of, prepare
from benchmarks.command import add_common_arguments, check_models, measuring
from benchmarks.machine import available_memory, header, matrix_product
from benchmarks.records import Alone, Gpu, Group, Latency, RunnerRow
from benchmarks.runners import (
    GPU_RUNNERS,
    HALF_ONNX,
    OURS_ONNX,
    RUNNERS,
    Died,
    Run,
    Runner,
    Setting,
    alone,
    engine_of,
    given,
    inputs,
    load,
    reason,
)
from benchmarks.timing import Times, extrapolated, interleaved, percentiles, ratio, warm_up
from evaluation.record import labels
from export.icnet import ICNet
from export.onnx_file import total_flop
from runtime import ICNetError, InputError, ModelError, Predictor
from runtime.commands.options import number, share
from runtime.files import digest

Maps = NDArray[np.float32]

SIZES = {"cpu": [1, 2, 5, 10, 20], "cuda": [1, 5, 16, 64]}
ROUNDS = {"cpu": 7, "cuda": 30}
MIN_WARM_UPS = {"cpu": 2, "cuda": 6}  # each of two slots captures its CUDA graph at the second call of a size
PRODUCT = "matrix product"
# The runners that are also timed from files to files, and the file that each of them runs.
FILES = {
    "ours, ONNX Runtime": OURS_ONNX,
    "ours, OpenVINO": Path(OURS_ONNX).with_suffix(".fp32.xml").name,
    "ours, TensorRT FP16": Path(HALF_ONNX).with_suffix(".engine").name,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench latency`."""
    add = parser.add_argument
    add(
        "models",
        type=Path,
        nargs="*",
        metavar="MODEL",
        help="model files to compare; with --checkpoint also against all that is installed here "
        "(which is what is compared if none is given), and then their maps are judged",
    )
    add("--checkpoint", type=Path, help="default: random weights of width 1 (the time is the same)")
    add("--best", action="store_true", help="race all that can be made of a checkpoint or export for this CPU")
    add("--data", type=Path, help="of --best: data set with img/, gt/ and sism/; half calibrates INT8, half scores")
    add("--max-drop", type=share, help="of --best: how much S-measure and max F may drop on --data (default 0.005)")
    add("--only", nargs="+", metavar="TEXT", help="only runners whose name holds one of these, e.g. ours OpenVINO")
    add("--sizes", type=number(), nargs="+", help="group sizes (default 1 2 5 10 20; on a GPU 1 5 16 64)")
    add("--rounds", type=number(), help="timed calls per runner and size (default 7; on a GPU 30)")
    add("--seconds", type=float, help="per size; once they have passed and there are 3 rounds, no further one begins")
    sizes: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "SIZE"}
    add("--memory", **sizes, help="sizes whose memory is measured, in a process per runner (default: all; 0: none)")
    add("--files", **sizes, help="sizes that are timed from JPEG files to PNG maps (default: all; 0: none)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compare the runners, print tables and write the results; an interrupted comparison leaves what it has measured.

    On a GPU the results go to benchmarks/results/gpu_NAME.json unless --output says otherwise.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: a model file is missing, or --only names no runner.
        DependencyError: there is no GPU to run on.
        CheckpointError: the checkpoint can't be loaded.
        ModelError: the runner that all others are compared with does not run.
        OutputError: the results can't be written.
    """
    check_models(args.models)
    if args.best:
        sizes, rounds = args.sizes or SIZES["cpu"], args.rounds or ROUNDS["cpu"]
        return best.run(args, lambda files: Comparison(files, None, sizes, rounds, args.threads, seconds=args.seconds))
    if args.data or args.max_drop is not None:
        raise InputError("--data and --max-drop go with --best")
    sizes, rounds = args.sizes or SIZES[args.device], args.rounds or ROUNDS[args.device]
    card = gpu.find() if args.device == "cuda" else None
    output = args.output or (Path(f"benchmarks/results/gpu_{gpu.slug(card['gpu'])}.json") if card else None)
    comparison = Comparison(args.models, args.checkpoint, sizes, rounds, args.threads, card, args.only, args.seconds)
    return 130 if comparison.run(args.memory, args.files, output)["interrupted"] else 0


@dataclass
class Comparison:
    """A comparison, on the CPU or on the GPU `card`; its attributes are the options of `add_arguments`.

    Model files are compared with each other, and with a checkpoint also with all other runners. Without either, the
    other runners have random weights of width 1.
    """

    models: Sequence[Path]
    checkpoint: Path | None
    sizes: Sequence[int]
    rounds: int
    threads: int
    card: Gpu | None = None
    only: Sequence[str] | None = None
    seconds: float | None = None
    results: Latency = field(init=False)
    _loaded: dict[str, "_Loaded"] = field(init=False, default_factory=dict)
    _reference: Run | None = field(init=False, default=None)  # on a GPU: ONNX Runtime on the CPU
    _step: Callable[..., None] = field(init=False)  # names the next step, or counts the last as done

    def run(
        self, memory: Sequence[int] | None = None, files: Sequence[int] | None = None, output: Path | None = None
    ) -> Latency:
        """Compare, print tables, and write the results. Ctrl-C ends it early: the results then say so.

        Args:
            memory: the sizes whose memory is measured; None for all.
            files: likewise, those that are timed from files to files.
            output: the JSON file; None for none.

        Raises:
            what `run` of this module does.
        """
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        memory, files = ([n for n in self.sizes if chosen is None or n in chosen] for chosen in (memory, files))
        runners = self._runners()
        results = self.results = {
            **header("latency", self.threads, self.card),
            "first": next(iter(runners)),
            "models": {k: {"sha256": digest(p), "bytes": p.stat().st_size} for k, p in self._files().items()},
            "not_run": {},
            "bounds": {},
            "groups": [],
            "end_to_end": [],
        }
        read = (self.checkpoint, *self.models)
        with (
            tempfile.TemporaryDirectory() as folder,
            measuring(results, output, inputs=read, keep=lambda: results["groups"]) as progress,
        ):
            steps = len(runners) * (1 + len(memory)) + len(self.sizes) * self.rounds
            bar = progress.add_task("exporting", total=steps)
            self._step = lambda text=None: progress.update(
                bar, advance=0 if text else 1, description=text and escape(text)
            )
            setting = Setting(Path(folder), self.threads, self.sizes, self._device)
            self._compare(setting, runners, memory)
            torch.cuda.empty_cache()
            self._time_files(setting, runners, files)
        return results

    @property
    def _device(self) -> str:
        """PyTorch's name for the device that the runners run on."""
        return gpu.DEVICE if self.card else "cpu"

    def _files(self) -> dict[str, Path]:
        return dict(zip(labels(self.models), self.models, strict=True))

    def _runners(self) -> dict[str, Runner]:
        found = {} if self.models and not self.checkpoint else dict(GPU_RUNNERS if self.card else RUNNERS)
        for label, path in self._files().items():
            precision = precision_of(path)
            found[label] = given(path, precision)
            if self.card and path.suffix == ".onnx":
                found[f"{label}, TensorRT"] = given(path, precision, build=True)
        if self.only:
            found = {k: v for k, v in found.items() if any(text.lower() in k.lower() for text in self.only)}
        if not found:
            raise InputError(f"--only {' '.join(self.only or ())}: no runner's name holds any of these")
        return found

    def _compare(self, setting: Setting, runners: dict[str, Runner], memory: Sequence[int]) -> None:
        """Load every runner, judge its maps, and time all of them at every size."""
        folder, not_run = setting.folder, self.results["not_run"]
        own = not self.models or self.checkpoint is not None
        network = prepare(folder, self.checkpoint, half=self.card is not None) if own else None
        with ExitStack() as stack:
            for label, runner in runners.items():
                self._step(f"starting {label}")
                try:
                    self._loaded[label] = _Loaded(stack.enter_context(runner.start(setting)), runner.precision)
                except Exception as error:  # each engine raises classes of its own
                    not_run[label] = reason(error)
                self._step()
            if (first := self.results["first"]) not in self._loaded:
                raise ModelError(f"{first} does not run, and all others are compared with it: {not_run[first]}")
            if network and self.card:
                predictor = Predictor(folder / OURS_ONNX, threads=self.threads)
                self._reference = stack.enter_context(predictor).predict_tensors
            if network and (len(self._loaded) > 1 or self.card):
                self._judge(network)
            graph = folder / OURS_ONNX if network else next((p for p in self.models if p.suffix == ".onnx"), None)
            for n in self.sizes:
                died = {label for label in self._loaded if n in memory and not self._alone(label, setting, n)}
                self._compare_group(n, _flop(graph, n), died)
                torch.cuda.empty_cache()  # so that any runner can have this memory at the next size
            self._loaded.clear()

    def _judge(self, network: ICNet) -> None:
        """Give every runner its bound, and compare its maps of the groups that the noise floor is measured on."""
        self._step("measuring the noise floor")
        groups = judged(max(self.sizes))
        for loaded in self._loaded.values():
            if self.card and loaded.precision == "fp32":  # may be TF32, which has as many bits as FP16
                loaded.precision = "fp16"
        self.results["bounds"] = bounds(network, sorted({x.precision for x in self._loaded.values()}), groups)
        for loaded in self._loaded.values():
            loaded.agreement.bound = self.results["bounds"][loaded.precision]
        for group in groups:
            n = len(group[0])
            self._step(f"comparing, group of {n}")
            maps: dict[str, Maps] = {}
            for label, loaded in self._loaded.items():
                try:
                    maps[label] = loaded.run(*group)
                except Exception as error:  # a file that does not take this size: the sizes of the comparison remain
                    self.results["not_run"][f"{label}, group of {n}, to compare"] = reason(error)
            expected = self._reference(*group) if self._reference else maps.get(self.results["first"])
            if expected is not None:
                for label, found in maps.items():
                    self._loaded[label].agreement.add(np.abs(found - expected))

    def _alone(self, label: str, setting: Setting, n: int) -> bool:
        """Note time and memory of a process that runs one runner alone; False if it died."""
        self._step(f"memory, group of {n}, {label}")
        paths = {k: path.absolute() for k, path in self._files().items()}
        paths |= {f"{k}, TensorRT": engine_of(setting.folder, str(path)) for k, path in paths.items() if self.card}
        try:
            self._loaded[label].alone[n] = alone(str(paths.get(label, label)), setting, n)
        except ICNetError as error:
            self.results["not_run"][f"{label}, alone, group of {n}"] = str(error)
            return not isinstance(error, Died)
        finally:
            self._step()
        return True

    def _compare_group(self, n: int, flop: int | None, failed: set[str]) -> None:
        """The comparison for one size, without the runners that have `failed`."""
        tensors, maps = inputs(n), dict[str, Maps]()

        def fail(label: str, why: str) -> None:
            failed.add(label)
            self.results["not_run"][f"{label}, group of {n}"] = why

        def call(label: str) -> None:
            if label in failed:
                return
            try:
                maps[label] = self._loaded[label].run(*tensors)
            except Exception as error:  # out of memory, above all
                fail(label, reason(error))

        most = 0.0  # bytes that the largest of the runners so far allocates again in every round
        for label in [label for label in self._loaded if label not in failed]:
            peaks = {size: found["peak_memory_bytes"] for size, found in self._loaded[label].alone.items()}
            free, need = available_memory(), extrapolated(peaks, n)
            if free is not None and need + most > free:
                others = f"and others {most / 1e9:.1f} GB, of the {free / 1e9:.1f} GB free"
                fail(label, f"would take {need / 1e9:.1f} GB, {others}")
                continue
            most = max(most, need)
            self._step(f"group of {n}, warming up {label}")
            warm_up(partial(call, label), MIN_WARM_UPS["cuda" if self.card else "cpu"])
            if label not in failed and not np.isfinite(maps[label]).all():
                fail(label, "its maps hold NaN or infinite values")
        self._step(f"group of {n}")
        work = matrix_product(self._device, self.threads)
        work.run()
        calls: dict[str, Callable[[], object]] = {k: partial(call, k) for k in self._loaded if k not in failed}
        times: Times = {}
        try:
            for _ in interleaved(calls | {PRODUCT: work.run}, times, self.rounds, self.seconds):
                self._step()
        finally:  # also if interrupted
            if times:
                product = times.pop(PRODUCT)
                group: Group = {
                    "n": n,
                    "rounds": len(product),
                    "matrix_product_flop_per_s": work.amount / float(np.median(product)),
                    "flop": flop,
                    "runners": {},
                }
                self.results["groups"].append(group)
                expected = self._reference(*tensors) if self._reference else maps.get(self.results["first"])
                ran = {label: times[label] for label in calls if label not in failed}
                for label in ran:
                    group["runners"][label] = self._row(label, group, ran, maps, expected)

    def _row(self, label: str, group: Group, ran: Times, maps: dict[str, Maps], expected: Maps | None) -> RunnerRow:
        """One runner at one size: its times, agreement with the maps that are `expected`, and its memory."""
        found, first, loaded = percentiles(ran[label]), self.results["first"], self._loaded[label]
        rate = group["flop"] and group["flop"] / found["median_s"] / group["matrix_product_flop_per_s"]
        row: dict[str, Any] = {
            **found,
            "images_per_s": group["n"] / found["median_s"],
            "share_of_matrix_product": rate,
            "mean_difference": None,
            "agrees": None,
        }
        if first in ran:
            row["mean_difference"] = float(np.abs(maps[label] - maps[first]).mean())
            row |= ratio(ran[first], ran[label])
        if expected is not None:
            difference = np.abs(maps[label] - expected)
            row["agrees"] = loaded.agreement.add(difference)
            if self._reference:
                row["mean_difference_from_cpu"] = float(difference.mean())
        row |= {key: value for key, value in loaded.alone.get(group["n"], {}).items() if key != "times_s"}
        return cast(RunnerRow, row)

    def _time_files(self, setting: Setting, runners: dict[str, Runner], sizes: Sequence[int]) -> None:
        """Time groups from JPEG files to PNG maps, for the runners that have a file which a Predictor runs."""
        paths = {k: setting.folder / name for k, name in FILES.items() if (setting.folder / name).exists()}
        for label, path in (paths | self._files()).items() if sizes else ():
            if label not in runners or label in self.results["not_run"]:
                continue
            try:
                with load(path, setting) as predictor:
                    for n in sizes:
                        self._step(f"files, {label}, group of {n}")
                        row = end_to_end.measure(label, predictor, n, self.rounds, self.seconds)
                        self.results["end_to_end"].append(row)
            except ICNetError as error:
                self.results["not_run"][f"{label}, files"] = str(error)


@dataclass
class _Loaded:
    """A runner that is loaded; `alone` is time and memory of a process of its own, by group size."""

    run: Run
    precision: str
    agreement: Agreement = field(default_factory=Agreement)
    alone: dict[int, Alone] = field(default_factory=dict)


def _flop(graph: Path | None, n: int) -> int | None:
    """FLOP of a group of n; None if there is no file to count them in."""
    try:
        return total_flop(graph, n) if graph else None
    except ModelError:  # not a file of ours
        return None
