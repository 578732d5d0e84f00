"""`icnet bench scaling`: how do time and memory grow with the group, and with the number of groups in a call?

Every group size runs in a process of its own. A size is skipped, with the reason, if its memory would not fit by the
straight line through the smaller ones. Two more things are measured if the files for them lie beside a model. With a
bank export (NAME.intra.onnx, NAME.banked.onnx), groups larger than --chunk also run in chunks, as a model of its own.
With a packed export (NAME.packed.onnx), several groups in one call are timed against the same groups one by one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import Progress

from benchmarks import gpu
from benchmarks.command import add_common_arguments, check_models, measuring
from benchmarks.machine import available_memory, header
from benchmarks.records import PackRow, ScaledModel, Scaling
from benchmarks.runners import Setting, alone, inputs, load
from benchmarks.timing import Times, extrapolated, interleaved, line, ratio, warm_up
from evaluation.record import labels
from runtime import ICNetError, ModelError, Predictor
from runtime.bank_models import MAX_IMAGES
from runtime.commands.options import number
from runtime.files import bank_files, digest

SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 300]
PACKS = [1, 2, 4, 8]  # groups in one call
MIN_PACK_ROUNDS = 9  # packed and one by one differ by a few per cent
MIN_POINTS = 3  # of a line
SPARE = 0.8  # of the free memory that a size may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench scaling`."""
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="MODEL", help="exports, engines, or whatever else a Predictor runs")
    add("--sizes", type=number(), nargs="+", default=SIZES, help=f"group sizes (default {' '.join(map(str, SIZES))})")
    add("--calls", type=number(2), default=4, help="per size; the first is the first map (default 4)")
    add("--chunk", type=number(), default=MAX_IMAGES, help=f"images at once in chunks (default {MAX_IMAGES})")
    add("--packs", type=number(0), nargs="+", default=PACKS, help="groups in one call (default 1 2 4 8; 0: none)")
    add("--pack-size", type=number(), default=5, metavar="N", help="images in each of these groups (default 5)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and write the results; an interrupted run leaves what it has measured.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: a model file is missing.
        DependencyError: --device cuda without a GPU.
        ModelError: no model runs at any size.
        OutputError: the results can't be written.
    """
    check_models(args.models)
    card = gpu.find() if args.device == "cuda" else None
    models: list[ScaledModel] = []
    results: Scaling = {**header("scaling", args.threads, card), "calls": args.calls, "models": models}
    setting, sizes = Setting(Path(), args.threads, args.sizes, args.device), sorted(set(args.sizes))

    def measure(found: ScaledModel, path: Path, setting: Setting, sizes: Sequence[int]) -> None:
        models.append(found)
        for n in progress.track(sizes, description=escape(found["name"])):
            _measure(found, path, setting, n, args.calls)

    def measured() -> bool:
        return any(found["sizes"] for found in models)

    read = [*args.models, *(file for model in args.models for file in bank_files(model))]
    with measuring(results, args.output, inputs=read, keep=measured) as progress:
        for label, path in zip(labels(args.models), args.models, strict=True):
            plain: ScaledModel = {"name": label, "sha256": digest(path), "sizes": [], "not_run": {}}
            measure(plain, path, setting, sizes)
            _packs(plain, path, setting, args, progress)
            large, files = [n for n in sizes if n > args.chunk], bank_files(path)
            if large and all(file.is_file() for file in files):
                name, digests = f"{label}, chunks of {args.chunk}", [digest(file) for file in files]
                chunked: ScaledModel = {"name": name, "sha256": digests, "sizes": [], "not_run": {}}
                measure(chunked, path, replace(setting, chunk=args.chunk), large)
        if not measured():
            raise ModelError(next(f"{found['name']}: {why}" for found in models for why in found["not_run"].values()))
    return 130 if results["interrupted"] else 0


def _measure(found: ScaledModel, path: Path, setting: Setting, n: int, calls: int) -> None:
    """One size: a row, or a reason why there is none; then the straight lines, if there are enough points."""
    free, rows = available_memory(), found["sizes"]
    need = extrapolated({row["n"]: row["peak_memory_bytes"] for row in rows}, n)
    if free is not None and need > SPARE * free:
        found["not_run"][str(n)] = (
            f"would take {need / 1e9:.0f} GB; {free / 1e9:.0f} GB are free, of which a size may take {SPARE:.0%}"
        )
        return
    try:
        row = alone(str(path.absolute()), setting, n, calls)
    except ICNetError as error:
        found["not_run"][str(n)] = str(error)
        return
    rows.append({"n": n, "median_s": float(np.median(row["times_s"])), **row})
    if len(rows) >= MIN_POINTS:
        sizes = [row["n"] for row in rows]
        found["time_offset_s"], found["time_per_image_s"] = line(sizes, [row["median_s"] for row in rows])
        offset, slope = line(sizes, [row["peak_memory_bytes"] for row in rows])
        found["memory_offset_bytes"], found["memory_per_image_bytes"] = offset, slope


def _packs(found: ScaledModel, path: Path, setting: Setting, args: argparse.Namespace, progress: Progress) -> None:
    """Several groups of one size in one call of the packed export beside `path`, against the same one by one."""
    packed, packs = path.with_name(f"{path.stem}.packed{path.suffix}"), sorted({*args.packs} - {0})
    if not packs or not packed.is_file():
        return
    rows: list[PackRow] = []
    found["packs"] = rows
    with load(path, setting) as one_by_one, load(packed, setting, max_images=max(packs) * args.pack_size) as at_once:
        for k in progress.track(packs, description=escape(f"{found['name']}, packed")):
            groups = [inputs(args.pack_size, seed) for seed in range(k)]
            separate, together = partial(_maps, one_by_one, groups), partial(_maps, at_once, groups)
            warm_up(separate)
            warm_up(together)
            times: Times = {}
            rounds = max(args.calls, MIN_PACK_ROUNDS)
            for _ in interleaved({"separate": separate, "together": together}, times, rounds):
                pass
            row = {
                **ratio(times["separate"], times["together"]),
                "groups": k,
                "images": k * args.pack_size,
                "one_by_one_s": float(np.median(times["separate"])),
                "packed_s": float(np.median(times["together"])),
                "mean_difference": float(np.abs(together() - separate()).mean()),
            }
            rows.append(cast(PackRow, row))
    for pack in rows:  # of one group as large as all of them, which takes the same tensors
        try:
            pack["peak_memory_bytes"] = alone(str(packed.absolute()), setting, pack["images"])["peak_memory_bytes"]
        except ICNetError as error:
            found["not_run"][f"{pack['images']}, packed"] = str(error)


def _maps(predictor: Predictor, groups: Sequence[tuple[Any, Any]]) -> NDArray[np.float32]:
    return np.concatenate([np.stack(maps) for maps in predictor.predict_groups(groups)])
