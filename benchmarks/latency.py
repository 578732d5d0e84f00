"""python benchmarks/latency.py: how fast is each way to run ICNet on this machine, and how much memory does it take?

All contenders run interleaved in one process, in a new random order every round, on the same inputs, and their maps
are compared, so that nobody wins by being wrong. Memory is the peak of a process that runs one contender alone.
Absolute times hold for the machine and the moment; the ratio is the result.

With --device cuda the GPU's contenders race. Their maps are compared with those of ONNX Runtime on the CPU too, and
their times with a large FP16 matrix product that runs among them; who can't run on this machine is listed with the
reason.
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
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import gpu
from benchmarks.contenders import (
    CHECKPOINT,
    CONTENDERS,
    GPU_CONTENDERS,
    HALF_NETWORK,
    HALF_ONNX,
    ORACLE_ONNX,
    OURS_ONNX,
    Runner,
    Setting,
    inputs,
)
from benchmarks.gpu import Gpu
from export.checkpoint import load_checkpoint, save_checkpoint
from export.fp16 import half_precision
from export.icnet import ICNet
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime import ICNetError, InputError, ModelError, OutputError, Predictor, __version__
from runtime.errors import one_line
from runtime.files import replacing, same_file
from runtime.predictor import MAX_THREADS

Results = dict[str, Any]
Maps = NDArray[np.float32]

SIZES = {"cpu": [1, 2, 5, 10, 20], "cuda": [1, 5, 16, 64]}
ROUNDS = {"cpu": 7, "cuda": 30}
WARM_UP = {"cpu": 1, "cuda": 6}  # a slot captures its CUDA graph when a size comes a second time, and there are two
PRODUCT = "matrix product"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench`."""
    add = parser.add_argument
    add("--device", choices=SIZES, default="cpu", help="where to race (default cpu)")
    add("--checkpoint", type=Path, help="default: random weights of width 1 (the time is the same)")
    add("--sizes", type=int, nargs="+", help="group sizes (default 1 2 5 10 20; on a GPU 1 5 16 64)")
    add("--rounds", type=int, help="timed calls per contender and size (default 7; on a GPU 30)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    add("--no-memory", action="store_true", help="leave the memory out, which takes a process per contender and size")
    add("--output", type=Path, help="write the results as JSON (default for a GPU: benchmarks/results/gpu_NAME.json)")


def run(args: argparse.Namespace) -> int:
    """Race the contenders, print a table and write the results.

    Raises:
        InputError: an option below 1.
        DependencyError: there is no GPU to race on.
        CheckpointError: the checkpoint can't be loaded.
        ModelError: the contender that all others are compared with does not run.
        OutputError: the results can't be written.
    """
    sizes, rounds = args.sizes or SIZES[args.device], ROUNDS[args.device] if args.rounds is None else args.rounds
    if min(sizes) < 1 or rounds < 1 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--sizes, --rounds and --threads take numbers from 1 (--threads to {MAX_THREADS})")
    card = gpu.find() if args.device == "cuda" else None
    output = args.output or (Path(f"benchmarks/results/gpu_{card.slug}.json") if card else None)
    if output and args.checkpoint and same_file(args.checkpoint, output):
        raise OutputError(f"{output}: is the checkpoint itself; choose another --output")
    with replacing(output) if output else nullcontext() as temporary:
        results = race(args.checkpoint, sizes, rounds, args.threads, card, memory=not args.no_memory)
        if temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
    if output:
        print(f"{output}: written")
    return 0


def race(
    checkpoint: Path | None, sizes: list[int], rounds: int, threads: int, card: Gpu | None = None, memory: bool = True
) -> Results:
    """Race the contenders, on the CPU or on `card`, and print a table; raises what `run` does."""
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    contenders = GPU_CONTENDERS if card else CONTENDERS
    results: Results = {"machine": machine(threads, card), "rounds": rounds, "not_run": {}, "groups": []}
    with (
        tempfile.TemporaryDirectory() as name,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("exporting", total=len(contenders) + len(sizes) * (rounds + len(contenders)))
        step = partial(progress.advance, bar)
        setting = Setting(Path(name), threads, sizes, card.device if card else "cpu")
        network = prepare(setting.folder, checkpoint, half=card is not None)
        if card:
            results["flop_per_image"] = gpu.flop_per_image(network.width)
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for label, start in contenders.items():
                progress.update(bar, description=f"starting {label}")
                try:
                    runners[label] = stack.enter_context(start(setting))
                except Exception as error:  # on a GPU there is no end of what can be missing
                    results["not_run"][label] = _reason(error)
                step()
            first = next(iter(contenders))
            if first not in runners:
                reason = results["not_run"][first]
                raise ModelError(f"{first} does not run, and all others are compared with it: {reason}")
            for n in sizes:
                progress.update(bar, description=f"group of {n}")
                results["groups"].append(_race_group(n, runners, rounds, setting, card, results, step))
            runners.clear()
        torch.cuda.empty_cache()
        for group in results["groups"] if memory else ():
            progress.update(bar, description=f"memory, group of {group['n']}")
            for label, row in group["contenders"].items():
                row["peak_memory_bytes"] = _peak_memory(label, setting, group["n"], card)
                step()
    console.print(table(results))
    for label, reason in results["not_run"].items():
        console.print(f"not run: {label}: {reason}", markup=False, highlight=False, soft_wrap=True)
    return results


def _race_group(
    n: int,
    runners: dict[str, Runner],
    rounds: int,
    setting: Setting,
    card: Gpu | None,
    results: Results,
    step: Callable[[], None],
) -> Results:
    """The race for one size."""
    tensors = inputs(n)
    maps: dict[str, Maps] = {}
    group: Results = {"n": n, "contenders": {}}
    for label, runner in runners.items():
        try:
            for _ in range(WARM_UP["cuda" if card else "cpu"]):
                maps[label] = runner(*tensors)
            if not np.isfinite(maps[label]).all():
                raise ModelError("its maps hold NaN or infinite values")
        except Exception as error:  # out of memory, above all
            maps.pop(label, None)
            results["not_run"][f"{label}, group of {n}"] = _reason(error)
    calls: dict[str, Callable[[], object]] = {label: partial(runners[label], *tensors) for label in maps}
    flop = 0
    if card:
        flop, calls[PRODUCT] = gpu.matrix_product(card.device)
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[label]()
            times[label].append(time.perf_counter() - start)
        step()
    group["contenders"] = _summaries({label: times[label] for label in maps}, maps, next(iter(runners)))
    if card:
        rate = group["matrix_product_flop_per_s"] = flop / float(np.median(times[PRODUCT]))
        with Predictor(setting.folder / OURS_ONNX, threads=setting.threads) as predictor:
            expected = predictor.predict_tensors(*tensors)
        for label, row in group["contenders"].items():
            row["images_per_s"] = n / row["median_s"]
            row["share_of_matrix_product"] = results["flop_per_image"] * row["images_per_s"] / rate
            row["mean_difference_from_cpu"] = float(np.abs(maps[label] - expected).mean())
        calls.clear()
        torch.cuda.empty_cache()  # the next size's memory is anybody's
    return group


def prepare(folder: Path, checkpoint: Path | None, half: bool = False) -> ICNet:
    """Write the files that the contenders read: a checkpoint, the paper's network and ours as ONNX, and ours in FP16.

    Args:
        folder: where to.
        checkpoint: None for random weights of width 1.
        half: whether FP16 is wanted.

    Returns:
        The network.
    """
    torch.manual_seed(0)
    network = ICNet().eval() if checkpoint is None else load_checkpoint(checkpoint)
    save_checkpoint(folder / CHECKPOINT, network)
    write_onnx(network, folder / OURS_ONNX)
    if half:
        typed = half_precision(network)
        write_onnx(typed, folder / HALF_ONNX)
        torch.save(typed, folder / HALF_NETWORK)
    else:
        write_onnx(ReferenceICNet.of(network), folder / ORACLE_ONNX)
    return network


def machine(threads: int, card: Gpu | None = None) -> dict[str, Any]:
    """What the results were measured on and with."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    found = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "icnet-deploy": __version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    if card:
        found |= {
            "gpu": card.name,
            "compute_capability": card.compute_capability,
            "driver": card.driver,
            "gpu_memory_bytes": card.memory_bytes,
            **gpu.versions(),
        }
    return found


def _reason(error: Exception) -> str:
    return one_line(error) if isinstance(error, ICNetError) else f"{type(error).__name__}: {one_line(error)}"


def _summaries(times: dict[str, list[float]], maps: dict[str, Maps], first: str) -> dict[str, dict[str, Any]]:
    """Per contender: median and 90th percentile, how many times as fast as the first, and how far from its maps.

    The last two are None if the first did not run.
    """
    base = float(np.median(times[first])) if first in times else None
    return {
        label: {
            "median_s": float(np.median(seconds)),
            "p90_s": float(np.percentile(seconds, 90)),
            "ratio": base and base / float(np.median(seconds)),
            "mean_difference": float(np.abs(maps[label] - maps[first]).mean()) if base else None,
        }
        for label, seconds in times.items()
    }


def _peak_memory(label: str, setting: Setting, n: int, card: Gpu | None) -> int | None:
    """The peak of a process that runs one contender alone: of the GPU's memory, or else of its own."""
    command = [sys.executable, "-m", "benchmarks.contenders", label]
    command += [str(setting.folder), str(n), str(setting.threads), setting.device]
    root = Path(__file__).resolve().parents[1]
    if card:
        return gpu.peak_memory(command, str(root))
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def table(results: Results) -> Table:
    """The results, for a terminal."""
    machine, on_gpu = results["machine"], "gpu" in results["machine"]
    first = next(iter(GPU_CONTENDERS if on_gpu else CONTENDERS))
    where = machine["gpu"] if on_gpu else f"{machine['cpu']}, {machine['threads']} threads"
    caption = f"ratio: times as fast as {first}; memory: the peak of a process that runs it alone"
    columns: dict[str, tuple[str, float, str]] = {  # heading: (key, factor, format)
        "median": ("median_s", 1e3, ".2f" if on_gpu else ".0f"),
        "p90": ("p90_s", 1e3, ".2f" if on_gpu else ".0f"),
        "ratio": ("ratio", 1, ".2f"),
        "memory": ("peak_memory_bytes", 1e-6, ".0f"),
        "mean |Δ|": ("mean_difference", 1, ".0e"),
    }
    units = {"median": " ms", "p90": " ms", "memory": " MB", "of matmul": " %"}
    if on_gpu:
        caption += " on the GPU; of matmul: share of the rate of a large FP16 matrix product"
        columns |= {
            "|Δ| CPU": ("mean_difference_from_cpu", 1, ".0e"),
            "images/s": ("images_per_s", 1, ".0f"),
            "of matmul": ("share_of_matrix_product", 100, ".1f"),
        }
    grid = Table(title=f"{where}; times of a whole group", caption=caption)
    grid.add_column("N", justify="right")
    grid.add_column("contender")
    for heading in columns:
        grid.add_column(heading, justify="right", no_wrap=True)
    for group in results["groups"]:
        for label, row in group["contenders"].items():
            cells = []
            for heading, (key, factor, form) in columns.items():
                value = row.get(key)
                cells.append("–" if value is None else f"{value * factor:{form}}{units.get(heading, '')}")
            grid.add_row(str(group["n"]), label, *cells)
        grid.add_section()
    return grid
