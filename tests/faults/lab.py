"""What the fault cases stand on: small exports, a data set, undisturbed results, ways to run and to judge.

A case is a kind and a seed; both together repeat it. It ends well or raises; every way to raise is a failure.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import icnet_cli
from runtime import ICNetError, Predictor
from runtime.files import bank_files

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")
GROUPS = {"ant": 1, "bee": 3, "cow": 2, "dog": 4, "elk": 2, "fox": 1}  # images per group
LARGE = 34  # images: more than go into one chunk
EVERYTHING = "maps,masks,cutouts,boxes"  # that icnet predict writes
TIME_OUT = 120  # seconds that a process or call may take; far from what it does take, on a busy machine too
UNPRIVILEGED = 65534  # permissions do not hold for root, so cases about them run as nobody
SETTLED = re.compile(
    r"icnet( [a-z]+)*: ((error|warning): \S|stopped|.+: (its pixels|nothing stands out))|\d+ of \d+ groups failed"
)


@dataclass(frozen=True)
class Kind:
    """A kind of cases.

    Attributes:
        name: by which cases are repeated.
        what: for the table.
        run: one case; whatever it raises is a failure.
        sample: the number of cases in `make test`.
        full: the number in `make faults`.
        seconds: that a case may take.
    """

    name: str
    what: str
    run: Callable[["Lab", "Case"], None]
    sample: int
    full: int
    seconds: int = 2 * TIME_OUT


class Case:
    """A case while it runs.

    Attributes:
        seed: its number within its kind.
        rng: all that is random in it.
        folder: an empty folder for it.
        tried: what was done, for the report of a failure.
    """

    def __init__(self, kind: str, seed: int, folder: Path) -> None:
        self.kind, self.seed, self.folder, self.tried = kind, seed, folder, ""
        self.rng = np.random.default_rng([*kind.encode(), seed])

    def one_of(self, things: Any) -> Any:
        """One of a sequence's elements, as it is."""
        things = list(things)
        return things[int(self.rng.integers(len(things)))]

    def number(self, low: float, high: float) -> float:
        """A number; large and small ones are equally likely."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    @property
    def repeat(self) -> str:
        """The command that runs it again."""
        return f"python -m tests.faults --kind {self.kind} --seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.split("\n") if line]


class Lab:
    """Models, data and undisturbed results; made once, never changed.

    Args:
        exports: icnet.onnx with its three siblings.
        other: makes the same of a network with other weights, when they are needed.
        folder: for all else.
    """

    def __init__(self, exports: Path, other: Callable[[], Path], folder: Path) -> None:
        self.exports, self.other, self.folder = exports, other, folder
        self._seconds: dict[str, float] = {}
        self.models: dict[str, Path] = {}
        for role, name in {"plain": "icnet.onnx", "packed": "icnet.packed.onnx"}.items():
            self.models[role] = folder / role / name  # alone: no bank export lies beside it
            self.models[role].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(exports.with_name(name), self.models[role])
        self.models["chunked"] = self.models["bank"] = folder / "banked/icnet.onnx"
        self.models["bank"].parent.mkdir(exist_ok=True)
        for file in bank_files(exports):
            shutil.copy(file, folder / "banked" / file.name)
        self.data = make_data(folder / "data", GROUPS)
        self.large = make_data(folder / "large", {"one": LARGE, "two": 2})

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        if "predictor" in vars(self):
            self.predictor.close()

    @cached_property
    def predictor(self) -> Predictor:
        """The plain model and its bank export."""
        return Predictor(self.models["plain"], bank_export=bank_files(self.models["bank"]), threads=1)

    @cached_property
    def bank(self) -> Path:
        """A bank of the data set's largest group."""
        path = self.folder / "bank.npz"
        group = "dog"
        with Predictor(bank_export=bank_files(self.models["bank"]), threads=1) as predictor:
            predictor.bank(sorted((self.data / f"img/{group}").iterdir()), self.sisms(group)).save(path)
        return path

    @cached_property
    def checkpoint(self) -> Path:
        """The weights of the exports, as a checkpoint."""
        from export.checkpoint import save_checkpoint
        from tests.helpers import random_network

        path = self.folder / "icnet.pth"
        save_checkpoint(path, random_network(1 / 32))
        return path

    @cached_property
    def mnn(self) -> Path:
        """The plain model for MNN, as `icnet build` makes it."""
        from export.to_mnn import build_mnn

        path = self.folder / "icnet.mnn"
        with captured():
            build_mnn(self.models["plain"], path)
        return path

    @cached_property
    def detector(self) -> Path:
        """A detector's ONNX file, with a digest in it, as `icnet export` writes one."""
        return self.make_detector(self.folder / "detector.onnx")

    @cached_property
    def photos(self) -> Path:
        """The data set without its SISMs."""
        return Path(shutil.copytree(self.data / "img", self.folder / "photos/img")).parent

    def make_detector(self, path: Path, bias: float = -0.4) -> Path:
        """Write such a file; another bias gives other SISMs."""
        import onnx

        from export.onnx_file import save_model
        from tests.runtime.detectors import detector_file

        names = ("images", "sisms")
        detector_file(path, layout="NHWC", dtype="uint8", batch="B", size=("H", "W"), names=names, bias=bias)
        save_model(onnx.load(path), path)
        return path

    def sisms(self, group: str) -> list[Path]:
        """The SISM files of a group."""
        return sorted((self.data / "sism" / group).iterdir())

    def arguments(self, mode: str) -> list[str]:
        """The command line of a mode, but for its output: one of `runs.PREDICTS`, make-bank or export."""
        if mode == "export":
            return ["export", "--checkpoint", str(self.checkpoint)]
        if mode == "make-bank":
            return ["bank", str(self.data / "img/dog"), "-s", str(self.data / "sism/dog"), *self._model("bank")]
        data = self.large if mode == "chunked" else self.data
        more = {"packed": ["--pack"], "outputs": ["--write", EVERYTHING]}.get(mode, [])
        if mode == "detector":
            more, data = ["--sism-model", str(self.detector), "--keep-sisms"], self.photos
        more = ["--bank", str(self.bank)] if mode == "bank" else more
        return ["predict", str(data), *self._model(mode), *more]

    def _model(self, mode: str) -> list[str]:
        return ["-m", str(self.models["plain" if mode in ("outputs", "detector") else mode]), "-t", "1"]

    def output(self, mode: str, folder: Path) -> Path:
        """What a mode is told to write, in a folder."""
        return folder / {"make-bank": "out/dog.npz", "export": "out/icnet.onnx"}.get(mode, "out")

    def expected(self, mode: str) -> Path:
        """The folder with what a mode gives undisturbed."""
        folder = self.folder / "expected" / mode
        if not folder.exists():
            temporary = self.folder / "expected" / f".{mode}"
            began = time.monotonic()
            done = command(*self.arguments(mode), "-o", self.output(mode, temporary))
            self._seconds[mode] = time.monotonic() - began
            assert done.code == 0, done
            temporary.rename(folder)
        return folder / "out"

    def duration(self, mode: str) -> float:
        """Seconds that a run of a mode takes, about, with nothing in its way."""
        self.expected(mode)
        return self._seconds[mode]


def make_data(folder: Path, groups: dict[str, int]) -> Path:
    """A data set of noise images, with SISMs."""
    rng = np.random.default_rng(7)
    for group, count in groups.items():
        for i in range(count):
            width, height = (int(side) for side in rng.integers(20, 60, 2))
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            for kind, name in {"img": f"{i:02}.{'jpg' if i % 2 else 'png'}", "sism": f"{i:02}.png"}.items():
                path = folder / kind / group / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (image if kind == "img" else image.convert("L")).save(path)
    return folder


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Catch standard output and error, also what libraries write past Python; the list gets both at the end."""
    caught: list[str] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = [os.dup(1), os.dup(2)]
        streams = sys.stdout, sys.stderr
        try:
            for fd, file in enumerate(files, 1):
                os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(os.fdopen(os.dup(fd), "wb", 0), "utf-8", "backslashreplace", write_through=True)
                for fd in (1, 2)
            )
            yield caught
        finally:
            sys.stdout, sys.stderr = streams
            for fd, saved in enumerate(kept, 1):
                os.dup2(saved, fd)
                os.close(saved)
            for file in files:
                file.seek(0)
                caught.append(file.read().decode("utf-8", "surrogateescape"))


def command(*argv: object) -> Outcome:
    """Run the command line in this process."""
    code: Any = None
    with captured() as caught:
        try:
            code = icnet_cli.main([os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in argv])
        except SystemExit as error:  # argparse
            code = error.code
    return Outcome(code, *caught)


def start(*argv: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start the command line in a process of its own; returns once it has imported what it needs to begin."""
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), *map(os.fspath, map(str, argv))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def ended(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a process from `start`."""
    try:
        out, err = process.communicate(timeout=TIME_OUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"hangs: no end within {TIME_OUT} s") from None
    return Outcome(process.returncode, out, err)


def obeyed(text: str) -> list[str]:
    """The characters that a terminal obeys instead of showing them: controls, line breaks, turned directions."""
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    kinds = ("Cc", "Cs", "Zl", "Zp")  # Cs: surrogates, which no encoding has
    return [c for c in text if unicodedata.category(c) in kinds or unicodedata.bidirectional(c) in turns]


def settle(outcome: Outcome, *codes: int, lines: int | None = 1) -> bool:
    """Assert that a command ended in one of the ways that are promised; whether it did what it was asked to.

    Args:
        outcome: of the command.
        codes: the exit codes that will do; 0 and 2 if none are named.
        lines: how many lines an error takes; None where several groups may each have one.
    """
    assert outcome.code in (codes or (0, 2)), outcome
    for line in (*outcome.lines, *outcome.out.split("\n")):
        assert not obeyed(line.replace("\t", " ")), f"unprintable: {line!r}"
    for line in outcome.lines:
        assert SETTLED.match(line), f"not a line of ours: {line!r}"
    if outcome.code == 2:
        errors = [line for line in outcome.lines if ": error: " in line]
        assert errors, outcome
        assert lines is None or len(outcome.lines) == lines, outcome
    return outcome.code == 0


def message(error: BaseException) -> str:
    """The message of an error of ours, which must be one printable line; any other error is raised."""
    if not isinstance(error, ICNetError):
        raise error
    text = str(error)
    assert text.strip(), repr(error)
    assert not obeyed(text), f"unprintable: {text!r}"
    return text


def attempt(call: Callable[[], Any], quiet: bool = True) -> tuple[Any, ICNetError | None]:
    """The result of a call, or its error if that is one of ours; if `quiet`, nothing may reach the terminal."""
    error: BaseException | None = None
    result = None
    with warnings.catch_warnings(action="ignore"), captured() as caught:  # Pillow's warnings are the caller's to filter
        try:
            result = call()
        except Exception as caught_error:
            error = caught_error
    assert not quiet or caught == ["", ""], f"wrote to the terminal: {caught}"
    if error is not None:
        message(error)
    return result, error if isinstance(error, ICNetError) else None


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


def same_tree(found: Path, expected: Path) -> None:
    """Assert that two folders hold the same: names and bytes, and so nothing temporary."""
    one, other = tree(found), tree(expected)
    assert sorted(one) == sorted(other), f"files: {sorted({*one} ^ {*other})} in one only"
    for name, content in one.items():
        assert content == other[name], f"{name}: other bytes than those of an undisturbed run"


def alike(found: Path, expected: Path) -> None:
    """The same of packed runs: which groups shared a call depends on what was left to do, and rounding on that."""
    assert sorted(tree(found)) == sorted(tree(expected))
    for name, content in tree(found).items():
        if Path(name).name == "icnet.json":
            record, other = json.loads(content), json.loads((expected / name).read_text())
            assert record["made_from"] == other["made_from"], name
            digests = {
                one: hashlib.sha256((found / name).with_name(one).read_bytes()).hexdigest() for one in other["files"]
            }
            assert record["files"] == digests, f"{name}: digests of other files"
        else:
            one, other = (np.asarray(Image.open(folder / name), np.float32) for folder in (found, expected))
            assert one.shape == other.shape, name
            assert np.abs(one - other).mean() < 1, f"{name}: another picture"  # of 255 levels


def part_of(found: Path, expected: Path, hidden: bool) -> None:
    """Assert that a folder holds whole results only: each is there as it should be, or not at all.

    Args:
        found: what is there after a disturbance.
        expected: undisturbed results.
        hidden: whether hidden files, which the next run sweeps, may be there.
    """
    whole = tree(expected)
    for name, content in tree(found).items() if found.exists() else ():
        if Path(name).name.startswith("."):
            assert hidden, f"{name}: a temporary file is left"
        elif Path(name).name != "icnet.json":  # begun, it says what is not there yet
            assert name in whole, f"{name}: no result"
            assert content == whole[name], f"{name}: truncated or wrong"


@contextlib.contextmanager
def without_privileges(folder: Path) -> Iterator[None]:
    """Be nobody, for whom permissions count; the folder becomes theirs."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UNPRIVILEGED, UNPRIVILEGED, follow_symlinks=False)
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)
