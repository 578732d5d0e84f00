"""`icnet data photos`: cut-outs, backgrounds and photographs out of packages of Linux distributions, by a manifest.

The manifest says which file goes where, so that what is held out is fixed by name, and has the SHA-256 of each. Files
lie in the packages as they are, in zip archives (furniture of Sweet Home 3D), or in resource archives of Qt (pictures
of GCompris).
"""

import argparse
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.errors import InputError
from runtime.files import replacing, write_bytes, write_picture

SIDE = 320  # longest side of a cut-out, pixels; they are pasted at up to 210
DIRECTORY, COMPRESSED, ZSTD = 2, 1, 4  # flags of an entry in a Qt resource archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet data photos`."""
    parser.add_argument("manifest", type=Path, help="JSON: packages and files, see weights/photos.json")
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages: PACKAGE/usr/...")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for cutouts/, backgrounds/ and so on")


def run(args: argparse.Namespace) -> int:
    """Write the files of the manifest; cut-outs are cut to what is not transparent.

    Raises:
        InputError: the manifest can't be read, or a file is missing, of another SHA-256, or not a picture.
        OutputError: a file can't be written.
    """
    try:
        manifest: dict[str, Any] = json.loads(args.manifest.read_bytes())
        roots = {name: package["root"] for name, package in manifest["packages"].items()}
        places = {place: dict(files) for place, files in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{args.manifest}: not a manifest with packages and files: {error!r}") from error
    for place, files in places.items():
        common = os.path.commonpath([os.path.dirname(file.replace("!", "/")) for file in files])  # noqa: PTH120
        for file, digest in files.items():
            package, _, path = file.partition("/")
            if package not in roots:
                raise InputError(f"{args.manifest}: no package {package!r} for {file}")
            content = read(args.packages / package / roots[package], path)
            if hashlib.sha256(content).hexdigest() != digest:
                raise InputError(f"{args.packages / file}: another file than the manifest's; take the version it names")
            name = file.replace("!", "/").removeprefix(f"{common}/").replace("/", "-")
            _write(args.output / place / name, content, cut=place.startswith("cutouts/"))
    print(f"{sum(map(len, places.values()))} files in {args.output}")
    return 0


def _write(path: Path, content: bytes, cut: bool) -> None:
    with replacing(path) as temporary:
        if not cut:
            write_bytes(temporary, content)
            return
        try:
            image = Image.open(io.BytesIO(content)).convert("RGBA")
        except (OSError, ValueError) as error:
            raise InputError(f"{path.name}: not a picture that can be read: {error}") from error
        image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        write_picture(temporary, image.save)


def read(folder: Path, path: str) -> bytes:
    """The content of a file, `PATH`, or of a file in an archive, `ARCHIVE!PATH`.

    Raises:
        InputError: it is missing or can't be read.
    """
    archive, _, member = path.partition("!")
    try:
        if not member:
            return (folder / archive).read_bytes()
        if archive.endswith(".rcc"):
            return _resources(folder / archive)[member]
        with zipfile.ZipFile(folder / archive) as file:
            return file.read(member)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{folder / archive}: can't be read: {error}; unpack its package here") from error
    except KeyError:
        raise InputError(f"{folder / archive}: has no {member}; take the version that the manifest names") from None


@cache
def _resources(path: Path) -> dict[str, bytes]:
    try:
        return dict(read_resources(path.read_bytes()))
    except (struct.error, IndexError, ValueError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: not a resource archive of Qt: {error}") from error


def read_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a Qt resource archive (`rcc --binary`), but those packed by zstd.

    A tree of 14 bytes an entry, 22 from version 2 on; names in UTF-16; contents with their length before them; all
    numbers are big-endian (https://github.com/qt/qtbase, src/tools/rcc/rcc.cpp).

    Raises:
        ValueError, IndexError, struct.error, zlib.error: `data` is not one.
    """
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres":
        raise ValueError("does not begin with 'qres'")
    size = 22 if version >= 2 else 14

    def entries(index: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + size * index
        name, flags = struct.unpack_from(">IH", data, at)
        length = struct.unpack_from(">H", data, names + name)[0] if index else 0
        path = folder + data[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be")
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">II", data, at + 6)
            for child in range(first, first + count):
                if child <= index:
                    raise ValueError("its folders hold each other")
                yield from entries(child, path + "/" if index else "")
        elif not flags & ZSTD:
            start = contents + struct.unpack_from(">I", data, at + 10)[0] + 4
            content = data[start : start + struct.unpack_from(">I", data, start - 4)[0]]
            yield path, zlib.decompress(content[4:]) if flags & COMPRESSED else content

    yield from entries(0, "")
