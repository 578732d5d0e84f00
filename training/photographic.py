"""Groups made by cut and paste that look like photographs and their detectors' SISMs, beside `paste.py`'s drawings.

What differs: objects of up to 230 pixels, which the border may cut; their colours lean towards the background's; their
edges are soft; the whole image went through a camera and JPEG. An image is one of three scenes:

- *alone*: the common object is all there is, and often large, so a network has to keep what the SISM marks if nothing
  contradicts it; a share of the groups has such images only, some of them a single one;
- *side by side*: two whole photographs in one image, one of the common object and one of another;
- *scattered*: one or two common objects among up to three others, as in `paste.py`.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from runtime.contract import SIZE
from training.paste import AREA, CutPaste, Group, Pixels, Plane, blurred, photographed, place, sism, with_shadow

ALONE = 0.15  # share of groups in which nothing but the common object is to be seen
SINGLE = 0.25  # share of those that have one image
SIDE_BY_SIDE = 0.45  # share of images with others in them
SCATTERED = (np.log(45), np.log(150))  # of objects' longer sides, pixels
LARGE = (np.log(90), np.log(230))


class PhotographicPaste(CutPaste):
    """Makes such groups; the arguments are those of `CutPaste`."""

    def group(
        self,
        seed: Sequence[int],
        n: int,
        *,
        name: str | None = None,
        distractors: tuple[int, int] = (0, 3),
        corrupted: float | None = None,
    ) -> Group:
        """As `CutPaste.group`; without a name and a share, some groups show one object only, some have one image."""
        rng = np.random.default_rng([*seed, 4])
        if name is None and corrupted is None and rng.random() < ALONE:
            distractors = (0, 0)
            if rng.random() < SINGLE:
                n, corrupted = 1, 0.0
        return super().group(seed, n, name=name, distractors=distractors, corrupted=corrupted)

    def _scene(
        self, rng: np.random.Generator, name: str, strangers: Sequence[str]
    ) -> tuple[Pixels, Plane, list[Plane]]:
        if not strangers:
            canvas, alpha = self._photograph(rng, name, LARGE)
            return jpeg(rng, photographed(rng, canvas)), alpha, [alpha]
        if rng.random() < SIDE_BY_SIDE:
            return self._pair(rng, name, strangers[0])
        image, union, visible = super()._scene(rng, name, strangers)
        return jpeg(rng, image), union, visible

    def _pair(self, rng: np.random.Generator, name: str, other: str) -> tuple[Pixels, Plane, list[Plane]]:
        """Two photographs side by side, or one above the other; both squeezed, or only a part of each."""
        cut = int(SIZE * rng.uniform(0.35, 0.65))
        squeezed = rng.random() < 0.5
        widths = (cut, SIZE - cut)
        sides = LARGE if squeezed else (np.log(0.6 * min(widths)), np.log(1.4 * min(widths)))
        parts = []
        for k, width in zip((name, other), widths, strict=True):
            canvas, alpha = self._photograph(rng, k, sides, spread=0.35 if squeezed else 0.1)
            both = np.concatenate([photographed(rng, canvas).astype(np.float32), alpha[..., None]], 2)
            left = (SIZE - width) // 2
            parts.append(cv2.resize(both, (width, SIZE), interpolation=AREA) if squeezed else both[:, left:][:, :width])
        common = [np.full((SIZE, w), k == 0, bool) for k, w in enumerate(widths)]
        if rng.random() < 0.5:
            parts, common = parts[::-1], common[::-1]
        both, first = np.concatenate(parts, 1), np.concatenate(common, 1)
        if not squeezed and rng.random() < 0.4:
            both, first = both.transpose(1, 0, 2), first.T
        alpha = np.ascontiguousarray(both[..., 3])
        image = jpeg(rng, np.round(both[..., :3]).clip(0, 255).astype(np.uint8))
        return image, alpha * first, [alpha * first, alpha * ~first]

    def _photograph(
        self, rng: np.random.Generator, name: str, sides: tuple[float, float], spread: float = 0.5
    ) -> tuple[Plane, Plane]:
        """One object on a background: float32 [224, 224, 3] in [0, 255], and its alpha [224, 224]."""
        canvas = self._background(rng)
        return self._put(rng, canvas, name, float(np.exp(rng.uniform(*sides))), spread)

    def _put(
        self, rng: np.random.Generator, canvas: Plane, name: str, side: float, spread: float = 0.5
    ) -> tuple[Plane, Plane]:
        colour, alpha = place(rng, self._member(rng, name), side, spread=spread)
        if rng.random() < 0.6:
            alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.3, 1.2)), np.float32)
        if rng.random() < 0.5:
            weights = alpha[..., None] / max(float(alpha.sum()), 1)
            lean = rng.uniform(0, 0.5) * (canvas.mean((0, 1)) - (colour * weights).sum((0, 1)))
            colour = np.clip(colour + lean.astype(np.float32), 0, 255)
        if rng.random() < 0.4:
            canvas = with_shadow(rng, canvas, alpha)
        return canvas * (1 - alpha[..., None]) + colour * alpha[..., None], alpha

    def _side(self, rng: np.random.Generator) -> float:
        return float(np.exp(rng.uniform(*SCATTERED)))

    def _sism(self, rng: np.random.Generator, objects: Sequence[Plane]) -> Pixels:
        """Half of them as `paste.sism` makes them, half as good detectors do: nearly binary, and sharp."""
        if rng.random() < 0.5:
            return sism(rng, objects)
        plane = np.zeros((SIZE, SIZE), np.float32)
        for visible in objects:
            missed = len(objects) > 1 and rng.random() < 0.1
            plane = np.maximum(plane, visible * rng.uniform(0, 0.2 if missed else 0.15) + (not missed) * 0.85 * visible)
        return blurred(rng, plane, (0.5, 2), unevenness=0.3)


def jpeg(rng: np.random.Generator, image: Pixels) -> Pixels:
    """The image after JPEG of quality 60 to 95, in three of four cases."""
    if rng.random() < 0.25:
        return image
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
    data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), quality)[1]
    return np.ascontiguousarray(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
