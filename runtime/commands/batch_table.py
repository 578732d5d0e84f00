"""The tables of `icnet batch`: its groups, a row per image; and its outcomes, a row per group.

A table of groups has the columns `group`, `image` and, unless a detector makes the SISMs, `sism`. Images and SISMs are
paths or URLs; relative ones start at the folder of the table.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import InputError, OutputError, one_line
from runtime.files import encoded, replacing, write_bytes
from runtime.groups import Group, find_groups

STATUS = "status.parquet"
OURS = {b"written by": b"icnet batch"}  # in the metadata of a status table
SCHEMA = pa.schema(
    {"group": pa.string(), "status": pa.string(), "error": pa.string(), "seconds": pa.float64(), "engine": pa.string()}
)


class Row(TypedDict):
    """A group on its way to an actor; `sisms` is empty if there are none, `problem` if the group can be used."""

    group: str
    images: list[str]
    sisms: list[str]
    problem: str


def is_table(source: str) -> bool:
    """Whether a source of groups is a table, not a folder in one of the usual layouts."""
    return is_url(source) or source.lower().endswith(".parquet")


def is_url(source: str) -> bool:
    """Whether this is an URL, which fsspec opens, not a local path."""
    return "://" in source


def of_folder(path: Path, sisms: Path | None) -> list[Row]:
    """The groups at a path, as `find_groups` finds them.

    Raises:
        InputError: as it does.
    """
    return [
        Row(
            group=group.name,
            images=[str(image.absolute()) for image in group.images],
            sisms=[str(sism.absolute()) for sism in group.sisms or ()],
            problem=str(group.problem or ""),
        )
        for group in find_groups(path, sisms)
    ]


def of_table(source: str) -> list[Row]:
    """The groups of a table, in the order of their first rows; their images in that of their rows.

    Raises:
        InputError: it can't be read, or is no such table. What is wrong with one group is its `problem`.
    """
    try:
        files, path = fsspec.core.url_to_fs(source)
        table = pq.read_table(path, filesystem=files)
        if missing := [name for name in ("group", "image") if name not in table.column_names]:
            raise InputError(f"{source}: has no column {missing[0]!r}; a row is an image: group, image, and its sism")
        columns = [name for name in ("group", "image", "sism") if name in table.column_names]
        rows = table.select(columns).cast(pa.schema([(name, pa.string()) for name in columns])).to_pylist()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such table") from error
    except Exception as error:  # each of fsspec's file systems has its own
        raise InputError(f"{source}: can't be read as a table: {one_line(error) or type(error).__name__}") from error
    if not rows:
        raise InputError(f"{source}: has no rows")
    return _grouped(source, rows, str(files.unstrip_protocol(path)) if is_url(source) else os.path.abspath(path))  # noqa: PTH100


def _grouped(source: str, rows: Sequence[Mapping[str, str | None]], place: str) -> list[Row]:
    folder = place.rpartition("/")[0]
    found: dict[str, Row] = {}
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(rows):
        group, image, sism = row["group"], row["image"], row.get("sism")
        if not group or not image:
            raise InputError(f"{source}: row {number} has no {'image' if group else 'group'}")
        if Path(group).name != group or group in (STATUS, "..") or "\0" in group:
            raise InputError(f"{source}: row {number}: {group!r} can't be the name of a group's folder")
        if (group, image) in seen:
            raise InputError(f"{source}: row {number}: {image} is in the group {group} twice")
        seen.add((group, image))
        of_group = found.setdefault(group, Row(group=group, images=[], sisms=[], problem=""))
        of_group["images"].append(_absolute(image, folder))
        of_group["sisms"] += [_absolute(sism, folder)] if sism else []
    for of_group in found.values():
        if 0 < len(of_group["sisms"]) < len(of_group["images"]):
            counts = f"{len(of_group['images'])} images but {len(of_group['sisms'])} SISMs"
            of_group["problem"] = f"{source}: the group {of_group['group']} has {counts}"
    return [*found.values()]


def _absolute(name: str, folder: str) -> str:
    if is_url(name):
        return fsspec.core.strip_protocol(name) if name.startswith("file://") else name
    return name if name.startswith("/") else f"{folder}/{name}"


def file_name(source: str) -> str:
    """The name of a file, also of an URL with a query or a chained one."""
    if not is_url(source):
        return Path(source).name
    parts = urlsplit(source.partition("::")[0])
    return PurePosixPath(parts.netloc + parts.path).name


def fetch(source: str, folder: Path) -> Path:
    """The local file of a source; an URL's content is put into `folder`, under its own name.

    Raises:
        InputError: it can't be read.
    """
    if not is_url(source):
        return Path(source)
    try:
        with fsspec.open(source, "rb") as file:
            content = file.read()
    except Exception as error:  # each of fsspec's file systems has its own
        raise InputError(f"{source}: can't be read: {one_line(error) or type(error).__name__}") from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(source)
    write_bytes(path, content)
    return path


def check_status(path: Path) -> None:
    """Raise OutputError if there is a file of others in the place of the status table."""
    if not os.path.lexists(path):
        return
    try:
        ours = not path.is_symlink() and OURS.items() <= (pq.read_schema(path).metadata or {}).items()
    except (OSError, pa.ArrowException):
        ours = False
    if not ours:
        raise OutputError(f"{path}: was not made by icnet batch and would be overwritten; choose another --output")


def write_status(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the status table, with the columns of `SCHEMA`: a row per group.

    Raises:
        OutputError: it can't be written.
    """
    table = pa.Table.from_pylist([*rows], SCHEMA.with_metadata(OURS))
    with replacing(path) as temporary:
        write_bytes(temporary, encoded(partial(pq.write_table, table)))


def group_of(row: Row, images: Sequence[Path], sisms: Sequence[Path]) -> Group:
    """A row's group, given its local files."""
    return Group(
        row["group"], tuple(images), tuple(sisms) or None, InputError(row["problem"]) if row["problem"] else None
    )
