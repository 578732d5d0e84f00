"""`icnet predict --report`: the page's content, its numbers in a real browser, and names that are hostile to HTML."""

import base64
import io
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.commands import report
from tests.runtime.browser import Visit

Run = Callable[..., tuple[int, str, str]]
HOSTILE = "\"><script>alert('1')<script>&amp; \u202egpj"  # quotes, tags, an entity, and text from right to left


@pytest.fixture
def dataset(image_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Two groups of noise, three and two images; the second's name, and one of its images', are hostile."""
    for group, names in (("plain", ["a", "b", "c"]), (HOSTILE, [HOSTILE, "z"])):
        image_folder(f"set/img/{group}", *(f"{name}.jpg" for name in names), size=(90, 60))
        image_folder(f"set/sism/{group}", *(f"{name}.png" for name in names), mode="L")
    return tmp_path / "set"


@pytest.fixture
def predict(icnet: Run, exports: Path, dataset: Path, tmp_path: Path) -> Run:
    def run(*options: object) -> tuple[int, str, str]:
        return icnet("predict", dataset, "-m", exports, "-o", tmp_path / "out", "--report", *options)

    return run


def pages(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("report*.html"))}


def names_in(page: str) -> list[str]:
    return [unescape(name) for name in re.findall(r"<h3><bdi>(.*?)</bdi>", page)]


def test_a_report_has_every_image_and_needs_nothing(predict: Run, tmp_path: Path) -> None:
    code, out, _ = predict()
    assert code == 0
    assert f"report: {tmp_path / 'out/report.html'}" in out
    ((name, page),) = pages(tmp_path / "out").items()
    assert name == "report.html"
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert names_in(page) == [f"{shown}.jpg", "z.jpg", "a.jpg", "b.jpg", "c.jpg"]
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert page.count("<script>") == 1
    assert "\u202e" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy[1]
    assert "icnet.onnx · ONNX Runtime" in page


def test_large_runs_are_pages_with_an_index(predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(report, "PAGE_IMAGES", 2)
        predict()
    written = pages(tmp_path / "out")
    assert list(written) == ["report-001.html", "report-002.html", "report-003.html", "report.html"]
    assert [len(names_in(page)) for page in written.values()] == [2, 2, 1, 0]
    index = written["report.html"]
    assert re.findall(r'<a href="(report-\d+\.html)">', index) == [
        "report-001.html",
        "report-002.html",
        "report-003.html",
    ]
    predict()
    assert list(pages(tmp_path / "out")) == ["report.html"]


def test_finished_and_failed_groups_are_in_it(predict: Run, dataset: Path, tmp_path: Path) -> None:
    predict()
    before = pages(tmp_path / "out")["report.html"]
    (dataset / "img/plain/b.jpg").write_bytes(b"damaged")
    code, _, _ = predict("--resume")
    assert code == 2
    page = pages(tmp_path / "out")["report.html"]
    assert len(names_in(page)) == 2
    assert "not an image" in page.partition('class="error">')[2]
    maps = [re.findall(r'class="map" alt="map" src="([^"]+)"', text)[:2] for text in (before, page)]
    tensors = [[np.asarray(Image.open(opened(uri))).astype(int) for uri in uris] for uris in maps]
    # Made from the maps at their own size this time.
    assert max(np.abs(one - other).mean() for one, other in zip(*tensors, strict=True)) < 12


def opened(uri: str) -> Any:
    return io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))


def test_a_file_of_others_stays(predict: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("mine")
    code, _, err = predict()
    assert code == 2
    assert f"{tmp_path / 'out/report.html'}: was not made by icnet predict" in err
    assert (tmp_path / "out/report.html").read_text() == "mine"
    assert not (tmp_path / "out/plain").exists()


def at(visit: Visit, level: int) -> list[int]:
    """The counts in the page at a threshold."""
    slide = f"slider => {{ slider.value = {level}; slider.dispatchEvent(new Event('input')) }}"
    visit.page.locator("#threshold").evaluate(slide)
    visit.wait(f"document.body.dataset.level === '{level}'")
    counts: list[int] = visit.page.evaluate("[...document.querySelectorAll('article')].map((a) => +a.dataset.count)")
    return counts


def test_the_page_in_a_browser(browser: Any, predict: Run, tmp_path: Path) -> None:
    """The slider counts as NumPy does; keys, filters and hostile names, on a phone."""
    predict()
    path = tmp_path / "out/report.html"
    uris = re.findall(r'class="map" alt="map" src="([^"]+)"', path.read_text(encoding="utf-8"))
    maps = [np.asarray(Image.open(opened(uri))) for uri in uris]
    visit = Visit(browser, path.as_uri(), viewport={"width": 390, "height": 800})
    visit.wait("document.body.dataset.level === '128'")
    middle = int(np.median(maps[0]))
    for level in (1, middle, middle + 1, 255):
        assert at(visit, level) == [int((map_ >= level).sum()) for map_ in maps]
    at(visit, middle)
    visit.page.locator("article").first.scroll_into_view_if_needed()
    drawn = """async () => {
        const canvas = document.querySelector('canvas.cut-out')
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
        return data.filter((_, i) => i % 4 === 3).reduce((sum, alpha) => sum + (alpha > 0), 0)
    }"""
    assert visit.page.evaluate(drawn) == int((maps[0] >= middle).sum())

    at(visit, 128)
    page = visit.page
    focused = "[...document.querySelectorAll('article')].indexOf(document.activeElement)"
    moves = []
    for key in ("j", "j", "j", "k", "ArrowDown"):
        page.keyboard.press(key)
        moves.append(page.evaluate(focused))
    assert moves == [0, 1, 2, 1, 2]
    page.keyboard.press("z")
    assert page.locator("article.zoomed").count() == 1
    page.keyboard.press("j")
    assert page.evaluate(focused) == 3
    assert page.locator("article").nth(3).get_attribute("class") == "zoomed"
    page.keyboard.press("Escape")
    assert page.locator("article.zoomed").count() == 0
    page.keyboard.press("-")
    visit.wait("document.body.dataset.level === '120'")
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert page.locator("option").all_inner_texts() == ["all", shown, "plain"]
    page.select_option("#group", shown)
    visit.wait("document.getElementById('shown').textContent === '2 of 5 images'")
    assert page.locator("article:visible h3 bdi").all_inner_texts() == [f"{shown}.jpg", "z.jpg"]
    counts = at(visit, 255)
    page.select_option("#group", "")
    page.check("#empty")
    visit.wait(f"document.getElementById('shown').textContent === '{counts.count(0)} of 5 images'")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it fits a phone"
    visit.context.close()
    assert visit.problems == []
    assert [request for request in visit.requests if not request.startswith(("file:", "data:"))] == []
