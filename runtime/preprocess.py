"""From what a caller has (files, arrays, PIL images) to the network's uint8 tensors, and from its maps back.

Resizing is Pillow's antialiased bilinear, which is what torchvision does to a PIL image and so what ICNet was trained
with; OpenCV's bilinear does not antialias and gives the network other pixels.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.contract import SIZE
from runtime.errors import InputError

ImageSource = str | os.PathLike[str] | NDArray[np.generic] | Image.Image

MIN_SIDE = 2  # pixels: one row, one column or one pixel shows no object
BILINEAR = Image.Resampling.BILINEAR


def image_tensor(source: ImageSource, name: str = "image") -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Read an image and resize it for the network.

    Args:
        source: a file that Pillow reads; an array H×W, H×W×1, H×W×3 (RGB) or H×W×4 (RGBA) of uint8, uint16, bool, or
            float in [0, 1]; or a PIL image. An EXIF orientation is applied, 16 bits are scaled (not cut) to 8,
            transparent pixels show white.
        name: what messages call an array or PIL image; a file is called by its path.

    Returns:
        RGB uint8 [224, 224, 3], and the upright image's own (width, height) in pixels.

    Raises:
        InputError: it can't be read, or is no image.
    """
    image = _read(source, name, mode="RGB", behind=(255, 255, 255, 255))
    return np.asarray(image.resize((SIZE, SIZE), BILINEAR)), image.size


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
    sism = _read(source, name, mode="L", behind=(0, 0, 0, 255))
    return np.asarray(sism.resize((SIZE, SIZE), BILINEAR))


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


def _read(source: ImageSource, name: str, mode: str, behind: tuple[int, int, int, int]) -> Image.Image:
    """Any source as an upright 8-bit image of the given mode; `behind` is the RGBA shown through transparent pixels."""
    if isinstance(source, np.ndarray):
        image = _from_array(source, name)
    elif isinstance(source, Image.Image):
        image = _decode(source, name)
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        image = _open(Path(source))
    else:
        raise InputError(f"{name}: expected a path, a NumPy array or a PIL image, got {type(source).__name__}")
    if min(image.size) < MIN_SIDE:
        raise InputError(f"{name}: {image.width}×{image.height} pixels is too small to show anything")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    return image if image.mode == mode else image.convert(mode)


def _open(path: Path) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        with Image.open(path) as image:
            return _decode(image, str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image, or of a format that Pillow can't read") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(str(path)) from error
    except OSError as error:
        if error.errno is None:  # Pillow's own, about the content
            raise _damaged(str(path), error) from error
        raise InputError(f"{path}: can't be read: {error.strerror}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_many_pixels(name)
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise _damaged(name, error) from error
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name)
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


def _too_many_pixels(name: str) -> InputError:
    return InputError(
        f"{name}: more than {Image.MAX_IMAGE_PIXELS} pixels, perhaps a decompression bomb; make it smaller, or raise "
        "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _from_array(array: NDArray[np.generic], name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise InputError(f"{name}: shape {array.shape}, expected H×W, H×W×1, H×W×3 or H×W×4")
    if array.size == 0:
        raise InputError(f"{name}: shape {array.shape} has no pixels")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{name}: holds NaN or infinite values")
        low, high = array.min(), array.max()
        if low < 0 or high > 1:
            raise InputError(f"{name}: {array.dtype} values in [{low:g}, {high:g}], expected [0, 1] (or uint8)")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: dtype {array.dtype}, expected uint8, uint16, bool, or float in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))
