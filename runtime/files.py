"""Output files that are either whole or absent; digests and names of files."""

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.contract import FILE_DIGEST
from runtime.errors import InputError, ModelError, OutputError

TAIL = 1 << 16  # bytes at the end of a model file, in which its metadata are
UNSEALED = "0" * 64  # stands for a file's digest until the digest is known
# As protobuf writes an entry of ONNX's metadata, or as JSON writes one of the notes in an MNN file. MNN's converter
# copies ONNX's metadata in a third form, and with it the ONNX file's digest.
SEAL = re.compile(FILE_DIGEST.encode() + rb'(?:\x12\x40|": ")(.{64})', re.DOTALL)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if the block ends well, deleted if it does not.

    Missing folders are made; of a symbolic link, the target is replaced. The temporary name keeps the suffix, by which
    writers choose a format.

    Raises:
        OutputError: the folder can't be made or written to, or `path` is a folder, a device or the like.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError(f"{path}: can't be written: it is {'a folder' if target.is_dir() else 'not a regular file'}")
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    with _output_errors(Path(path)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            yield temporary
            temporary.replace(target)
        finally:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a result of an earlier run, if there is one.

    Raises:
        OutputError: it can't be deleted.
    """
    with _output_errors(path):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write to a temporary name, from `replacing`, in the way of all our JSON files."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_model_file(path: Path) -> None:
    """Raise ModelError unless `path` is a file, whatever is in it."""
    if not path.is_file():
        raise ModelError(f"{path}: {'not a model file' if path.exists() else 'no such model file'}")


def seal(path: Path) -> str:
    """Write a model file's digest into it: over the digits of `UNSEALED` behind the key `FILE_DIGEST`.

    The digest is the SHA-256 of the file's bytes, with 64 zeros in the digest's own place. So neither writing nor
    checking it takes a parser, and it covers graph and weights alike.
    """
    with path.open("r+b") as file:
        place = _seal(file)
        assert place is not None, f"{path} has no {FILE_DIGEST}"
        found, _ = _digests(file, place)
        file.seek(place)
        file.write(found.encode())
    return found


def check_seal(path: Path, data: bytes | None = None) -> None:
    """Check a model file against the digest in it. A file without one passes: another tool's, or an older export.

    Args:
        path: an .onnx or .mnn file.
        data: its bytes, if they are read already.

    Raises:
        ModelError: it can't be read, or is not as it was written.
    """
    if data is None:
        check_model_file(path)
    try:
        with path.open("rb") if data is None else io.BytesIO(data) as file:
            place = _seal(file)
            found, stored = _digests(file, place) if place is not None else ("", "")
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    if found != stored:
        raise ModelError(
            f"{path}: damaged, or edited: it is not as it was written, by its own SHA-256; export or build it again "
            f"(edited on purpose? Remove {FILE_DIGEST} from its metadata, or use Predictor(..., verify=False))"
        )


def _seal(file: BinaryIO) -> int | None:
    """Where the digits of a file's digest start, if it has one; metadata come last in both formats."""
    start = max(file.seek(0, os.SEEK_END) - TAIL, 0)
    file.seek(start)
    tail = file.read()
    found = SEAL.match(tail, max(tail.rfind(FILE_DIGEST.encode()), 0))
    return start + found.start(1) if found else None


def _digests(file: BinaryIO, place: int) -> tuple[str, str]:
    """The digest of a file as it is, and the one that is stored at `place`."""
    file.seek(place)
    stored = file.read(len(UNSEALED))
    found, buffer, at = hashlib.sha256(), bytearray(1 << 20), 0
    file.seek(0)
    while n := file.readinto(buffer):  # type: ignore[attr-defined]  # binary files have it; BinaryIO does not say so
        for i in range(max(place - at, 0), min(place + len(UNSEALED) - at, n)):
            buffer[i] = ord("0")
        found.update(memoryview(buffer)[:n])
        at += n
    return found.hexdigest(), stored.decode("ascii", "replace")


def bank_files(path: Path) -> tuple[Path, Path]:
    """Where a bank export that is called `path` has its two files: NAME.intra.onnx and NAME.banked.onnx."""
    return path.with_name(f"{path.stem}.intra{path.suffix}"), path.with_name(f"{path.stem}.banked{path.suffix}")


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one place, which need not exist."""
    return os.path.realpath(one) == os.path.realpath(other)


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: it can't be read.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path}: not a regular file")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{path}: can't be written: {path.parent} is not a folder") from error
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
