"""python benchmarks/latency.py: how fast is each way to run ICNet on this machine, and how much memory does it take?

Contenders are what is installed here, and the model files that are given. All run interleaved in one process, in a new
random order every round, on the same inputs, once they are warm. Absolute times hold for the machine and the moment;
the ratio is the result, with its 95 % bootstrap interval. Among them runs a large matrix product (FP32 on a CPU, FP16
on a GPU), for the share of the machine's best rate. Memory is the peak of a process that runs one runner alone, and
the first map is counted from the start of that process. Who would not fit into the free memory, by these peaks, beside
those that are loaded is left out of a group, and so is whose own process died at it.

Nobody wins by being wrong: maps are compared with those of the first runner (on a GPU, with those of ONNX Runtime on
the CPU), by a bound on the mean of |Δ| that is the precision's own (see `agreement.py`), pooled over groups that all
compute before the comparison and those of the comparison. Who can't run, or fails on the way, is listed with the
reason.

Last come whole groups, from JPEG files to PNG maps: see `end_to_end.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet bench`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks import end_to_end, gpu
from benchmarks.agreement import Agreement, bounds, judged, precision_of, prepare
from benchmarks.gpu import Gpu
from benchmarks.machine import available_memory, machine, matrix_product, name_of, wide_console
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
    given_to_tensorrt,
    inputs,
    load,
    reason,
)
from benchmarks.timing import Times, interleaved, interval, line, percentiles, ratio, warm_up
from evaluation.record import labels
from export.icnet import ICNet
from export.operations import total_flop
from runtime import ICNetError, InputError, ModelError, OutputError, Predictor
from runtime.files import digest, replacing, same_file, write_json
from runtime.predictor import MAX_THREADS
from runtime.threads import cores

Results = dict[str, Any]
Maps = NDArray[np.float32]

SIZES = {"cpu": [1, 2, 5, 10, 20], "cuda": [1, 5, 16, 64]}
ROUNDS = {"cpu": 7, "cuda": 30}
MIN_WARM_UPS = {"cpu": 2, "cuda": 6}  # a slot captures its CUDA graph when a size comes a second time, of two slots
PRODUCT = "matrix product"
# Whose way from files to files is measured, and which file each of them runs.
WAY = {"ours, ONNX Runtime": OURS_ONNX, "ours, TensorRT FP16": Path(HALF_ONNX).with_suffix(".engine").name}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench`."""
    add = parser.add_argument
    add(
        "models",
        type=Path,
        nargs="*",
        metavar="MODEL",
        help="model files to compare; with --checkpoint also against all that is installed here "
        "(which is what is compared if none is given), and then their maps are judged",
    )
    add("--device", choices=SIZES, default="cpu", help="where to run (default cpu)")
    add("--checkpoint", type=Path, help="default: random weights of width 1 (the time is the same)")
    add("--only", nargs="+", metavar="TEXT", help="only runners whose name holds one of these, e.g. ours OpenVINO")
    add("--sizes", type=int, nargs="+", help="group sizes (default 1 2 5 10 20; on a GPU 1 5 16 64)")
    add("--rounds", type=int, help="timed calls per runner and size (default 7; on a GPU 30)")
    add("--seconds", type=float, help="per size; once they have passed and there are 3 rounds, no further one begins")
    add("--threads", type=int, default=cores(), help="CPU threads (default: all)")
    add(
        "--memory",
        type=int,
        nargs="+",
        metavar="SIZE",
        help="sizes whose memory is measured, in a process per runner (default: all; 0: none)",
    )
    add(
        "--files",
        type=int,
        nargs="+",
        metavar="SIZE",
        help="sizes whose way from JPEG files to PNG maps is measured (default: all; 0: none)",
    )
    add("--output", type=Path, help="write the results as JSON (default for a GPU: benchmarks/results/gpu_NAME.json)")


def run(args: argparse.Namespace) -> int:
    """Compare the runners, print tables and write the results; an interrupted comparison leaves what it has measured.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: an option out of range, or a model file that is not there.
        DependencyError: there is no GPU to run on.
        CheckpointError: the checkpoint can't be loaded.
        ModelError: the runner that all others are compared with does not run.
        OutputError: the results can't be written.
    """
    sizes, rounds = args.sizes or SIZES[args.device], ROUNDS[args.device] if args.rounds is None else args.rounds
    if min(sizes) < 1 or rounds < 1 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--sizes, --rounds and --threads take numbers from 1 (--threads to {MAX_THREADS})")
    for model in args.models:
        if not model.is_file():
            raise InputError(f"{model}: no such model file")
    card = gpu.find() if args.device == "cuda" else None
    output = args.output or (Path(f"benchmarks/results/gpu_{card.slug}.json") if card else None)
    if output and any(same_file(file, output) for file in filter(None, (args.checkpoint, *args.models))):
        raise OutputError(f"{output}: is one of the models; choose another --output")
    comparison = Comparison(args.models, args.checkpoint, sizes, rounds, args.threads, card, args.only, args.seconds)
    with replacing(output) if output else nullcontext() as temporary:
        results = comparison.run(args.memory, args.files)
        if results["interrupted"] and not results["groups"]:
            raise KeyboardInterrupt  # there is nothing to keep
        if temporary:
            write_json(temporary, results)
    if output:
        print(f"{output}: written")
    return 130 if results["interrupted"] else 0


@dataclass
class Comparison:
    """A comparison, on the CPU or on `card`.

    Attributes:
        models: model files to compare. If there are some, other runners take part only if there is a checkpoint too.
        checkpoint: whose network is compared; None for random weights of width 1.
        sizes: the group sizes.
        rounds: timed calls per runner and size.
        threads: CPU threads.
        card: the GPU; None for the CPU.
        only: texts of which a runner's name must hold one; None for all.
        seconds: after which no further round of a size begins, once there are three.
    """

    models: Sequence[Path]
    checkpoint: Path | None
    sizes: Sequence[int]
    rounds: int
    threads: int
    card: Gpu | None = None
    only: Sequence[str] | None = None
    seconds: float | None = None
    results: Results = field(init=False)
    _peaks: dict[str, dict[int, int]] = field(init=False, default_factory=dict)  # memory by runner and size

    def run(self, memory: Sequence[int] | None = None, files: Sequence[int] | None = None) -> Results:
        """Compare, and print tables. Ctrl-C ends it early: the results then say so.

        Args:
            memory: the sizes whose memory is measured; None for all.
            files: likewise, those whose way from files to files is.

        Raises:
            what `run` of this module does.
        """
        console = wide_console()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        memory, files = ([n for n in self.sizes if chosen is None or n in chosen] for chosen in (memory, files))
        runners = self._runners()
        self.results = {
            "machine": machine(self.threads) | (gpu.description(self.card) if self.card else {}),
            "first": next(iter(runners)),
            "models": {k: {"sha256": digest(p), "bytes": p.stat().st_size} for k, p in self._files().items()},
            "interrupted": False,
            "not_run": {},
            "bounds": {},
            "groups": [],
            "end_to_end": [],
        }
        steps = len(runners) * (1 + len(memory)) + len(self.sizes) * self.rounds
        with (
            tempfile.TemporaryDirectory() as name,
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task("exporting", total=steps)

            def step(text: str | None = None) -> None:
                progress.update(bar, advance=0 if text else 1, description=text and escape(text))

            try:
                self._run(Path(name), runners, memory, files, step)
            except KeyboardInterrupt:
                self.results["interrupted"] = True
        self.print(console)
        return self.results

    def print(self, console: Console) -> None:
        """The tables, and who did not run or disagrees."""
        results = self.results
        if results["groups"]:
            console.print(table(results))
        if results["end_to_end"]:
            console.print(end_to_end.table(results))
        plain = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        for label, why in results["not_run"].items():
            plain(f"not run: {label}: {why}")
        rows = [item for group in results["groups"] for item in group["runners"].items()]
        for label in dict.fromkeys(label for label, row in rows if row["agrees"] is False):
            plain(f"disagrees: {label}: its maps differ from the reference by more than rounding explains")
        if len({label for label, _ in rows}) > 1 and all(row["agrees"] is None for _, row in rows):
            plain("not judged: whether the maps agree; that takes the --checkpoint they are of")
        if results["interrupted"]:
            plain("interrupted: this is what was measured until then")

    def _files(self) -> dict[str, Path]:
        return dict(zip(labels(self.models), self.models, strict=True))

    def _runners(self) -> dict[str, Runner]:
        found = {} if self.models and not self.checkpoint else dict(GPU_RUNNERS if self.card else RUNNERS)
        for label, path in self._files().items():
            precision = precision_of(path)
            found[label] = given(path, precision)
            if self.card and path.suffix == ".onnx":
                found[f"{label}, TensorRT"] = given_to_tensorrt(path, precision)
        if self.only:
            found = {k: v for k, v in found.items() if any(text.lower() in k.lower() for text in self.only)}
        if not found:
            raise InputError(f"--only {' '.join(self.only or ())}: no runner's name holds any of these")
        return found

    def _run(
        self,
        folder: Path,
        runners: dict[str, Runner],
        memory: Sequence[int],
        files: Sequence[int],
        step: Callable[..., None],
    ) -> None:
        setting = Setting(folder, self.threads, self.sizes, self.card.device if self.card else "cpu")
        paths, results = self._files(), self.results
        own = not self.models or self.checkpoint is not None
        network = prepare(folder, self.checkpoint, half=self.card is not None) if own else None
        with ExitStack() as stack:
            started: dict[str, Run] = {}
            for label, runner in runners.items():
                step(f"starting {label}")
                try:
                    started[label] = stack.enter_context(runner.start(setting))
                except Exception as error:  # there is no end of what can be missing
                    results["not_run"][label] = reason(error)
                step()
            if (first := results["first"]) not in started:
                why = results["not_run"][first]
                raise ModelError(f"{first} does not run, and all others are compared with it: {why}")
            reference = None
            if network and self.card:
                reference = stack.enter_context(Predictor(folder / OURS_ONNX, threads=self.threads)).predict_tensors
            agreements = {label: Agreement(None) for label in started}
            if network and (len(started) > 1 or self.card):
                self._judge(network, started, runners, agreements, reference, step)
            graph = folder / OURS_ONNX if network else next((p for p in self.models if p.suffix == ".onnx"), None)
            for n in self.sizes:
                found = {k: self._alone(k, setting, n, step) for k in started} if n in memory else {}
                self._compare_group(n, started, agreements, reference, _flop(graph, n), found, step)
                torch.cuda.empty_cache()  # the next size's memory is anybody's
            started.clear()
        torch.cuda.empty_cache()
        ways = {k: folder / name for k, name in WAY.items() if (folder / name).exists()} | paths
        ways = {k: path for k, path in ways.items() if k in runners and k not in results["not_run"]}
        for label, path in ways.items() if files else ():
            try:
                with load(path, setting) as predictor:
                    for n in files:
                        step(f"files, {label}, group of {n}")
                        row = end_to_end.measure(predictor, n, self.rounds, self.threads, self.seconds)
                        results["end_to_end"].append({"runner": label, **row})
            except ICNetError as error:
                results["not_run"][f"{label}, files"] = str(error)

    def _judge(
        self,
        network: ICNet,
        started: dict[str, Run],
        runners: dict[str, Runner],
        agreements: dict[str, Agreement],
        reference: Run | None,
        step: Callable[..., None],
    ) -> None:
        """Give every runner its bound, and compare its maps of the groups that the noise floor is measured on."""
        step("measuring the noise floor")
        precisions = {label: runners[label].precision for label in started}
        if self.card:  # libraries may compute FP32 as TF32, which keeps as many bits as FP16 does
            precisions = {label: "fp16" if p == "fp32" else p for label, p in precisions.items()}
        groups = judged(max(self.sizes))
        self.results["bounds"] = bounds(network, sorted({*precisions.values()}), groups)
        for label in started:
            agreements[label].bound = self.results["bounds"][precisions[label]]
        for group in groups:
            n = len(group[0])
            step(f"comparing, group of {n}")
            maps: dict[str, Maps] = {}
            for label, run in started.items():
                try:
                    maps[label] = run(*group)
                except Exception as error:  # a file that takes other sizes only: the comparison's own must do
                    self.results["not_run"][f"{label}, group of {n}, to compare"] = reason(error)
            expected = reference(*group) if reference else maps.get(self.results["first"])
            if expected is not None:
                for label, found in maps.items():
                    agreements[label].add(np.abs(found - expected))

    def _alone(self, label: str, setting: Setting, n: int, step: Callable[..., None]) -> Results | None:
        """Memory and first map of a process that runs one runner alone; None if it died, nothing if it failed."""
        step(f"memory, group of {n}, {label}")
        paths = {k: path.absolute() for k, path in self._files().items()}
        paths |= {f"{k}, TensorRT": engine_of(setting.folder, str(path)) for k, path in paths.items() if self.card}
        try:
            found = alone(str(paths.get(label, label)), setting, n)
        except ICNetError as error:
            self.results["not_run"][f"{label}, alone, group of {n}"] = str(error)
            return None if isinstance(error, Died) else {}
        finally:
            step()
        del found["times_s"]
        self._peaks.setdefault(label, {})[n] = found["peak_memory_bytes"]
        return found

    def _need(self, label: str, n: int) -> float:
        """Bytes that a runner takes at most for a group of n, as far as other sizes tell; 0 if they don't."""
        peaks = self._peaks.get(label, {})
        if n in peaks or len(peaks) < 2:
            return peaks.get(n, 0)
        offset, slope = line([*peaks], [*peaks.values()])
        return offset + slope * n

    def _compare_group(
        self,
        n: int,
        started: dict[str, Run],
        agreements: dict[str, Agreement],
        reference: Run | None,
        flop: int | None,
        found: dict[str, Results | None],
        step: Callable[..., None],
    ) -> None:
        """The comparison for one size; what was `found` of it before goes into the rows."""
        kind = "cuda" if self.card else "cpu"
        tensors, first = inputs(n), self.results["first"]
        maps: dict[str, Maps] = {}

        def call(label: str) -> None:
            if label in failed:
                return
            try:
                maps[label] = started[label](*tensors)
            except Exception as error:  # out of memory, above all
                failed.add(label)
                self.results["not_run"][f"{label}, group of {n}"] = reason(error)

        failed = {label for label, row in found.items() if row is None}
        most = 0.0  # that any of those before takes again in every round
        for label in started:
            if label in failed:
                continue
            free, need = available_memory(), self._need(label, n)
            if free is not None and need + most > free:
                failed.add(label)
                why = f"would take {need / 1e9:.1f} GB, and others {most / 1e9:.1f} GB, of the {free / 1e9:.1f} GB free"
                self.results["not_run"][f"{label}, group of {n}"] = why
                continue
            most = max(most, need)
            step(f"group of {n}, warming up {label}")
            warm_up(partial(call, label), MIN_WARM_UPS[kind])
            if label not in failed and not np.isfinite(maps[label]).all():
                failed.add(label)
                self.results["not_run"][f"{label}, group of {n}"] = "its maps hold NaN or infinite values"
        step(f"group of {n}")
        work = matrix_product(self.card.device if self.card else "cpu", self.threads)
        work.run()
        calls: dict[str, Callable[[], object]] = {k: partial(call, k) for k in started if k not in failed}
        times: Times = {}
        try:
            for _ in interleaved(calls | {PRODUCT: work.run}, times, self.rounds, self.seconds):
                step()
        finally:  # also if interrupted
            if times:
                ran = {k: times[k] for k in calls if k not in failed}
                rate = work.amount / float(np.median(times[PRODUCT]))
                group: Results = {"n": n, "rounds": len(times[PRODUCT]), "matrix_product_flop_per_s": rate}
                self.results["groups"].append(group | {"flop": flop, "runners": {}})
                expected = reference(*tensors) if reference else maps.get(first)
                for label, seconds in ran.items():
                    row = percentiles(seconds)
                    row["images_per_s"] = n / row["median_s"]
                    share = flop and flop / row["median_s"] / rate
                    other: Results = {"share_of_matrix_product": share, "mean_difference": None, "agrees": None}
                    if first in ran:
                        other |= ratio(ran[first], seconds)
                        other["mean_difference"] = float(np.abs(maps[label] - maps[first]).mean())
                    if expected is not None:
                        difference = np.abs(maps[label] - expected)
                        other["agrees"] = agreements[label].add(difference)
                        if reference:
                            other["mean_difference_from_cpu"] = float(difference.mean())
                    self.results["groups"][-1]["runners"][label] = row | other | (found.get(label) or {})


def _flop(graph: Path | None, n: int) -> int | None:
    """What a group of n costs; None if there is no file that says so."""
    try:
        return total_flop(graph, n) if graph else None
    except ModelError:  # a file of another maker, or none at all
        return None


# heading: (key, factor, format)
COLUMNS: dict[str, tuple[str, float, str]] = {
    "ms": ("median_s", 1e3, ".0f"),
    "p90": ("p90_s", 1e3, ".0f"),
    "p99": ("p99_s", 1e3, ".0f"),
    "images/s": ("images_per_s", 1, ".1f"),
    "MB": ("peak_memory_bytes", 1e-6, ".0f"),
    "start, s": ("first_map_s", 1, ".1f"),
    "of peak": ("share_of_matrix_product", 1, ".0%"),
    "|Δ|": ("mean_difference", 1, ".0e"),
}
GPU_COLUMNS = COLUMNS | {
    "ms": ("median_s", 1e3, ".2f"),
    "p90": ("p90_s", 1e3, ".2f"),
    "p99": ("p99_s", 1e3, ".2f"),
    "GPU MB": ("peak_gpu_memory_bytes", 1e-6, ".0f"),
    "|Δ| CPU": ("mean_difference_from_cpu", 1, ".0e"),
}


def table(results: Results) -> Table:
    """The comparison, for a terminal."""
    columns = GPU_COLUMNS if "gpu" in results["machine"] else COLUMNS
    grid = Table(
        title=escape(f"{name_of(results['machine'])}; times of a whole group"),
        caption=escape(
            f"ratio: times as fast as {results['first']}, with its 95 % interval; p99: of few rounds, the slowest; MB: "
            "peak of a process that runs it alone; start: from the start of that process to the first map; of peak: "
            "convolutions and products per second, as a share of a large matrix product's rate; |Δ|: mean difference "
            "of the maps; !: disagrees"
        ),
    )
    grid.add_column("N", justify="right")
    grid.add_column("runner")
    grid.add_column("ratio", justify="right", no_wrap=True)
    for heading in columns:
        grid.add_column(heading, justify="right", no_wrap=True)
    for group in results["groups"]:
        for label, row in group["runners"].items():
            cells = [interval(row) if "ratio" in row else "–"]
            for key, factor, form in columns.values():
                value = row.get(key)
                cells.append("–" if value is None else f"{value * factor:{form}}")
            grid.add_row(str(group["n"]), escape(label) + (" !" if row["agrees"] is False else ""), *map(escape, cells))
        grid.add_section()
    return grid
