"""icnet bench gpu-check: run on this GPU whatever needs one, and compare it with the CPU.

A check passed, failed, or could not run because something is missing. The exit code is 0 if every check that was asked
for passed: nothing is skipped.
"""

import argparse
import ctypes
import logging
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from benchmarks import describe, records
from benchmarks.gpu_checks import ENGINES, Check, checks
from benchmarks.gpu_subject import Subject
from benchmarks.machine import header
from benchmarks.records import CheckRow, GpuCheck
from benchmarks.render import to_terminal, wide_console
from benchmarks.runners import reason
from evaluation.record import recording
from runtime import DependencyError, InputError
from runtime.backends import cuda_driver
from runtime.files import digest, same_file
from runtime.threads import cores

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "weights" / "icnet_demo.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench gpu-check`."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=DEMO, help="the network (default: the demo checkpoint)")
    add(
        "--engine",
        action="append",
        choices=ENGINES,
        help="check this one only; repeat it for more (default: tensorrt and onnxruntime)",
    )
    add("--groups", type=int, default=10_000, metavar="N", help="groups in the long stream (default 10000)")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="JSON",
        help="the results (default: benchmarks/results/gpu_check_NAME.json, if there is a GPU)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks, print what ran, what failed and what is missing, and write the results.

    Returns:
        0 if every check passed; 1 if not; 130 if interrupted.

    Raises:
        InputError: an option is out of range.
        CheckpointError: the checkpoint can't be loaded.
        OutputError: the results can't be written.
    """
    if args.groups < 2:
        raise InputError("--groups: at least 2")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    console, card = wide_console(), find_card()
    output = args.output or _default_output(card)
    if output and same_file(output, args.checkpoint):
        raise InputError(f"{output}: is the checkpoint; choose another --output")
    engines = list(dict.fromkeys(args.engine or ("tensorrt", "onnxruntime")))
    results = cast(GpuCheck, header("gpu-check", cores()))
    results["machine"].update(cast(Any, card))
    results["model"] = {"name": args.checkpoint.name, "sha256": digest(args.checkpoint)}
    results["engines"], results["checks"] = engines, []

    def keep() -> bool:
        return bool(results["checks"])

    wanted = [check for engine in engines for check in checks(engine)]
    with (
        tempfile.TemporaryDirectory() as folder,
        recording(
            results, output, inputs=[args.checkpoint], keep=lambda: results["checks"], console=console
        ) as progress,
    ):
        subject = Subject(Path(folder), args.checkpoint, args.groups)
        for check in progress.track(wanted, description="checking"):
            row = perform(check, subject)
            results["checks"].append(row)
            progress.console.print(f"{row['outcome']:9} {row['name']}", highlight=False)
    to_terminal(describe.gpu_check(results), console)
    if results["interrupted"]:
        return 130
    return 0 if all(row["outcome"] == "passed" for row in results["checks"]) else 1


def perform(check: Check, subject: Subject) -> CheckRow:
    """Run one check, whatever comes of it."""
    started = time.perf_counter()
    row: CheckRow = {"name": check.name, "outcome": "passed", "seconds": 0.0, "figures": {}}
    try:
        check.usable()
        row["figures"] = check.run(subject)
    except DependencyError as error:
        row["outcome"], row["why"] = "could not", reason(error)
    except Exception as error:  # what any engine raises; the other checks go on
        row["outcome"], row["why"] = "failed", reason(error)
    row["seconds"] = time.perf_counter() - started
    return row


def find_card() -> records.Gpu:
    """The first GPU and its software, as the driver tells it; empty without a driver."""
    found = _ask_driver()
    if not found:
        return {}
    name, capability, driver, memory = found
    card: records.Gpu = {"gpu": name, "compute_capability": capability, "driver": driver, "cuda": _cuda_version()}
    if memory.isdecimal():  # Jetson's memory is the host's, and not told
        card["gpu_memory_bytes"] = int(memory) << 20
    return card


def _ask_driver() -> list[str]:
    """Name, compute capability, driver and MiB of the first GPU, asked of `nvidia-smi`; nothing without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [text.strip() for text in lines[0].rsplit(",", 3)] if lines else []


def _cuda_version() -> str | None:
    """The newest CUDA that the driver runs."""
    version = ctypes.c_int()
    try:
        known = cuda_driver.load_driver().cuDriverGetVersion(ctypes.byref(version)) == 0
    except DependencyError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if known else None


def _default_output(card: records.Gpu) -> Path | None:
    name = re.sub(r"[^a-z0-9]+", "_", card.get("gpu", "").lower()).strip("_")
    return ROOT / "benchmarks" / "results" / f"gpu_check_{name}.json" if name else None
