import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from export.icnet import Uint8Interface
from export.onnx_file import save_model
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime import DependencyError, ICNetError, InputError, ModelError, Predictor
from runtime.preprocess import image_tensor, restore_map, sism_tensor
from tests.helpers import BIRDS, convert_to_mnn, damage, random_network

SUFFIXES = pytest.mark.parametrize("suffix", [".onnx", ".mnn"])
PHOTOS = sorted(BIRDS.glob("*.jpg"))
RNG = np.random.default_rng(0)


def pytest_generate_tests(metafunc):
    """Whatever a Predictor does, it does with every format that runs on a CPU."""
    if "model_file" in metafunc.fixturenames:
        metafunc.parametrize("model_file", ["onnx_file", "mnn_file"], indirect=True, ids=["onnx", "mnn"])


def tensors(n):
    return (
        RNG.integers(0, 256, (n, 224, 224, 3), dtype=np.uint8),
        RNG.integers(0, 256, (n, 224, 224), dtype=np.uint8),
    )


def test_maps_of_photographs_are_the_papers(predictor, network):
    """The whole chain, beside the reference fed by Pillow: one map per image, at its own size."""
    sisms = [Image.open(p).convert("L") for p in PHOTOS]
    maps = predictor(PHOTOS, sisms)
    images = torch.from_numpy(np.stack([image_tensor(p)[0] for p in PHOTOS]))
    with torch.no_grad():
        expected = Uint8Interface(ReferenceICNet.of(network))(
            images, torch.from_numpy(np.stack([*map(sism_tensor, sisms)]))
        )
    for photo, found, tensor in zip(PHOTOS, maps, expected.numpy(), strict=True):
        image = Image.open(photo)
        assert found.shape == (image.height, image.width)
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        assert abs(found - restore_map(tensor, image.size)).mean() < 1e-3
    assert max(m.std() for m in maps) > 0.01  # not all one grey


def test_paths_arrays_and_pil_images_give_the_same_maps(predictor):
    sisms = [np.asarray(Image.open(p).convert("L")) for p in PHOTOS]
    as_paths = predictor(PHOTOS, sisms)
    as_text = predictor(map(str, PHOTOS), iter(sisms))
    as_arrays = predictor([np.asarray(Image.open(p)) for p in PHOTOS], sisms)
    as_images = predictor([Image.open(p) for p in PHOTOS], [Image.fromarray(s) for s in sisms])
    for others in (as_text, as_arrays, as_images):
        for one, other in zip(as_paths, others, strict=True):
            np.testing.assert_array_equal(one, other)


def test_stacked_arrays_are_groups(predictor):
    images, sisms = tensors(3)
    for one, other in zip(predictor(images, sisms), predictor([*images], [*sisms]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_resized_tensors_go_straight_in(predictor):
    images, sisms = tensors(4)
    maps = predictor.predict_tensors(images, sisms)
    assert (maps.shape, maps.dtype) == ((4, 224, 224), np.float32)
    np.testing.assert_array_equal(maps, np.stack(predictor(images, sisms)))


def test_tensors_need_not_be_contiguous(predictor):
    images, sisms = tensors(4)
    expected = predictor.predict_tensors(images[::2].copy(), sisms[::2].copy())
    np.testing.assert_array_equal(predictor.predict_tensors(images[::2], sisms[::2]), expected)


def test_several_threads_at_once(predictor):
    groups = [tensors(n) for n in (1, 2, 3, 1, 4, 2, 1, 3)]
    expected = [predictor.predict_tensors(*group) for group in groups]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda group: predictor.predict_tensors(*group), groups * 3))
    for one, other in zip(expected * 3, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_closing(model_file):
    predictor = Predictor(model_file, threads=1)
    with predictor as entered:
        assert entered is predictor
        predictor.predict_tensors(*tensors(1))
    predictor.close()
    with pytest.raises(ICNetError, match="closed"):
        predictor.predict_tensors(*tensors(1))
    with pytest.raises(ICNetError, match="closed"):
        predictor(PHOTOS, PHOTOS)


@pytest.mark.parametrize(
    ("images", "sisms", "message"),
    [
        ([], [], "no images"),
        (PHOTOS, PHOTOS[:2], "5 images but 2 SISMs"),
        (str(PHOTOS[0]), [PHOTOS[0]], "images: expected a sequence with one entry per image, got str"),
        (PHOTOS[0], [PHOTOS[0]], "images: expected a sequence"),
        (PHOTOS, "sisms", "sisms: expected a sequence"),
        (None, [], "images: expected a sequence"),
        ({*PHOTOS}, PHOTOS, "images: expected a sequence with one entry per image, got set"),
        (np.zeros((50, 60, 3), np.uint8), np.zeros((50, 60), np.uint8), r"images: .* one array of shape \(50, 60, 3\)"),
        ([np.zeros((9, 9), np.int64)], [np.zeros((9, 9), np.uint8)], r"images\[0\]: dtype int64"),
        ([np.zeros((9, 9), np.uint8)], [np.full((9, 9), np.nan)], r"sisms\[0\]: holds NaN"),
        (["none.jpg"], ["none.png"], "none.jpg: no such file"),
    ],
)
def test_groups_that_can_not_be_used(predictor, images, sisms, message):
    with pytest.raises(InputError, match=message):
        predictor(images, sisms)


@pytest.mark.parametrize(
    ("images", "sisms", "message"),
    [
        (
            np.zeros((2, 224, 224, 3), np.float32),
            np.zeros((2, 224, 224), np.uint8),
            "expected images uint8 .* got images float32",
        ),
        (
            np.zeros((2, 3, 224, 224), np.uint8),
            np.zeros((2, 224, 224), np.uint8),
            r"got images uint8 \[2, 3, 224, 224\]",
        ),
        (
            np.zeros((2, 224, 224, 3), np.uint8),
            np.zeros((224, 224), np.uint8),
            r"expected sisms .* got sisms uint8 \[224, 224\]",
        ),
        (np.zeros((2, 224, 224, 3), np.uint8), np.zeros((3, 224, 224), np.uint8), "2 images but 3 SISMs"),
        (np.zeros((0, 224, 224, 3), np.uint8), np.zeros((0, 224, 224), np.uint8), "no images"),
        ([[1]], np.zeros((1, 224, 224), np.uint8), "images: expected a NumPy array, got list"),
    ],
)
def test_tensors_that_can_not_be_used(predictor, images, sisms, message):
    with pytest.raises(InputError, match=message):
        predictor.predict_tensors(images, sisms)


def test_a_provider_that_is_not_there_is_an_error(onnx_file):
    with pytest.raises(DependencyError, match=r"NoSuchProvider: not in this onnxruntime, which has .*CPUExecution"):
        Predictor(onnx_file, providers=["NoSuchProvider", "CPUExecutionProvider"])


def test_a_provider_that_is_silently_not_used_is_an_error(onnx_file, monkeypatch):
    """As when CUDA's libraries are missing: ONNX Runtime warns, and runs on the CPU."""
    import onnxruntime

    cuda = ("CUDAExecutionProvider", {"device_id": 0})
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda[0], "CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, **others: session(path, options, providers=providers[1:], **others),
    )
    with pytest.raises(ModelError, match=r"CUDAExecutionProvider was asked for but could not be started"):
        Predictor(onnx_file, providers=[cuda, "CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [0, 10**9, "2", 1.5])
def test_threads_must_be_a_sensible_number(model_file, threads):
    with pytest.raises(InputError, match=r"threads=.*expected 1 to 1024"):
        Predictor(model_file, threads=threads)


@pytest.mark.parametrize("model", [None, 3, b"x"])
def test_a_model_is_a_path(model):
    with pytest.raises(InputError, match="model: expected a path"):
        Predictor(model)


def save(model, path):
    """Write a model in the format that the path's suffix names."""
    save_model(model, path)
    if path.suffix == ".mnn":
        convert_to_mnn(path)
    return path


@cache
def float_model():
    with TemporaryDirectory() as folder:
        return write_onnx(random_network(1 / 32), Path(folder, "m.onnx"), "float32")


def other_model(path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"not a model"), "not an (ONNX|MNN) model"),
        (lambda p: p.write_bytes(b""), "not an (ONNX|MNN) model|not an ICNet export"),
        (
            other_model,
            r"not an ICNet export: expected inputs images uint8 \[N, 224, 224, 3\], .* found inputs x float32 \[",
        ),
        (lambda p: onnx.save(float_model(), p), "--io float32"),
        (lambda p: None, "no such model file"),
        (lambda p: p.mkdir(), "not a model file"),
        (lambda p: p.symlink_to(p), "no such model file"),
    ],
)
@SUFFIXES
def test_files_that_are_no_model_of_ours(tmp_path, suffix, write, message):
    path = tmp_path / f"model{suffix}"
    write(path)
    if suffix == ".mnn":
        convert_to_mnn(path)
    with pytest.raises(ModelError, match=rf"model\{suffix}: .*({message})"):
        Predictor(path)


@SUFFIXES
def test_a_model_for_a_fixed_group_says_so(onnx_file, tmp_path, suffix):
    model = onnx.load(onnx_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    path = save(model, tmp_path / f"three{suffix}")
    with Predictor(path) as predictor:
        assert predictor.predict_tensors(*tensors(3)).shape == (3, 224, 224)
        for call in (lambda: predictor.predict_tensors(*tensors(2)), lambda: predictor(*tensors(2))):
            with pytest.raises(ModelError, match=rf"three\{suffix}: built for groups of exactly 3 images, got 2"):
                call()


def test_a_model_that_computes_nan_is_an_error_not_a_map(onnx_file, tmp_path):
    model = onnx.load(onnx_file)
    damage(model)
    save_model(model, tmp_path / "nan.onnx")
    with Predictor(tmp_path / "nan.onnx") as predictor, pytest.raises(ModelError, match="NaN or infinite"):
        predictor.predict_tensors(*tensors(1))


def lying_model(path, scale, copies):
    """Declares the contract's tensors and gives something else."""
    info = onnx.helper.make_tensor_value_info
    inputs = [info("images", 2, ["N", 224, 224, 3]), info("sisms", 2, ["N", 224, 224])]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["sisms"], ["f"], to=1),
            onnx.helper.make_node("Mul", ["f", "scale"], ["wrong"]),
            onnx.helper.make_node("Cast", ["images"], ["colours"], to=1),  # MNN drops an input that nothing uses
            onnx.helper.make_node("Gather", ["colours", "red"], ["reds"], axis=3),
            onnx.helper.make_node("Div", ["reds", "huge"], ["traces"]),
            onnx.helper.make_node("Add", ["wrong", "traces"], ["scaled"]),
            onnx.helper.make_node("Concat", ["scaled"] * copies, ["maps"], axis=0),
        ],
        "g", inputs, [info("maps", 1, ["M", 224, 224])],
        [
            onnx.numpy_helper.from_array(np.float32(scale), "scale"),
            onnx.numpy_helper.from_array(np.int64(0), "red"),
            onnx.numpy_helper.from_array(np.float32(1e30), "huge"),
        ],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize(
    ("scale", "copies", "message"), [(1.0, 1, r"maps leave \[0, 1\]"), (1 / 255, 2, "gave 4 maps for 2 images")]
)
@SUFFIXES
def test_a_model_that_lies_about_its_maps(tmp_path, suffix, scale, copies, message):
    path = tmp_path / f"x{suffix}"
    lying_model(path, scale, copies)
    if suffix == ".mnn":
        convert_to_mnn(path)
    with Predictor(path) as predictor, pytest.raises(ModelError, match=message):
        predictor(*tensors(2))


def test_importing_the_runtime_loads_neither_torch_nor_an_engine():
    code = """
import sys
before = set(sys.modules)
import runtime
heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "cuda", "cv2", "rich", "MNN"}
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & heavy, loaded & heavy
assert len(set(sys.modules) - before) < 400
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_predicting_needs_no_torch(model_file):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None  # importing them fails
from runtime import Predictor
with Predictor({str(model_file)!r}) as predictor:
    print(len(predictor([{str(PHOTOS[0])!r}], [{str(PHOTOS[0])!r}])))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "1\n"
