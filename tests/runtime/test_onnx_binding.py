"""ONNX Runtime through I/O bindings: a real session on the CPU, with the page-locked memory of a simulated GPU."""

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export.to_onnx import write_onnx
from runtime import DependencyError, ICNetError, ModelError, Predictor
from runtime.backends import onnx as backend
from runtime.backends import onnx_gpu
from runtime.backends.onnx import CPU, KEPT_IMAGES, MAX_BINDINGS, OnnxBackend
from runtime.contract import ExportKind
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
        with pytest.raises(ModelError, match=r"out of page-locked host memory: 1 MiB were wanted; .*split the group"):
            predictor.predict_tensors(*group(3))
        assert pinned(gpu) == 0
        predictor.predict_tensors(*group(1))


def test_a_model_that_gives_more_maps_than_there_is_room_for(gpu, tmp_path):
    lying_model(tmp_path / "x.onnx", 1 / 255, 2)
    with Predictor(tmp_path / "x.onnx") as predictor, pytest.raises(ModelError, match="failed on a group of 2"):
        predictor.predict_tensors(*group(2))


def test_a_driver_older_than_onnx_runtime_needs(small_model, monkeypatch, capsys):
    """ONNX Runtime's own fallback would print, and compute on the CPU."""
    said = (
        "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; expr=cudaSetDevice("
        "info_.device_id);"
    )
    real = onnxruntime.InferenceSession

    class Session(real):
        def __init__(self, path, options, providers, **others):
            self.fails = providers != [CPU]
            super().__init__(path, options, providers=[CPU], **others)

        def _create_inference_session(self, *args):
            if self.fails:
                self.fails = False
                raise RuntimeError(said)
            super()._create_inference_session(*args)

    install(Gpu(), monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    with pytest.raises(DependencyError, match=r"CUDA up to 12\.2\) is too old .*CUDA failure 35") as caught:
        Predictor(small_model, providers=["CUDAExecutionProvider"])
    assert "\n" not in str(caught.value)
    said = "CUDA failure 100: no CUDA-capable device is detected"
    with pytest.raises(ModelError, match="can't be run with CUDAExecutionProvider: CUDA failure 100"):
        Predictor(small_model, providers=["CUDAExecutionProvider"])
    assert capsys.readouterr() == ("", "")


def test_no_such_gpu_and_no_driver(gpu, small_model, monkeypatch):
    with pytest.raises(DependencyError, match="GPU 3 can't be used: cuDeviceGet failed with 101"):
        Predictor(small_model, providers=[(CPU, {"device_id": "3"})])
    monkeypatch.undo()
    monkeypatch.setattr(backend, "CUDA", (CPU,))
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(DependencyError, match=r"no NVIDIA driver on this machine \(.*cuda.*\): a GPU is needed"):
        Predictor(small_model)


def test_a_stream_of_mixed_sizes_plans_each_length_once(gpu, exports, monkeypatch):
    """ONNX Runtime plans all convolutions whenever the length differs from the last call's."""
    rng = random.Random(0)
    groups = [group(rng.randint(1, 6), seed) for seed in range(14)]
    lengths, sent = [], []
    with Predictor(exports.with_name("icnet.packed.onnx"), threads=1, max_images=16) as packed:
        onnx, session = packed._backend, packed._backend._session
        run, submit = session.run_with_iobinding, onnx.submit

        def note(io):
            run(io)
            lengths.append(io.get_outputs()[0].shape()[0])

        monkeypatch.setattr(session, "run_with_iobinding", note)
        monkeypatch.setattr(onnx, "submit", lambda *t, **more: sent.append(len(t[0])) or submit(*t, **more))
        found = list(packed.predict_groups(groups))
    assert [len(maps) for maps in found] == [len(images) for images, _ in groups]
    assert len(set(sent)) > 2  # as many plans, and more, without padding
    plans = [length for length, before in zip(lengths, [None, *lengths], strict=False) if length != before]
    assert len(plans) == len(set(lengths)) <= 2
    with Predictor(exports, threads=1) as plain:
        for maps, tensors in zip(found, groups, strict=True):
            np.testing.assert_allclose(np.stack(maps), plain.predict_tensors(*tensors), atol=2e-2)


@pytest.mark.parametrize(
    ("images", "length"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24), (64, 64), (65, 72)]
)
def test_lengths_of_packed_calls(images, length):
    assert backend.padded(images) == length


def test_padding_is_a_group_of_its_own(gpu, exports, monkeypatch):
    """Whatever numbers the caller gave its groups."""
    images, sisms = group(5)
    for labels in ([0, 0, 1, 1, 2], [5, 5, 5, 5, 5], [1, 1, 3, 3, 2], [-1, -1, 0, 2, 2]):
        with Predictor(exports.with_name("icnet.packed.onnx"), threads=1) as predictor:
            predictor._backend.submit(images, sisms, np.array(labels, np.int32))
            (held,) = [block for block in gpu.pinned.values() if block.size == 8 * 4]
            sent = held.view(np.int32).tolist()
        assert sent[:5] == labels
        assert len(set(sent[5:])) == 1
        assert sent[5] not in labels


class TestProviders:
    """The options that a session on an NVIDIA GPU gets."""

    @pytest.fixture
    def seen(self, monkeypatch):
        """What happens, in order: the import of TensorRT, and the providers of each session, which runs on the CPU."""
        install(Gpu(), monkeypatch)
        seen, real = [], onnxruntime.InferenceSession

        class Session(real):
            def __init__(self, path, options, providers, **others):
                seen.append(providers)
                super().__init__(path, options, providers=[CPU], **others)

            def get_providers(self):
                return [onnx_gpu.TENSORRT, onnx_gpu.CUDA, CPU]

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [onnx_gpu.TENSORRT, onnx_gpu.CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnx_gpu, "load", seen.append)
        return seen

    def providers(self, seen, path, *providers):
        seen.clear()
        OnnxBackend(path, providers=providers).close()
        return seen[-1]

    @pytest.mark.parametrize(("precision", "tf32"), [("fp32", {"use_tf32": 0}), ("fp16", {}), ("int8", {})])
    def test_cuda(self, seen, tmp_path, precision, tf32):
        write_onnx(random_network(1 / 32), tmp_path / "x.onnx", ExportKind.PLAIN, {"precision": precision})
        chosen = {"cudnn_conv_algo_search": "HEURISTIC"} | tf32
        assert self.providers(seen, tmp_path / "x.onnx", onnx_gpu.CUDA) == [(onnx_gpu.CUDA, chosen)]

    def test_options_of_the_callers_are_kept(self, seen, small_model):
        given = {"use_tf32": 1, "device_id": 0, "cudnn_conv_algo_search": "EXHAUSTIVE"}
        assert self.providers(seen, small_model, (onnx_gpu.CUDA, given)) == [(onnx_gpu.CUDA, given)]
        profile = dict.fromkeys(onnx_gpu.PROFILE, "images:2x224x224x3,sisms:2x224x224")
        (_, options), _ = self.providers(seen, small_model, (onnx_gpu.TENSORRT, profile))
        assert options.items() > profile.items()
        assert self.providers(seen, small_model, CPU) == [CPU]

    def test_tensorrt(self, seen, small_model, tmp_path):
        path = tmp_path / "x.onnx"
        path.write_bytes(small_model.read_bytes())
        tensorrt, cuda = self.providers(seen, path, (onnx_gpu.TENSORRT, {"device_id": 0}))
        assert seen[-2] == "tensorrt"  # its libraries are loaded before the session looks for them
        assert cuda == (onnx_gpu.CUDA, {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": 0, "device_id": 0})
        name, options = tensorrt
        assert name == onnx_gpu.TENSORRT
        assert [options[option] for option in onnx_gpu.PROFILE] == [
            f"images:{n}x224x224x3,sisms:{n}x224x224" for n in (1, 5, 64)
        ]
        folder = options["trt_engine_cache_path"]
        assert options["trt_engine_cache_enable"]
        assert options["trt_timing_cache_enable"]
        assert Path(folder).is_dir()
        assert options["trt_timing_cache_path"] == folder
        write_onnx(random_network(1 / 32), path, ExportKind.PLAIN, {"note": "another file of the same name"})
        (_, others), _ = self.providers(seen, path, onnx_gpu.TENSORRT)
        assert others["trt_engine_cache_path"] != folder

    def test_tensorrt_with_a_bank_and_where_nothing_can_be_kept(self, seen, exports, tmp_path):
        path = tmp_path / "x.onnx"
        path.write_bytes(bank_files(exports)[1].read_bytes())
        (tmp_path / "x.onnx.tensorrt").touch()
        (_, options), _ = self.providers(seen, path, onnx_gpu.TENSORRT)
        assert options["trt_profile_max_shapes"] == "images:64x224x224x3,sisms:64x224x224,bank:1024x40"
        assert "trt_engine_cache_enable" not in options

    def test_groups_beyond_the_profile_are_refused(self, seen, small_model, tmp_path):
        path = tmp_path / "x.onnx"
        path.write_bytes(small_model.read_bytes())
        with (
            Predictor(path, providers=[onnx_gpu.TENSORRT]) as predictor,
            pytest.raises(ModelError, match=r"profile for groups of up to 64 images, got 65; .*trt_profile_max_shapes"),
        ):
            predictor.predict_tensors(*group(65))


def test_packs_and_banks_go_through_bindings(gpu, exports, expected):
    groups = [tensors for tensors, _ in expected]
    with (
        Predictor(exports.with_name("icnet.packed.onnx"), threads=1, max_images=8) as packed,
        Predictor(bank_export=bank_files(exports), threads=1, max_images=4) as banks,
    ):
        for found, (tensors, maps) in zip(packed.predict_groups(groups), expected, strict=True):
            np.testing.assert_allclose(np.stack(found), maps, atol=2e-2)
            np.testing.assert_allclose(banks.predict_tensors(*tensors), maps, atol=2e-2)
            bank = banks.bank(*tensors)
            np.testing.assert_allclose(np.stack(banks.against(bank, *tensors)), maps, atol=2e-2)
        assert gpu.alive["page-locked memory"] == 4 + 3 + 4
    gc.collect()
    assert gpu.leaks() == {}
