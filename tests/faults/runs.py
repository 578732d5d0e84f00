"""Kinds of cases around whole runs: kills, full disks, two runs at once, closing and leaving while threads compute."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Bank, ICNetError, Predictor
from runtime.files import bank_files
from tests.faults.damage import picture
from tests.faults.lab import (
    ROOT,
    TIME_OUT,
    Case,
    Kind,
    Lab,
    alike,
    command,
    ended,
    make_data,
    message,
    part_of,
    same_tree,
    settle,
    start,
)

PREDICTS = ("outputs", "plain", "packed", "detector", "chunked", "bank")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
STARTED = 0.05  # seconds until a process that is ready answers to signals


def again(lab: Lab, mode: str, output: Path, expected: Path, *more: str) -> None:
    """Run a mode once more: now it must give what an undisturbed run gives, and leave nothing temporary."""
    assert settle(command(*lab.arguments(mode), "-o", output, *more))
    (alike if mode == "packed" else same_tree)(output if output.suffix == "" else output.parent, expected)


def killed(lab: Lab, case: Case, mode: str) -> None:
    """A signal at a random moment of a run: nothing is half written, and the next run completes it."""
    expected = lab.expected(mode)
    number = case.one_of(SIGNALS)
    output = lab.output(mode, case.folder)
    folder = case.folder / "out"
    length = lab.duration(mode)
    process = start(*lab.arguments(mode), "-o", output)
    if mode in PREDICTS and case.rng.random() < 0.5:  # once so many files are there, whatever the time
        files = int(case.rng.integers(1, sum(1 for p in expected.rglob("*") if p.is_file())))
        case.tried += f"{mode}, {signal.Signals(number).name} at file {files}; "
        while process.poll() is None and sum(1 for p in folder.rglob("*") if p.suffix) < files:
            time.sleep(0.001)
    else:
        moment = STARTED + case.rng.uniform(0, length)
        case.tried += f"{mode}, {signal.Signals(number).name} after {moment:.3f} s; "
        time.sleep(moment)
    process.send_signal(number)
    done = ended(process)
    assert "Traceback" not in done.err, done.err
    if done.code == -number != -signal.SIGKILL:  # before the command began, or once it had ended
        said = [line for line in done.err.splitlines() if "detector.onnx: its pixels" not in line]
        assert said == [], done
        assert not folder.exists() or same_tree(folder, expected) is None
    elif number == signal.SIGKILL:
        assert done.code in (0, -number), done
    else:
        settle(done, 0, SIGNALS[number])
    part_of(folder, expected, hidden=number == signal.SIGKILL)
    again(lab, mode, output, expected, *["--resume"] * (mode in PREDICTS))


def kills(lab: Lab, case: Case) -> None:
    """A signal at a random moment of `icnet predict` or `icnet bank`."""
    killed(lab, case, (*PREDICTS, "make-bank")[case.seed % 7])


def killed_exports(lab: Lab, case: Case) -> None:
    """A signal at a random moment of `icnet export`."""
    killed(lab, case, "export")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond this many bytes."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def can_mount() -> bool:
    """Whether a small file system can be mounted."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    folder = Path("/tmp") / f"faults-{os.getpid()}"
    folder.mkdir()
    try:
        with small_disk(folder, 64):
            return True
    except subprocess.CalledProcessError:
        return False
    finally:
        folder.rmdir()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of this size on a folder."""
    options = f"size={kilobytes}k,mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)


def disks(lab: Lab, case: Case) -> None:
    """A full disk or a file-size limit: an error, whole files only, and the next run with room completes them."""
    mode = (*PREDICTS, "make-bank")[case.seed % 7]
    expected = lab.expected(mode)
    sizes = [p.stat().st_size for p in expected.rglob("*") if p.is_file()]
    disk = case.folder / "disk"
    disk.mkdir()
    output = lab.output(mode, disk)
    full = case.seed % 2 == case.seed // 7 % 2 and can_mount()
    with contextlib.ExitStack() as stack:
        if full:
            kilobytes = int(case.rng.uniform(1, sum(-(-size // 4096) * 4 for size in sizes)))
            case.tried += f"{mode}, a disk of {kilobytes} KiB; "
            stack.enter_context(small_disk(disk, max(kilobytes, 4)))
            done = command(*lab.arguments(mode), "-o", output)
        else:
            limit = int(case.number(1, max(sizes) * 1.1))
            case.tried += f"{mode}, files of at most {limit} bytes; "
            with file_size_limit(max(limit, 1)):
                process = start(*lab.arguments(mode), "-o", output)
                done = ended(process)
        settle(done, lines=None)
        assert (done.code == 2) == (full or limit < max(sizes)) or full, done
        part_of(disk / "out", expected, hidden=False)
        if full:
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True, capture_output=True)
        again(lab, mode, output, expected, *["--resume"] * (mode in PREDICTS))


def full_exports(lab: Lab, case: Case) -> None:
    """The same for `icnet export`."""
    expected, output = lab.expected("export"), lab.output("export", case.folder)
    limit = int(case.number(64, (expected / "icnet.onnx").stat().st_size))
    case.tried += f"files of at most {limit} bytes; "
    with file_size_limit(limit):
        process = start(*lab.arguments("export"), "-o", output)
        done = ended(process)
    settle(done, 2)
    part_of(case.folder / "out", expected, hidden=False)
    again(lab, "export", output, expected)


def races(lab: Lab, case: Case) -> None:
    """Two runs into one folder at once: both end well, every file is whole, and no record lies."""
    mode = PREDICTS[case.seed % 6]
    other = mode if case.rng.random() < 0.5 else {"plain": "packed", "packed": "plain"}.get(mode, mode)
    resumes = [["--resume"] * int(case.rng.integers(2)) for _ in range(2)]
    out = case.folder / "out"
    case.tried += f"{mode} {resumes[0]} and {other} {resumes[1]}; "
    first = start(*lab.arguments(mode), "-o", out, *resumes[0])
    time.sleep(case.rng.uniform(0, lab.duration(mode)))
    second = start(*lab.arguments(other), "-o", out, *resumes[1])
    outcomes = [ended(first), ended(second)]
    for done in outcomes:
        settle(done, 0)
    results = {
        name: p.read_bytes() for p in out.rglob("*.*") if (name := str(p.relative_to(out))) and p.name != "icnet.json"
    }
    wholes = [lab.expected(each) for each in (mode, other)]
    for name, content in results.items():
        assert any(content == (whole / name).read_bytes() for whole in wholes), f"{name}: of neither run"
    again(lab, mode, out, wholes[0], "--resume")


def closing(lab: Lab, case: Case) -> None:
    """A Predictor that is closed while other threads call it: each call ends, with its result or with "is closed"."""
    mode = case.one_of(["plain", "packed", "chunked"])
    images = int(case.rng.integers(1, 4)) if mode != "chunked" else 40
    group = (
        [np.asarray(picture(case)) for _ in range(images)],
        [np.asarray(picture(case))[:, :, 0] for _ in range(images)],
    )
    bank = bank_files(lab.models["bank"])
    predictor = (
        Predictor(bank_export=bank, threads=1)
        if mode == "chunked"
        else Predictor(lab.models[mode], threads=1, max_delay_ms=case.one_of([0, 30_000]) if mode == "packed" else 0)
    )
    expected = predictor(*group) if mode != "packed" else None
    outcomes: list[Any] = []

    def calls() -> None:
        for _ in range(1000):
            try:
                outcomes.append(predictor(*group))
            except Exception as error:
                outcomes.append(error)
                return

    threads = [threading.Thread(target=calls, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait = case.number(0.001, 0.3)
    case.tried += f"{mode}, {images} images, closed after {wait:.3f} s; "
    time.sleep(wait)
    began = time.monotonic()
    predictor.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a call hangs after close()"
    assert time.monotonic() - began < 10, "a call waited after close()"
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            assert isinstance(outcome, ICNetError), repr(outcome)
            assert "closed" in message(outcome), outcome
        elif expected is not None:
            for one, other in zip(outcome, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    assert sum(isinstance(outcome, Exception) for outcome in outcomes) == len(threads)


LEAVING = """
import sys, threading, time
import numpy as np
from runtime import Predictor
mode, model, intra, banked, wait = sys.argv[1:]
predictor = Predictor(bank_export=(intra, banked), threads=2) if mode == "chunked" else Predictor(model, threads=2)
n = 40 if mode == "chunked" else 3
group = np.zeros((n, 224, 224, 3), np.uint8), np.zeros((n, 224, 224), np.uint8)
def calls():
    while True:
        predictor(*group)
def streams():
    for _ in predictor.predict_groups(iter(lambda: group, None)):
        pass
for target in (calls, streams, calls):
    threading.Thread(target=target, daemon=True).start()
time.sleep(float(wait))
"""


def leaving(lab: Lab, case: Case) -> None:
    """A program that ends while its threads compute ends with its own exit code."""
    mode, wait = case.one_of(["plain", "packed", "chunked"]), case.number(0.001, 0.5)
    case.tried += f"{mode}, after {wait:.3f} s; "
    argv = [sys.executable, "-c", LEAVING, mode, lab.models[mode], *bank_files(lab.models["bank"]), str(wait)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=TIME_OUT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert "Fatal" not in done.stderr, done.stderr


def descriptors(lab: Lab, case: Case) -> None:
    """A process that runs out of file descriptors gets errors, not wrong results, and goes on once there are some."""
    image = sorted((lab.data / "img/cow").iterdir())
    sisms = lab.sisms("cow")
    expected = lab.predictor(image, sisms)
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    spare = int(case.rng.integers(0, 4))
    case.tried += f"{spare} to spare; "
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + spare, kept[1]))
    try:
        for call in (lambda: lab.predictor(image, sisms), lambda: Bank.load(lab.bank)):
            try:
                call()
            except ICNetError as error:
                message(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
    for one, other in zip(lab.predictor(image, sisms), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def batches(lab: Lab, case: Case) -> None:
    """200 groups, two actors: ten kills of an actor at random moments, one of the driver, and --resume."""
    from tests import batch_runs

    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # Ray's processes map far more memory than they use
    data = make_data(case.folder / "data", {f"g{i:03}": 1 + i % 4 for i in range(200)})
    model = ["-m", lab.models["plain"], "-t", 1]
    expected, out = case.folder / "expected", case.folder / "out"
    assert settle(command("predict", data, *model, "-o", expected))
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as temporary:  # short, for Ray's sockets
        argv = (data, *model, "-o", out, "--actors", 2)
        env = batch_runs.environment(TMPDIR=temporary)
        killed = batch_runs.disturbed(case.rng, argv, out, 200, 10, env)
        assert os.listdir(temporary) == []  # noqa: PTH208
    case.tried += f"{killed} actors killed; "
    batch_runs.check(out, expected)
    assert killed >= 9, killed


KINDS = (
    Kind(
        "kills",
        "predict in all its modes and bank, killed, then run again",
        kills,
        4,
        300,
    ),
    Kind("killed-exports", "export, killed, then run again", killed_exports, 0, 30),
    Kind("disks", "predict and bank on a full disk or with a limit of file sizes, then again with room", disks, 3, 150),
    Kind("full-exports", "export with a limit of file sizes, then without", full_exports, 0, 10),
    Kind("races", "two runs into one folder at once", races, 2, 60),
    Kind("closing", "close() while threads compute", closing, 4, 100),
    Kind("leaving", "the interpreter's end while threads compute", leaving, 1, 40),
    Kind("descriptors", "no file descriptors left", descriptors, 2, 40),
    Kind(
        "batches",
        "batch of 200 groups, ten actors and the driver killed",
        batches,
        0,
        int(bool(find_spec("ray"))),
        1800,
    ),
)
