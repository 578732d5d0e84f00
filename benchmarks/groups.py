"""python benchmarks/groups.py: what does it cost to pack groups, and how much memory does a large group take in chunks?

A stream of small groups is run by the plain model one by one and by the packed one several at once, interleaved in one
process, in a new random order every round; the ratio is the result. Memory is the peak of a process that runs one
group alone, by the plain model at once, and by the bank export in chunks.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet groups`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["groups", *sys.argv[1:]]))

import argparse
import json
import os
import platform
import random
import subprocess
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.contenders import inputs, peak_memory
from runtime import InputError, OutputError, Predictor
from runtime.files import bank_files, digest, replacing, same_file

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet groups`."""
    add = parser.add_argument
    add("--model", type=Path, required=True, help="NAME.onnx or NAME.engine; beside it NAME.packed, .intra and .banked")
    add("--sizes", type=int, nargs=2, default=(3, 8), metavar=("FEWEST", "MOST"), help="images of the groups (3 8)")
    add("--groups", type=int, default=24, help="in the stream (default 24)")
    add("--rounds", type=int, default=7)
    add("--max-images", type=int, default=32, help="in a packed call (default 32)")
    add("--large", type=int, default=300, help="images of the large group (default 300; 0 leaves the memory out)")
    add("--chunk", type=int, default=16, help="images at once (default 16)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--output", type=Path, help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Race packing and measure memory, and print both.

    Raises:
        InputError: an option is out of range.
        ModelError: a model is missing or fails.
        OutputError: the results can't be written.
    """
    if not 1 <= args.sizes[0] <= args.sizes[1] or min(args.groups, args.rounds, args.chunk) < 1 or args.large < 0:
        raise InputError("--sizes takes FEWEST ≤ MOST, --groups, --rounds and --chunk numbers from 1, --large from 0")
    if args.output and same_file(args.output, args.model):
        raise OutputError(f"{args.output}: is the model itself; choose another --output")
    results: Results = {
        "cpu": platform.processor() or platform.machine(),
        "threads": args.threads,
        "model": digest(args.model),
        "sizes": list(args.sizes),
        "max_images": args.max_images,
    }
    results |= race(args)
    one, packed = (results["seconds"][label] for label in ("one by one", "packed"))
    print(f"{args.groups} groups of {args.sizes[0]} to {args.sizes[1]}, {results['images']} images:")
    for label, seconds in (("one by one", one), ("packed", packed)):
        print(f"  {label:10}  {args.groups / seconds:6.2f} groups/s  {results['images'] / seconds:6.1f} images/s")
    print(f"  packed is {one / packed:.3f} times as fast; mean |Δ| of the maps {results['mean_difference']:.0e}")
    if args.large:
        results["peak_memory"] = memory = {
            f"{args.chunk} at once": peak(args, args.chunk, chunks=False),
            f"{args.chunk} in chunks of {args.chunk}": peak(args, args.chunk, chunks=True),
            f"{args.large} in chunks of {args.chunk}": peak(args, args.large, chunks=True),
        }
        for label, size in memory.items():
            print(f"  group of {label:24} {size / 1e6:6.0f} MB")
        at_once, _, large = memory.values()
        print(f"  {large / at_once:.2f} times the memory of a group of {args.chunk}")
    if args.output:
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def race(args: argparse.Namespace) -> Results:
    """The median times of the stream, both ways."""
    choose = random.Random(0)
    groups = [inputs(choose.randint(*args.sizes)) for _ in range(args.groups)]
    packed_file = args.model.with_name(f"{args.model.stem}.packed{args.model.suffix}")
    console = Console(stderr=True)
    with (
        Predictor(args.model, threads=args.threads) as plain,
        Predictor(packed_file, threads=args.threads, max_images=args.max_images) as packed,
    ):
        contenders = {"one by one": plain, "packed": packed}
        maps = {label: list(predictor.predict_groups(groups)) for label, predictor in contenders.items()}  # and warm up
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for _ in track(range(args.rounds), console=console, transient=True, disable=not console.is_terminal):
            for label in random.sample(list(contenders), 2):
                start = time.perf_counter()
                for _ in contenders[label].predict_groups(groups):
                    pass
                times[label].append(time.perf_counter() - start)
    found, expected = (np.concatenate([np.stack(group) for group in maps[label]]) for label in ("packed", "one by one"))
    return {
        "groups": args.groups,
        "images": len(found),
        "rounds": args.rounds,
        "seconds": {label: float(np.median(seconds)) for label, seconds in times.items()},
        "mean_difference": float(np.abs(found - expected).mean()),
    }


def peak(args: argparse.Namespace, n: int, chunks: bool) -> int:
    """Peak memory in bytes of a process that runs a group of n alone."""
    code = "import sys; from benchmarks.groups import alone; alone(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(args.model), str(n), str(args.chunk if chunks else 0), str(args.threads)]
    root = Path(__file__).resolve().parents[1]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def alone(model: str, n: str, chunk: str, threads: str) -> None:
    """Run a group of n, in chunks unless `chunk` is 0, and print this process's peak memory."""
    path = Path(model)
    options: dict[str, Any] = {"model": path}
    if int(chunk):
        options = {"bank": bank_files(path), "max_images": int(chunk)}
    with Predictor(**options, threads=int(threads)) as predictor:
        predictor.predict_tensors(*inputs(int(n)))
    print(peak_memory())
