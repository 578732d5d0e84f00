"""Output files that are either whole or absent; digests and names of files."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import InputError, ModelError, OutputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if the block ends well, deleted if it does not.

    Missing folders are made; of a symbolic link, the target is replaced. The temporary name keeps the suffix, by which
    writers choose a format.

    Raises:
        OutputError: the folder can't be made or written to, or `path` is a folder, a device or the like.
    """
    target = Path(os.path.realpath(path))
    with _output_errors(Path(path)):
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise OutputError(f"{path}: can't be written: it is {kind}")
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
    try:
        if not path.is_file():
            raise ModelError(f"{path}: {'not a model file' if path.exists() else 'no such model file'}")
    except OSError as error:  # a folder that must not be entered, a name that is too long
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error


def utf8_name(path: Path) -> bool:
    """Whether the bytes of a path are UTF-8, as some engines need it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def bank_files(path: Path) -> tuple[Path, Path]:
    """Where a bank export that is called `path` has its two files: NAME.intra.onnx and NAME.banked.onnx."""
    return path.parent / f"{path.stem}.intra{path.suffix}", path.parent / f"{path.stem}.banked{path.suffix}"


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
