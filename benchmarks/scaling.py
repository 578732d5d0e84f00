"""python benchmarks/scaling.py: how do time and memory grow with the group, and with the number of groups?

Every group size runs in a process of its own: the time from its start to the first map, the median of the calls after
that, and the peak of its memory. Through the points goes a straight line: its slope is the cost of one more image, its
offset what a group costs in any case. A size whose memory would not fit, by the line through the smaller ones, is left
out with the reason.

If the two files of a bank export lie beside a model (NAME.intra.onnx, NAME.banked.onnx), groups larger than --chunk are
also run in chunks, as a model of its own. If a packed export does (NAME.packed.onnx), several groups in one call are
compared against the same groups one by one, interleaved in one process; memory is that of a process of its own again.

With --groups one process runs that many groups of mixed sizes, and its resident memory is recorded on the way.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet scaling`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["scaling", *sys.argv[1:]]))

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import available_memory, machine, memory, name_of, wide_console
from benchmarks.runners import Setting, alone, inputs, load
from benchmarks.timing import Times, interleaved, interval, line, ratio, warm_up
from evaluation.record import labels
from runtime import ICNetError, InputError, ModelError, OutputError, Predictor
from runtime.bank import MAX_IMAGES
from runtime.files import bank_files, digest, replacing, same_file, write_json
from runtime.predictor import MAX_THREADS
from runtime.threads import cores

SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 300]
PACKS = [1, 2, 4, 8]  # groups in one call
PACK_ROUNDS = 9  # at least: packed and one by one differ by a few per cent
STREAM_SIZES = (1, 2, 3, 5, 8)  # of the groups of --groups
RECORDS = 20  # of the memory during --groups
FEWEST = 3  # points of a line
SPARE = 0.8  # of the free memory that a size may take
GREW = 1.02  # times as much memory at the end as in the middle: more than allocators vary by

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet scaling`."""
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="MODEL", help="exports, engines, or whatever else a Predictor runs")
    add("--sizes", type=int, nargs="+", default=SIZES, help=f"group sizes (default {' '.join(map(str, SIZES))})")
    add("--calls", type=int, default=4, help="per size; the first is the first map (default 4)")
    add("--chunk", type=int, default=MAX_IMAGES, help=f"images at once in chunks (default {MAX_IMAGES})")
    add("--packs", type=int, nargs="+", default=PACKS, help="groups in one call (default 1 2 4 8; 0: none)")
    add("--pack-size", type=int, default=5, metavar="N", help="images in each of these groups (default 5)")
    add("--groups", type=int, default=0, help="also run so many groups of mixed sizes, and watch the memory")
    add("--threads", type=int, default=cores(), help="CPU threads (default: all)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where ONNX files run (default cpu)")
    add("--output", type=Path, help="write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write the results; an interrupted run leaves what it has measured.

    Returns:
        0; 1 if memory grew with the groups; 130 if it was interrupted.

    Raises:
        InputError: an option out of range, or a model file that is not there.
        ModelError: no model runs at any size; with --groups, one can't be loaded or fails.
        OutputError: the results can't be written.
    """
    if min(args.chunk, args.pack_size, *args.sizes) < 1 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(
            f"--sizes, --chunk, --pack-size and --threads take numbers from 1 (--threads to {MAX_THREADS})"
        )
    if args.calls < 2 or min(args.groups, *args.packs) < 0:
        raise InputError("--calls takes numbers from 2, --groups and --packs from 0")
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
                if packs := [k for k in sorted(set(args.packs)) if k] if packed_file(path).is_file() else []:
                    _packs(found, path, setting, packs, args.pack_size, args.calls, progress)
                if args.groups:
                    found["stream"] = _stream(path, setting, args.groups, progress)
                large = [n for n in sorted(set(args.sizes)) if n > args.chunk]
                if large and all(file.is_file() for file in bank_files(path)):
                    chunked: Results = {"name": f"{label}, chunks of {args.chunk}", "sizes": [], "not_run": {}}
                    chunked["sha256"] = [digest(file) for file in bank_files(path)]
                    results["models"].append(chunked)
                    for n in progress.track(large, description=escape(chunked["name"])):
                        _measure(chunked, path, replace(setting, chunk=args.chunk), n, args.calls)
        except KeyboardInterrupt:
            results["interrupted"] = True
        if not any(found["sizes"] or "stream" in found for found in results["models"]):  # there is nothing to keep
            if results["interrupted"]:
                raise KeyboardInterrupt
            models = results["models"]
            raise ModelError(next(f"{found['name']}: {why}" for found in models for why in found["not_run"].values()))
        for found in results["models"]:
            _fit(found)
        if temporary:
            write_json(temporary, results)
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
    """The straight lines through a model's points, if there are enough to see whether they lie on one."""
    rows = found["sizes"]
    if len(rows) >= FEWEST:
        n = [row["n"] for row in rows]
        found["time_offset_s"], found["time_per_image_s"] = line(n, [row["median_s"] for row in rows])
        offset, slope = line(n, [row["peak_memory_bytes"] for row in rows])
        found["memory_offset_bytes"], found["memory_per_image_bytes"] = offset, slope


def packed_file(path: Path) -> Path:
    """Where the packed export of a model called `path` lies: NAME.packed.onnx."""
    return path.with_name(f"{path.stem}.packed{path.suffix}")


def _packs(
    found: Results, path: Path, setting: Setting, packs: Sequence[int], size: int, rounds: int, progress: Progress
) -> None:
    """Several groups of one size in one call, against the same one by one."""
    rows: list[Results] = []
    found["packs"] = rows
    packed = packed_file(path)
    with (
        load(path, setting) as one_by_one,
        load(packed, setting, max(packs) * size) as at_once,
    ):
        for k in progress.track(packs, description=escape(f"{found['name']}, packed")):
            groups = [inputs(size, seed) for seed in range(k)]
            calls = {
                name: partial(_maps, predictor, groups)
                for name, predictor in (("one_by_one", one_by_one), ("packed", at_once))
            }
            for call in calls.values():
                warm_up(call)
            times: Times = {}
            for _ in interleaved(calls, times, max(rounds, PACK_ROUNDS)):
                pass
            row: Results = {"groups": k, "images": k * size}
            row |= {f"{name}_s": float(np.median(took)) for name, took in times.items()}
            row |= ratio(times["one_by_one"], times["packed"])
            row["mean_difference"] = float(np.abs(calls["packed"]() - calls["one_by_one"]()).mean())
            rows.append(row)
    for row in rows:  # of one group as large as all of them, which takes the same tensors
        try:
            row["peak_memory_bytes"] = alone(str(packed.absolute()), setting, row["images"])["peak_memory_bytes"]
        except ICNetError as error:
            found["not_run"][f"{row['images']}, packed"] = str(error)


def _maps(predictor: Predictor, groups: Sequence[tuple[Any, Any]]) -> NDArray[np.float32]:
    return np.concatenate([np.stack(maps) for maps in predictor.predict_groups(groups)])


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
        for row in found.get("packs", ()):
            ms = [row[key] * 1e3 for key in ("packed_s", "one_by_one_s")]
            used = f", {row['peak_memory_bytes'] / 1e6:.0f} MB" if "peak_memory_bytes" in row else ""
            plain(
                f"{name}: {row['groups']} × {row['images'] // row['groups']} images packed: {ms[0]:.0f} ms{used}; one "
                f"by one: {ms[1]:.0f} ms; packed is {interval(row)} times as fast; |Δ| {row['mean_difference']:.0e}"
            )
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
    """Time and memory against the group's size, with the fitted lines; time against the number of groups in a call."""
    from matplotlib.figure import Figure

    packs = next((found for found in results["models"] if found.get("packs")), None)
    figure = Figure(figsize=(13 if packs else 9, 3.6), layout="constrained")
    time, memory, *rest = figure.subplots(1, 3 if packs else 2)

    def fitted(axes: Any, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
        axes.plot(x, y, "o", color=colour, label=label)
        if len(x) >= FEWEST:
            offset, slope = line(x, y)
            axes.plot(x, offset + slope * np.asarray(x), "-", color=colour, linewidth=1)

    for i, found in enumerate(results["models"]):
        n, rows = [row["n"] for row in found["sizes"]], found["sizes"]
        fitted(time, n, [row["median_s"] for row in rows], f"C{i}", found["name"])
        fitted(memory, n, [row["peak_memory_bytes"] / 1e9 for row in rows], f"C{i}", found["name"])
    time.set(xlabel="images in the group", ylabel="time, s")
    memory.set(xlabel="images in the group", ylabel="memory, GB")
    if packs:
        k, rows = [row["groups"] for row in packs["packs"]], packs["packs"]
        for i, (key, label) in enumerate({"packed_s": "packed", "one_by_one_s": "one by one"}.items()):
            fitted(rest[0], k, [row[key] for row in rows], f"C{i}", f"{packs['name']}, {label}")
        size = rows[0]["images"] // rows[0]["groups"]
        rest[0].set(xlabel=f"groups of {size} in a call", ylabel="time, s")
    for axes in (time, memory, *rest):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata=metadata)
