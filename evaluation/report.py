"""The report of `icnet evaluate`: the pages of `icnet predict --report`, with ground truths, scores and curves.

The groups with the worst maps come first, and so do the worst images of each group, by their S-measure. Images whose
ground truth has no foreground come last.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluation.dataset import Dataset, Maps
from evaluation.metrics import FOREGROUND, LEVELS, TITLES, Curve, Metrics, Scores
from evaluation.record import SISMS
from runtime.commands.report import Judged, Report, escaped
from runtime.contract import SIZE
from runtime.preprocess import grey_image

COLOURS = ("#1f77b4", "#d95f02", "#2c9a4b", "#b5489a", "#8a6d1f", "#5f6fd1")  # seen on white and on black


class EvaluationReport:
    """Collects what a run of `icnet evaluate` finds, and writes it as pages.

    Args:
        folder: where the pages go.
        models: what makes the maps, e.g. files and engines.
        named: whether the groups' names begin with those of data set and maps: there are several.

    Raises:
        OutputError: as for `Report`.
    """

    def __init__(self, folder: Path, models: Sequence[str], named: bool) -> None:
        self._report = Report(folder, [*models, "worst first, by S-measure"], "icnet evaluate")
        self._named = named
        self._groups = 0
        self._sets: list[tuple[str, str]] = []  # data sets and maps in their order

    def add(self, dataset: Dataset, label: str, number: int, maps: Maps, scores: Sequence[Scores]) -> None:
        """Add a group of a data set.

        Args:
            dataset: the data set.
            label: what the maps are called.
            number: the group's place in the data set.
            maps: its maps, as for `evaluate`.
            scores: of each.

        Raises:
            InputError: an image or SISM can't be read.
        """
        if (str(dataset.path), label) not in self._sets:
            self._sets.append((str(dataset.path), label))
        of_group = Scores()
        for one in scores:
            of_group.merge(one)
        numbers = [one.numbers() for one in scores]
        order = sorted(range(len(maps)), key=lambda i: _rank(numbers[i]))
        group = dataset.groups[number]
        truths = [grey_image(dataset.ground_truths[number][i]) > FOREGROUND for i in order]
        judged = Judged(
            np.stack([grey_image(truth, (SIZE, SIZE)) for truth in truths]),
            [_text(numbers[i]) for i in order],
            _text(of_group.numbers()),
            (len(self._sets), _rank(of_group.numbers())),
        )
        listed = replace(
            group,
            name=f"{dataset.name}, {label}: {group.name}" if self._named else group.name,
            images=tuple(group.images[i] for i in order),
            sisms=tuple(group.sisms[i] for i in order) if group.sisms else None,
        )
        self._groups += 1
        self._report.add_read(self._groups, listed, [np.asarray(maps[i]) for i in order], judged)

    def finish(self, name: str, found: Mapping[str, Metrics]) -> None:
        """Add the scores and curves of a data set, by what made the maps."""
        colours = iter(COLOURS * len(found))
        styles = {
            label: 'stroke="currentColor" stroke-dasharray="4 3"' if label == SISMS else f'stroke="{next(colours)}"'
            for label in found
        }
        heads = "<th>".join(["maps", *TITLES.values()])
        rows = "".join(
            f'<tr><td><svg width="22" height="10" aria-hidden="true">{_line(styles[label], "0,5 22,5")}</svg> '
            f"<bdi>{escaped(label)}</bdi>" + "".join(f"<td>{value:.4f}" for value in metrics.numbers().values())
            for label, metrics in found.items()
        )
        levels = np.arange(LEVELS) / (LEVELS - 1)
        charts = (
            _chart("precision over recall", [(styles[label], m.recall, m.precision) for label, m in found.items()]),
            _chart("F-measure over threshold", [(styles[label], levels, m.f) for label, m in found.items()]),
        )
        self._report.summary += (
            f"<h2><bdi>{escaped(name)}</bdi></h2>\n<table><tr><th>{heads}{rows}</table>\n{''.join(charts)}\n"
        )

    def write(self) -> Path:
        """Write the pages.

        Returns:
            The page to open first.

        Raises:
            OutputError: one can't be written.
        """
        return self._report.write()


def _rank(numbers: Mapping[str, float]) -> float:
    return numbers.get("s", math.inf)


def _text(numbers: Mapping[str, float]) -> str:
    return " · ".join(f"{TITLES[name]} {value:.3f}" for name, value in numbers.items())


def _chart(title: str, lines: Iterable[tuple[str, Curve, Curve]]) -> str:
    """Lines in a square of 0 … 1, as SVG: (style, x, y) each."""
    left, right, top, bottom = 34, 292, 8, 186
    parts = [f'<svg class="chart" viewBox="0 0 300 220" role="img" aria-label="{title}">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + tick * (right - left), bottom - tick * (bottom - top)
        parts.append(f'<path d="M{x} {top}V{bottom}M{left} {y}H{right}" stroke="currentColor" stroke-opacity="0.2"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x}" y="{bottom + 13}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="215" text-anchor="middle">{title}</text>')
    for style, xs, ys in lines:
        points = zip(left + xs * (right - left), bottom - ys * (bottom - top), strict=True)
        parts.append(_line(style, " ".join(f"{x:.1f},{y:.1f}" for x, y in points)))
    return "".join([*parts, "</svg>"])


def _line(style: str, points: str) -> str:
    return f'<polyline points="{points}" fill="none" stroke-width="2" {style}/>'
