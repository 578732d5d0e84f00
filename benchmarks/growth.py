"""python benchmarks/growth.py: how do time and memory grow with the group, and does memory grow with the groups?

Every group size runs in a process of its own: the time from its start to the first map, the median of the calls after
that, and the peak of its memory. Through the points goes a straight line: its slope is the cost of one more image, its
offset what a group costs in any case. A size whose memory would not fit, by the line through the smaller ones, is left
out with the reason.

With --groups one process runs that many groups of mixed sizes, and its resident memory is recorded on the way.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet growth`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["growth", *sys.argv[1:]]))

import argparse
import json
import os
from contextlib import nullcontext
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.accuracy import labels
from benchmarks.contenders import Setting, alone, inputs, load
from benchmarks.machine import available_memory, machine, memory, name_of, wide_console
from benchmarks.timing import line
from runtime import ICNetError, InputError, OutputError
from runtime.files import digest, replacing, same_file
from runtime.predictor import MAX_THREADS

SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 300]
STREAM_SIZES = (1, 2, 3, 5, 8)  # of the groups of --groups
RECORDS = 20  # of the memory during --groups
SPARE = 0.8  # of the free memory that a size may take
GREW = 1.02  # times as much memory at the end as in the middle: more than allocators vary by

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet growth`."""
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="MODEL", help="exports, engines, or whatever else a Predictor runs")
    add("--sizes", type=int, nargs="+", default=SIZES, help=f"group sizes (default {' '.join(map(str, SIZES))})")
    add("--calls", type=int, default=4, help="per size; the first is the first map (default 4)")
    add("--groups", type=int, default=0, help="also run so many groups of mixed sizes, and watch the memory")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where ONNX files run (default cpu)")
    add("--output", type=Path, help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write the results; an interrupted run leaves what it has measured.

    Returns:
        0; 1 if memory grew with the groups; 130 if it was interrupted.

    Raises:
        InputError: an option out of range, or a model file that is not there.
        ModelError: --groups: a model can't be loaded, or fails.
        OutputError: the results can't be written.
    """
    if min(args.sizes) < 1 or args.calls < 2 or args.groups < 0 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--sizes and --threads take numbers from 1 (--threads to {MAX_THREADS}), --calls from 2")
    if args.groups and not Path("/proc/self/status").exists():
        raise InputError("--groups: this system does not say how much memory a process has")
    for model in args.models:
        if not model.is_file():
            raise InputError(f"{model}: no such model file")
        if args.output and same_file(args.output, model):
            raise OutputError(f"{args.output}: is one of the models; choose another --output")
    console = wide_console()
    results: Results = {"machine": machine(args.threads), "calls": args.calls, "interrupted": False, "models": []}
    setting = Setting(Path(), args.threads, args.sizes, args.device)
    with (
        replacing(args.output) if args.output else nullcontext() as temporary,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        try:
            for label, path in zip(labels(args.models), args.models, strict=True):
                found: Results = {"name": label, "sha256": digest(path), "sizes": [], "not_run": {}}
                results["models"].append(found)
                for n in progress.track(sorted(set(args.sizes)), description=escape(label)):
                    _measure(found, path, setting, n, args.calls)
                if args.groups:
                    found["stream"] = _stream(path, setting, args.groups, progress)
        except KeyboardInterrupt:
            results["interrupted"] = True
        if results["interrupted"] and not any(found["sizes"] for found in results["models"]):
            raise KeyboardInterrupt  # there is nothing to keep
        for found in results["models"]:
            _fit(found)
        if temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    grew = report(results, console)
    if args.output:
        print(f"{args.output}: written")
    return 130 if results["interrupted"] else int(grew)


def _measure(found: Results, path: Path, setting: Setting, n: int, calls: int) -> None:
    """One size: a row, or a reason why there is none."""
    free, rows = available_memory(), found["sizes"]
    if free is not None and len(rows) >= 2:
        offset, slope = line([row["n"] for row in rows], [row["peak_memory_bytes"] for row in rows])
        if offset + slope * n > SPARE * free:
            found["not_run"][str(n)] = f"would take {(offset + slope * n) / 1e9:.0f} GB of the {free / 1e9:.0f} GB free"
            return
    try:
        row = alone(str(path.absolute()), setting, n, calls)
    except ICNetError as error:
        found["not_run"][str(n)] = str(error)
        return
    rows.append({"n": n, "median_s": float(np.median(row["times_s"])), **row})


def _fit(found: Results) -> None:
    """The straight lines through a model's points."""
    rows = found["sizes"]
    if len(rows) >= 2:
        n = [row["n"] for row in rows]
        found["time_offset_s"], found["time_per_image_s"] = line(n, [row["median_s"] for row in rows])
        offset, slope = line(n, [row["peak_memory_bytes"] for row in rows])
        found["memory_offset_bytes"], found["memory_per_image_bytes"] = offset, slope


def _stream(path: Path, setting: Setting, groups: int, progress: Progress) -> Results:
    """Resident memory of this process while it runs many groups of mixed sizes."""
    tensors = [inputs(n) for n in STREAM_SIZES]
    records = []
    with load(path, setting) as predictor:
        every = max(groups // RECORDS, 1)
        for i in progress.track(range(groups), description=f"{groups} groups"):
            predictor.predict_tensors(*tensors[i % len(tensors)])
            if (i + 1) % every == 0:
                records.append({"groups": i + 1, "memory_bytes": memory("VmRSS")})
    return {"sizes": list(STREAM_SIZES), "records": records}


def grew(stream: Results) -> float:
    """Memory at the end, as a multiple of that in the middle of the groups."""
    records = stream["records"]
    return float(records[-1]["memory_bytes"] / records[len(records) // 2]["memory_bytes"])


def report(results: Results, console: Console) -> bool:
    """Print all; returns whether memory grew with the groups."""
    console.print(table(results))
    grown = False

    def plain(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for found in results["models"]:
        name = found["name"]
        if "time_per_image_s" in found:
            ms = [found[key] * 1e3 for key in ("time_offset_s", "time_per_image_s")]
            mb = [found[key] / 1e6 for key in ("memory_offset_bytes", "memory_per_image_bytes")]
            plain(f"{name}: {ms[0]:.0f} ms + {ms[1]:.1f} ms per image; {mb[0]:.0f} MB + {mb[1]:.1f} MB per image")
        for n, why in found["not_run"].items():
            plain(f"not run: {name}, group of {n}: {why}")
        if found.get("stream", {}).get("records"):
            factor, last = grew(found["stream"]), found["stream"]["records"][-1]
            grown |= factor > GREW
            verdict = ": it grows" if factor > GREW else ""
            now = f"{last['memory_bytes'] / 1e6:.0f} MB after {last['groups']} groups"
            plain(f"{name}: {now}, {factor:.3f} times as much as half way{verdict}")
    if results["interrupted"]:
        plain("interrupted: this is what was measured until then")
    return grown


def table(results: Results) -> Table:
    """Time and memory by size, for a terminal."""
    grid = Table(title=escape(f"{name_of(results['machine'])}; each size in a process of its own"))
    for heading in ("model", "N", "first map", "median", "per image", "memory"):
        grid.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading != "model")
    for found in results["models"]:
        for row in found["sizes"]:
            cells = [f"{row['first_map_s']:.2f} s", f"{row['median_s'] * 1e3:.0f} ms"]
            cells += [f"{row['median_s'] / row['n'] * 1e3:.1f} ms", f"{row['peak_memory_bytes'] / 1e6:.0f} MB"]
            grid.add_row(escape(found["name"]), str(row["n"]), *cells)
        grid.add_section()
    return grid


def draw(results: Results, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Time and memory against the group's size, with the fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"median_s": ("time", "s", 1.0), "peak_memory_bytes": ("memory", "GB", 1e-9)}
    for axes, (key, (name, unit, factor)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, found in enumerate(results["models"]):
            n = np.array([row["n"] for row in found["sizes"]])
            axes.plot(n, [row[key] * factor for row in found["sizes"]], "o", color=f"C{i}", label=found["name"])
            offset, slope = (found.get(f"{name}_{kind}") for kind in _fitted(name))
            if slope is not None:
                axes.plot(n, (offset + slope * n) * factor, "-", color=f"C{i}", linewidth=1)
        axes.set(xlabel="images in the group", ylabel=f"{name}, {unit}", xlim=(0, None), ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120, metadata=metadata)


def _fitted(name: str) -> tuple[str, str]:
    return ("offset_s", "per_image_s") if name == "time" else ("offset_bytes", "per_image_bytes")
