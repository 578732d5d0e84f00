"""The site in chromium: the maps are the Predictor's, and whatever can be dropped on it gets an answer."""

import base64
import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from export.noise import ALLOWED_FLOORS, NEGLIGIBLE_MAX, NEGLIGIBLE_MEAN, reference, variant
from runtime import Predictor
from runtime.commands.web import build
from runtime.files import bundled
from runtime.groups import find_groups
from runtime.preprocess import image_tensor, sism_tensor
from tests.helpers import DATA, random_network
from tests.runtime.browser import Visit, or_skip, serious, serving

GROUP = "owl"
WIDTH = 1 / 32
ROUNDING = 0.5 + 1e-4  # of a map to 8 bits


@pytest.fixture(scope="module")
def site(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with a bank export, and samples."""
    samples = [group for group in find_groups(DATA / "pasted", DATA / "pasted" / "sism") if group.name == GROUP]
    site = tmp_path_factory.mktemp("web") / "site"
    or_skip(lambda: build(site, exports, samples=samples))
    return site


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with serving(site) as url:
        yield url


@pytest.fixture(scope="module")
def opened(browser: Any, url: str) -> Iterator[Visit]:
    """On one thread: several, which wait by turning, take far longer beside other tests."""
    visit = Visit(browser, url + "?threads=1").started()
    yield visit
    visit.context.close()


@pytest.fixture
def visit(opened: Visit, url: str) -> Iterator[Visit]:
    """One page for all tests, emptied before each: what an earlier test left there would show."""
    opened.clear()
    yield opened
    assert opened.problems == []
    assert [request for request in opened.requests if not request.startswith((url, "blob:", "data:"))] == []


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "png", **options})
    return buffer.getvalue()


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def picture(size: tuple[int, int] = (60, 40), mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours, as photographs have."""
    rng = np.random.default_rng((seed, *size))
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), np.uint8), "RGBA")
    return noise.filter(ImageFilter.GaussianBlur(2)).convert(mode)


def shown(visit: Visit, kind: str, n: int = 0) -> NDArray[np.uint8]:
    """RGBA of a canvas, uint8 [224, 224, 4]."""
    canvas = visit.page.locator(f"canvas.{kind}").nth(n)
    url = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def test_the_sample_groups_maps_are_the_predictors(visit: Visit, exports: Path) -> None:
    """Maps, masks and cut-outs at full size, from the ZIP file; the bound is that of an export against the paper."""
    visit.page.click("#samples button")
    visit.ready("8 maps ready")
    archive = zipfile.ZipFile(visit.download("#zip"))
    assert archive.testzip() is None

    paths = sorted((DATA / "pasted/img" / GROUP).glob("*.jpg"))
    sisms = [DATA / "pasted/sism" / GROUP / f"{path.stem}.png" for path in paths]
    with Predictor(exports) as predictor:
        expected = predictor(paths, sisms)
    floor = noise_floor(paths, sisms)
    errors = []
    for i, (path, map_) in enumerate(zip(paths, expected, strict=True)):
        assert np.array_equal(shown(visit, "image", i)[:, :, :3], image_tensor(path)[0])
        assert np.array_equal(shown(visit, "sism", i)[:, :, 0], sism_tensor(sisms[i]))
        found, mask, cutout = (
            np.asarray(Image.open(archive.open(f"{kind}/{path.stem}.png"))) for kind in ("maps", "masks", "cutouts")
        )
        assert found.dtype == np.uint8
        assert found.shape == map_.shape
        errors.append(np.abs(found - map_ * 255).ravel())
        assert np.array_equal(mask, np.where(found >= 128, 255, 0))
        assert np.array_equal(cutout[:, :, 3], mask)
        assert np.array_equal(cutout[:, :, :3][mask > 0], np.asarray(Image.open(path).convert("RGB"))[mask > 0])
    error = np.concatenate(errors)
    assert error.max() <= ROUNDING + 255 * max(ALLOWED_FLOORS["fp32"] * floor.max(), NEGLIGIBLE_MAX)
    assert error.mean() <= ROUNDING + 255 * max(ALLOWED_FLOORS["fp32"] * floor.mean(), NEGLIGIBLE_MEAN)
    assert np.concatenate([m.ravel() for m in expected]).std() > 0.02  # or any maps would pass


def noise_floor(paths: list[Path], sisms: list[Path]) -> NDArray[np.float32]:
    network = random_network(WIDTH)
    images = torch.from_numpy(np.stack([image_tensor(path)[0] for path in paths]))
    tensors = torch.from_numpy(np.stack([sism_tensor(sism) for sism in sisms]))
    with torch.inference_mode():
        maps = [model(images, tensors).numpy() for model in (reference(network), variant(network, "fp32"))]
    difference: NDArray[np.float32] = np.abs(maps[0] - maps[1])
    return difference


def test_a_plain_export_and_a_detector(browser: Any, exports: Path, tmp_path: Path) -> None:
    """One call for the group, with the SISMs of a detector whose map is the red of its image; given files go before."""
    model, detector = tmp_path / "model" / "icnet.onnx", tmp_path / "detector.onnx"
    model.parent.mkdir()
    model.write_bytes(exports.read_bytes())
    onnx.save(red_detector(), detector)
    or_skip(lambda: build(tmp_path / "site", model, detector))
    images, sism = [picture((90, 60), seed=seed) for seed in range(2)], png(picture((30, 30), "L"))
    with serving(tmp_path / "site") as url:
        visit = Visit(browser, url + "?threads=1").started()
        assert "1 thread" in visit.page.inner_text("#engine")
        visit.choose([file(f"{i}.png", png(image)) for i, image in enumerate(images)], [file("1.png", sism)])
        visit.ready("2 maps ready")
        sisms = [shown(visit, "sism", i)[:, :, 0].astype(int) for i in range(2)]
        found = [np.asarray(Image.open(visit.download(f"li:nth-child({i}) [data-kind=map]"))) for i in (1, 2)]
        visit.context.close()
    red = png(images[0].getchannel("R"))  # at the image's own size, as the detector sees it
    assert np.abs(sisms[0] - sism_tensor(red)).max() <= 1
    assert np.array_equal(sisms[1], sism_tensor(sism))
    with Predictor(model) as predictor:
        expected = predictor([png(image) for image in images], [red, sism])
    for map_, grey in zip(expected, found, strict=True):
        assert np.abs(map_ * 255 - grey).mean() < 1


def test_photographs_get_the_maps_of_the_models_that_ship(browser: Any, tmp_path: Path) -> None:
    """Those that the Predictor computes, with the same detector."""
    model, detector = bundled("icnet.onnx"), bundled("detector.onnx")
    assert model is not None
    assert detector is not None
    photos = sorted((DATA / "photos/fish").glob("*.jpg"))[:2]
    or_skip(lambda: build(tmp_path / "site", model, detector))
    with serving(tmp_path / "site") as url:
        visit = Visit(browser, url).started()
        assert "1 thread" not in visit.page.inner_text("#engine") or os.cpu_count() == 1
        visit.choose(photos)
        visit.ready("2 maps ready")
        sisms, maps = (np.stack([shown(visit, kind, i)[:, :, 0] for i in range(2)]) for kind in ("sism", "map"))
        visit.context.close()
    with Predictor(model, sism_model=detector) as predictor:
        pixels = predictor.pipeline.read(photos, None)
        expected = predictor.predict_tensors(pixels.images, sisms)
    assert np.abs(pixels.sisms - sisms.astype(int)).max() <= 1  # a rounding of the detector's
    error = np.abs(maps - 255 * expected)
    assert error.max() <= ROUNDING + 255 * NEGLIGIBLE_MAX
    assert error.mean() <= ROUNDING + 255 * NEGLIGIBLE_MEAN
    assert all(0.02 < (map_ >= 128).mean() < 0.8 for map_ in maps)  # a fish each


def red_detector() -> onnx.ModelProto:
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=kinds.FLOAT),
        helper.make_node("Gather", ["floats", "zero"], ["red"], axis=3),
        helper.make_node("Div", ["red", "most"], ["sisms"]),
    ]
    constants = [helper.make_tensor("zero", kinds.INT64, [], [0]), helper.make_tensor("most", kinds.FLOAT, [], [255])]
    inputs = [helper.make_tensor_value_info("images", kinds.UINT8, ["B", "H", "W", 3])]
    outputs = [helper.make_tensor_value_info("sisms", kinds.FLOAT, ["B", "H", "W"])]
    graph = helper.make_graph(nodes, "red", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


SOURCES = {
    "EXIF": lambda: png(picture((90, 40)), format="jpeg", quality=95, exif=oriented(6)),
    "mirrored": lambda: png(picture((90, 40)), format="jpeg", quality=95, exif=oriented(7)),
    "alpha": lambda: png(picture((50, 70), "RGBA")),
    "palette": lambda: png(picture((50, 70)).quantize(16)),
    "grey": lambda: png(picture((300, 500), "L")),
    "tall": lambda: png(picture((300, 1400))),
    "gif": lambda: png(picture((50, 70)), format="gif"),
    "webp": lambda: png(picture((50, 70)), format="webp", lossless=True),
    "16 bit": lambda: png(Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80) * 16)),
}  # fmt: skip


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_pixels_are_read_as_in_python(visit: Visit) -> None:
    contents = {name: make() for name, make in SOURCES.items()}
    visit.choose(
        [file(f"{name}.x", content) for name, content in contents.items()],
        [file(f"{name}.png", content) for name, content in contents.items()],
    )
    assert visit.messages == []
    for i, (name, content) in enumerate(contents.items()):
        level = 0 if name in ("palette", "grey", "tall", "gif", "webp") else 1  # decoders and blending round
        tensor, (width, height) = image_tensor(content)
        difference = np.abs(shown(visit, "image", i)[:, :, :3].astype(int) - tensor)
        assert difference.max() <= level, name
        assert np.abs(shown(visit, "sism", i)[:, :, 0].astype(int) - sism_tensor(content)).max() <= level, name
        map_ = Image.open(visit.download(f"li:nth-child({i + 1}) [data-kind=map]"))
        assert map_.size == (width, height), name


def test_the_resize_is_pillows(visit: Visit) -> None:
    """Sizes at random, the smallest, and a large one; exact from Pillow 13, which may shrink heights first."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1, 224, 224), (2, 700, 224, 224), (3000, 2, 224, 224), (224, 224, 224, 224), (2200, 1500, 224, 224)]
    sizes += [tuple(rng.integers(1, 400, 4)) for _ in range(12)]
    resize = """async ([width, height, toWidth, toHeight, channels]) => {
        const { resized } = await import('./pixels.js')
        const noise = Uint8Array.from({ length: width * height * 4 }, (_, i) => (Math.imul(i, 2654435761) >>> 13) & 255)
        const rows = Array.from({ length: height }, (_, y) => noise.subarray(y * width * 4, (y + 1) * width * 4))
        const bytes = await resized(rows, width, height, { channels, step: 4 }, toWidth, toHeight)
        let text = ''
        for (const byte of bytes) text += String.fromCharCode(byte)
        return btoa(text)
    }"""
    exact = int(PIL.__version__.split(".")[0]) >= 13
    for i, size in enumerate(sizes):
        width, height, to_width, to_height = map(int, size)
        channels = 1 + 2 * (i % 2)
        numbers = np.arange(width * height * 4, dtype=np.uint64) * np.uint64(2654435761)
        noise = ((numbers & np.uint64(0xFFFFFFFF)) >> np.uint64(13)).astype(np.uint8).reshape(height, width, 4)
        image = Image.fromarray(noise[:, :, 0] if channels == 1 else np.ascontiguousarray(noise[:, :, :3]))
        expected = np.asarray(image.resize((to_width, to_height), Image.Resampling.BILINEAR)).astype(int)
        found = visit.page.evaluate(resize, [width, height, to_width, to_height, channels])
        difference = np.abs(np.frombuffer(base64.b64decode(found), np.uint8).reshape(expected.shape) - expected)
        assert difference.max() <= (0 if exact else 1), size


HEIC = b"\0\0\0\x18ftypheic" + bytes(40)
BAD: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty.jpg", lambda: b"", "the file is empty"),
    ("text.jpg", lambda: b"no picture at all", "not an image that this browser can read"),
    ("IMG_1.HEIC", lambda: HEIC, "a HEIC photograph"),
    ("line.png", lambda: png(picture((1, 9))), "1×9 pixels is too small"),
    ("flat.png", lambda: png(picture((8, 8))), "its SISM has values 0 and 1"),
]


def test_files_that_cannot_be_used_get_a_message_and_the_others_a_map(visit: Visit) -> None:
    good = [file(f"{i}.png", png(picture(seed=i))) for i in range(2)]
    sisms = [file(f"{i}.png", png(picture(seed=i, mode="L"))) for i in range(2)]
    flat = file("flat.png", png(Image.fromarray(np.eye(8, dtype=np.uint8))))
    bad = [file(name, make()) for name, make, _ in BAD]
    visit.choose([*bad, *good], [*sisms, flat, file("line.png", png(picture(mode="L")))])
    visit.ready("2 maps ready")
    for name, _, reason in BAD:
        assert any(message.startswith(f"{name}: {reason}") for message in visit.messages), (name, visit.messages)


DROP = """([zone, name, content]) => {
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name))
    document.getElementById(zone).dispatchEvent(new DragEvent('drop', { dataTransfer, cancelable: true }))
}"""


def test_images_come_and_go(visit: Visit) -> None:
    """None, one, some without a SISM; adding and removing changes the group."""
    assert "Choose photographs" in visit.status
    visit.choose([file("a.png", png(picture(seed=1)))])
    assert "needs a SISM: choose or drop a.png" in visit.page.inner_text(".note")
    assert visit.page.is_hidden("#tools")
    visit.page.set_input_files("#sisms", [file(f"{s}.png", png(picture(seed=7, mode="L"))) for s in "ab"])
    visit.ready("1 map ready")
    assert "add photographs" in visit.status
    alone = shown(visit, "map")
    visit.page.set_input_files("#images", [file("b.png", png(picture(seed=2)))])
    visit.ready("2 maps ready")
    assert not np.array_equal(shown(visit, "map"), alone)
    visit.page.click("[aria-label='Remove b.png']")
    visit.ready("1 map ready")
    assert np.array_equal(shown(visit, "map"), alone)
    for zone, name, picked in (("sisms", "c.png", picture(mode="L")), ("images", "c.png", picture(seed=3))):
        visit.page.evaluate(DROP, [f"drop-{zone}", name, base64.b64encode(png(picked)).decode()])
        visit.wait("document.getElementById('messages').children.length === 1" if zone == "sisms" else "true")
    visit.ready("2 maps ready")
    visit.page.click("[aria-label='Remove c.png']")
    visit.ready("1 map ready")
    assert np.array_equal(shown(visit, "map"), alone)
    visit.page.click("#clear")
    visit.wait("document.querySelectorAll('.card').length === 0")
    assert visit.page.is_hidden("#tools")


def test_the_threshold_moves_every_cut_out(visit: Visit) -> None:
    names = [f"{i}.png" for i in range(2)]
    visit.choose(
        [file(n, png(picture(seed=i))) for i, n in enumerate(names)], [file(n, png(picture(mode="L"))) for n in names]
    )
    single = {}
    counts = []
    for level in (1, 90, 255):
        visit.page.locator("#threshold").fill(str(level))
        visit.page.wait_for_timeout(100)
        alphas = [shown(visit, "cutout", i)[:, :, 3] for i in range(2)]
        maps = [shown(visit, "map", i)[:, :, 0] for i in range(2)]
        for alpha, map_ in zip(alphas, maps, strict=True):
            assert np.array_equal(alpha > 0, map_ >= level)
        counts.append(sum(int((alpha > 0).sum()) for alpha in alphas))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    visit.page.locator("#threshold").fill("90")
    for kind in ("map", "mask", "cutout"):  # one by one
        single[kind] = np.asarray(Image.open(visit.download(f"li:nth-child(2) [data-kind={kind}]")))
    assert np.array_equal(single["mask"], np.where(single["map"] >= 90, 255, 0))
    assert np.array_equal(single["cutout"][:, :, 3], single["mask"])


# Notes what the page says from here on, and makes its clock a slow machine's.
WATCH = """(() => {
    globalThis.said = []
    const [status, bar] = ['status', 'progress'].map((id) => document.getElementById(id))
    new MutationObserver(() => said.push([bar.value, status.textContent])).observe(status, { childList: true })
    const now = performance.now.bind(performance)
    performance.now = () => 1000 * now()
})()"""


def test_forty_images_appear_one_by_one(visit: Visit) -> None:
    names = [f"{i:02}.png" for i in range(40)]
    visit.page.set_input_files("#sisms", [file(n, png(picture((24, 24), "L", i))) for i, n in enumerate(names)])
    visit.page.set_input_files("#images", [file(n, png(picture((24, 24), seed=i))) for i, n in enumerate(names)])
    enabled = "document.querySelectorAll('[data-kind=map]:enabled').length"
    visit.page.evaluate(WATCH)
    seen = []
    for at in (1, 20, 40):
        visit.wait(f"{enabled} >= {at}")
        seen.append(visit.page.evaluate(enabled))
    assert seen[0] < seen[1] < seen[2] == 40, seen
    visit.ready("40 maps ready")
    said = visit.page.evaluate("(delete performance.now, said)")
    steps = [(bar, text) for bar, text in said if text.startswith(("SIVs of ", "Map of "))]
    assert [text.partition(";")[0] for _, text in steps] == [
        f"{what} of {n}" for what in ("SIVs", "Map") for n in names
    ]
    assert all(one < next for (one, _), (next, _) in pairwise(steps))
    assert any(re.search(r"; about \d+ s left$", text) for _, text in steps)


def test_hundred_megapixels_are_scaled_and_that_is_said(visit: Visit) -> None:
    big = Image.new("P", (12000, 8400), 1)
    big.putpalette([0, 0, 0, 200, 40, 90])
    exif = oriented(6)
    visit.choose([file("big.png", png(big, exif=exif))], [file("big.png", png(picture(mode="L")))])
    note = visit.page.inner_text(".note")
    assert "101 megapixels: scaled to" in note
    width, height = (int(n) for n in note.partition("scaled to ")[2].partition(" ")[0].split("×"))
    assert width < height, "it lies on its side"
    assert 0.9 < width * height / (1 << 26) <= 1.001
    assert np.array_equal(shown(visit, "image")[0, 0], (200, 40, 90, 255))


def test_a_browser_without_simd_is_told(browser: Any, url: str) -> None:
    visit = Visit(browser, url, before="WebAssembly.validate = () => false")
    visit.page.wait_for_selector("#messages p")
    assert "no WebAssembly SIMD" in visit.messages[0]
    visit.context.close()


def test_a_tab_that_is_closed_in_the_middle_leaves_nothing(visit: Visit, url: str) -> None:
    """Of a second tab, in the same profile as the first: the next one begins anew."""
    tab = visit.context.new_page()
    tab.goto(url)
    tab.click("#samples button")
    tab.wait_for_selector("body[data-state=busy] .card")
    tab.close()
    tab = visit.context.new_page()
    tab.goto(url)
    assert tab.locator(".card").count() == 0
    assert visit.context.storage_state(indexed_db=True) == {"cookies": [], "origins": []}
    kept = "Promise.all([caches.keys(), navigator.serviceWorker.getRegistrations()])"
    assert tab.evaluate(kept) == [[], []]
    tab.close()


def test_models_that_are_no_icnet_are_named(browser: Any, site: Path, exports: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    for content, reason in (
        (exports.with_name("icnet.packed.onnx").read_bytes(), "is no ICNet export: expected inputs"),
        (b"no model", "can't be loaded"),
    ):
        (tmp_path / "site/models/intra.onnx").write_bytes(content)
        with serving(tmp_path / "site") as url:
            visit = Visit(browser, url + "?threads=1")
            visit.page.wait_for_selector("#messages p")
            assert f"intra.onnx {reason}" in visit.messages[0]
            assert visit.status == "Stopped"
            visit.context.close()


def test_accessibility(visit: Visit) -> None:
    """No serious finding of axe-core in light or dark, with results on the page."""
    visit.choose([file("a.png", png(picture()))], [file("a.png", png(picture(mode="L")))])
    assert serious(visit) == []
