"""Scores of maps against PySODMetrics, against their definitions, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import Scores
from runtime import InputError

NAMES = ("mae", "max_f", "s", "max_e")


def scores(*pairs):
    total = Scores()
    for map_, gt in pairs:
        total.add(map_, gt)
    return total.results()


def values(metrics):
    return [getattr(metrics, name) for name in NAMES]


def case(k):
    """A map and a ground truth without random numbers, which other programs can make too."""
    height, width = 23 + 7 * k, 41 - 3 * k
    y, x = np.mgrid[:height, :width]
    gt = (abs(y - height // 2) * (k + 2) < 2 * height) & (abs(x - 5 * k) < 9 + k)
    map_ = (9 * k + 90 * gt + (x * x * 7 + y * 13 + x * y * 3) % (110 + 10 * k)) % 256
    return map_.astype(np.uint8), gt


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, (0.2741917434, 0.9480909481, 0.5958284151, 0.9496883924)),
        (1, (0.2847519516, 0.9289640592, 0.6494934912, 0.8880809903)),
        (2, (0.2944306342, 0.9098848247, 0.6424464646, 0.8573320026)),
        (3, (0.3233316622, 0.8799744082, 0.6906240501, 0.8263410348)),
        (4, (0.3911758077, 0.7947279865, 0.5511498525, 0.7467594559)),
        (5, (0.4594785814, 0.6863079019, 0.4226397878, 0.7333288319)),
    ],
)
def test_the_scores_are_those_of_pysodmetrics(k, expected):
    """What PySODMetrics 1.6.2 computes for these maps."""
    np.testing.assert_allclose(values(scores(case(k))), expected, rtol=0, atol=1e-9)


def test_means_over_images_are_those_of_pysodmetrics():
    """Curves are averaged before their maximum is taken."""
    found = scores(*map(case, range(6)))
    np.testing.assert_allclose(
        [*values(found), found.precision[100], found.recall[100]],
        [0.337893396767, 0.805346283615, 0.592030343552, 0.794134121687, 0.609487514113, 0.935553255118],
        rtol=0,
        atol=1e-9,
    )
    assert found.max_f < np.mean([scores(case(k)).max_f for k in range(6)])
    assert (found.images, found.empty) == (6, 0)


def by_definition(map_, gt):
    """MAE, max F, S and max E of one map, pixel by pixel as the papers write them."""
    v = map_ / 255
    if v.max() > v.min():
        v = (v - v.min()) / (v.max() - v.min())
    pixels = gt.size
    f, e = [], []
    for threshold in range(256):
        found = (v * 255).astype(np.uint8) >= threshold
        hits = (found & gt).sum()
        precision, recall = hits / max(found.sum(), 1), hits / gt.sum()
        f.append(1.3 * precision * recall / (0.3 * precision + recall) if hits else 0)
        if gt.all():
            aligned = found
        else:
            a, b = found - found.mean(), gt - gt.mean()
            aligned = (1 + 2 * a * b / (a**2 + b**2)) ** 2 / 4
        e.append(aligned.sum() / (pixels - 1))

    def likeness(x):
        return 2 * x.mean() / (x.mean() ** 2 + 1 + (x.std(ddof=1) if x.size > 1 else 0))

    def similarity(x, y):
        varies = (x.min() < x.max(), y.min() < y.max())
        if not any(varies):
            return 1
        if not all(varies):
            return 0
        covariance = np.cov(x.ravel(), y.ravel())
        return 4 * x.mean() * y.mean() * covariance[0, 1] / ((x.mean() ** 2 + y.mean() ** 2) * np.trace(covariance))

    if gt.all():
        return np.abs(v - gt).mean(), max(f), v.mean(), max(e)
    s_object = gt.mean() * likeness(v[gt]) + (1 - gt.mean()) * likeness(1 - v[~gt])
    row, column = (int(np.round(axis.mean())) + 1 for axis in np.nonzero(gt))
    s_region = 0
    for rows in (slice(row), slice(row, None)):
        for columns in (slice(column), slice(column, None)):
            if v[rows, columns].size:
                s_region += v[rows, columns].size / pixels * similarity(v[rows, columns], gt[rows, columns])
    return np.abs(v - gt).mean(), max(f), max(0, (s_object + s_region) / 2), max(e)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 255), st.integers(0, 2**32 - 1))
def test_the_scores_are_those_of_the_definitions(height, width, steps, seed):
    rng = np.random.default_rng(seed)
    gt = rng.random((height, width)) < rng.random()
    gt.flat[rng.integers(gt.size)] = True
    map_ = (rng.integers(0, steps + 1, gt.shape) * (255 // steps)).astype(np.uint8)
    np.testing.assert_allclose(values(scores((map_, gt))), by_definition(map_, gt), rtol=0, atol=1e-9)


HALF = np.repeat([[True, True, False, False]], 4, axis=0)


def test_a_perfect_map_has_the_best_scores():
    found = scores((HALF.astype(np.float32), HALF))
    assert values(found) == [0, 1, 1, 16 / 15]  # the E-measure divides by one pixel less
    assert (found.precision[1:] == 1).all()
    assert (found.recall == 1).all()
    assert found.precision[0] == 0.5


def test_the_opposite_map_has_the_worst():
    found = scores((~HALF * 1.0, HALF))
    assert found.mae == 1
    assert found.s == 0
    assert found.max_f == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))  # at threshold 0 everything is found
    assert found.max_e == pytest.approx(16 * 0.25 / 15)  # there nothing of the map deviates from its mean


def test_a_map_of_one_value_by_hand():
    found = scores((np.full((4, 4), 0.2), HALF))
    assert found.mae == pytest.approx((0.8 + 0.2) / 2)  # it is not stretched
    objects = (2 * 0.2 / (0.2**2 + 1) + 2 * 0.8 / (0.8**2 + 1)) / 2
    assert found.s == pytest.approx((objects + 4 / 16) / 2)  # only in the quadrants of one column both are even


def test_maps_are_stretched_to_their_own_range():
    map_, gt = case(1)
    assert map_.max() < 230
    stretched = (map_ - map_.min()) / (int(map_.max()) - map_.min())
    assert values(scores((map_, gt))) == pytest.approx(values(scores((stretched, gt))), abs=3e-3)
    assert scores((HALF * np.uint8(3) + np.uint8(9), HALF)) != scores((np.full((4, 4), 9, np.uint8), HALF))
    assert values(scores((HALF * np.uint8(3) + np.uint8(9), HALF))) == values(scores((HALF * 1.0, HALF)))


def test_floats_are_rounded_to_8_bits_and_ground_truths_cut_above_128():
    rng = np.random.default_rng(0)
    map_, gt = rng.random((9, 9), np.float32), rng.integers(0, 256, (9, 9), np.uint8)
    gt.flat[:2] = (128, 129)
    assert values(scores((map_, gt))) == values(scores((np.rint(map_ * 255).astype(np.uint8), gt > 128)))


def test_an_empty_ground_truth_counts_for_mae_only():
    map_, gt = case(0)
    empty = np.zeros((4, 4), np.uint8)
    found, alone = scores((map_, gt), (np.full((4, 4), 51, np.uint8), empty)), scores((map_, gt))
    assert found.mae == pytest.approx((alone.mae + 0.2) / 2)
    assert values(found)[1:] == values(alone)[1:]
    assert (found.images, found.empty) == (2, 1)
    with pytest.raises(InputError, match="no foreground in any of 1 ground truths"):
        scores((empty, empty))
    with pytest.raises(InputError, match="no foreground in any of 0 ground truths"):
        scores()


def test_a_ground_truth_that_is_all_foreground():
    gt, map_ = np.ones((4, 4), bool), np.linspace(0, 1, 16).reshape(4, 4)
    found = scores((map_, gt))
    assert (found.max_f, found.max_e) == (1, 16 / 15)
    assert found.s == pytest.approx(0.5)


@pytest.mark.parametrize("where", [(-1, 0), (0, -1), (-1, -1), (0, 0)])
def test_foreground_in_a_corner(where):
    gt = np.zeros((5, 6), bool)
    gt[where] = True
    assert scores((gt * 1.0, gt)).s == 1


@pytest.mark.parametrize(
    ("map_", "gt", "message"),
    [
        (np.zeros((4, 5)), HALF, "4×4 pixels, but the map has 5×4"),
        (np.full((4, 4), np.nan), HALF, "leaves \\[0, 1\\]"),
        (np.full((4, 4), 2.0), HALF, "leaves \\[0, 1\\]"),
        (np.zeros((4, 4), int), HALF, "its map is int64"),
        (np.zeros((1, 4, 4)), HALF, "the map must be an array \\[height, width\\], got \\(1, 4, 4\\)"),
        (np.zeros((4, 4)), HALF * 1.0, "dtype float64, expected bool or uint8"),
        (np.zeros((4, 4)), HALF.astype(np.uint8), "its values are 0 and 1 of 255"),
        (np.zeros((0, 4)), np.zeros((0, 4), bool), "must be an array"),
    ],
)
def test_arrays_that_can_not_be_scored(map_, gt, message):
    with pytest.raises(InputError, match=f"^x.png: .*{message}"):
        Scores().add(map_, gt, "x.png")
