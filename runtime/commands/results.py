"""The results of a group on disk, and whether a new run would give the same.

OUTPUT/GROUP/NAME.png            one map per image
OUTPUT/GROUP/contact_sheet.jpg
OUTPUT/GROUP/icnet.json          the record: what these were made from, and their digests once all are written
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import OutputError
from runtime.files import digest, remove, replacing, same_file, write_json
from runtime.groups import Group

SHEET = "contact_sheet.jpg"
RECORD = "icnet.json"


class GroupResults:
    """The results of one group in its folder. Several threads may write at once.

    Args:
        folder: where they go.
        group: the group.
        model: the model file, and its digest.
        bank: the bank that the images were compared with, if not with each other.
    """

    def __init__(self, folder: Path, group: Group, model: tuple[Path, str], bank: Path | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._inputs = [model[0], *group.images, *(group.sisms or ()), *([bank] if bank else [])]
        names = [*(f"{image.stem}.png" for image in group.images), SHEET]
        self._digests: dict[str, str | None] = dict.fromkeys(names)
        self._made_from: dict[str, Any] = {
            "model": model[1],
            "images": {image.name: digest(image) for image in group.images},
            "sisms": "builtin" if group.sisms is None else {sism.name: digest(sism) for sism in group.sisms},
        } | ({"bank": digest(bank)} if bank else {})

    def finished(self) -> bool:
        """Whether the folder holds, untouched, what this group and model gave an earlier run."""
        record = self._record()
        return (
            record.get("made_from") == self._made_from
            and set(record["files"]) == set(self._digests)
            and all((self.folder / n).is_file() and digest(self.folder / n) == d for n, d in record["files"].items())
        )

    def begin(self) -> None:
        """Clear the way for new results. Only files that `icnet predict` made are overwritten or deleted.

        Raises:
            OutputError: the folder holds an input, or files of others under the names of the results.
        """
        for path in self._inputs:
            if same_file(path.parent, self.folder):
                raise OutputError(f"{self.folder}: holds {path.name}, an input of this run; choose another --output")
        record = self._record()
        ours = {*record["files"], RECORD} if record else set()
        for name in (*self._digests, RECORD):
            if (self.folder / name).exists() and name not in ours:
                raise OutputError(
                    f"{self.folder / name}: was not made by icnet predict and would be overwritten; "
                    "move it away or choose another --output"
                )
        for name in ours - set(self._digests) - {RECORD}:  # of images that are no longer in the group
            remove(self.folder / name)
        self._write_record()

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Write one of the results: `save` gets the path to write to. The last result completes the record."""
        with replacing(self.folder / name) as temporary:
            save(temporary)
            written = digest(temporary)  # of what this run wrote, whatever another does to it
        with self._lock:
            self._digests[name] = written
            if all(self._digests.values()):
                self.finish()

    def finish(self) -> None:
        """Note that all results are there."""
        self._write_record()

    def _record(self) -> dict[str, Any]:
        """The record in the folder; empty if it is not one of `icnet predict`."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            if isinstance(record["made_from"], dict) and isinstance(record["files"], dict):
                return {"made_from": record["made_from"], "files": record["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {}

    def _write_record(self) -> None:
        record = {"made_from": self._made_from, "files": self._digests}
        with replacing(self.folder / RECORD) as temporary:
            write_json(temporary, record)
