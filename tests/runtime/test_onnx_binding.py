"""ONNX Runtime through I/O bindings: a real session on the CPU, with the page-locked memory of a simulated GPU."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.to_onnx import write_onnx
from runtime import DependencyError, ICNetError, ModelError, Predictor
from runtime.backends import onnx as backend
from runtime.backends.onnx import CPU, KEPT_IMAGES, MAX_BINDINGS
from runtime.files import bank_files
from tests.helpers import group, random_network
from tests.runtime.test_predictor import lying_model
from tests.simulated_gpu import Gpu, install

BUFFERS = 3  # images, sisms and maps


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "icnet.onnx"
    write_onnx(random_network(1 / 32), path)
    return path


@pytest.fixture
def gpu(monkeypatch):
    """The CPU's provider is taken for one of a GPU, whose memory ONNX Runtime calls "cpu"."""
    monkeypatch.setattr(backend, "CUDA", (CPU,))
    monkeypatch.setattr(backend, "DEVICE", "cpu")
    return install(Gpu(), monkeypatch)


@pytest.fixture(scope="module")
def expected(small_model):
    with Predictor(small_model, threads=1) as predictor:
        assert predictor._backend._bindings is None
        return [(group(n, s), predictor.predict_tensors(*group(n, s))) for n in (1, 2, 3, 5, 6, 9) for s in (0, 1)]


def pinned(gpu):
    return gpu.alive["page-locked memory"]


def test_every_call_gets_maps_of_its_own(gpu, small_model, expected):
    with Predictor(small_model, threads=1) as predictor:
        found = [predictor.predict_tensors(*tensors) for tensors, _ in expected]  # sizes grow, and repeat
        again = [predictor.predict_tensors(*tensors) for tensors, _ in reversed(expected)]  # and shrink
    for maps, other, (_, right) in zip(found, reversed(again), expected, strict=True):  # the buffers are poisoned now
        np.testing.assert_array_equal(maps, right)
        np.testing.assert_array_equal(other, right)


def test_groups_go_through_page_locked_memory(gpu, small_model, expected):
    with Predictor(small_model, threads=1) as predictor:
        predictor.predict_tensors(*expected[2][0])
        images, sisms = expected[2][0]
        held = [block.tobytes() for block in gpu.pinned.values()]
        for wanted in (images, sisms, expected[2][1]):
            assert any(block.startswith(wanted.tobytes()) for block in held)


def test_buffers_grow_and_are_reused(gpu, small_model):
    def call(n):
        predictor.predict_tensors(*group(n))
        return gpu.made["page-locked memory"] // BUFFERS

    with Predictor(small_model, threads=1) as predictor:
        assert [call(n) for n in (3, 1, 4, 4, 2)] == [1] * 5  # 3 makes room for 4
        assert [call(n) for n in (5, 8, 1)] == [2] * 3
        assert pinned(gpu) == BUFFERS
        assert {block.size for block in gpu.pinned.values()} == {8 * 224 * 224 * size for size in (3, 1, 4)}
        assert call(KEPT_IMAGES + 1) == 3
        assert pinned(gpu) == 0  # too large to keep
        assert call(1) == 4
    gc.collect()
    assert gpu.leaks() == {}


def test_concurrent_calls_have_bindings_of_their_own(gpu, small_model, expected):
    barrier = threading.Barrier(8)

    def work(start):
        barrier.wait()
        for i in range(12):
            tensors, maps = expected[(start + i) % len(expected)]
            np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)

    with Predictor(small_model, threads=1) as predictor:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [None] * 8
        assert BUFFERS < pinned(gpu) <= MAX_BINDINGS * BUFFERS
    gc.collect()
    assert gpu.leaks() == {}


def test_closing_waits_for_calls_and_refuses_more(gpu, small_model, expected):
    predictor = Predictor(small_model, threads=1)
    outcomes, started = [], threading.Event()

    def work():
        try:
            while True:
                started.set()
                tensors, maps = expected[-1]
                np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
        except ICNetError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]  # more than there are bindings: some wait for one
    for thread in threads:
        thread.start()
    started.wait()
    predictor.close()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 6
    assert all("closed" in outcome for outcome in outcomes)
    gc.collect()
    assert gpu.leaks() == {}


def test_a_forgotten_predictor_frees_its_memory(gpu, small_model):
    Predictor(small_model, threads=1).predict_tensors(*group(1))
    gc.collect()
    assert gpu.leaks() == {}


def test_an_error_frees_the_buffers_and_the_next_call_works(gpu, small_model, expected, monkeypatch):
    with Predictor(small_model, threads=1) as predictor:
        session = predictor._backend._session
        run = session.run_with_iobinding
        predictor.predict_tensors(*group(2))

        def fail(binding):
            raise RuntimeError("CUDA failure 700")

        monkeypatch.setattr(session, "run_with_iobinding", fail)
        with pytest.raises(ModelError, match="failed on a group of 2: CUDA failure 700"):
            predictor.predict_tensors(*group(2))
        assert pinned(gpu) == 0
        monkeypatch.setattr(session, "run_with_iobinding", run)
        np.testing.assert_array_equal(predictor.predict_tensors(*expected[2][0]), expected[2][1])
    gc.collect()
    assert gpu.leaks() == {}


def test_too_little_page_locked_memory(gpu, small_model):
    gpu.memory = 3 * 224 * 224 * 8 - 1  # two images, but the maps of three are too many
    with Predictor(small_model, threads=1) as predictor:
        predictor.predict_tensors(*group(2))
        with pytest.raises(ModelError, match=r"out of page-locked host memory: 1 MiB were wanted .*split the group"):
            predictor.predict_tensors(*group(3))
        assert pinned(gpu) == 0
        predictor.predict_tensors(*group(1))


def test_a_model_that_gives_more_maps_than_there_is_room_for(gpu, tmp_path):
    lying_model(tmp_path / "x.onnx", 1 / 255, 2)
    with Predictor(tmp_path / "x.onnx") as predictor, pytest.raises(ModelError, match="failed on a group of 2"):
        predictor.predict_tensors(*group(2))


def test_no_such_gpu_and_no_driver(gpu, small_model, monkeypatch):
    with pytest.raises(DependencyError, match="GPU 3 can't be used: cuDeviceGet failed with 101"):
        Predictor(small_model, providers=[(CPU, {"device_id": "3"})])
    monkeypatch.undo()
    monkeypatch.setattr(backend, "CUDA", (CPU,))
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(DependencyError, match=r"no NVIDIA driver on this machine \(.*cuda.*\): a GPU is needed"):
        Predictor(small_model)


def test_packs_and_banks_go_through_bindings(gpu, exports, expected):
    groups = [tensors for tensors, _ in expected]
    with (
        Predictor(exports.with_name("icnet.packed.onnx"), threads=1, max_images=8) as packed,
        Predictor(bank=bank_files(exports), threads=1, max_images=4) as banks,
    ):
        for found, (tensors, maps) in zip(packed.predict_groups(groups), expected, strict=True):
            np.testing.assert_allclose(np.stack(found), maps, atol=2e-2)
            np.testing.assert_allclose(banks.predict_tensors(*tensors), maps, atol=2e-2)
            bank = banks.bank(*tensors)
            np.testing.assert_allclose(np.stack(banks.against(bank, *tensors)), maps, atol=2e-2)
        assert gpu.alive["page-locked memory"] == 4 + 3 + 4
    gc.collect()
    assert gpu.leaks() == {}
