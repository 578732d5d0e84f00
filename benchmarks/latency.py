"""python benchmarks/latency.py: how fast is each way to run ICNet on this machine, and how much memory does it take?

All contenders run interleaved in one process, in a new random order every round, on the same inputs, and their maps
are compared, so that nobody wins by being wrong. Memory is the peak of a process that runs one contender alone.
Absolute times hold for the machine and the moment; the ratio is the result.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet bench`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))

import argparse
import datetime
import json
import logging
import os
import platform
import random
import subprocess
import tempfile
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.contenders import CHECKPOINT, CONTENDERS, ORACLE_ONNX, OURS_ONNX, inputs
from export.checkpoint import load_checkpoint, save_checkpoint
from export.icnet import ICNet
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime import InputError, OutputError, __version__
from runtime.files import replacing, same_file
from runtime.predictor import MAX_THREADS

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench`."""
    parser.add_argument("--checkpoint", type=Path, help="default: random weights of width 1 (the time is the same)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="group sizes")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per contender and size (default 7)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Race the contenders, print a table and write the results.

    Raises:
        InputError: an option below 1.
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the results can't be written.
    """
    if min(args.sizes) < 1 or args.rounds < 1 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--sizes, --rounds and --threads take numbers from 1 (--threads to {MAX_THREADS})")
    if args.output and args.checkpoint and same_file(args.checkpoint, args.output):
        raise OutputError(f"{args.output}: is the checkpoint itself; choose another --output")
    with replacing(args.output) if args.output else nullcontext() as temporary:
        results = race(args)
        if temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def race(args: argparse.Namespace) -> Results:
    """Race the contenders and print a table."""
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as name,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        folder = Path(name)
        steps = len(args.sizes) * (args.rounds + 1 + len(CONTENDERS))
        bar = progress.add_task("exporting", total=steps)
        prepare(folder, args.checkpoint)
        runners = {label: start(folder, args.threads) for label, start in CONTENDERS.items()}
        groups = []
        for n in args.sizes:
            progress.update(bar, description=f"group of {n}")
            tensors = inputs(n)
            maps = {label: runner(*tensors) for label, runner in runners.items()}  # warm-up
            progress.advance(bar)
            times: dict[str, list[float]] = {label: [] for label in runners}
            for _ in range(args.rounds):
                for label in random.sample(list(runners), len(runners)):
                    start = time.perf_counter()
                    runners[label](*tensors)
                    times[label].append(time.perf_counter() - start)
                progress.advance(bar)
            groups.append({"n": n, "contenders": _summaries(times, maps)})
        for group in groups:
            progress.update(bar, description=f"memory, group of {group['n']}")
            for label, row in group["contenders"].items():
                row["peak_memory_bytes"] = _peak_memory(label, folder, group["n"], args.threads)
                progress.advance(bar)
    results = {"machine": machine(args.threads), "rounds": args.rounds, "groups": groups}
    console.print(table(results))
    return results


def prepare(folder: Path, checkpoint: Path | None) -> None:
    """Write the files that the contenders read: a checkpoint, the paper's network and ours as ONNX."""
    torch.manual_seed(0)
    network = ICNet().eval() if checkpoint is None else load_checkpoint(checkpoint)
    save_checkpoint(folder / CHECKPOINT, network)
    write_onnx(network, folder / OURS_ONNX)
    write_onnx(ReferenceICNet.of(network), folder / ORACLE_ONNX)


def machine(threads: int) -> dict[str, Any]:
    """What the results were measured on and with."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "icnet-deploy": __version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _summaries(times: dict[str, list[float]], maps: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Per contender: median and 90th percentile, how many times as fast as the first, and how far from its maps."""
    first = next(iter(times))
    base = float(np.median(times[first]))
    return {
        label: {
            "median_s": float(np.median(seconds)),
            "p90_s": float(np.percentile(seconds, 90)),
            "ratio": base / float(np.median(seconds)),
            "mean_difference": float(np.abs(maps[label] - maps[first]).mean()),
        }
        for label, seconds in times.items()
    }


def _peak_memory(label: str, folder: Path, n: int, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.contenders", label, str(folder), str(n), str(threads)]
    root = Path(__file__).resolve().parents[1]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def table(results: Results) -> Table:
    """The results, for a terminal."""
    first = next(iter(CONTENDERS))
    grid = Table(
        title=f"{results['machine']['cpu']}, {results['machine']['threads']} threads; times of a whole group",
        caption=f"ratio: times as fast as {first}; memory: the peak of a process that runs it alone",
    )
    grid.add_column("N", justify="right")
    grid.add_column("contender")
    for column in ("median", "p90", "ratio", "memory", "mean |Δ|"):
        grid.add_column(column, justify="right", no_wrap=True)
    for group in results["groups"]:
        for label, row in group["contenders"].items():
            grid.add_row(
                str(group["n"]),
                label,
                f"{row['median_s'] * 1e3:.0f} ms",
                f"{row['p90_s'] * 1e3:.0f} ms",
                f"{row['ratio']:.2f}",
                f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
                f"{row['mean_difference']:.0e}",
            )
        grid.add_section()
    return grid
