"""The real thing, where there is one: everything else about the GPU is tested on the simulated GPU."""

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from export.fp16 import half_precision
from export.tensorrt_engine import Options, Profile, build_engine
from export.to_onnx import write_onnx
from runtime import ICNetError, Predictor
from runtime.backends.cuda import Cuda, PageLocked
from tests.helpers import group, random_network

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda():
    try:
        cuda = Cuda()
    except ICNetError as error:
        pytest.skip(f"no usable GPU: {error}")
    yield cuda
    cuda.close()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def engine(request, cuda, tmp_path_factory):
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        pytest.skip("no TensorRT")
    folder = tmp_path_factory.mktemp("engine")
    network = random_network(0.25)
    write_onnx(network, folder / "fp32.onnx")
    write_onnx(half_precision(network), folder / "fp16.onnx")
    path = folder / "icnet.engine"
    try:
        build_engine(folder / f"{request.param}.onnx", path, [Profile(1, 2, 4), Profile(5, 8, 16)])
    except ICNetError as error:
        pytest.skip(f"TensorRT does not build for this GPU: {error}")
    return path, folder / "fp32.onnx", request.param


@pytest.fixture(scope="module")
def page_locked():
    try:
        memory = PageLocked()
    except ICNetError as error:
        pytest.skip(f"no usable GPU: {error}")
    yield memory
    memory.close()


@pytest.fixture(scope="module", params=["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def provider(request, page_locked):
    if request.param not in onnxruntime.get_available_providers():
        pytest.skip(f"{request.param}: not in this onnxruntime; onnxruntime-gpu has it")
    return request.param


def test_page_locked_copies_go_to_the_device_and_back(cuda):
    with cuda:
        stream, event = cuda.stream(), cuda.event()
        here, there = cuda.pinned((3, 5), np.float32), cuda.pinned((3, 5), np.float32)
        memory = cuda.allocate(here.nbytes)
        here[:] = np.arange(15).reshape(3, 5)
        there[:] = -1
        cuda.copy_in(memory, here, stream)
        cuda.copy_out(there, memory, stream)
        event.record(stream)
        event.synchronize()
        np.testing.assert_array_equal(there, np.arange(15).reshape(3, 5))
        memory.free()
        cuda.free_pinned(here)
        cuda.free_pinned(there)


def test_the_drivers_page_locked_memory_takes_asynchronous_copies(page_locked, cuda):
    here, there = (page_locked.allocate((3, 5), np.float32) for _ in range(2))
    with cuda:
        stream, memory = cuda.stream(), cuda.allocate(here.nbytes)
        here[:] = np.arange(15).reshape(3, 5)
        there[:] = -1
        cuda.copy_in(memory, here, stream)
        cuda.copy_out(there, memory, stream)
        stream.synchronize()
        memory.free()
    np.testing.assert_array_equal(there, np.arange(15).reshape(3, 5))
    page_locked.free(here)
    page_locked.free(there)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtimes_maps_are_the_cpus(provider, precision, tmp_path):
    network = random_network(0.25)
    write_onnx(network, tmp_path / "fp32.onnx")
    path = tmp_path / f"{precision}.onnx"
    if precision == "fp16":
        write_onnx(half_precision(network), path)
    worst = {"fp32": 2e-3, "fp16": 2e-2}[precision]  # mean; TF32 and FP16 swap near-equal pixels
    sizes = (1, 3, 5, 16, 3, 3, 1, 16)
    with Predictor(path, providers=[provider]) as gpu, Predictor(tmp_path / "fp32.onnx") as cpu:
        expected = [cpu.predict_tensors(*group(n)) for n in sizes]
        one_by_one = [gpu.predict_tensors(*group(n)) for n in sizes]
        with ThreadPoolExecutor(6) as pool:
            at_once = list(pool.map(lambda n: gpu.predict_tensors(*group(n)), sizes))
    for maps, other, right in zip(one_by_one, at_once, expected, strict=True):
        assert np.abs(maps - right).mean() < worst
        assert np.abs(other - right).mean() < worst


def test_a_captured_graph_replays_its_copies(cuda):
    with cuda:
        stream = cuda.stream()
        capture = cuda.capture(stream)
        if capture is None:
            pytest.skip("no cuda-bindings")
        here, there = cuda.pinned((8,), np.uint8), cuda.pinned((8,), np.uint8)
        memory = cuda.allocate(8)
        with capture:
            cuda.copy_in(memory, here, stream)
            cuda.copy_out(there, memory, stream)
        for value in (1, 2):
            here[:] = value
            capture.launch()
            stream.synchronize()
            assert there.tolist() == [value] * 8
        capture.free()
        memory.free()
        cuda.free_pinned(here)
        cuda.free_pinned(there)


def test_an_engines_maps_are_the_cpus(engine):
    path, onnx_path, precision = engine
    worst = {"fp32": 2e-3, "fp16": 2e-2}[precision]  # mean; TF32 and FP16 swap near-equal pixels
    with Predictor(path) as gpu, Predictor(onnx_path) as cpu:
        for n in (1, 3, 5, 16, 3, 3, 1, 16):
            maps = gpu.predict_tensors(*group(n))
            assert np.abs(maps - cpu.predict_tensors(*group(n))).mean() < worst


def test_a_stream_of_groups_equals_one_by_one(engine):
    groups = [group(n) for n in (2, 4, 2, 9, 1, 2, 4, 9)]
    with Predictor(engine[0]) as predictor:
        for tensors, maps in zip(groups, predictor.predict_groups(groups), strict=True):
            np.testing.assert_allclose(np.stack(maps), predictor.predict_tensors(*tensors), atol=1e-2)


def test_packed_and_bank_engines_give_the_maps_of_the_plain_one(engine):
    path, onnx_path, precision = engine
    network = random_network(0.25)
    typed = half_precision(network) if precision == "fp16" else network
    engines = {}
    for kind in ("packed", "intra", "banked"):
        write_onnx(typed, onnx_path.with_name(f"{kind}.onnx"), kind)
        engines[kind] = onnx_path.with_name(f"{kind}.engine")
        options = Options(bank=Profile(1, 5, 40) if kind == "banked" else None)
        build_engine(onnx_path.with_name(f"{kind}.onnx"), engines[kind], [Profile(1, 8, 8)], options)
    groups = [group(n) for n in (2, 4, 2, 5, 1, 8, 4, 3)]
    worst = {"fp32": 2e-3, "fp16": 2e-2}[precision]
    with (
        Predictor(path) as plain,
        Predictor(engines["packed"], bank=(engines["intra"], engines["banked"])) as predictor,
    ):
        for tensors, maps in zip(groups, predictor.predict_groups(groups), strict=True):
            assert np.abs(np.stack(maps) - plain.predict_tensors(*tensors)).mean() < worst
        large = group(16)
        assert np.abs(predictor.predict_tensors(*large) - plain.predict_tensors(*large)).mean() < worst
