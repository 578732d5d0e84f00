"""The results of a group on disk, and whether a new run would give the same.

OUTPUT/GROUP/NAME.png            one map per image
OUTPUT/GROUP/masks/NAME.png      its mask, and
OUTPUT/GROUP/cutouts/NAME.png    its cut-out, if asked for
OUTPUT/GROUP/boxes.json          the boxes of all images, if asked for
OUTPUT/GROUP/contact_sheet.jpg
OUTPUT/GROUP/sisms/NAME.png      the SISM that a detector made of it, if it is kept
OUTPUT/GROUP/icnet.json          the record: what these were made from, and their digests

The record is finished once all results are there. Before that, it says which files are `icnet predict`'s: each result
is added to it, in a line of its own, just before it gets its name. So after a crash nothing of ours passes for a user's
file, and no user's file for ours.
"""

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from runtime.commands.outputs import BOXES, FOLDERS, SHEET, SISMS, Outputs
from runtime.errors import InputError, OutputError
from runtime.files import (
    check_outputs,
    digest,
    encoded,
    locked,
    output_errors,
    replacing,
    sweep,
    write_bytes,
    write_json,
)
from runtime.grey import note, save_grey
from runtime.groups import Group

RECORD = "icnet.json"
DETECTOR = "detector"  # the role of the file that made the SISMs
SOURCE = "icnet-sism-of"  # the text in such a file that says what it was made from


@dataclass(frozen=True)
class Record:
    """What a record says: what the results were made from (None: it is unfinished), and each file's digest."""

    made_from: dict[str, Any] | None
    files: dict[str, str]


class GroupResults:
    """The results of one group in its folder. Several threads may write at once, and several runs too.

    Args:
        folder: where they go.
        group: the group.
        models: every file by which the maps are computed, and its digest, under the name of its role.
        asked: what is written.
        detected: how the detector in `models` is run, if the SISMs are its own; else "".
        keep: its SISMs are results too.

    Attributes:
        kept_sisms: of each image the SISM that an earlier run kept, if this detector made it of this image.

    Raises:
        InputError: an image or SISM can't be read.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        models: Mapping[str, tuple[Path, str]],
        asked: Outputs | None = None,
        detected: str = "",
        keep: bool = False,
    ) -> None:
        asked = asked or Outputs()
        self.folder = folder
        self._lock = threading.Lock()
        self._inputs = [*(path for path, _ in models.values()), *group.images, *(group.sisms or ())]
        self._digests: dict[str, str | None] = dict.fromkeys(asked.all_names(group))
        self._made_from: dict[str, Any] = {
            "models": {role: sha256 for role, (_, sha256) in models.items()},
            "images": {image.name: digest(image) for image in group.images},
            "sisms": {sism.name: digest(sism) for sism in group.sisms or ()} or detected or "builtin",
            **asked.settings(),
        }
        self._sources: dict[str, str] = {}  # of each SISM's name, what it is made from
        if detected:
            of = f"{models[DETECTOR][1]} {detected}"
            images = self._made_from["images"].values()
            names = [f"{SISMS}/{image.stem}.png" for image in group.images]
            self._sources = {name: f"{of} {sha256}" for name, sha256 in zip(names, images, strict=True)}
        kept = self._kept()
        self.kept_sisms = [folder / name if name in kept else None for name in self._sources]
        self._digests |= kept if not keep else dict.fromkeys(self._sources) | kept

    def finished(self) -> bool:
        """Whether the folder holds, untouched, what this group and these models gave an earlier run."""
        record = self._record()
        return (
            record is not None
            and record.made_from == self._made_from
            and set(record.files) == set(self._digests)
            and all(self._holds(name, sha256) for name, sha256 in record.files.items())
        )

    def _kept(self) -> dict[str, str]:
        """The SISMs there that need not be made again, and their digests."""
        record = self._record() if self._sources else None
        files = record.files if record else {}
        return {
            name: files[name]
            for name, source in self._sources.items()
            if name in files and self._holds(name, files[name]) and note(self.folder / name, SOURCE) == source
        }

    def keep_sism(self, index: int, sism: NDArray[np.uint8]) -> None:
        """Write the SISM of one of the images, uint8 [height, width] of its size.

        Raises:
            OutputError: it can't be written.
        """
        name, source = [*self._sources.items()][index]
        self.write(name, partial(save_grey, sism, notes={SOURCE: source}))

    def begin(self) -> None:
        """Clear the way for new results. Only files that `icnet predict` made are overwritten or deleted.

        Raises:
            OutputError: the folder holds an input, or files of others under the names of the results; or it can't be
                read or written to.
        """
        check_outputs((), self._inputs, [self.folder / name for name in FOLDERS])
        with output_errors(self.folder / RECORD):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                for path in (self.folder / name for name in FOLDERS if name):
                    if path.is_symlink():  # a record can't vouch for files that lie elsewhere
                        raise OutputError(f"{path}: is a link; remove it or choose another --output")
                # Looked for before the record is read: another run adds a result to the record before it is there.
                there = [name for name in (*self._digests, RECORD) if os.path.lexists(self.folder / name)]
                record = self._record()
                ours = record.files if record else {}
                for name in there:
                    if (self.folder / name).is_symlink() or not (record if name == RECORD else name in ours):
                        raise OutputError(
                            f"{self.folder / name}: was not made by icnet predict and would be overwritten; "
                            "move it away or choose another --output"
                        )
                for name in ours.keys() - self._digests.keys():  # of other images, or not asked for any more
                    if self._holds(name, ours[name]):
                        (self.folder / name).unlink()
                for name in FOLDERS:  # of a killed run, also where this one writes nothing
                    sweep(self.folder / name)
                self._write_record(None, {name: ours[name] for name in self._digests if name in ours})

    def write(self, name: str, save: Callable[[BinaryIO], object]) -> None:
        """Write one of the results: `save` gets a file to write to. The last result completes the record.

        Raises:
            OutputError: it can't be written.
        """
        content = encoded(save)
        sha256 = hashlib.sha256(content).hexdigest()  # of what this run wrote, whatever another does to it
        with replacing(self.folder / name) as temporary:
            write_bytes(temporary, content)
            self._add(name, sha256)
        with self._lock:
            self._digests[name] = sha256
            if all(self._digests.values()):
                self.finish()

    def finish(self) -> None:
        """Note that all results are there."""
        with output_errors(self.folder / RECORD), locked(self.folder):
            self._write_record(self._made_from, self._digests)

    def _holds(self, name: str, sha256: str) -> bool:
        """Whether a file is there with this content."""
        path = self.folder / name
        try:
            return stat.S_ISREG(path.lstat().st_mode) and digest(path) == sha256
        except (OSError, InputError):
            return False

    def _record(self) -> Record | None:
        """The record in the folder; None if there is none of `icnet predict`, whatever is in its place."""
        path = self.folder / RECORD
        try:
            if not stat.S_ISREG(path.lstat().st_mode):  # reading a pipe would wait for ever
                return None
            text = path.read_text(encoding="utf-8")
            content, end = json.JSONDecoder().raw_decode(text)
            made_from, files = content["made_from"], content["files"]
            if not isinstance(made_from, dict | None) or not isinstance(files, dict):
                return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        added = text[end:].splitlines()
        for line in added:
            try:
                files |= json.loads(line)
            except (ValueError, TypeError, RecursionError):  # empty, or cut off by a full disk
                continue
        if not all(_is_result(name) and isinstance(sha256, str | None) for name, sha256 in files.items()):
            return None
        known = {name: sha256 for name, sha256 in files.items() if sha256}
        return Record(made_from if len(known) == len(files) and not any(added) else None, known)

    def _add(self, name: str, sha256: str) -> None:
        """Add a result to the record. The line break comes first: it ends a line that was cut off."""
        line = ("\n" + json.dumps({name: sha256})).encode()
        with output_errors(self.folder / RECORD), locked(self.folder), (self.folder / RECORD).open("ab", 0) as file:
            if file.write(line) != len(line):
                raise OutputError(f"{self.folder / RECORD}: can't be written: the disk is full")

    def _write_record(self, made_from: dict[str, Any] | None, files: Mapping[str, str | None]) -> None:
        with replacing(self.folder / RECORD) as temporary:
            write_json(temporary, {"made_from": made_from, "files": files})


def _is_result(name: str) -> bool:
    """Whether a result can have this name: a record with any other name, or with another path, is not ours."""
    try:
        os.fsencode(name)  # no lone surrogates
    except ValueError:
        return False
    folder, _, file = name.rpartition("/")
    if folder not in FOLDERS or name.startswith("/") or Path(file).name != file or "\0" in file:
        return False
    return name in (SHEET, BOXES) or file.endswith(FOLDERS[folder])
