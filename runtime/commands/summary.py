"""What `icnet predict` says at its end: what was done, what looks wrong, what was passed over."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.commands.outputs import BOXES, SHEET, Fullness, Outputs
from runtime.groups import Group, heif_hint

NEARLY_EMPTY, NEARLY_FULL = 0.001, 0.95  # shares of a map's pixels
NAMED = 5  # names in a line; of the others, the number


class Summary:
    """Counts what a run did.

    Args:
        groups: all groups of the run.
        asked: what is written.

    Attributes:
        failed: groups that failed.
        finished: groups that were finished before.
    """

    def __init__(self, groups: Sequence[Group], asked: Outputs) -> None:
        self.failed = self.finished = 0
        self._groups, self._asked = groups, asked
        self._maps: list[Fullness] = []

    def add(self, written: Iterable[Fullness | None]) -> None:
        """Count a group's images."""
        self._maps += [one for one in written if one is not None]

    def lines(self, output: Path, model: Path, card: str | None) -> list[str]:
        """The summary.

        Args:
            output: the folder of all results.
            model: the model's file.
            card: what its checkpoint is for, if that is known.
        """
        done = len(self._groups) - self.failed - self.finished
        lines = [f"{_count(done, 'group')}, {_count(len(self._maps), 'image')}"]
        if self.finished:
            lines.append(f"{self.finished} of {len(self._groups)} groups were finished already")
        folder = output / (self._groups[0].name if len(self._groups) == 1 else "GROUP")
        suffix = self._asked.cutout_format
        places = {"maps": "*.png", "masks": "masks/*.png", "cutouts": f"cutouts/*.{suffix}", "boxes": BOXES}
        lines += [f"{kind}: {folder / place}" for kind, place in places.items() if kind in self._asked.kinds]
        lines.append(f"to look at: {folder / SHEET}")
        level = f"{self._asked.counted_from:g}"
        if empty := [one.name for one in self._maps if one.share < NEARLY_EMPTY]:
            what = f"fewer than {NEARLY_EMPTY:.1%} of the pixels reach {level}"
            lines.append(f"nearly empty, {what}: {_count(len(empty), 'map')}: {_some(empty)}")
        if full := [one.name for one in self._maps if one.share > NEARLY_FULL]:
            what = f"more than {NEARLY_FULL:.0%} of the pixels reach {level}"
            lines.append(f"nearly full, {what}: {_count(len(full), 'map')}: {_some(full)}")
        if files := [file for group in self._groups for file in group.passed_over]:
            counts = Counter(file.suffix.lower() or "no suffix" for file in files).most_common()
            kinds = ", ".join(f"{suffix} {count}" for suffix, count in counts)
            names = _some([file.name for file in files])
            what = f"passed over, no image by its suffix: {_count(len(files), 'file')} ({kinds}): {names}"
            lines.append(f"{what}{heif_hint(files)}")
        if card:
            lines.append(f"{model.name} is for: {card}")
        return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
