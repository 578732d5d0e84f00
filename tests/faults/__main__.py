"""Fault cases from the command line: one, to repeat it; or all, with a table for docs/reliability.md.

    python -m tests.faults --kind images --seed 17    # one case
    python -m tests.faults --write                    # all: what `make faults` runs

Every kind runs in a process of its own. If that dies or is silent for too long, the case that it was at has failed, and
another process goes on behind it.
"""

import argparse
import contextlib
import json
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.faults import commands, detectors, inputs, runs
from tests.faults.lab import ROOT, Case, Kind, Lab

KINDS = {kind.name: kind for kind in (*inputs.KINDS, *detectors.KINDS, *commands.KINDS, *runs.KINDS)}
PAGE = ROOT / "docs/reliability.md"
MARKERS = "<!-- faults -->\n", "<!-- end of faults -->\n"
MEMORY = 4 << 30  # bytes that a case may add to the process's address space
SILENT = 60  # seconds beyond a case's own time-out: a hang in native code


class HangsError(BaseException):
    """A case takes too long; no code that is tested catches this."""


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Bound the time and the memory that a case may take."""

    def stop(*_: object) -> None:
        raise HangsError(f"no end within {seconds} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, memory[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, handler)


def run_case(lab: Lab, kind: Kind, seed: int) -> str | None:
    """One case; None, or what was tried, what came of it, and how to repeat it."""
    with tempfile.TemporaryDirectory(prefix="case-", dir=lab.folder) as folder:
        Path(folder).chmod(0o755)
        case = Case(kind.name, seed, Path(folder))
        try:
            with bounded(kind.seconds):
                kind.run(lab, case)
        except (Exception, HangsError) as error:
            where = "".join(traceback.format_exception(error)[-3:])
            return (
                f"{case.repeat}\n  tried: {case.tried!r:.400}\n  {type(error).__name__}: {str(error)[:2000]}\n{where}"
            )
    return None


def make_exports(folder: Path) -> tuple[Path, Path]:
    """Exports of two narrow networks, from the tests' cache where they are there."""
    import logging

    import torch

    from tests.export_cache import ExportCache
    from tests.helpers import random_network, write_exports

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is not installed
    found = []
    kept, torch.onnx.export = torch.onnx.export, ExportCache(torch.onnx.export)
    try:
        for seed in range(2):
            (folder / f"exports{seed}").mkdir(parents=True)
            found.append(write_exports(folder / f"exports{seed}", random_network(1 / 32, seed=seed)))
    finally:
        torch.onnx.export = kept
    return found[0], found[1]


def child(args: argparse.Namespace) -> int:
    """Run cases of one kind, a line of JSON for each: [seed, failure, seconds]."""
    import torch

    from tests.export_cache import ExportCache

    torch.onnx.export = ExportCache(torch.onnx.export)  # as in driver.py
    with tempfile.TemporaryDirectory(prefix="lab-", dir=args.exports) as folder:
        Path(folder).chmod(0o755)
        found = [args.exports / f"exports{i}/icnet.onnx" for i in range(2)]
        with Lab(found[0], lambda: found[1], Path(folder)) as lab:
            out = sys.stdout
            for seed in range(args.seed, args.seed + args.count):
                print(json.dumps(["begin", seed, None]), file=out, flush=True)
                began = time.monotonic()
                failure = run_case(lab, KINDS[args.kind], seed)
                print(json.dumps([seed, failure, time.monotonic() - began]), file=out, flush=True)
    return 0


def isolated(kind: Kind, seeds: range, exports: Path) -> Iterator[tuple[int, str | None, float]]:
    """Run cases in processes that may die: (seed, failure, seconds) each."""
    seed, silent = seeds.start, kind.seconds + SILENT
    while seed < seeds.stop:
        words = ["--kind", kind.name, "--seed", str(seed), "--count", str(seeds.stop - seed), "--exports", str(exports)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", *words, "--child"], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=silent)
                ending = f"its process died with exit code {process.wait() if line is None else 0}"
            except queue.Empty:
                line, ending = None, f"hangs: silent for {silent} s"
            if line is None:
                process.kill()
                process.wait()
                if seed < seeds.stop:
                    yield seed, f"python -m tests.faults --kind {kind.name} --seed {seed}\n  {ending}\n", 0.0
                    seed += 1
                break
            found = json.loads(line)
            if found[0] != "begin":
                yield found[0], found[1], found[2]
                seed = found[0] + 1
            if seed == seeds.stop:
                process.wait()
                break


def _read(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):
            lines.put(line)
    lines.put(None)


def table(counts: dict[str, list[int]]) -> str:
    """Kinds × cases × failures, in Markdown."""
    rows = [f"| {KINDS[name].what} | {cases} | {failures} |" for name, (cases, failures) in counts.items()]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    head = ["| kind | cases | failures |", "|---|---:|---:|"]
    return "\n".join([*head, *rows, f"| all | {total[0]} | {total[1]} |"]) + "\n"


def write(counts: dict[str, list[int]]) -> None:
    """Put the counts into the page's table; the rows of the kinds that were not run stay."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKERS[0])
    rows, after = rest.split(MARKERS[1])
    names = {kind.what: name for name, kind in KINDS.items()}
    for what, *numbers in (row.strip("| ").split(" | ") for row in rows.splitlines()):
        if what in names:
            counts = {names[what]: [int(number) for number in numbers]} | counts
    in_order = {name: counts[name] for name in KINDS if name in counts}
    PAGE.write_text(before + MARKERS[0] + table(in_order) + MARKERS[1] + after, encoding="utf-8")


def main() -> int:
    """Run what is asked for; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--kind", choices=KINDS, action="append", help="only this kind (may be repeated)")
    add("--seed", type=int, help="the first case")
    add("--count", type=int, help="how many from --seed on (default 1)")
    add("--share", type=float, default=1, help="of the cases of every kind (default 1)")
    add("--sample", action="store_true", help="the cases of make test")
    add("--write", action="store_true", help="write the table into docs/reliability.md, or with --kind its rows")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--exports", type=Path, help="a folder with exports0/ and exports1/, which make_exports filled earlier")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    if args.child:
        args.kind = args.kind[0]
        return child(args)
    folder = args.exports or Path(tempfile.mkdtemp(prefix="icnet-faults-"))
    folder.chmod(0o755)
    counts: dict[str, list[int]] = {}
    failures: list[str] = []
    try:
        if args.exports is None:
            make_exports(folder)
        for name in args.kind or KINDS:
            kind, began = KINDS[name], time.monotonic()
            first, count = args.seed or 0, args.count or 1
            if args.seed is None:
                count = kind.sample if args.sample else max(min(kind.full, 1), round(kind.full * args.share))
            if count == 0:
                continue
            counts[name] = [0, 0]
            for _, failure, _ in isolated(kind, range(first, first + count), folder):
                counts[name][0] += 1
                counts[name][1] += failure is not None
                if failure is not None:
                    failures.append(failure)
                    print(failure, file=sys.stderr, flush=True)
            print(
                f"{name}: {counts[name][0]} cases, {counts[name][1]} failures, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    finally:
        if args.exports is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(counts), end="")
    if args.write:
        write(counts)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
