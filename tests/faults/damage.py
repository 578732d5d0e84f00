"""Damage: bytes, images, names, JSON texts and arrays that nobody should send, made from a random generator."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.faults.lab import Case

LONG = 255  # bytes: what a file name may have
HOSTILE_TEXTS = [
    *["\n", "a\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r", "\t", "\x7f", "\x9b31m"],  # what terminals obey
    *[
        "\u202egpj.exe",
        "שלום",
        "e\u0301",
        "\u200b",
        "\u2028",
        "🦉",
        "\udcff\udcfe",
        "x\udc80y",
    ],  # surrogates: not UTF-8
    *[
        "[bold]",
        "[red",
        "]",
        "{0}",
        "%s",
        "$HOME",
        "`id`",
        "'",
        '"',
        "\\",
        "-x",
        "--help",
        "...",
        "~",
        "*",
        "con",
        ":link:",
        "<b>",
        "&amp;",
        ";",
        "|",
        "#",
        "=",
    ],
    *[" ", "a" * 200],
]


def damaged(case: Case, content: bytes) -> bytes:
    """A file's bytes after one of the ways in which files get damaged; never as they were."""
    rng, found = case.rng, bytearray(content)
    n = len(content)
    ways = ("truncate", "tail", "flip", "flips", "header", "zeros", "cut", "insert", "noise", "empty", "head", "twice")
    way = case.one_of(ways)
    at = int(rng.integers(max(n, 1)))
    some = int(min(n - at, case.number(1, 4096))) if n else 0
    if way == "truncate":
        found = found[:at]
    elif way == "tail":
        found = found[: n - int(rng.integers(1, 17))]
    elif way in ("flip", "flips", "header"):
        where = min(n, 64) if way == "header" else n
        for _ in range(1 if way != "flips" else int(case.number(2, 200))):
            position = int(rng.integers(max(where, 1)))
            at = position
            found[position] ^= 1 << int(rng.integers(8))
    elif way == "zeros":
        found[at : at + some] = bytes(some)
    elif way == "cut":
        del found[at : at + some]
    elif way == "insert":
        found[at:at] = rng.bytes(some)
    elif way == "noise":
        found[at : at + some] = rng.bytes(some)
    elif way == "empty":
        found.clear()
    elif way == "head":
        found = bytearray(rng.bytes(16)) + found[16:]
    else:
        found *= 2
    case.tried += f"{way} at {at} of {n}; "
    return bytes(found) if bytes(found) != content else content[: n // 2]


def picture(case: Case, side: int = 48) -> Image.Image:
    """A smooth RGB image with some noise, of random size."""
    rng = case.rng
    width, height = (int(s) for s in rng.integers(8, side, 2))
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 5 + y, 255 - y * 4, (x ^ y) * 3], -1) + rng.integers(0, 60, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


# Format, suffix, mode, and options of Pillow's writers. Every format that has a suffix of ours, then others.
ENCODINGS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("JPEG", ".jpg", "RGB", {}),
    ("JPEG", ".jpeg", "RGB", {"progressive": True, "quality": 60}),
    ("JPEG", ".jpe", "L", {}),
    ("JPEG", ".jfif", "CMYK", {}),
    ("PNG", ".png", "RGB", {}),
    ("PNG", ".png", "RGBA", {}),
    ("PNG", ".png", "LA", {}),
    ("PNG", ".png", "P", {}),
    ("PNG", ".png", "P", {"transparency": 3}),
    ("PNG", ".png", "1", {}),
    ("PNG", ".png", "I;16", {}),
    ("WEBP", ".webp", "RGB", {}),
    ("WEBP", ".webp", "RGBA", {"lossless": True}),
    ("AVIF", ".avif", "RGB", {}),
    ("JPEG2000", ".jp2", "RGB", {}),
    ("JPEG2000", ".jp2", "L", {}),
    ("BMP", ".bmp", "RGB", {}),
    ("BMP", ".bmp", "P", {}),
    ("TIFF", ".tif", "RGB", {}),
    ("TIFF", ".tiff", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", ".tiff", "RGB", {"compression": "tiff_deflate"}),
    ("TIFF", ".tiff", "RGB", {"compression": "jpeg"}),
    ("TIFF", ".tif", "1", {"compression": "group4"}),
    ("TIFF", ".tif", "I;16", {}),
    ("TIFF", ".tif", "F", {}),
    ("TIFF", ".tif", "LAB", {}),
    ("GIF", ".gif", "P", {}),
    ("PPM", ".ppm", "RGB", {}),
    ("PPM", ".pgm", "L", {}),
    ("TGA", ".png", "RGB", {}),
    ("PCX", ".png", "RGB", {}),
    ("SGI", ".png", "RGB", {}),
    ("QOI", ".png", "RGB", {}),
    ("ICO", ".png", "RGB", {}),
    ("ICNS", ".png", "RGB", {}),
    ("DDS", ".png", "RGB", {}),
    ("MSP", ".png", "1", {}),
    ("SPIDER", ".png", "F", {}),
    ("IM", ".png", "RGB", {}),
    ("XBM", ".png", "1", {}),
]


def encoded(case: Case) -> tuple[str, bytes]:
    """An image file: its suffix, which for formats that have none of ours is a wrong one, and its bytes."""
    format_, suffix, mode, options = ENCODINGS[case.seed % len(ENCODINGS)]
    image = picture(case)
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 7)
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
    elif mode == "LAB":
        image = Image.new("LAB", image.size, (100, 120, 130))
    else:
        image = image.convert(mode)
    if format_ in ("JPEG", "PNG", "WEBP", "TIFF") and mode in ("RGB", "L") and case.rng.random() < 0.5:
        exif = Image.Exif()
        most = 9 if "compression" in options else 12
        exif[0x0112] = int(case.rng.integers(1, most))  # orientation; those from 9 on do not exist
        options = options | {"exif": exif}
    file = io.BytesIO()
    image.save(file, format_, **options)
    case.tried += f"{format_} {mode} {suffix}; "
    return suffix, file.getvalue()


def hostile_name(case: Case) -> str:
    """A file name that is allowed, but should not be printed, parsed or trusted."""
    text = case.one_of(HOSTILE_TEXTS)
    where = int(case.rng.integers(3))
    name = (text, f"a{text}", f"a{text}b")[where]
    if name.strip(".") == "" or case.rng.random() < 0.1:
        name = "x" * (LONG - 24)
    while len(name.encode("utf-8", "surrogateescape")) > LONG - 24:
        name = name[:-1]
    case.tried += f"name {name!r}; "
    return name


def hostile_json(case: Case, depth: int = 0) -> Any:
    """Any JSON value, most of them of the wrong type for wherever they are put."""
    rng = case.rng
    kind = case.one_of(("null", "bool", "number", "text", "list", "dict") if depth < 3 else ("null", "number", "text"))
    if kind == "list":
        return [hostile_json(case, depth + 1) for _ in range(int(rng.integers(4)))]
    if kind == "dict":
        names = ("key", "ranges", "files", "made_from", "float_layers", "model", *HOSTILE_TEXTS)
        return {case.one_of(names): hostile_json(case, depth + 1) for _ in range(int(rng.integers(4)))}
    if kind == "text":
        return case.one_of(["", "00" * 32, "../precious.txt", "/etc/passwd", "\0", *HOSTILE_TEXTS])
    if kind == "number":
        return case.one_of([0, -1, 1e308, -1e308, float("nan"), float("inf"), 2**70, 0.5, 10**400])
    return case.one_of([None, True, False]) if kind == "bool" else None


def hostile_text(case: Case) -> bytes:
    """A JSON file that parses to something odd, or does not parse."""
    content = case.one_of(
        [
            lambda: json.dumps(hostile_json(case)).encode(),
            lambda: b"[" * 200_000,
            lambda: b'{"files":' * 50_000,
            lambda: b"\xff\xfe{}",
            lambda: b"\xef\xbb\xbf{}",
            lambda: b'{"made_from": {"\\ud800": 1}, "files": {"\\udfff": null}}',
            lambda: b"9" * 100_000,
            lambda: b"",
            lambda: b"\0" * 4096,
            lambda: b'{"files": {}, "files": []}',
        ]
    )()
    case.tried += f"JSON {content[:60]!r}; "
    return content


def hostile_array(case: Case) -> Any:
    """Something that is given as an image: arrays of all kinds, and what are no arrays."""
    rng = case.rng
    dtype = case.one_of(
        ["u1", "u2", ">u2", "?", "f2", "f4", "f8", ">f4", "i1", "i4", "i8", "c8", "O", "U1", "S1", "M8[s]", "V3"]
    )
    shape = tuple(int(case.one_of([0, 1, 2, 3, 4, 5, 17, 40])) for _ in range(int(rng.integers(0, 5))))
    if rng.random() < 0.6:
        shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)), *case.one_of([(), (1,), (3,), (4,), (2,)]))
    case.tried += f"array {dtype} {shape}; "
    array = np.zeros(shape, dtype)
    if dtype[-2:-1] in ("u", "i", "f") or dtype == "?":
        scale = case.one_of([1, 255, 65535, 1e30, -1, float("nan"), float("inf")])
        with np.errstate(all="ignore"):
            array = (rng.random(shape) * scale).astype(dtype)
        case.tried += f"× {scale}; "
    layout = case.one_of(["", "", "F", "negative", "step", "read-only", "masked", "list", "broadcast"])
    case.tried += f"{layout}; "
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "negative" and array.ndim:
        return array[::-1]
    if layout == "step" and array.ndim > 1:
        return array[:, ::2]
    if layout == "read-only":
        array.setflags(write=False)
    if layout == "masked":
        return np.ma.masked_array(array)
    if layout == "list":
        return array.tolist()
    if layout == "broadcast":
        return np.broadcast_to(array, (*array.shape,))
    return array


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with these files, as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None, **options: Any) -> bytes:
    """An array's file; with `shape` its header claims another one than its content has."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    content = file.getvalue()
    if shape is None:
        return content
    header = io.BytesIO()
    described = np.lib.format.header_data_from_array_1_0(array) | {"shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue() + array.tobytes()


def unusable(case: Case, path: Path) -> list[Callable[[], Any]]:
    """Ways to put at `path` what no program can read as a model."""
    return [
        lambda: path.write_bytes(case.rng.bytes(int(case.number(1, 1e5)))),
        lambda: path.write_bytes(hostile_text(case)),
        lambda: path.write_bytes(b""),
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
    ]
