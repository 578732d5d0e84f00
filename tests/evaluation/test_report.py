"""`icnet evaluate --report`: ground truths, scores and curves in the pages of `icnet predict --report`."""

import base64
import io
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from evaluation.metrics import TITLES, Scores
from runtime.commands import report
from tests.runtime.browser import Visit, serious

Run = Callable[..., tuple[int, str, str]]
HOSTILE = "<b>'\"&"
TRUTH = (5, 10, 45, 30)  # the foreground


@pytest.fixture
def dataset(image_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Ready maps: right ones, a moved one in "good", and in "bad" a wrong one, and one of an empty truth."""
    truth = Image.new("L", (60, 40))
    truth.paste(255, TRUTH)
    moved = ImageChops.offset(truth, 6)
    wrong = truth.point(lambda v: 255 - v)
    empty = Image.new("L", (60, 40))
    images = {
        "good": {"x": (truth, truth), "y": (truth, moved)},
        "bad": {"a": (truth, truth), "b": (truth, wrong), "c": (empty, moved)},
        HOSTILE: {HOSTILE: (truth, truth)},
    }
    for group, named in images.items():
        image_folder(f"set/img/{group}", *(f"{name}.jpg" for name in named))
        image_folder(f"set/sism/{group}", *(f"{name}.png" for name in named), mode="L")
        for name, pair in named.items():
            for kind, image in zip(("set/gt", "maps"), pair, strict=True):
                (tmp_path / kind / group).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / kind / group / f"{name}.png")
    return tmp_path / "set"


@pytest.fixture
def evaluate(icnet: Run, dataset: Path, tmp_path: Path) -> Run:
    def run(*options: object, models: tuple[object, ...] = (tmp_path / "maps",)) -> tuple[int, str, str]:
        return icnet("evaluate", dataset, "--models", *models, "--report", tmp_path / "out", *options)

    return run


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def scores_of(dataset: Path, *names: str) -> dict[str, float]:
    scores = Scores()
    for name in names:
        scores.add(
            *(np.asarray(Image.open(path / f"{name}.png")) for path in (dataset.parent / "maps", dataset / "gt"))
        )
    return scores.numbers()


def numbers(text: str) -> dict[str, float]:
    """The scores in a heading, by their names."""
    found = {name: re.search(rf"{title} (\d\.\d+)", text) for name, title in TITLES.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def test_the_worst_come_first_with_their_scores(evaluate: Run, dataset: Path, tmp_path: Path) -> None:
    code, out, err = evaluate("--output", tmp_path / "r.json")
    assert (code, err) == (0, "")
    assert f"report: {tmp_path / 'out/report.html'}" in out
    page = read(tmp_path / "out/report.html")
    groups = [unescape(text) for text in re.findall(r"<h2><bdi>(.*?)</h2>", page)]
    images = [unescape(text) for text in re.findall(r"<h3><bdi>(.*?)</h3>", page)]
    assert [text.partition("</bdi>")[0] for text in groups] == ["set", "bad", "good", HOSTILE]
    assert [text.partition(".jpg")[0] for text in images] == ["b", "a", "c", "y", "x", HOSTILE]
    places = [("bad", "b"), ("bad", "a"), ("bad", "c"), ("good", "y"), ("good", "x"), (HOSTILE, HOSTILE)]
    for text, place in zip(images, places, strict=True):
        assert numbers(text) == pytest.approx(scores_of(dataset, "/".join(place)), abs=5.1e-4)
    assert list(numbers(images[2])) == ["mae"]
    assert numbers(groups[1]) == pytest.approx(scores_of(dataset, "bad/a", "bad/b", "bad/c"), abs=5.1e-4)
    found = json.loads(read(tmp_path / "r.json"))["datasets"][0]["maps"]
    rows = re.findall(r"<tr><td><svg.*?<bdi>(.*?)</bdi>((?:<td>[\d.]+)+)", page)
    assert [row[0] for row in rows] == ["SISMs", "maps"]
    for scores, (_, cells) in zip(found, rows, strict=True):
        assert cells == "".join(f"<td>{scores[name]:.4f}" for name in TITLES)


def test_ground_truths_and_curves_are_those_of_the_scores(evaluate: Run, dataset: Path, tmp_path: Path) -> None:
    evaluate("--output", tmp_path / "r.json")
    page = read(tmp_path / "out/report.html")
    truths = re.findall(r'alt="ground truth" src="data:image/png;base64,([^"]+)"', page)
    expected = Image.open(dataset / "gt/bad/b.png").resize((224, 224), Image.Resampling.BILINEAR)
    assert len(truths) == 6
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(truths[0])))), np.asarray(expected))
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", page)
    assert len(charts) == 2
    maps = json.loads(read(tmp_path / "r.json"))["datasets"][0]["maps"]
    for row, line in zip(maps, lines(charts[0]), strict=True):
        assert line == pytest.approx(np.stack([row["recall"], row["precision"]], 1), abs=1e-3)
    for row, line in zip(maps, lines(charts[1]), strict=True):
        assert line[:, 0] == pytest.approx(np.arange(256) / 255, abs=1e-3)
        assert line[:, 1].max() == pytest.approx(row["max_f"], abs=1e-3)


def lines(chart: str) -> list[Any]:
    """The lines of a chart in the units of its axes, float64 [n, 2] each: ticks say where 0 and 1 are."""
    ticks = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([01])</text>', chart)
    left, right = (float(x) for x, _, anchor, _ in ticks if anchor == "middle")
    low, high = (float(y) - 4 for _, y, anchor, _ in ticks if anchor == "end")  # a text's base line
    found = [
        np.array([pair.split(",") for pair in points.split()], float) for points in re.findall('points="(.*?)"', chart)
    ]
    return [(line - (left, low)) / (right - left, high - low) for line in found]


def test_models_have_sections_of_their_own_and_large_runs_pages(
    evaluate: Run, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE_IMAGES", 4)
    assert evaluate(models=(exports, tmp_path / "maps"))[0] == 0
    pages = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pages == ["report-001.html", "report-002.html", "report-003.html", "report-004.html", "report.html"]
    index = read(tmp_path / "out/report.html")
    assert index.count('class="chart"') == 2
    assert "icnet.onnx, ONNX Runtime, cpu" in index
    names = [unescape(name) for name in re.findall(r"<tr><td>(set, .*?)<td>", index)]
    assert sorted(names[:3]) == sorted(f"set, icnet.onnx: {group}" for group in ("bad", "good", HOSTILE))
    assert names[3:] == [f"set, maps: {group}" for group in ("bad", "good", HOSTILE)]
    assert len(re.findall(r"<td>S ↑ \d\.\d+ · max F", index)) == 6
    assert 'class="chart"' not in read(tmp_path / "out/report-001.html")


def test_reports_of_predict_stay_and_bad_places_are_named(
    evaluate: Run, icnet: Run, dataset: Path, exports: Path, tmp_path: Path
) -> None:
    assert icnet("predict", dataset, "-m", exports, "-o", tmp_path / "out", "--report")[0] == 0
    before = read(tmp_path / "out/report.html")
    code, _, err = evaluate()
    assert code == 2
    assert f"{tmp_path / 'out/report.html'}: was not made by icnet evaluate" in err
    assert read(tmp_path / "out/report.html") == before
    code, _, err = icnet("evaluate", dataset, "--report", dataset / "gt/bad/a.png")
    assert code == 2
    assert f"{dataset / 'gt/bad/a.png'}: " in err
    code, _, err = evaluate("--output", tmp_path / "out/report.html")
    assert "is another file of this run" in err
    options = ("--cutouts", dataset, "--backgrounds", dataset, "--models", exports, "--report", tmp_path / "new")
    code, _, err = icnet("evaluate", "--bank-sizes", *options)
    assert "--report shows the maps of data sets" in err


def test_the_page_in_a_browser(browser: Any, evaluate: Run, dataset: Path, tmp_path: Path) -> None:
    """The slider counts the maps' pixels, axe-core finds nothing serious, and nothing is asked of the network."""
    evaluate()
    path = tmp_path / "out/report.html"
    visit = Visit(browser, path.as_uri(), viewport={"width": 390, "height": 800})
    visit.wait("document.body.dataset.level === '128'")
    encoded = re.findall(r'class="map" alt="map" src="data:image/png;base64,([^"]+)"', read(path))
    maps = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in encoded]
    counts = visit.page.evaluate("[...document.querySelectorAll('article')].map((a) => +a.dataset.count)")
    assert counts == [int((map_ >= 128).sum()) for map_ in maps]
    assert visit.page.locator("article").nth(5).locator("h3 bdi").inner_text() == f"{HOSTILE}.jpg"
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits a phone"
    assert serious(visit) == []
    visit.context.close()
    assert visit.problems == []
    assert [request for request in visit.requests if not request.startswith(("file:", "data:"))] == []
