"""`icnet bench throughput`: how many groups per second does one Predictor take from many threads?

First the *capacity*: every thread has its next group ready as soon as its last is done. Then the same groups arrive at
random (a Poisson process) at a share of that capacity, and wait in one queue for a free thread. Several models get the
same groups at the same times, at a share of the first one's capacity. A packed model takes waiting groups in one call.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.progress import Progress

from benchmarks import gpu
from benchmarks.command import add_common_arguments, measuring
from benchmarks.machine import header
from benchmarks.records import ServedModel, StreamRow, Throughput
from benchmarks.runners import Setting, inputs, load
from evaluation.record import labels
from runtime import InputError, Predictor
from runtime.commands.options import number
from runtime.files import digest
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
    add("--sizes", default=SERVICE, metavar="HISTOGRAM", help="data set, JSON file, or 'service' (default: 3 to 8)")
    add("--groups", type=number(), default=60, help="in each of the two streams (default 60)")
    add("--callers", type=number(1, MAX_THREADS), default=4, help="threads that call the Predictor (default 4)")
    add("--load", type=float, default=0.7, help="arrivals as a share of the capacity (default 0.7)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run both streams, print a table and write the results; an interrupted run leaves what it has measured.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: --load is out of range, or the histogram can't be used.
        DependencyError: --device cuda without a GPU.
        ModelError: the model can't be loaded, or fails.
        OutputError: the results can't be written.
    """
    if not 0 < args.load <= 2:
        raise InputError(f"--load {args.load:g}: expected a share of the capacity, e.g. 0.7")
    histogram = read_histogram(args.sizes)
    card = gpu.find() if args.device == "cuda" else None
    rng = np.random.default_rng(0)
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
    setting = Setting(Path(), args.threads, [*histogram], args.device)

    def measured() -> bool:
        return any(found["streams"] for found in models)

    read = (*args.models, Path(args.sizes))
    with measuring(results, args.output, inputs=read, keep=measured) as progress:
        for label, path in zip(labels(args.models), args.models, strict=True):
            with load(path, setting) as predictor:
                for n in progress.track(sorted(set(sizes)), description=escape(f"{label}, warming up")):
                    predictor.predict_tensors(*inputs(n))
                streams: dict[str, StreamRow] = {}
                models.append({"name": label, "sha256": digest(path), "streams": streams})
                how = args.callers, progress, card is not None
                streams["capacity"] = stream(predictor, sizes, np.zeros(len(sizes)).tolist(), *how)
                rate = args.load * models[0]["streams"]["capacity"]["groups_per_s"]
                streams["arriving"] = stream(predictor, sizes, np.cumsum(gaps / rate).tolist(), *how)
    return 130 if results["interrupted"] else 0


def read_histogram(source: str) -> Histogram:
    """The number of groups of each size.

    Args:
        source: "service" (3 to 8 images, all alike), a data set with img/GROUP/, a JSON file {"size": groups}, or
            results of an earlier run.

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
        found = json.loads(path.read_text(encoding="utf-8"))
        found = {int(size): count for size, count in found.get("histogram", found).items()}
        good = all(isinstance(c, int) and c >= 0 for c in found.values()) and sum(found.values()) > 0
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file or data set, and not '{SERVICE}'") from error
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f'{source}: not a histogram: expected JSON such as {{"3": 10, "4": 7}}') from error
    if not good or not all(1 <= size <= MAX_IMAGES for size in found):
        raise InputError(f"{source}: sizes must be 1 to {MAX_IMAGES} and their counts whole numbers, some above 0")
    return {size: count for size, count in sorted(found.items()) if count}


def stream(
    predictor: Predictor,
    sizes: Sequence[int],
    arrivals: Sequence[float],
    callers: int,
    progress: Progress,
    on_gpu: bool,
) -> StreamRow:
    """Run groups that threads take in the order of their arrival.

    Args:
        predictor: runs them.
        sizes: their images.
        arrivals: when they arrive, in seconds from the start; 0 for a group that is there once a thread is free.
        callers: the number of threads.
        progress: shows how many are done.
        on_gpu: whether idle time is the GPU's.

    Raises:
        ICNetError: a group failed; those after it are not run.
    """
    tensors = {n: inputs(n) for n in set(sizes)}
    stopped = threading.Event()

    def work(n: int, due: float) -> tuple[float, float, float]:
        stopped.wait(max(0.0, start + due - time.perf_counter()))
        taken = time.perf_counter() - start
        predictor.predict_tensors(*tensors[n])
        return due or taken, taken, time.perf_counter() - start

    sampler = _Sampler() if on_gpu else None
    pool = ThreadPoolExecutor(callers)
    cpu, start = time.process_time(), time.perf_counter()
    try:
        rows = [*progress.track(pool.map(work, sizes, arrivals), total=len(sizes), description="groups")]
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        idle = sampler.stop() if sampler else None
    wall = time.perf_counter() - start
    if not on_gpu:
        idle = max(0.0, 1 - (time.process_time() - cpu) / (wall * cores()))
    arrival, taken, done = np.array(rows).T
    p50, p90, p99 = map(float, np.percentile(done - arrival, [50, 90, 99]))
    queue_p50, queue_p99 = map(float, np.percentile(taken - arrival, [50, 99]))
    return {
        "groups": len(rows),
        "images": sum(sizes),
        "groups_per_s": len(rows) / wall,
        "images_per_s": sum(sizes) / wall,
        "latency_s": {"median": p50, "p90": p90, "p99": p99},
        "queue_s": {"median": queue_p50, "p99": queue_p99},
        "idle_share": idle,
    }


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
