"""Output files that are either whole or absent and never replace an input; digests and names of files."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from runtime.contract import FILE_DIGEST
from runtime.errors import InputError, ModelError, OutputError
from runtime.groups import suffixes

TAIL = 1 << 16  # bytes at the end of a model file, in which its metadata are
UNSEALED = "0" * 64  # stands for a file's digest until the digest is known
# As protobuf writes an entry of ONNX's metadata, as JSON writes one of the notes in an MNN file, or as an OpenVINO file
# has it. The converters of both copy ONNX's metadata in other forms, and with it the ONNX file's digest.
SEAL = re.compile(FILE_DIGEST.encode() + rb'(?:\x12\x40|": "|_xml value=")(.{64})', re.DOTALL)
TEMPORARY = re.compile(r"\.icnet-[0-9a-f]{16}(\.[^.]*)?")  # names that `replacing` makes
_swept: set[Path] = set()  # folders that this process has searched for the temporary files of dead runs


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None], folders: Iterable[Path] = ()) -> None:
    """Nothing that a run reads is written: the rule of every command, applied before it begins.

    Args:
        outputs: files that the run will write; None for those that were not asked for.
        inputs: everything that it reads, in whatever role: files; or folders, which stand for the images in them, at
            any depth. Links, symbolic or hard, count as the file that they lead to.
        folders: folders that the run fills with files of its own. No input may lie directly in one.

    Raises:
        OutputError: an output is an input, or named twice; or one of `folders` holds an input.
    """
    read = [path for path in inputs if path]
    written: dict[tuple[int, int] | str, Path] = {}
    for path in [path for path in outputs if path]:
        if written.setdefault(_identity(path), path) is not path:
            raise OutputError(f"{path}: is another file of this run; choose another name")
    there = any(isinstance(identity, tuple) for identity in written)
    for one in read:
        for file in (one, *(_images(one) if there else ())):
            if output := written.get(_identity(file)):
                raise OutputError(f"{output}: is an input of this run; choose another name")
    filled = {_identity(folder): folder for folder in folders}
    holders: dict[Path, Path] = {}
    for file in read if filled else ():
        for place in (file, Path(os.path.realpath(file))):
            holders.setdefault(place.parent, file)
    for holder, file in holders.items():
        if folder := filled.get(_identity(holder)):
            raise OutputError(f"{folder}: holds {file.name}, an input of this run; choose another --output")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if the block ends well, deleted if it does not.

    Missing folders are made; of a symbolic link, the target is replaced. The temporary name keeps the suffix, by which
    writers choose a format. What is renamed is on the disk. The temporary file is locked while this process lives; one
    without a lock is what a killed run left, and the next run that writes to that folder deletes it.

    Raises:
        OutputError: the folder can't be made or written to, or `path` is a folder, a device or the like.
    """
    try:
        target = Path(os.path.realpath(path))
    except (TypeError, ValueError) as error:  # no path at all, or a null byte in it
        raise OutputError(f"{path!r}: can't be written: {error}") from error
    with output_errors(Path(path)):
        if target.exists() and not target.is_file():
            kind = "a folder" if target.is_dir() else "not a regular file"
            raise OutputError(f"{path}: can't be written: it is {kind}")
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        with _temporary_file(target) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)


@contextmanager
def replacing_folder(path: Path, place: Path) -> Iterator[Path]:
    """A temporary folder to fill; it replaces `path`, a folder or nothing, if the block ends well.

    All files are on the disk before the folder gets its name.

    Args:
        path: the folder to write.
        place: where the temporary folder is made, on the same file system. It is locked meanwhile, so that runs which
            use it follow each other. What a killed run left in it is deleted.

    Raises:
        OutputError: it can't be written.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):
            for dead in [one for one in place.iterdir() if TEMPORARY.fullmatch(one.name) and one.is_dir()]:
                shutil.rmtree(dead)
            temporary, old = (place / f".icnet-{secrets.token_hex(8)}" for _ in range(2))
            try:
                temporary.mkdir()
                yield temporary
                for file in [file for file in temporary.rglob("*") if file.is_file()]:
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                if path.exists():
                    path.rename(old)
                try:
                    temporary.rename(path)
                except OSError:
                    if old.exists():
                        old.rename(path)
                    raise
            finally:
                for folder in (temporary, old):
                    shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file, from `replacing`, which then syncs it; every file of this package is written here.

    Libraries that write by themselves may miss that the disk is full: give them `encoded`.

    Raises:
        OSError: not all of it could be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        written = os.fstat(file.fileno()).st_size
    if written != (size := memoryview(content).nbytes):  # TensorRT's plans are buffers without a length
        raise OSError(errno.ENOSPC, f"{written} of {size} bytes were written")


def encoded(save: Callable[[BinaryIO], object]) -> bytes:
    """The bytes that `save` writes to the file it is given."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def write_picture(path: Path, save: Callable[..., object], **options: Any) -> None:
    """Write a temporary file, from `replacing`, in the format that its suffix names.

    Args:
        path: the file.
        save: Pillow's `image.save` or matplotlib's `figure.savefig`.
        options: passed on to it.

    Raises:
        OSError: not all of it could be written.
    """
    name = path.suffix[1:].lower()
    write_bytes(path, encoded(partial(save, format="jpeg" if name == "jpg" else name, **options)))


def write_json(path: Path, content: Any) -> None:
    """Write a temporary file, from `replacing`, in the way of all our JSON files."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """The content of a JSON file of ours."""
    return (json.dumps(content, indent=1) + "\n").encode()


def remove(path: Path) -> None:
    """Delete a result of an earlier run, if there is one.

    Raises:
        OutputError: it can't be deleted.
    """
    with output_errors(path):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep other runs, and other threads of this one, out of the block while they lock the same folder.

    Args:
        folder: the folder.
        wait: for those that hold it. If not, it must be certain that there are none.

    Raises:
        OSError: the folder can't be opened; or without `wait`, it can't be locked (BlockingIOError: another holds it).
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if wait:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors into OutputError, which names `path`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{path}: can't be written: {path.parent} is not a folder") from error
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error


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


def seal(path: Path) -> str:
    """Write a model file's digest into it: over the digits of `UNSEALED` behind `FILE_DIGEST`, or `XML_DIGEST`.

    The digest is the SHA-256 of the file's bytes, with 64 zeros in the digest's own place. So neither writing nor
    checking it takes a parser, and it covers graph and weights alike. OpenVINO's weights are
    in a file of their own, whose digest the .xml holds.
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
        path: an .onnx, .mnn or .xml file.
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


def bundled(name: str) -> Path | None:
    """A model that comes with this package, e.g. "icnet.onnx" or "detector.onnx"; None if it has none of that name."""
    path = Path(__file__).parent / "models" / name
    return path if path.is_file() else None


def bank_files(path: Path) -> tuple[Path, Path]:
    """Where a bank export that is called `path` has its two files: NAME.intra.onnx and NAME.banked.onnx."""
    return path.parent / f"{path.stem}.intra{path.suffix}", path.parent / f"{path.stem}.banked{path.suffix}"


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one place, which need not exist."""
    return _identity(one) == _identity(other)


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: it can't be read.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise InputError(f"{path}: not a regular file")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


def model_digest(path: Path) -> str:
    """SHA-256 of a model: of its file; of an OpenVINO file NAME.xml, of what NAME.xml and NAME.bin have.

    Raises:
        InputError: a file can't be read.
    """
    return joint_digest(path, path.with_suffix(".bin")) if path.suffix.lower() == ".xml" else digest(path)


def joint_digest(*paths: Path) -> str:
    """One SHA-256 of several files, from that of each.

    Raises:
        InputError: a file can't be read.
    """
    return hashlib.sha256("".join(map(digest, paths)).encode()).hexdigest()


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | str:
    """The same for all paths that lead to one file: a tuple if it is there."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _images(folder: Path) -> Iterator[Path]:
    """The images in a folder, at any depth; none of what is no folder."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        if (here := _identity(name)) in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(here)
        yield from (Path(name, file) for file in files if Path(file).suffix.lower() in suffixes())


@contextmanager
def _temporary_file(target: Path) -> Iterator[Path]:
    """A new file beside `target`, locked by this process; deleted at the end if it is still there."""
    while True:
        path = target.with_name(f".icnet-{secrets.token_hex(8)}{target.suffix}")
        try:  # a signal that comes while the file is made raises right after
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                with suppress(OSError):  # on a file system without locks nothing is swept
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(path, descriptor):
                    yield path
                    return
            finally:
                os.close(descriptor)
        finally:
            with suppress(NotADirectoryError):
                path.unlink(missing_ok=True)
        # another run took it for a dead run's before it was locked


def sweep(folder: Path) -> None:
    """Delete the temporary files that killed runs left in a folder."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if TEMPORARY.fullmatch(entry.name)]:
            with suppress(OSError):  # locked by a living run, another user's, or gone
                descriptor = os.open(folder / name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(folder / name, descriptor):  # else a run finished it meanwhile
                        (folder / name).unlink()
                finally:
                    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is a regular one and still has its name."""
    status = os.fstat(descriptor)
    try:
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, path.lstat())
    except OSError:
        return False
