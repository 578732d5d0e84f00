"""From what a caller has (files, arrays, PIL images) to the network's uint8 tensors, and from its maps back.

Resizing is Pillow's antialiased bilinear, which is what torchvision does to a PIL image and so what ICNet was trained
with; OpenCV's bilinear does not antialias and gives the network other pixels.
"""

import ctypes
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from runtime.contract import SIZE
from runtime.errors import InputError
from runtime.grey import grey_levels, made_here, save_grey
from runtime.groups import heif_hint
from runtime.sisms import builtin_sism

ImageSource = str | os.PathLike[str] | bytes | bytearray | BytesIO | NDArray[np.generic] | Image.Image
EXPECTED = "expected a path, a NumPy array, a PIL image, or the bytes of a file"

TOLERANCE = 1e-3  # how far a float may lie outside [0, 1] by rounding
MIN_SIDE = 2  # pixels: one row, one column or one pixel shows no object
ORIENTATION = 0x0112  # EXIF tag
TURNED = range(5, 9)  # its values by which width and height change places
BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Pixels:
    """An image and its SISM as the network takes them.

    Attributes:
        image: RGB uint8 [224, 224, 3].
        sism: uint8 [224, 224].
        size: (width, height) of the upright image in pixels, to which its map is restored.
    """

    image: NDArray[np.uint8]
    sism: NDArray[np.uint8]
    size: tuple[int, int]


@dataclass(frozen=True)
class GroupPixels:
    """A group as the network takes it.

    Attributes:
        images: RGB uint8 [N, 224, 224, 3].
        sisms: uint8 [N, 224, 224].
        sizes: the images' own (width, height) in pixels.
    """

    images: NDArray[np.uint8]
    sisms: NDArray[np.uint8]
    sizes: tuple[tuple[int, int], ...]


def read_pixels(
    image: ImageSource, sism: ImageSource | None, image_name: str = "image", sism_name: str = "SISM"
) -> Pixels:
    """Read an image and its SISM and resize both for the network: the only way for pixels of groups.

    Args:
        image: as for `image_tensor`.
        sism: as for `sism_tensor`; None for the built-in SISM of the resized image.
        image_name: as for `image_tensor`.
        sism_name: as for `sism_tensor`.

    Raises:
        InputError: one of them can't be read, or is no image.
        DependencyError: the built-in SISM was asked for and OpenCV is not installed.
    """
    tensor, size = image_tensor(image, image_name)
    if sism is None:
        return Pixels(tensor, builtin_sism(tensor, name_of(image, image_name)), size)
    return Pixels(tensor, sism_tensor(sism, sism_name), size)


def name_of(source: ImageSource, name: str) -> str:
    """What messages call a source: its path, or `name`."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else name


def reads(images: Sequence[ImageSource], sisms: Sequence[ImageSource | None] | None) -> list[Callable[[], Pixels]]:
    """A call per image that reads it and its SISM; where there is none it is built in."""
    every = enumerate(zip(images, [None] * len(images) if sisms is None else sisms, strict=True))
    return [partial(read_pixels, image, sism, f"images[{i}]", f"sisms[{i}]") for i, (image, sism) in every]


def stack(pixels: Sequence[Pixels]) -> GroupPixels:
    """The images of a group in one array, and their SISMs in another."""
    images, sisms = np.stack([p.image for p in pixels]), np.stack([p.sism for p in pixels])
    return GroupPixels(images, sisms, tuple(p.size for p in pixels))


def image_tensor(source: ImageSource, name: str = "image") -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Read an image and resize it for the network.

    Args:
        source: a file that Pillow reads; an array H×W, H×W×1, H×W×3 (RGB) or H×W×4 (RGBA) of uint8, uint16, bool, or
            float in [0, 1]; a PIL image; or the content of a file, as bytes or BytesIO (all of it, wherever it
            stands). An EXIF orientation is applied, 16 bits are scaled to 8 (of 16-bit RGB files Pillow reads the upper
            8), transparent pixels show white.
        name: what messages call what has no path; a file is called by its path.

    Returns:
        RGB uint8 [224, 224, 3], and the upright image's own (width, height) in pixels.

    Raises:
        InputError: it can't be read, or is no image.
    """
    image = rgb_image(source, name)
    return resized(image), image.size


def sism_tensor(source: ImageSource, name: str = "SISM") -> NDArray[np.uint8]:
    """Read a single-image saliency map and resize it for the network.

    Args:
        source: as for `image_tensor`; colours are turned to grey, transparent pixels are not salient.
        name: as for `image_tensor`.

    Returns:
        uint8 [224, 224], 255 the most salient.

    Raises:
        InputError: it can't be read, or is no image.
    """
    sism = read_image(source, name, mode="L", behind=(0, 0, 0, 255))
    if sism.getextrema()[1] == 1 and not made_here(source):
        raise InputError(
            f"{name_of(source, name)}: its values are 0 and 1 of 255, so nothing is salient; a mask must be bool, or 0 "
            "and 255"
        )
    return resized(sism)


def rgb_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Read an image at its own size, as `image_tensor` does before it resizes.

    Raises:
        InputError: it can't be read, or is no image.
    """
    return read_image(source, name, mode="RGB", behind=(255, 255, 255, 255))


def resized(image: Image.Image) -> NDArray[np.uint8]:
    """An 8-bit RGB image or grey SISM at the network's size: uint8 [224, 224, 3] or [224, 224]."""
    return np.asarray(image.resize((SIZE, SIZE), BILINEAR))


def grey_image(source: ImageSource, size: tuple[int, int] | None = None, name: str = "grey image") -> NDArray[np.uint8]:
    """Read a map or a ground truth, which need not be of the network's size.

    Args:
        source: as for `image_tensor`; colours are turned to grey, transparent pixels are 0.
        size: (width, height) in pixels to resize it to, bilinearly; None for its own.
        name: as for `image_tensor`.

    Returns:
        uint8 [height, width].

    Raises:
        InputError: it can't be read, or is no image.
    """
    image = read_image(source, name, mode="L", behind=(0, 0, 0, 255))
    return np.asarray(image if size in (None, image.size) else image.resize(size, BILINEAR))


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file in pixels, EXIF orientation applied, without decoding it.

    Raises:
        InputError: it is no image.
    """
    _check_file(str(path))
    with _reading(str(path)), path.open("rb") as file, _identified(file) as image:
        # Pillow has turned the size of a TIFF file when it opens it.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
        return image.size[::-1] if turned else image.size


def restore_map(tensor: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a map from the network to an image's own size, bilinearly.

    Args:
        tensor: float32 [224, 224] in [0, 1].
        size: (width, height) in pixels.

    Returns:
        float32 [height, width] in [0, 1].
    """
    resized = np.asarray(Image.fromarray(tensor).resize(size, BILINEAR), dtype=np.float32)
    return resized.clip(0, 1)  # a weighted mean can leave [0, 1] by a rounding


def restores(pixels: GroupPixels, maps: NDArray[np.float32]) -> list[Callable[[], NDArray[np.float32]]]:
    """A call per image that restores its map, float32 [224, 224], to the image's own size."""
    return [partial(restore_map, *pair) for pair in zip(maps, pixels.sizes, strict=True)]


def save_map(tensor: NDArray[np.float32], path: str | os.PathLike[str] | BinaryIO) -> None:
    """Write a map, float32 [height, width] in [0, 1], as a PNG file of 8-bit grey."""
    save_grey(grey_levels(tensor), path)


def read_image(source: ImageSource, name: str, mode: str, behind: tuple[int, int, int, int]) -> Image.Image:
    """Any source as an upright 8-bit image of the given mode; `behind` is the RGBA shown through transparent pixels."""
    if isinstance(source, np.ndarray):
        image = _from_array(source, name)
    elif isinstance(source, Image.Image):
        image = _decode(source, name)
    elif isinstance(source, str | os.PathLike) and isinstance(os.fspath(source), str):
        name = os.fspath(source)
        image = _open_path(name)
    elif isinstance(source, bytes | bytearray | BytesIO):
        if isinstance(source, BytesIO) and source.closed:
            raise InputError(f"{name}: the file is closed; give it open, or its bytes")
        content = source.getvalue() if isinstance(source, BytesIO) else source
        if not content:
            raise InputError(f"{name}: the content is empty (0 bytes)")
        image = _open(BytesIO(content), name)
    else:
        raise InputError(f"{name}: {EXPECTED}, got {type(source).__name__}")
    if min(image.size) < MIN_SIDE:
        raise InputError(f"{name}: {image.width}×{image.height} pixels is too small; at least {MIN_SIDE}×{MIN_SIDE}")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:  # Pillow has no way from LAB and a few others
        raise InputError(
            f"{name}: Pillow can't turn an image of mode {image.mode} into {mode}: save it as RGB"
        ) from error
    except Exception as error:  # what Pillow raises if `info` says nonsense about transparency: TypeError and more
        raise _damaged(name, error) from error


def silence_libtiff() -> None:
    """Keep off standard error what libtiff prints there about a damaged file, which is an error of ours as well.

    Pillow has no way to do it, and the file descriptor belongs to all threads; so libtiff's handler is taken away, for
    the whole process. Where Pillow's libtiff can't be reached, it is left as it is.
    """
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


def _check_file(path: str) -> None:
    with _reading(path):
        status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path or '(empty path)'}: a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise InputError(f"{path}: the file is empty")


def _open_path(path: str) -> Image.Image:
    _check_file(path)
    # Pillow maps a file that it opens by its name into memory, and then garbles an uncompressed TIFF of 8 or 32 bits
    # per pixel with an orientation from 5 to 8.
    with _reading(path), Path(path).open("rb") as file:
        return _open(file, path)


def _open(file: BinaryIO, name: str) -> Image.Image:
    with _reading(name), _identified(file) as image:
        return _decode(image, name)


def _identified(file: BinaryIO) -> Image.Image:
    """Pillow's image of a file, which pillow-heif may read if Pillow alone can't."""
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        try:
            import pillow_heif
        except ImportError:
            raise error from None
        pillow_heif.register_heif_opener()  # it turns images upright, and says so in their EXIF orientation
        file.seek(0)
        return Image.open(file)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """All that can go wrong in reading a file, as InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        hint = heif_hint([Path(path)])
        raise InputError(f"{path}: not an image, or of a format that Pillow can't read{hint}") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: can't be read: {error.strerror}") from error
        raise _damaged(path, error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image.width * image.height, name)
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:
        raise _damaged(name, error) from error
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        grey = _from_array(values, name)
        if isinstance(image.info.get("transparency"), int):  # one value that stands for transparent pixels
            grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
        return grey
    if image.mode == "I":  # how Pillow reads some 16-bit files
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name}: 32-bit values outside 0 … 65535; save it with 8 or 16 bits")
        return _from_array(values.astype(np.uint16), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    return image


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged or truncated image: {error}")


def _check_pixels(pixels: int, name: str) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise _too_many_pixels(name)


def _too_many_pixels(name: str) -> InputError:
    return InputError(
        f"{name}: more than {Image.MAX_IMAGE_PIXELS} pixels, perhaps a decompression bomb; make it smaller, or raise "
        "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _from_array(array: NDArray[np.generic], name: str) -> Image.Image:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name}: a masked array; fill the masked values first: array.filled(0)")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InputError(f"{name}: shape {array.shape}, expected H×W, H×W×1, H×W×3 or H×W×4")
    if array.size == 0:
        raise InputError(f"{name}: shape {array.shape} has no pixels")
    _check_pixels(array.shape[0] * array.shape[1], name)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        if 0 < array.max() <= 255:
            raise InputError(
                f"{name}: 16-bit values of at most {array.max()} of 65535; if they are 8-bit, make them uint8"
            )
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{name}: holds NaN or infinite values")
        low, high = array.min(), array.max()
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise InputError(f"{name}: {array.dtype} values in [{low:g}, {high:g}], expected [0, 1] (or uint8)")
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: dtype {array.dtype}, expected uint8, uint16, bool, or float in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))
