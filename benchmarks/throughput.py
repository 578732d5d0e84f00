"""icnet bench throughput: how many groups per second does one Predictor take from many threads?

First the *capacity*: every thread has its next group ready as soon as its last is done. Then the same groups arrive at
random (a Poisson process) at a share of that capacity, and wait in one queue for a free thread. Several models get the
same groups at the same times, at a share of the first one's capacity; of a packed model, waiting groups share calls.

Idle is, on the CPU, the share of its cores' time in which this process did not compute (CPU time against wall time); on
a GPU, the share of the time in which no kernel ran, as nvidia-smi samples it.
"""

import argparse
import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.progress import Progress

from benchmarks import describe, gpu
from benchmarks.machine import header
from benchmarks.records import ServedModel, StreamRow, Throughput
from benchmarks.render import to_terminal, wide_console
from benchmarks.runners import Setting, inputs, load
from evaluation.record import labels, recording
from runtime import ICNetError, InputError, Predictor
from runtime.files import digest, write_bytes
from runtime.groups import find_groups
from runtime.predictor import MAX_THREADS
from runtime.threads import cores

SERVICE = "service"  # the built-in histogram
MAX_IMAGES = 4096  # in one group of a histogram
SAMPLES_MS = 100  # between nvidia-smi's

Histogram = dict[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench throughput`."""
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="MODEL", help="exports, engines, or whatever else a Predictor runs")
    add("--sizes", default=SERVICE, metavar="HISTOGRAM", help="JSON file, data set, or 'service' (default)")
    add("--save-sizes", type=Path, metavar="JSON", help="write that histogram to a file, e.g. a data set's")
    add("--groups", type=int, default=60, help="in each of the two streams (default 60)")
    add("--callers", type=int, default=4, help="threads that call the Predictor (default 4)")
    add("--load", type=float, default=0.7, help="arrivals as a share of the capacity (default 0.7)")
    add("-t", "--threads", type=int, default=cores(), help="CPU threads of one call (default: all)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where an ONNX file runs, and what is idle or not")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Run both streams, print a table and write the results; an interrupted run leaves what it has measured.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: an option out of range, or a histogram that can't be used.
        DependencyError: --device cuda without a GPU.
        ModelError: the model can't be loaded, or fails.
        OutputError: the results can't be written.
    """
    if min(args.groups, args.callers, args.threads) < 1 or max(args.callers, args.threads) > MAX_THREADS:
        raise InputError(f"--groups, --callers and --threads take numbers from 1 (threads to {MAX_THREADS})")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: expected a number from 0")
    if not 0 < args.load <= 2:
        raise InputError(f"--load {args.load:g}: expected a share of the capacity, e.g. 0.7")
    histogram = read_histogram(args.sizes)
    card = gpu.find() if args.device == "cuda" else None
    rng = np.random.default_rng(args.seed)
    shares = np.array([*histogram.values()]) / sum(histogram.values())
    sizes = [int(n) for n in rng.choice([*histogram], args.groups, p=shares)]
    gaps = rng.exponential(1, len(sizes))
    models: list[ServedModel] = []
    results: Throughput = {
        **header("throughput", args.threads, card),
        "histogram": histogram,
        "groups": args.groups,
        "callers": args.callers,
        "load": args.load,
        "models": models,
    }
    console = wide_console()
    setting = Setting(Path(), args.threads, [*histogram], args.device)
    saved = (
        {args.save_sizes: lambda path: write_bytes(path, (json.dumps(histogram) + "\n").encode())}
        if args.save_sizes
        else {}
    )

    def measured() -> bool:
        return any(found["streams"] for found in models)

    read = (*args.models, Path(args.sizes))
    with recording(results, args.output, inputs=read, others=saved, keep=measured, console=console) as progress:
        for label, path in zip(labels(args.models), args.models, strict=True):
            with load(path, setting) as predictor:
                for n in progress.track(sorted(set(sizes)), description=escape(f"{label}, warming up")):
                    predictor.predict_tensors(*inputs(n))
                found: ServedModel = {"name": label, "sha256": digest(path), "streams": {}}
                models.append(found)
                capacity = Stream(predictor, sizes, np.zeros(len(sizes)), args.callers)
                found["streams"]["capacity"] = capacity.run(progress, card is not None)
                rate = args.load * models[0]["streams"]["capacity"]["groups_per_s"]
                arriving = Stream(predictor, sizes, np.cumsum(gaps / rate), args.callers)
                found["streams"]["arriving"] = arriving.run(progress, card is not None)
    to_terminal(describe.throughput(results), console)
    return 130 if results["interrupted"] else 0


def read_histogram(source: str) -> Histogram:
    """How many groups there are of each size.

    Args:
        source: "service" (3 to 8 images, all alike), a JSON file {"size": groups}, or a data set with img/GROUP/.

    Raises:
        InputError: it is none of these.
    """
    if source == SERVICE:
        return dict.fromkeys(range(3, 9), 1)
    path = Path(source)
    if path.is_dir():
        groups = [group for group in find_groups(path, None) if group.problem is None]
        return dict(sorted(Counter(len(group.images) for group in groups).items()))
    try:
        found = {int(size): count for size, count in json.loads(path.read_text(encoding="utf-8")).items()}
        good = all(isinstance(c, int) and c >= 0 for c in found.values()) and sum(found.values()) > 0
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file or data set, and not '{SERVICE}'") from error
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f'{source}: not a histogram: expected JSON such as {{"3": 10, "4": 7}}') from error
    if not good or not all(1 <= size <= MAX_IMAGES for size in found):
        raise InputError(f"{source}: sizes must be 1 to {MAX_IMAGES} and their counts whole numbers, some above 0")
    return {size: count for size, count in sorted(found.items()) if count}


@dataclass
class Stream:
    """Groups that arrive at given times, in seconds from the start, and threads that take them in that order."""

    predictor: Predictor
    sizes: Sequence[int]
    arrivals: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]
    callers: int
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _rows: list[tuple[float, float, float]] = field(default_factory=list)  # arrival, taken, done
    _error: ICNetError | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, progress: Progress, on_gpu: bool) -> StreamRow:
        """Run to the end.

        Raises:
            ICNetError: a group failed.
        """
        tensors = {n: inputs(n) for n in set(self.sizes)}
        bar = progress.add_task("groups", total=len(self.sizes))
        sampler = _Sampler() if on_gpu else None
        cpu, start = time.process_time(), time.perf_counter()
        pool = [threading.Thread(target=self._work, args=(start, tensors), daemon=True) for _ in range(self.callers)]
        for thread in pool:
            thread.start()
        try:
            for thread in pool:
                while thread.is_alive():
                    thread.join(0.05)
                    progress.update(bar, completed=len(self._rows))
        finally:
            self._stopped.set()
            for thread in pool:
                thread.join()
            idle = sampler.stop() if sampler else None
        if self._error:
            raise self._error
        wall = time.perf_counter() - start
        if not on_gpu:
            idle = max(0.0, 1 - (time.process_time() - cpu) / (wall * cores()))
        arrival, taken, done = np.array(self._rows).T
        p50, p90, p99 = np.percentile(done - arrival, [50, 90, 99])
        return {
            "groups": len(done),
            "images": sum(self.sizes),
            "groups_per_s": len(done) / wall,
            "images_per_s": sum(self.sizes) / wall,
            "latency_s": {"median": float(p50), "p90": float(p90), "p99": float(p99)},
            "queue_s": {"median": float(np.median(taken - arrival)), "p99": float(np.percentile(taken - arrival, 99))},
            "idle_share": idle,
        }

    def _work(self, start: float, tensors: dict[int, Any]) -> None:
        while not self._stopped.is_set():
            with self._lock:
                i = self._next
                if i == len(self.sizes) or self._error:
                    return
                self._next += 1
            due = float(self.arrivals[i])
            if self._stopped.wait(max(0.0, start + due - time.perf_counter())):
                return
            taken = time.perf_counter() - start
            try:
                self.predictor.predict_tensors(*tensors[self.sizes[i]])
            except ICNetError as error:
                self._error = error
                return
            done = time.perf_counter() - start
            arrival = due if due else taken  # no arrivals: a group is there when a thread is
            self._rows.append((arrival, taken, done))


class _Sampler:
    """The GPU's utilisation while something runs, from nvidia-smi."""

    def __init__(self) -> None:
        command = shutil.which("nvidia-smi")
        query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", f"--loop-ms={SAMPLES_MS}"]
        self._process = None
        if command:
            self._process = subprocess.Popen([command, *query], stdout=subprocess.PIPE, text=True)

    def stop(self) -> float | None:
        """The idle share; None where nvidia-smi is missing or does not say."""
        if self._process is None:
            return None
        self._process.terminate()
        samples = [float(line) for line in self._process.communicate()[0].split() if line.isdigit()]
        return 1 - float(np.mean(samples)) / 100 if samples else None
