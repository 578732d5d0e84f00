"""Groups made by cut and paste, objects of one class on backgrounds, among other objects.

The idea of "group cut-paste" is that of "Free Lunch for Co-Saliency Detection: Context Adjustment" (Li et al., 2021).
Every image holds one or two objects of the group's class and up to three *distractors* of other classes. The ground
truth is the common class only; the SISM marks everything, blurred and with holes, misses and false alarms, and in a
share of the images it is plainly wrong, as the authors of ICNet describe it (§4.4). A class that comes back in half of
the images as a distractor (a *decoy*) makes sure that an object is not common just because it is frequent.

Everything follows from a seed: the same seed gives the same groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.contract import SIZE
from runtime.errors import InputError
from runtime.groups import image_files
from runtime.preprocess import read_image
from training.cutouts import related

MIN_CUTOUTS = 2  # in a class; with one, all common objects would be the same picture
MIN_VISIBLE = 0.35  # share of a common object that others leave uncovered
BACKGROUND_SIDE = 480  # photographs are kept with this shorter side, pixels
LOG_SIDES = (np.log(48), np.log(125))  # of objects' longer sides, pixels
PROCEDURAL = 0.25  # share of backgrounds that are textures

AREA = cv2.INTER_AREA

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """A group with its ground truth.

    name: its class. images: RGB, uint8 [N, 224, 224, 3]. masks: uint8 [N, 224, 224], 0 or 255. sisms: uint8
    [N, 224, 224].
    """

    name: str
    images: Pixels
    masks: Pixels
    sisms: Pixels


class CutPaste:
    """Makes groups from a folder of cut-outs and a folder of backgrounds.

    Args:
        cutouts: `CLASS/NAME.png`, RGBA; what is not transparent is the object.
        backgrounds: photographs, in folders of any depth.

    Raises:
        InputError: no folder, a class with fewer than two cut-outs, a cut-out without an alpha channel, fewer than
            five classes, or no background.
    """

    def __init__(self, cutouts: Path, backgrounds: Path) -> None:
        self.classes = _cutouts(cutouts)
        self.names = sorted(self.classes)
        self._others = {name: [n for n in self.names if not related(n, name)] for name in self.names}
        self._photos = photos(backgrounds)

    def nth(
        self, seed: int, i: int, n: int, distractors: tuple[int, int], corrupted: float, name: str | None = None
    ) -> Group:
        """Group i of a test set: unless named, classes take turns in an order that follows from the seed.

        The arguments are those of `group`.
        """
        if name is None:
            order = np.random.default_rng([seed, 0]).permutation(len(self.names))
            name = self.names[order[i % len(order)]]
        return self.group([seed, 1, i], n, name=name, distractors=distractors, corrupted=corrupted)

    def group(
        self,
        seed: Sequence[int],
        n: int,
        *,
        name: str | None = None,
        distractors: tuple[int, int] = (0, 3),
        corrupted: float | None = None,
    ) -> Group:
        """Make a group.

        Args:
            seed: any whole numbers; the group depends on them only.
            n: images in it.
            name: the common class; None for any.
            distractors: their smallest and largest number in an image.
            corrupted: share of SISMs that are plainly wrong; None for a random share up to 0.4.
        """
        rng = np.random.default_rng(seed)
        name = self.names[rng.integers(len(self.names))] if name is None else name
        others = self._others[name]
        decoy = others[rng.integers(len(others))]
        share = rng.uniform(0, 0.4) if corrupted is None else corrupted
        # The seed decides which SISMs are corrupted first: a higher share corrupts the same ones and more.
        wrong = set(np.random.default_rng([*seed, 1]).permutation(n)[: round(share * n)].tolist())
        images, masks, sisms = np.empty((n, SIZE, SIZE, 3), np.uint8), *np.empty((2, n, SIZE, SIZE), np.uint8)
        for i in range(n):
            # A stream of its own per image and purpose: a corrupted SISM changes nothing else.
            scene = np.random.default_rng([*seed, 2, i])
            count = int(scene.integers(distractors[0], distractors[1] + 1))
            strangers = [others[scene.integers(len(others))] for _ in range(count)]
            if strangers and scene.random() < 0.5:
                strangers[0] = decoy
            images[i], common, salient = self._scene(scene, name, strangers)
            masks[i] = np.where(common > 0.5, 255, 0)
            sism_rng = np.random.default_rng([*seed, 3, i])
            sisms[i] = corrupted_sism(sism_rng, salient) if i in wrong else self._sism(sism_rng, salient)
        return Group(name, images, masks, sisms)

    def _scene(
        self, rng: np.random.Generator, name: str, strangers: Sequence[str]
    ) -> tuple[Pixels, Plane, list[Plane]]:
        """An image, the visible part of its common objects, and the visible part of each of its objects."""
        while True:
            common = [True] * (1 + (rng.random() < 0.3)) + [False] * len(strangers)
            names = [name] * (len(common) - len(strangers)) + list(strangers)
            order = rng.permutation(len(names))
            canvas = self._background(rng)
            visible: list[Plane] = []
            areas: list[float] = []
            for k in order:
                side = self._side(rng) * (1.15 if common[k] else 1)
                canvas, alpha = self._put(rng, canvas, names[k], side)
                visible = [v * (1 - alpha) for v in visible] + [alpha]
                areas.append(float(alpha.sum()))
            shares = [float(v.sum()) / max(area, 1) for v, area in zip(visible, areas, strict=True)]
            if all(share >= MIN_VISIBLE for share, k in zip(shares, order, strict=True) if common[k]):
                union = np.sum([v for v, k in zip(visible, order, strict=True) if common[k]], axis=0)
                return photographed(rng, canvas), union, visible

    def _side(self, rng: np.random.Generator) -> float:
        """The longer side of an object, pixels."""
        return float(np.exp(rng.uniform(*LOG_SIDES)))

    def _put(self, rng: np.random.Generator, canvas: Plane, name: str, side: float) -> tuple[Plane, Plane]:
        """An object of a class on a canvas: the new canvas, and the object's alpha."""
        colour, alpha = place(rng, self._member(rng, name), side)
        if rng.random() < 0.3:
            canvas = with_shadow(rng, canvas, alpha)
        return canvas * (1 - alpha[..., None]) + colour * alpha[..., None], alpha

    def _sism(self, rng: np.random.Generator, objects: Sequence[Plane]) -> Pixels:
        return sism(rng, objects)

    def single(self, seed: Sequence[int], size: int) -> tuple[Pixels, int]:
        """A small image with one object, perhaps partly covered: uint8 [size, size, 3], and its index in `names`."""
        rng = np.random.default_rng(seed)
        label = int(rng.integers(len(self.names)))
        name = self.names[label]
        canvas = self._background(rng, size)
        names = [name]
        if rng.random() < 0.3:
            names.insert(int(rng.integers(2)), self._others[name][rng.integers(len(self._others[name]))])
        for k in names:
            side = size * (rng.uniform(0.5, 1.1) if k == name else rng.uniform(0.3, 0.7))
            colour, alpha = place(rng, self._member(rng, k), side, size, spread=0.15 if k == name else 0.4)
            canvas = canvas * (1 - alpha[..., None]) + colour * alpha[..., None]
        return photographed(rng, canvas), label

    def alone(self, seed: Sequence[int], cutout: Pixels) -> tuple[Pixels, Plane]:
        """One cut-out on a background: uint8 [224, 224, 3], and its mask, float32 [224, 224] in [0, 1]."""
        rng = np.random.default_rng(seed)
        canvas = self._background(rng)
        colour, alpha = place(rng, cutout, SIZE * rng.uniform(0.4, 0.8), spread=0.15)
        return photographed(rng, canvas * (1 - alpha[..., None]) + colour * alpha[..., None]), alpha

    def _member(self, rng: np.random.Generator, name: str) -> Pixels:
        members = self.classes[name]
        return members[rng.integers(len(members))]

    def _background(self, rng: np.random.Generator, size: int = SIZE) -> Plane:
        """float32 [size, size, 3] in [0, 255]."""
        if rng.random() < PROCEDURAL:
            return texture(rng, size)
        photo = self._photos[rng.integers(len(self._photos))]
        height, width = photo.shape[:2]
        side = int(rng.uniform(0.35, 1) * min(height, width))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = np.asarray(cv2.resize(photo[top : top + side, left : left + side], (size, size), interpolation=AREA))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.3:
            crop = np.asarray(cv2.GaussianBlur(crop, (0, 0), rng.uniform(0.5, 3)))
        return _lit(rng, crop.astype(np.float32), 0.25)


def place(
    rng: np.random.Generator, cutout: Pixels, side: float, size: int = SIZE, spread: float = 0.5
) -> tuple[Plane, Plane]:
    """Put a cut-out at a random place: colour [size, size, 3] in [0, 255] and alpha [size, size] in [0, 1].

    Its rotation, mirroring, colour and light are random too.

    Args:
        rng: the source of all random numbers.
        cutout: RGBA, uint8 [H, W, 4].
        side: its longer side in the image, pixels.
        size: side of the image, pixels.
        spread: largest distance of its centre from the image's, as a share of `size`, limited so that most of it
            stays inside.
    """
    height, width = cutout.shape[:2]
    factor = side / max(height, width)
    box = (max(round(width * factor), 4), max(round(height * factor), 4))
    small = cv2.resize(cutout, box, interpolation=AREA if factor < 1 else cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        small = small[:, ::-1]
    angle = rng.normal(0, 25) if rng.random() < 0.85 else rng.uniform(-180, 180)
    reach = max(min(spread * size, size / 2 - 0.3 * side), 0)
    centre = size / 2 + rng.uniform(-reach, reach, 2)
    matrix = cv2.getRotationMatrix2D((box[0] / 2, box[1] / 2), angle, 1)
    matrix[:, 2] += centre - np.array(box) / 2
    alpha = small[..., 3:].astype(np.float32) / 255
    colour = _recoloured(rng, small[..., :3])
    # Premultiplied, so that the colour of transparent pixels does not bleed in.
    moved = cv2.warpAffine(np.concatenate([colour * alpha, alpha], 2), matrix, (size, size), flags=cv2.INTER_LINEAR)
    alpha = moved[..., 3]
    return moved[..., :3] / np.maximum(alpha, 1e-3)[..., None], alpha


def sism(rng: np.random.Generator, objects: Sequence[Plane]) -> Pixels:
    """A SISM of an image: everything in it that is salient, blurred, with holes, misses and false alarms."""
    plane = np.zeros((SIZE, SIZE), np.float32)
    for visible in objects:
        strength = rng.uniform(0, 0.3) if rng.random() < 0.1 else rng.uniform(0.55, 1)
        plane = np.maximum(plane, visible * strength)
    for _ in range(rng.poisson(0.7)):  # holes, where there is something
        plane *= 1 - rng.uniform(0.5, 1) * blob(rng, 8, 26, inside=plane)
    for _ in range(rng.poisson(0.6)):  # false alarms, anywhere
        plane = np.maximum(plane, rng.uniform(0.2, 0.9) * blob(rng, 8, 40))
    return blurred(rng, plane)


def corrupted_sism(rng: np.random.Generator, objects: Sequence[Plane]) -> Pixels:
    """A SISM that is plainly wrong: blobs anywhere, next to nothing, everything, or all but the objects."""
    kind = rng.integers(4)
    if kind == 0:
        plane = np.max([blob(rng, 15, 50) for _ in range(rng.integers(1, 4))], axis=0)
    elif kind == 1:
        plane = np.max(objects, axis=0) * np.float32(rng.uniform(0, 0.05))
    elif kind == 2:
        plane = np.full((SIZE, SIZE), rng.uniform(0.6, 1), np.float32)
    else:
        plane = (1 - np.max(objects, axis=0)) * np.float32(rng.uniform(0.6, 1))
    return blurred(rng, plane)


def blob(rng: np.random.Generator, smallest: float, largest: float, inside: Plane | None = None) -> Plane:
    """An ellipse of random radii (pixels), place and angle: float32 [224, 224], 0 or 1; centred `inside`, if given."""
    plane = np.zeros((SIZE, SIZE), np.float32)
    centre = rng.integers(0, SIZE, 2)
    if inside is not None and (places := np.flatnonzero(inside > 0.3)).size:
        centre = np.array(divmod(int(places[rng.integers(places.size)]), SIZE)[::-1])
    axes = rng.uniform(smallest, largest, 2).astype(int)
    cv2.ellipse(plane, (centre.tolist(), (2 * axes).tolist(), rng.uniform(0, 180)), 1.0, -1)
    return plane


def texture(rng: np.random.Generator, size: int = SIZE) -> Plane:
    """A procedural background: noise of several scales, stripes or checks between a few colours."""
    field = np.zeros((size, size), np.float32)
    for cells in 2 ** rng.choice(np.arange(1, 7), rng.integers(1, 4), replace=False):
        noise = rng.random((cells + 1, cells + 1)).astype(np.float32)
        field += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) / np.sqrt(cells)
    if rng.random() < 0.4:
        y, x = np.mgrid[:size, :size].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
        wave = np.sin(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)))
        if rng.random() < 0.5:
            wave *= np.sin(2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)))
        field += rng.uniform(0.2, 1) * (wave if rng.random() < 0.5 else np.sign(wave))
    field = (field - field.min()) / max(float(np.ptp(field)), 1e-6)
    stops = rng.uniform(0, 255, (int(rng.integers(2, 5)), 3))
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(field, at, stops[:, c]) for c in range(3)], 2).astype(np.float32)


def blurred(
    rng: np.random.Generator, plane: Plane, radii: tuple[float, float] = (1, 6), unevenness: float = 1
) -> Pixels:
    """A detector's map: soft, a little uneven, 8-bit."""
    plane = cv2.GaussianBlur(plane, (0, 0), rng.uniform(*radii))
    haze = unevenness * cv2.resize(rng.random((5, 5)).astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    plane = plane * (1 - 0.25 * haze) + rng.uniform(0, 0.08) * haze
    return np.round(np.clip(plane, 0, 1) * 255).astype(np.uint8)


def _recoloured(rng: np.random.Generator, rgb: Pixels) -> Plane:
    """A change of hue, saturation and light, and a gradient of light across the object."""
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV).astype(np.float32)
    spread = 8 if rng.random() < 0.8 else 60  # most objects keep their colour
    hsv[..., 0] = (hsv[..., 0] + rng.normal(0, spread)) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.5, 1.3), 0, 255)
    colour = cv2.cvtColor(np.round(hsv).astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    height, width = rgb.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, width)[None] * np.cos(angle) + np.linspace(-1, 1, height)[:, None] * np.sin(angle)
    light: Plane = (1 + rng.uniform(0, 0.35) * ramp)[..., None].astype(np.float32)
    return _lit(rng, colour * light, 0.25)


def _lit(rng: np.random.Generator, colour: Plane, spread: float) -> Plane:
    """Brightness, contrast and tint."""
    gain = rng.uniform(1 - spread, 1 + spread) * rng.uniform(1 - spread / 3, 1 + spread / 3, 3)
    contrast = rng.uniform(1 - spread, 1 + spread)
    mean = float(colour.mean())
    lit: Plane = np.clip(((colour - mean) * contrast + mean) * gain, 0, 255).astype(np.float32)
    return lit


def with_shadow(rng: np.random.Generator, canvas: Plane, alpha: Plane) -> Plane:
    """The canvas with the soft shadow of an object that will lie on it."""
    shift = np.array([[1, 0, rng.uniform(-8, 8)], [0, 1, rng.uniform(2, 10)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (SIZE, SIZE)), (0, 0), rng.uniform(2, 6))
    return canvas * (1 - rng.uniform(0.2, 0.6) * shadow[..., None])


def photographed(rng: np.random.Generator, canvas: Plane) -> Pixels:
    """The whole image as a camera gives it: a little soft, lit as one, noisy."""
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.0))
    canvas = _lit(rng, canvas, 0.15)
    noise = rng.standard_normal((*canvas.shape[:2], 1), np.float32) * np.float32(rng.uniform(0, 6))
    return np.round(np.clip(canvas + noise, 0, 255)).astype(np.uint8)


def _cutouts(folder: Path) -> dict[str, list[Pixels]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; cut-outs lie in CLASS/NAME.png")
    classes: dict[str, list[Pixels]] = {}
    for path in sorted(folder.glob("*/*.png")):
        cutout = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if cutout is None:
            raise InputError(f"{path}: not a picture that can be read")
        if cutout.ndim != 3 or cutout.shape[2] != 4 or cutout.dtype != np.uint8 or not cutout[..., 3].any():
            raise InputError(f"{path}: a cut-out is an 8-bit RGBA picture with something that is not transparent")
        classes.setdefault(path.parent.name, []).append(cv2.cvtColor(cutout, cv2.COLOR_BGRA2RGBA))
    if few := [name for name, members in classes.items() if len(members) < MIN_CUTOUTS]:
        raise InputError(f"{folder / few[0]}: a class needs at least {MIN_CUTOUTS} cut-outs, it has 1")
    if lonely := [name for name in classes if not any(not related(name, other) for other in classes)]:
        raise InputError(
            f"{folder}: images of {lonely[0]!r} need distractors of an unrelated class, and there is none; add one"
        )
    if not classes:
        raise InputError(f"{folder}: no cut-outs; expected CLASS/NAME.png")
    return classes


def photos(folder: Path) -> list[Pixels]:
    """The pictures in a folder of any depth, their shorter side `BACKGROUND_SIDE` pixels: uint8 [H, W, 3].

    Raises:
        InputError: no such folder, or no pictures in it, or one can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of backgrounds")
    found = []
    folders = [folder, *(f for f in folder.rglob("*") if f.is_dir())]
    for path in sorted({file.resolve() for f in folders for file in image_files(f)}):  # links: the same at other sizes
        image = np.asarray(read_image(path, "background", "RGB", behind=(255, 255, 255, 255)))
        factor = BACKGROUND_SIDE / min(image.shape[:2])
        size = [max(round(s * factor), BACKGROUND_SIDE) for s in image.shape[1::-1]]
        found.append(cv2.resize(image, size, interpolation=AREA))
    if not found:
        raise InputError(f"{folder}: no pictures for backgrounds")
    return found
