"""Many small groups through one Predictor each of a packed model and a bank export, from several threads, with faults.

    python -m tests.faults.soak --groups 100000    # what `make soak` runs

Every hundredth group has a fault: a bad image, a closed file, a wrong shape. Every other group's maps are compared with
those that were computed before the threads began. Memory is noted over time: what the process has, and what of it is in
use, by glibc's own count. The memory in use must stay flat. What is freed and can't be given back to the system, since
blocks that are in use lie behind it, is no leak.
Ctrl-C ends it early: the record and the picture are then of the groups that were done.
"""

import argparse
import ctypes
import gc
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime import ICNetError, Predictor
from runtime.contract import ExportKind
from runtime.files import bank_files
from tests.faults.lab import ROOT

WIDTH = 1 / 16
FAULT_EVERY = 100
SMALL, LARGE = 3, 7  # images of a group at most: packed; in chunks
CHUNK = 3  # images
SIDE = 64  # pixels at most
TOLERANCE, MEAN = 2e-2, 1e-3  # beside others, two pixels of equal attention may change places; the mean counts
WARM_UP = 0.2  # of the groups: allocators and pools have all they take by then
MOST_GROWTH = 0.05  # of the memory in use, from the end of the warm-up on
PAGE = 4096


@dataclass(frozen=True)
class Sample:
    """A group and the maps that it must give."""

    images: list[Any]
    sisms: list[Any]
    maps: list[NDArray[np.float32]]


def samples(
    packed: Predictor, banks: Predictor, count: int, rng: np.random.Generator
) -> list[tuple[Predictor, Sample]]:
    """Groups of random sizes, half of them for each Predictor, with the maps from a run on their own."""
    found = []
    for i in range(count):
        predictor, most = (packed, SMALL) if i % 2 else (banks, LARGE)
        images, sisms = [], []
        for _ in range(int(rng.integers(1, most + 1))):
            height, width = rng.integers(8, SIDE, 2)
            images.append(rng.integers(0, 256, (height, width, 3), np.uint8))
            sisms.append(rng.integers(0, 256, (height, width), np.uint8))
        found.append((predictor, Sample(images, sisms, predictor(images, sisms))))
    return found


def fault(kind: int, sample: Sample) -> tuple[list[Any], list[Any]]:
    """A group with a fault in it, of three kinds."""
    images = list(sample.images)
    file = io.BytesIO()
    Image.fromarray(images[-1]).save(file, "PNG")
    if kind == 0:  # a bad image
        images[-1] = Image.open(io.BytesIO(file.getvalue()[:-40]))
    elif kind == 1:  # a closed file
        images[-1] = Image.open(file)
        file.close()
    else:  # a wrong shape
        images[-1] = np.zeros((5, 5, 7), np.uint8)
    return images, sample.sisms


class Soak:
    """The run: threads take numbers of groups until there are none."""

    def __init__(self, pool: list[tuple[Predictor, Sample]], groups: int) -> None:
        self.pool, self.groups = pool, groups
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self._numbers = iter(range(groups))
        self._lock = threading.Lock()

    def _next(self, count: int) -> list[int]:
        with self._lock:
            return [n for _, n in zip(range(count), self._numbers, strict=False)]

    def stop(self) -> None:
        """Begin no more groups; `groups` becomes the number that have begun."""
        with self._lock:
            self.groups, self._numbers = next(self._numbers, self.groups), iter(range(0))

    def work(self, seed: int) -> None:
        """What a thread does: calls and streams in turn."""
        rng = np.random.default_rng(seed)
        try:
            while numbers := self._next(int(rng.integers(1, 9))):
                if len(numbers) == 1 or rng.random() < 0.5:
                    for number in numbers:
                        self._call(number, rng)
                else:
                    self._stream(numbers, rng)
        except BaseException as error:
            self.problems.append(f"thread {seed}: {error!r}")

    def _call(self, number: int, rng: np.random.Generator) -> None:
        predictor, sample = self.pool[int(rng.integers(len(self.pool)))]
        bad = number % FAULT_EVERY == FAULT_EVERY - 1
        group = fault(number // FAULT_EVERY % 3, sample) if bad else (sample.images, sample.sisms)
        try:
            self._check(number, sample, bad, predictor(*group))
        except ICNetError as error:
            self._check(number, sample, bad, error)

    def _stream(self, numbers: list[int], rng: np.random.Generator) -> None:
        own = self.pool[int(rng.integers(2)) :: 2]  # all of one Predictor
        chosen = [own[int(rng.integers(len(own)))][1] for _ in numbers]

        def source() -> Iterator[tuple[list[Any], list[Any]]]:
            for number, sample in zip(numbers, chosen, strict=True):
                bad = number % FAULT_EVERY == FAULT_EVERY - 1
                yield fault(number // FAULT_EVERY % 3, sample) if bad else (sample.images, sample.sisms)

        outcomes = own[0][0].predict_groups(source(), on_error="return")
        for number, sample, outcome in zip(numbers, chosen, outcomes, strict=True):
            self._check(number, sample, number % FAULT_EVERY == FAULT_EVERY - 1, outcome)

    def _check(self, number: int, sample: Sample, bad: bool, outcome: Any) -> None:
        problem = None
        if isinstance(outcome, ICNetError) != bad:
            problem = f"{'a fault gave maps' if bad else outcome}"
        elif not bad:
            for one, expected in zip(outcome, sample.maps, strict=True):
                if one.shape != expected.shape:
                    problem = f"maps of shape {one.shape} for {expected.shape}"
                elif (off := np.abs(one - expected)).max() > TOLERANCE or off.mean() > MEAN or np.isnan(off).any():
                    problem = f"wrong maps, off by {off.max():.2g}, in a group of {len(sample.maps)}"
        with self._lock:
            self.done["faults" if bad else "maps"] += 1 if bad else len(sample.maps)
            self.done["groups"] += 1
            if problem is not None:
                self.problems.append(f"group {number}: {problem}")


def memory() -> float:
    """The process's resident memory, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def in_use() -> float:
    """What all of C's heaps have given and not got back, in MB (malloc_info(3))."""
    with tempfile.NamedTemporaryFile() as file:
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(libc.fopen(os.fsencode(file.name), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        totals = [*ElementTree.parse(file.name).getroot()]  # after a <heap> each, the sums
    sizes = {
        element.get("type"): int(element.get("size", 0)) for element in totals if element.tag in ("total", "system")
    }
    return (sizes["current"] - sizes["fast"] - sizes["rest"] + sizes["mmap"]) / 1e6


def draw(record: dict[str, Any], path: Path) -> None:
    """Memory over groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    groups = [m["groups"] for m in record["memory"]]
    axes.plot(groups, [m["mb"] for m in record["memory"]], label="resident")
    axes.plot(groups, [m["in_use_mb"] for m in record["memory"]], label="in use")
    axes.legend()
    axes.set(
        xlabel="groups done",
        ylabel="memory, MB",
        title=f"{record['groups']} groups, {record['threads']} threads",
    )
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def make_models(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """A packed export and a bank export of a random network, from the tests' cache where they are there."""
    import logging

    import torch

    from export.checkpoint import weights_digest
    from export.to_onnx import write_onnx
    from runtime.contract import WEIGHTS
    from tests.export_cache import ExportCache
    from tests.helpers import random_network

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not installed
    kept, torch.onnx.export = torch.onnx.export, ExportCache(torch.onnx.export)
    try:
        network = random_network(WIDTH)
        files = folder / "icnet.packed.onnx", *bank_files(folder / "icnet.onnx")
        for path, kind in zip(files, (ExportKind.PACKED, ExportKind.INTRA, ExportKind.BANKED), strict=True):
            write_onnx(network, path, kind, {WEIGHTS: weights_digest(network)})
    finally:
        torch.onnx.export = kept
    return files[0], (files[1], files[2])


def main() -> int:
    """Run it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5, help="between two notes of the memory")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/soak.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/soak.png")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    with tempfile.TemporaryDirectory() as folder:
        packed_file, bank = make_models(Path(folder))
        with (
            Predictor(packed_file, threads=2, max_delay_ms=2) as packed,
            Predictor(bank_export=bank, threads=2, max_images=CHUNK) as banks,
        ):
            soak = Soak(samples(packed, banks, 60, np.random.default_rng(0)), args.groups)
            threads = [threading.Thread(target=soak.work, args=(i,), daemon=True) for i in range(args.threads)]
            began, notes = time.monotonic(), []
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                try:
                    threads[0].join(args.seconds)
                    if not threads[0].is_alive():
                        time.sleep(min(args.seconds, 1))
                except KeyboardInterrupt:
                    soak.stop()
                notes.append(
                    {
                        "seconds": round(time.monotonic() - began, 1),
                        "groups": soak.done["groups"],
                        "mb": round(memory(), 1),
                        "in_use_mb": round(in_use(), 1),
                    }
                )
            seconds = time.monotonic() - began
    gc.collect()
    warm = [note for note in notes if note["groups"] >= WARM_UP * soak.groups]
    third = max(len(warm) // 3, 1)
    ends = warm[:third], warm[-third:]
    resident, used = ([float(np.median([note[of] for note in end])) for end in ends] for of in ("mb", "in_use_mb"))
    growth = used[1] / used[0] - 1
    if growth > MOST_GROWTH:
        soak.problems.append(f"memory in use grew by {growth:.1%}, from {used[0]:.0f} to {used[1]:.0f} MB")
    if soak.done["groups"] != soak.groups:
        soak.problems.append(f"{soak.done['groups']} of {soak.groups} groups were done")
    record = {
        "groups": soak.groups,
        "threads": args.threads,
        "width": WIDTH,
        "seconds": round(seconds, 1),
        **dict(soak.done),
        "in_use_growth": round(growth, 4),
        "resident_growth": round(resident[1] / resident[0] - 1, 4),
        "problems": soak.problems[:50],
        "memory": notes,
    }
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record, args.plot)
    print(
        f"{soak.done['groups']} groups, {soak.done['maps']} maps, {soak.done['faults']} faults in {seconds:.0f} s; "
        f"memory in use {used[0]:.0f} → {used[1]:.0f} MB ({growth:+.1%}), resident {resident[0]:.0f} → "
        f"{resident[1]:.0f} MB; {len(soak.problems)} problems"
    )
    for problem in soak.problems[:20]:
        print(problem, file=sys.stderr)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
