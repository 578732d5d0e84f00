"""Masks, cut-outs and boxes made of maps."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

import runtime
from runtime import DependencyError, InputError, boxes, cutout, mask, otsu_level, outputs
from runtime.preprocess import restore_map
from tests.helpers import DATA


def smooth(rng, low=0.0, high=1.0, size=(60, 50)):
    """A random map."""
    small = rng.uniform(low, high, (6, 6)).astype(np.float32)
    return restore_map(small, size)


def test_masks_part_where_opencv_does():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for _ in range(30):
        map_ = smooth(rng) ** rng.uniform(0.3, 3)
        _, expected = cv2.threshold(np.rint(map_ * 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
        np.testing.assert_array_equal(mask(map_), expected > 0)


def test_a_map_that_is_dark_everywhere_has_an_empty_mask():
    assert not mask(smooth(np.random.default_rng(0), 0, 0.08)).any()
    assert not mask(np.zeros((4, 5), np.float32)).any()
    assert mask(np.ones((4, 5), np.float32)).all()
    assert otsu_level(np.zeros((4, 5), np.uint8)) == 0.1


def test_a_map_and_its_file_have_the_same_mask():
    map_ = smooth(np.random.default_rng(1))
    grey = np.rint(map_ * 255).astype(np.uint8)
    for level in (None, 0, 0.3, 0.5, 1):
        np.testing.assert_array_equal(mask(map_, level), mask(grey, level))
    np.testing.assert_array_equal(mask(grey, 0.5), grey >= 128)


def test_edges_of_maps_are_drawn_to_those_of_images():
    """Maps with edges in wrong places, as on the truth of the sample groups: some of the error goes."""
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    before, after = [], []
    for path in sorted((DATA / "pasted/img").glob("*/*.jpg")):
        image = Image.open(path).resize((448, 448))
        truth = Image.open(DATA / "pasted/gt" / path.parent.name / f"{path.stem}.png").convert("L").resize(image.size)
        moved = truth.transform(image.size, Image.Transform.AFFINE, (1, 0, rng.uniform(2, 3), 0, 1, rng.uniform(-3, 3)))
        map_ = restore_map(np.asarray(moved.resize((224, 224)), np.float32) / 255, image.size)
        expected = np.asarray(truth) / 255
        before.append(abs(map_ - expected).mean())
        after.append(abs(outputs.refine(map_, np.asarray(image)) / 255 - expected).mean())
    assert np.mean(after) < 0.85 * np.mean(before), (np.mean(before), np.mean(after))


def test_filtering_in_strips_shows_no_seams(monkeypatch):
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 30, 3), np.uint8).repeat(50, 0).repeat(50, 1)[:1999, :1201]
    map_ = smooth(rng, size=(1201, 1999))
    whole = outputs.refine(map_, image)
    monkeypatch.setattr(outputs, "STRIP_PIXELS", 1 << 16)
    assert abs(outputs.refine(map_, image).astype(int) - whole).max() <= 1  # sums of floats, rounded


def test_a_cutout_has_the_images_colours_and_the_maps_opacity():
    pytest.importorskip("cv2")
    image = Image.new("RGB", (300, 200), (10, 60, 200))
    ImageDraw.Draw(image).rectangle((100, 50, 199, 149), fill=(250, 120, 0))
    map_ = np.zeros((200, 300), np.float32)
    map_[52:147, 102:197] = 1
    rgba = cutout(image, map_)
    assert (rgba.shape, rgba.dtype) == ((200, 300, 4), np.uint8)
    assert (rgba[60:140, 110:190] == (250, 120, 0, 255)).all()
    assert (rgba[:40] == 0).all()
    edge = rgba[100, :, 3]
    assert edge[98] < 64
    assert edge[101] > 128  # where the map is 0, but the object's colour begins


def test_a_cutout_is_upright(tmp_path):
    pytest.importorskip("cv2")
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert cutout(tmp_path / "turned.jpg", np.ones((60, 40), np.float32)).shape == (60, 40, 4)
    with pytest.raises(InputError, match=r"turned\.jpg: 40×60 pixels \(upright\), but its map has 60×40"):
        cutout(tmp_path / "turned.jpg", np.ones((40, 60), np.float32))


def test_boxes_are_those_of_components():
    pytest.importorskip("cv2")
    salient = np.zeros((100, 200), bool)
    salient[10:30, 20:60] = True
    salient[50:90, 100:150] = True
    salient[90, 150] = True  # touches at a corner
    salient[0, 0] = True  # too small
    map_ = np.where(salient, 0.5, 0.25).astype(np.float32)
    map_[10:30, 20:60] = 1
    found = boxes(salient, map_)
    assert [box.bbox for box in found] == [(100, 50, 51, 41), (20, 10, 40, 20)]
    assert [box.area for box in found] == [2001, 800]
    assert [box.score for box in found] == pytest.approx([128 / 255, 1])
    assert [box.score for box in boxes(salient)] == [1, 1]
    assert len(boxes(salient, min_area=0)) == 3
    assert boxes(np.zeros((5, 5), bool)) == []


BAD_MAPS = {
    "a list": [[0.5]],
    "three axes": np.zeros((3, 4, 1), np.float32),
    "int64": np.zeros((3, 4), np.int64),
    "above 1": np.full((3, 4), 1.5),
    "NaN": np.full((3, 4), np.nan),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("map_", BAD_MAPS.values(), ids=BAD_MAPS)
def test_what_is_no_map_is_refused(map_):
    for call in (mask, otsu_level, lambda m: cutout(Image.new("RGB", (4, 3)), m)):
        with pytest.raises(InputError, match=r"map: expected float \[H, W\] in \[0, 1\] or uint8 \[H, W\], got"):
            call(map_)


def test_bad_levels_and_masks_are_refused():
    map_ = np.zeros((3, 4), np.float32)
    for level in (-0.1, 1.1, float("nan"), "0.5"):
        with pytest.raises(InputError, match=r"level=.*: expected a number from 0 to 1"):
            mask(map_, level)
    for bad in (map_, mask(map_)[0], None):
        with pytest.raises(InputError, match=r"mask: expected bool \[H, W\], got"):
            boxes(bad)
    with pytest.raises(InputError, match="but its mask has"):
        boxes(mask(map_), np.zeros((4, 3), np.float32))


def test_without_opencv_masks_are_made_and_the_rest_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    map_ = smooth(np.random.default_rng(0))
    salient = mask(map_)
    assert salient.any()
    for call in (lambda: cutout(Image.new("RGB", (60, 50)), map_), lambda: boxes(salient)):
        with pytest.raises(DependencyError, match=r"need OpenCV with its contrib modules: pip install .*opencv"):
            call()


def test_the_package_offers_them():
    import icnet

    for name in ("mask", "cutout", "boxes", "otsu_level", "Box"):
        assert getattr(icnet, name) is getattr(runtime, name)
