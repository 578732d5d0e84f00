"""What callers bring becomes the network's tensors as the authors' preprocessing makes them, or a clear error."""

import re
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import InputError
from runtime.grey import note, save_grey
from runtime.preprocess import image_tensor, restore_map, rgb_image, save_map, sism_tensor, upright_size
from runtime.threads import Workers
from tests.helpers import BIRDS

RNG = np.random.default_rng(0)


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def authors(image, mode):
    """The authors' transforms: PIL's convert, then torchvision's Resize, which is PIL's bilinear."""
    return np.asarray(image.convert(mode).resize((224, 224), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("path", sorted(BIRDS.glob("*.jpg")), ids=lambda p: p.stem)
def test_photographs_are_read_as_the_authors_read_them(path):
    tensor, size = image_tensor(path)
    image = Image.open(path)
    assert size == image.size
    assert tensor.dtype == np.uint8
    np.testing.assert_array_equal(tensor, authors(image, "RGB"))
    np.testing.assert_array_equal(sism_tensor(path), authors(image, "L"))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 700), st.integers(2, 700))
def test_any_size_is_resized_as_pillow_does(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tensor, size = image_tensor(pixels)
    assert size == (width, height)
    np.testing.assert_array_equal(tensor, authors(Image.fromarray(pixels), "RGB"))


def test_resizing_antialiases():
    stripes = np.zeros((448 * 4, 448 * 4), np.uint8)
    stripes[:, ::2] = 255  # finer than the tensor's pixels: a resize without antialiasing gives black, white or moiré
    tensor = sism_tensor(stripes)
    assert abs(tensor.astype(int) - 127).max() <= 8


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: Image.fromarray(a),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: a / 255,
        lambda a: (a / 255).astype(np.float32),
        lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
        lambda a: np.asfortranarray(a),
    ],
    ids=["uint8", "PIL", "uint16", "float64", "float32", "RGBA", "not contiguous"],
)
def test_all_kinds_of_arrays_give_the_same_tensor(convert):
    pixels = noise(50, 70)
    np.testing.assert_array_equal(image_tensor(convert(pixels))[0], image_tensor(pixels)[0])


@pytest.mark.parametrize("convert", [lambda g: g, lambda g: g[:, :, None], lambda g: np.dstack([g, g, g])])
def test_grey_is_grey_whatever_its_rank(convert):
    grey = noise(40, 30)[:, :, 0]
    expected = authors(Image.fromarray(grey), "RGB")
    np.testing.assert_array_equal(image_tensor(convert(grey))[0], expected)
    np.testing.assert_array_equal(sism_tensor(convert(grey)), expected[:, :, 0])


def test_a_mask_of_booleans_is_a_sism():
    mask = noise(40, 30)[:, :, 0] > 128
    np.testing.assert_array_equal(sism_tensor(mask), sism_tensor(mask.astype(np.uint8) * 255))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_files_are_scaled_not_cut(tmp_path, suffix):
    values = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    expected = sism_tensor(np.rint(values / 257).astype(np.uint8))
    np.testing.assert_array_equal(sism_tensor(path), expected)
    assert sism_tensor(path)[100].std() > 0  # a cut to 8 bits saturates


def test_a_float_tiff_is_a_sism(tmp_path):
    values = np.linspace(0, 1, 60 * 40, dtype=np.float32).reshape(40, 60)
    Image.fromarray(values).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(sism_tensor(tmp_path / "f.tif"), sism_tensor(values))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(noise(40, 80)).resize((160, 80))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL transpositions from upright to stored
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    tensor, size = image_tensor(tmp_path / "x.png")
    assert size == (160, 80)
    np.testing.assert_array_equal(tensor, authors(upright, "RGB"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "jp2", "gif", "bmp", "ppm"])
def test_the_size_without_decoding_is_that_of_the_decoded_image(tmp_path, suffix):
    """Whatever stands in the orientation's place, in every format, with or without EXIF in it."""
    turned = 0
    for orientation in range(13):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(noise(40, 60)).save(path, exif=exif)
        assert upright_size(path) == rgb_image(path).size
        turned += upright_size(path) == (40, 60)
    assert turned == (4 if suffix in ("jpg", "png", "webp", "tif", "avif") else 0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_files_are_set_upright_as_png_files_are(tmp_path, mode, compression):
    if mode == "I;16":
        stored = Image.fromarray(noise(40, 60)[..., 0].astype(np.uint16) * 257)
    else:
        stored = Image.fromarray(noise(40, 60)).convert(mode)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.tif", exif=exif, compression=compression)
        stored.save(tmp_path / "a.png", exif=exif)
        tiff, png = (rgb_image(tmp_path / name) for name in ("a.tif", "a.png"))
        np.testing.assert_array_equal(np.asarray(tiff), np.asarray(png))


@pytest.mark.parametrize("kind", [bytes, bytearray, BytesIO])
def test_the_content_of_a_file_is_an_image(kind):
    path = min(BIRDS.glob("*.jpg"))
    content = kind(path.read_bytes())
    for _ in range(2):  # a BytesIO is not used up
        np.testing.assert_array_equal(image_tensor(content)[0], image_tensor(path)[0])
        np.testing.assert_array_equal(sism_tensor(content), sism_tensor(path))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
@pytest.mark.parametrize("value", ["x", (1, 2, 3, 4, 5), (1, "x"), 1.5, -7, 10**30, b"\x00" * 999, [], {}, object()])
def test_nonsense_about_transparency_is_an_error_of_ours_or_of_no_effect(mode, value):
    image = Image.new(mode, (20, 10), 300 if mode == "I;16" else 0)
    image.info["transparency"] = value
    try:
        tensor, size = image_tensor(image, "images[3]")
        said = f"images[3]: {tensor.shape}, {size}"
    except InputError as error:
        said = str(error)
    assert said.startswith(("images[3]: (224, 224, 3), (20, 10)", "images[3]: damaged", "images[3]: Pillow can't"))


def test_transparent_pixels_show_white_and_are_not_salient(tmp_path):
    pixels = np.dstack([noise(20, 20), np.zeros((20, 20), np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert (image_tensor(tmp_path / "x.png")[0] == 255).all()
    assert (sism_tensor(tmp_path / "x.png") == 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_common_mode_of_pillow_is_taken(mode):
    image = Image.open(BIRDS / "owl.jpg").convert(mode)
    tensor, size = image_tensor(image)
    assert (tensor.shape, size) == ((224, 224, 3), image.size)
    np.testing.assert_array_equal(tensor, authors(image, "RGB"))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 500), st.integers(2, 500))
def test_maps_come_back_at_the_images_size_within_0_and_1(height, width):
    tensor = np.random.default_rng(width).random((224, 224), dtype=np.float32).round()
    restored = restore_map(tensor, (width, height))
    assert (restored.shape, restored.dtype) == ((height, width), np.float32)
    assert restored.min() >= 0
    assert restored.max() <= 1


def test_maps_are_enlarged_and_reduced_bilinearly():
    """By hand: a step gets 1/4 and 3/4 at twice the size; at half of it a line is weighed by a triangle of 4 pixels."""
    step = np.zeros((224, 224), np.float32)
    step[:, 112:] = 1
    np.testing.assert_allclose(restore_map(step, (448, 224))[9, 222:226], [0, 0.25, 0.75, 1], atol=1e-6)
    line = np.zeros((224, 224), np.float32)
    line[100] = 1
    np.testing.assert_allclose(restore_map(line, (224, 112))[48:52, 9], [0, 0.125, 0.375, 0], atol=1e-6)


def test_maps_come_back_in_place():
    """Each corner of the map ends in the same corner of the image, and a map at 224×224 is untouched."""
    tensor = np.zeros((224, 224), np.float32)
    tensor[:112, 112:] = 1
    restored = restore_map(tensor, (600, 300))
    assert (restored[20, 580], restored[20, 20], restored[280, 580]) == (1, 0, 0)
    np.testing.assert_array_equal(restore_map(tensor, (224, 224)), tensor)


def test_maps_are_saved_as_png_whatever_the_suffix(tmp_path):
    x, y = np.linspace(-1, 1, 640), np.linspace(-1, 1, 480)
    map_ = (1 / (1 + np.exp(60 * (np.hypot(x, y[:, None]) - 0.5)))).astype(np.float32)  # a disc with a soft edge
    save_map(map_, tmp_path / "map.tmp")  # a temporary name has another suffix
    with Image.open(tmp_path / "map.tmp") as saved:
        assert (saved.format, saved.mode) == ("PNG", "L")
        assert np.array_equal(np.asarray(saved), np.rint(map_ * 255))


@pytest.mark.parametrize("shape", [(2, 2), (1, 300), (300, 1), (97, 203)])
def test_grey_files_hold_the_pixels_and_their_notes(shape, tmp_path):
    """Of noise and of what is flat; the text is not all ASCII."""
    for pixels in (np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.full(shape, 255, np.uint8)):
        save_grey(pixels, tmp_path / "grey.png", {"of": "4×5, naïve → ÿ"})
        with Image.open(tmp_path / "grey.png") as image:
            image.verify()
        with Image.open(tmp_path / "grey.png") as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(image), pixels)
            assert image.text == {"Software": "icnet", "of": "4×5, naïve → ÿ"}
        assert note(tmp_path / "grey.png", "of") == "4×5, naïve → ÿ"


def test_threads_keep_the_order_of_the_calls():
    together = threading.Barrier(2)

    def second_waits_for_first(number):
        together.wait(10)  # breaks unless two calls run at once
        return number

    with Workers(2) as workers:
        assert workers.run([lambda i=i: second_waits_for_first(i) for i in range(6)]) == list(range(6))
        assert workers.run([]) == []
    with Workers(1) as workers:
        here = workers.run([threading.current_thread] * 3)
    assert here == [threading.current_thread()] * 3


def test_of_several_failures_the_first_image_is_named():
    failed = threading.Event()

    def first():
        failed.wait(10)
        raise InputError("first")

    def second():
        failed.set()
        raise InputError("second")

    with Workers(2) as workers, pytest.raises(InputError, match="first"):
        workers.run([first, second])


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


JPEG = (BIRDS / "owl.jpg").read_bytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "not an image"),
        (JPEG[:5000], "damaged or truncated"),
        (JPEG[:200], "not an image|damaged or truncated"),
        (png_header(100, 100), "damaged or truncated"),
        (png_header(20_000, 20_000), "decompression bomb"),
        (png_header(10_000, 10_000), "decompression bomb"),  # Pillow only warns of this one
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"P6\nabc 12 255\nxxxx", "damaged or truncated"),  # decoders that raise ValueError while opening
        (b"\x01\xda\x00\x07" + bytes(600), "damaged or truncated|not an image"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    for read in (image_tensor, sism_tensor):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*({message})"):
            read(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg: no such file"):
        image_tensor(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="a folder, not an image"):
        image_tensor(tmp_path)
    with pytest.raises(InputError, match="File name too long"):
        image_tensor("a" * 300)
    with pytest.raises(InputError, match="null"):
        image_tensor("a\0b.jpg")


def test_a_mask_of_0_and_1_in_bytes_is_no_sism(tmp_path):
    mask = noise(20, 20)[:, :, 0] % 2
    with pytest.raises(InputError, match=r"mask: its values are 0 and 1 of 255"):
        sism_tensor(mask, "mask")
    Image.fromarray(mask).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png: its values are 0 and 1"):
        sism_tensor(tmp_path / "m.png")
    assert image_tensor(mask)[0].max() == 1  # a very dark image is an image


def test_modes_that_pillow_can_not_convert():
    with pytest.raises(InputError, match="Pillow can't turn an image of mode LAB into L"):
        sism_tensor(Image.new("LAB", (5, 5)))


def test_floats_may_leave_0_and_1_by_a_rounding():
    pixels = noise(20, 20) / 255
    np.testing.assert_array_equal(image_tensor(pixels * 1.0000002 - 1e-7)[0], image_tensor(pixels)[0])
    for beyond in (pixels + 0.01, pixels - 0.01):  # no rounding goes as far
        with pytest.raises(InputError, match=r"float64 values in .*, expected \[0, 1\]"):
            image_tensor(beyond)


def test_big_endian_arrays():
    pixels = noise(20, 20).astype(np.uint16) * 257
    np.testing.assert_array_equal(image_tensor(pixels.astype(">u2"))[0], image_tensor(pixels)[0])


def test_the_transparent_value_of_a_16_bit_file(tmp_path):
    values = np.full((20, 20), 50_000, np.uint16)
    values[:, 10:] = 61_423
    Image.fromarray(values).save(tmp_path / "x.png", transparency=61_423)
    assert sism_tensor(tmp_path / "x.png")[100, [50, 200]].tolist() == [195, 0]
    assert image_tensor(tmp_path / "x.png")[0][100, [50, 200], 0].tolist() == [195, 255]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 1), np.uint8), "1×1 pixels"),
        (np.zeros((1, 50, 3), np.uint8), "50×1 pixels"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros(5, np.uint8), r"shape \(5,\), expected H×W"),
        (np.zeros((2, 5, 5, 3), np.uint8), "shape"),
        (np.zeros((3, 224, 224), np.uint8), r"shape \(3, 224, 224\), expected H×W"),
        (np.zeros((5, 5), np.int32), "dtype int32, expected uint8"),
        (np.zeros((5, 5), "U1"), "dtype <U1, expected uint8"),
        (np.full((5, 5), 200, np.uint16), "16-bit values of at most 200 of 65535; if they are 8-bit, make them uint8"),
        (Image.new("I", (5, 5), 200), "16-bit values of at most 200"),
        (np.ma.masked_all((5, 5), np.uint8), "masked array"),
        (np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2, 200_000_000), (0, 0)), "decompression bomb"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.full((5, 5), np.inf, np.float32), "NaN or infinite"),
        (np.full((5, 5), 255.0), r"values in \[255, 255\], expected \[0, 1\]"),
        (np.full((5, 5), -0.1), "expected"),
        (Image.new("F", (5, 5), 7.0), "expected"),
        (Image.new("I", (5, 5), 70_000), "outside 0 … 65535"),
        (Image.new("RGB", (1, 1)), "1×1 pixels"),
        (b"bytes", "not an image, or of a format that Pillow can't read"),
        (bytearray(b"bytes"), "not an image"),
        (b"", r"the content is empty \(0 bytes\)"),
        (BytesIO(), "the content is empty"),
        (5, "expected a path, a NumPy array, a PIL image, or the bytes of a file, got int"),
        (None, "got NoneType"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    for read in (image_tensor, sism_tensor):
        with pytest.raises(InputError, match=rf"^images\[3\]: .*{message}"):
            read(array, "images[3]")
