"""The TensorRT backend, unchanged, on a simulated GPU (see tests/simulated_gpu)."""

import gc
import hashlib
import json
import random
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.checkpoint import weights_digest
from export.onnx_file import save_model
from export.to_onnx import write_onnx
from runtime import DependencyError, ICNetError, InputError, ModelError, Predictor
from runtime.backends.cuda import NON_BLOCKING
from runtime.backends.tensorrt import TensorRTBackend
from runtime.errors import DeviceLostError, how_to_install
from runtime.files import bank_files
from runtime.tensorrt_library import log_of
from tests.helpers import BIRDS, group, random_network
from tests.simulated_gpu import FREED, Gpu, Violation, engine_file, install

PROFILES = [(1, 1, 1), (2, 4, 6), (4, 8, 12)]
PHOTOS = sorted(BIRDS.glob("*.jpg"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A real export, small enough to run thousands of times."""
    path = tmp_path_factory.mktemp("small") / "icnet.onnx"
    write_onnx(random_network(1 / 32), path)
    return path


@pytest.fixture
def engine(small_model, tmp_path):
    return engine_file(tmp_path / "icnet.engine", small_model, PROFILES)


@pytest.fixture(params=["TensorRT", "TensorRT without cuda-bindings", "TensorRT-RTX"])
def any_gpu(request, monkeypatch):
    gpu = Gpu(rtx=request.param == "TensorRT-RTX", bindings=request.param == "TensorRT")
    return install(gpu, monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    return install(Gpu(), monkeypatch)


@pytest.fixture(scope="module")
def expected(small_model):
    """Groups and their maps by ONNX Runtime."""
    with Predictor(small_model, threads=1) as predictor:
        return [(group(n, s), predictor.predict_tensors(*group(n, s))) for n in (1, 2, 3, 5, 6, 9, 12) for s in (0, 1)]


def test_every_group_size_gives_onnx_runtimes_maps(any_gpu, engine, expected):
    with Predictor(engine) as predictor:
        for _ in range(3):  # plain, captured, replayed
            for tensors, maps in expected:
                np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
    gc.collect()
    assert any_gpu.leaks() == {}


def test_a_thousand_groups_from_eight_threads(any_gpu, engine, expected):
    with Predictor(engine) as predictor:
        for tensors, _ in expected * 4:  # warm-up: every size is seen often enough in every slot
            predictor.predict_tensors(*tensors)
            for other in [predictor._backend.submit(*tensors) for _ in range(2)]:
                other.result()
        made = dict(any_gpu.made)
        alive = dict(any_gpu.alive)

        often = [1 / len(maps) for _, maps in expected]  # as many images of every size

        def work(seed):
            choose = random.Random(seed)
            groups = 125 if any_gpu.bindings else 25  # the others have no more to go wrong
            for tensors, maps in choose.choices(expected, often, k=groups):
                np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [None] * 8
        assert dict(any_gpu.made) == made
        assert dict(any_gpu.alive) == alive
    gc.collect()
    assert any_gpu.leaks() == {}


def test_whole_images_through_the_engine(gpu, engine, small_model):
    with Predictor(engine) as predictor, Predictor(small_model, threads=1) as cpu:
        for one, other in zip(predictor(PHOTOS, PHOTOS), cpu(PHOTOS, PHOTOS), strict=True):
            np.testing.assert_array_equal(one, other)


def operations(gpu, *kinds):
    return [(kind, stream) for kind, stream, _ in gpu.log if kind in kinds]


def test_the_next_groups_copies_are_issued_before_this_ones_wait(gpu, engine):
    groups = [group(n) for n in (3, 3, 5, 1)]
    with Predictor(engine) as predictor:
        assert len(list(predictor.predict_groups(groups))) == 4
    issued = operations(gpu, "execute", "record", "wait")
    starts = [i for i, (kind, _) in enumerate(issued) if kind == "record"]
    waits = [i for i, (kind, _) in enumerate(issued) if kind == "wait"]
    assert len(starts) == len(waits) == 4  # one wait per group
    for k in range(3):
        assert starts[k + 1] < waits[k]
    streams = [stream for kind, stream in issued if kind == "record"]
    assert streams[0] != streams[1]


def test_each_group_is_two_copies_in_one_run_and_one_copy_out(gpu, engine):
    with Predictor(engine) as predictor:
        predictor.predict_tensors(*group(3))
    pixels = 3 * 224 * 224
    assert [(kind, detail) for kind, _, detail in gpu.log] == [
        ("copy in", 3 * pixels), ("copy in", pixels), ("execute", 3), ("copy out", 4 * pixels),
        ("record", None), ("wait", None),
    ]  # fmt: skip


def test_repeated_sizes_replay_a_captured_graph(gpu, engine):
    with Predictor(engine) as predictor:
        for _ in range(8):
            predictor.predict_tensors(*group(3))
        launches = operations(gpu, "launch")
        assert len(launches) == 6  # per slot: the first call plain, from the second on a graph
        assert gpu.alive["executable graph"] == 2
        assert gpu.alive["graph"] == 0
    assert gpu.leaks() == {}


def test_graphs_are_bounded(gpu, small_model, tmp_path):
    engine = engine_file(tmp_path / "wide.engine", small_model, [(1, 8, 40)])
    with Predictor(engine) as predictor:
        for n in range(1, 21):
            for _ in range(4):
                predictor.predict_tensors(*group(n))
        assert gpu.alive["executable graph"] == 2 * 16


def test_a_graph_that_can_not_be_captured_is_done_without(gpu, engine, monkeypatch, expected):
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuGraphInstantiate", lambda *_: (900, None))
    with Predictor(engine) as predictor:
        for tensors, maps in expected * 3:
            np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
    assert operations(gpu, "launch") == []
    assert gpu.leaks() == {}


def test_the_tightest_profile_is_chosen(gpu, engine):
    with Predictor(engine) as predictor:
        contexts = [slot._plain for slot in predictor._backend._pool._free]
        for n, profile in [(2, 1), (5, 1), (7, 2), (6, 1), (12, 2), (1, 0)]:
            predictor.predict_tensors(*group(n))
            predictor.predict_tensors(*group(n))  # the other slot's turn
            assert [c.active_optimization_profile for c in contexts] == [profile] * 2


def test_streams_of_groups_come_back_in_order(any_gpu, engine, small_model):
    rng = random.Random(0)
    groups = [group(rng.choice([1, 2, 4, 6]), seed) for seed in range(12)]
    with Predictor(engine) as predictor, Predictor(small_model, threads=1) as cpu:
        found = predictor.predict_groups(iter(groups), ahead=2)
        for tensors, maps in zip(groups, found, strict=True):
            np.testing.assert_array_equal(np.stack(maps), cpu.predict_tensors(*tensors))


def test_unfinished_streams_do_not_starve_other_calls(gpu, engine, expected):
    """Two streams left in the middle hold all the slots: another call finishes what they started, and they go on."""
    (tensors, maps) = expected[4]
    with Predictor(engine) as predictor:
        streams = [predictor.predict_groups([tensors] * 5) for _ in range(3)]
        for stream in streams:
            np.testing.assert_array_equal(np.stack(next(stream)), maps)
        np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
        for stream in streams:
            assert len(list(stream)) == 4
            stream.close()
    gc.collect()
    assert gpu.leaks() == {}


def test_a_bad_group_in_a_stream_is_an_error_at_its_turn(gpu, engine):
    good = group(2)
    with Predictor(engine) as predictor:
        stream = predictor.predict_groups([good, good, (["none.jpg"], ["none.png"]), good])
        assert len(next(stream)) == 2
        assert len(next(stream)) == 2
        with pytest.raises(InputError, match=r"none\.jpg: no such file"):
            next(stream)
        assert len(predictor.predict_tensors(*good)) == 2
    gc.collect()
    assert gpu.leaks() == {}


def test_the_source_of_a_stream_is_read_only_as_far_as_needed(gpu, engine):
    read = []

    def endless():
        while True:
            read.append(1)
            yield group(1)

    with Predictor(engine) as predictor:
        stream = predictor.predict_groups(endless(), ahead=3)
        for _ in range(4):
            next(stream)
        stream.close()
    assert len(read) <= 4 + 3 + 2


def test_closing_frees_everything_also_with_groups_in_flight(any_gpu, engine):
    predictor = Predictor(engine)
    pending = predictor._backend.submit(*group(3))
    predictor.close()
    assert pending.result().shape == (3, 224, 224)
    del pending
    gc.collect()
    assert any_gpu.leaks() == {}
    predictor.close()
    with pytest.raises(ICNetError, match="closed"):
        predictor.predict_tensors(*group(1))


def test_a_predictor_that_is_dropped_leaks_nothing(any_gpu, engine):
    predictor = Predictor(engine)
    predictor.predict_tensors(*group(2))
    del predictor
    gc.collect()
    assert any_gpu.leaks() == {}


def test_closing_while_others_wait_for_a_slot(gpu, engine):
    predictor = Predictor(engine)
    errors = []

    def work():
        try:
            while True:
                predictor.predict_tensors(*group(1))
        except ICNetError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    predictor.close()
    for thread in threads:
        thread.join(30)
    assert len(errors) == 4
    assert all("closed" in e for e in errors)
    gc.collect()
    assert gpu.leaks() == {}


def test_running_out_of_memory_says_how_much_and_frees_what_it_had(engine, monkeypatch):
    for memory in (1 << 10, 3 << 20, 1 << 22):  # at the first buffer, at a later one, in the second slot
        with monkeypatch.context() as patch:
            gpu = install(Gpu(memory=memory), patch)
            with pytest.raises(ModelError, match=r"out of device memory: \d+ MiB were wanted; .*--max"):
                Predictor(engine)
            gc.collect()
            assert gpu.leaks() == {}


def test_an_error_on_the_device_reaches_the_caller_and_the_slot_comes_back(gpu, engine, expected):
    with Predictor(engine) as predictor:
        tensors, maps = expected[6]
        for _ in range(4):
            predictor.predict_tensors(*tensors)
        gpu.fail_launch = True
        for _ in range(3):
            with pytest.raises(ModelError, match="cuGraphLaunch failed with 719"):
                predictor.predict_tensors(*tensors)
        gpu.fail_launch = False
        np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
    gc.collect()
    assert gpu.leaks() == {}


def out_of_memory(gpu, monkeypatch):
    gpu.memory = gpu.used() + gpu.context_memory - 1


def no_context(gpu, monkeypatch):
    gpu.fail_contexts = True


def no_warm_up(gpu, monkeypatch):
    driver = sys.modules["pycuda.driver"]

    def fail(stream):
        raise driver.Error("cuStreamSynchronize failed: out of memory")

    synchronize, calls = driver.Stream.synchronize, iter([fail])
    monkeypatch.setattr(driver.Stream, "synchronize", lambda stream: next(calls, synchronize)(stream))


def no_capture(gpu, monkeypatch):
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuStreamBeginCapture", lambda *_: (901,))


def no_graph(gpu, monkeypatch):
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuGraphInstantiate", lambda *_: (2,))


@pytest.mark.parametrize("failure", [out_of_memory, no_context, no_warm_up, no_capture, no_graph])
def test_a_failed_capture_fails_no_call(gpu, engine, expected, monkeypatch, caplog, failure):
    (tensors, maps), (others, other_maps) = expected[4], expected[6]
    with Predictor(engine) as predictor:
        for _ in range(4):  # a graph in each slot, which goes on to be used
            predictor.predict_tensors(*others)
        for _ in range(2):
            predictor.predict_tensors(*tensors)
        alive = dict(gpu.alive)
        failure(gpu, monkeypatch)
        with caplog.at_level("WARNING", logger="runtime"):
            for call, right in [(tensors, maps), (tensors, maps), (others, other_maps)] * 3:  # each in both slots
                np.testing.assert_array_equal(predictor.predict_tensors(*call), right)
        messages = [record.message for record in caplog.records]
        assert all(message.startswith("no more CUDA graphs: ") for message in messages)
        assert len(messages) == (1 if failure is no_warm_up else 2)  # one per slot: it is not tried again
        if failure is not no_warm_up:  # which fails once: the other slot has its graph
            assert {kind: gpu.alive[kind] for kind in alive} == alive
    gc.collect()
    assert gpu.leaks() == {}


def test_pycudas_own_errors_are_ours(gpu, engine, expected, monkeypatch):
    driver = sys.modules["pycuda.driver"]

    def fail(*_):
        raise driver.Error("cuMemcpyHtoDAsync failed: an illegal memory access was encountered")

    tensors, maps = expected[4]
    with Predictor(engine, slots=2) as predictor:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "memcpy_htod_async", fail)
            for _ in range(3):  # more often than there are slots
                with pytest.raises(ModelError, match=r"GPU .*: cuMemcpyHtoDAsync failed: an illegal memory"):
                    predictor.predict_tensors(*tensors)
        np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
    gc.collect()
    assert gpu.leaks() == {}


def test_tensorrts_own_exceptions_are_ours(gpu, engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("Unable to\nexecute")

    with Predictor(engine) as predictor:
        context = type(predictor._backend._pool._free[0]._plain)
        monkeypatch.setattr(context, "execute_async_v3", fail)
        for _ in range(3):
            with pytest.raises(
                ModelError, match=r"\.engine: the GPU failed on a group of 2: Unable to execute; if it does so again"
            ):
                predictor.predict_tensors(*group(2))
    gc.collect()
    assert gpu.leaks() == {}


def test_a_gpu_that_stopped_is_refused_from_then_on(any_gpu, engine):
    predictor = Predictor(engine)
    predictor.predict_tensors(*group(2))
    any_gpu.sticky = 719
    for _ in range(4):
        with pytest.raises(DeviceLostError, match=r"GPU 0 stopped \(.*719\).*restart the process"):
            predictor.predict_tensors(*group(2))
    predictor.close()
    with pytest.raises(ICNetError, match="closed"):
        predictor.predict_tensors(*group(2))
    gc.collect()
    assert any_gpu.alive["execution context"] == any_gpu.alive["engine"] == 0
    with pytest.raises(DeviceLostError, match="GPU 0 stopped"):
        Predictor(engine)


def test_waits_beside_other_calls_sleep_and_lone_ones_spin(gpu, engine):
    def waits():
        return [detail for kind, _, detail in gpu.log if kind == "wait"]

    with Predictor(engine) as predictor:
        for _ in range(3):
            predictor.predict_tensors(*group(1))
        assert waits() == [None] * 3
        gpu.log.clear()
        assert len(list(predictor.predict_groups([group(1)] * 5))) == 5
        assert waits() == [None, *["sleep"] * 4]


def test_a_refused_shape_is_an_error_and_not_the_shape_before(gpu, engine, expected):
    with Predictor(engine) as predictor:
        for tensors, maps in expected[:4]:
            np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
        gpu.refuse_shapes = True
        message = r"icnet\.engine: TensorRT refused images of shape \(5, 224, 224, 3\): setInputShape: images"
        with pytest.raises(ModelError, match=message):
            predictor.predict_tensors(*group(5))
        gpu.refuse_shapes = False
        np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)


def test_an_interrupted_wait_gives_the_slot_back(gpu, engine, expected, monkeypatch):
    driver, tensors = sys.modules["pycuda.driver"], expected[4][0]

    def interrupt(event):
        raise KeyboardInterrupt

    predictor = Predictor(engine)
    with monkeypatch.context() as patch:
        patch.setattr(driver.Event, "synchronize", interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                predictor.predict_tensors(*tensors)
    predictor.predict_tensors(*tensors)
    predictor.close()
    gc.collect()
    assert gpu.leaks() == {}


def test_engines_with_host_code_need_permission(gpu, small_model, tmp_path, expected):
    engine = engine_file(tmp_path / "x.engine", small_model, PROFILES, host_code=True)
    with pytest.raises(ModelError, match=r"x\.engine: brings code that would run on this host.*allow_host_code=True"):
        Predictor(engine)
    with Predictor(engine, allow_host_code=True) as predictor:
        tensors, maps = expected[4]
        np.testing.assert_array_equal(predictor.predict_tensors(*tensors), maps)
    gc.collect()
    assert gpu.leaks() == {}


def test_tensorrt_has_one_logger_for_life(gpu, engine, tmp_path):
    """It keeps the first that it is given; what it says of the second engine reaches the caller nevertheless."""
    Predictor(engine).close()
    gc.collect()
    (tmp_path / "x.engine").write_text("something else")
    with pytest.raises(ModelError, match="Magic tag does not match"):
        Predictor(tmp_path / "x.engine")


class TestRtxKernels:
    """What TensorRT-RTX compiles when an engine runs."""

    @pytest.fixture
    def rtx(self, monkeypatch):
        return install(Gpu(rtx=True), monkeypatch)

    def run(self, rtx, engine):
        """Three sizes, of two profiles, in both slots: the number of kernels that were compiled."""
        before = rtx.made["compiled kernel"]
        with Predictor(engine) as predictor:
            for n in (1, 1, 3, 3, 5, 5):
                predictor.predict_tensors(*group(n))
        return rtx.made["compiled kernel"] - before

    def test_slots_share_them_and_they_are_kept(self, rtx, engine):
        assert self.run(rtx, engine) == 2
        assert self.run(rtx, engine) == 0
        assert sorted(p.name for p in engine.parent.iterdir()) == ["icnet.engine", "icnet.engine.kernels"]

    def test_those_of_another_version_are_replaced(self, rtx, engine):
        kernels = engine.with_name("icnet.engine.kernels")
        kernels.write_text('{"version": "1.0", "profiles": [0, 1, 2]}')
        assert self.run(rtx, engine) == 2
        assert json.loads(kernels.read_text())["version"] == rtx.version
        assert self.run(rtx, engine) == 0

    def test_where_they_can_not_be_kept_the_engine_runs(self, rtx, engine):
        engine.with_name("icnet.engine.kernels").mkdir()
        assert self.run(rtx, engine) == self.run(rtx, engine) == 2

    def test_eager_ones_on_request(self, rtx, engine):
        for eager in (False, True):
            backend = TensorRTBackend(engine, eager_kernels=eager)
            config = backend._pool._free[0]._plain.config
            assert config.dynamic_shapes_kernel_specialization_strategy == (1 if eager else 0)
            backend.close()


def test_groups_outside_every_profile(gpu, engine):
    with Predictor(engine) as predictor:
        with pytest.raises(ModelError, match=r"groups of 1, 2 to 6, 4 to 12 images, got 13; .*holds 13"):
            predictor.predict_tensors(*group(13))
        with pytest.raises(ModelError, match="got 13"):
            predictor([PHOTOS[0]] * 13, [PHOTOS[0]] * 13)
        assert len(gpu.log) == 0


def write_foreign(path, small_model):
    import onnx

    model = onnx.load(small_model)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "pictures" if name == "images" else name
    model.graph.input[0].name = "pictures"
    save_model(model, path.with_suffix(".onnx"))
    engine_file(path, path.with_suffix(".onnx"), PROFILES)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p, m: p.write_bytes(b"something else"),
            r"can't be loaded; .* rebuild it here .*Magic tag does not match",
        ),
        (lambda p, m: p.write_bytes(b""), "can't be loaded"),
        (lambda p, m: p.write_bytes(engine_file(p, m, PROFILES).read_bytes()[:5000]), "can't be loaded"),
        (lambda p, m: engine_file(p, m, PROFILES, version="11.2.0"), "serialised by 11.2.0, this is 10.16.0"),
        (write_foreign, r"not an ICNet export: .* found inputs .*pictures uint8 \[\?, 224, 224, 3\]"),
        (lambda p, m: None, "no such model file"),
        (lambda p, m: p.mkdir(), "not a model file"),
    ],
)
def test_engines_that_can_not_be_used(gpu, small_model, tmp_path, write, message):
    path = tmp_path / "x.engine"
    write(path, small_model)
    with pytest.raises(ModelError, match=rf"x\.engine: .*{message}"):
        Predictor(path)
    gc.collect()
    assert gpu.leaks() == {}


def test_a_sidecar_is_not_needed_but_must_fit(gpu, engine):
    sidecar = engine.with_name("icnet.engine.json")
    sidecar.write_text(json.dumps({"engine_sha256": hashlib.sha256(engine.read_bytes()).hexdigest()}))
    Predictor(engine).close()
    right = json.loads(sidecar.read_text())
    for notes, card in ((None, None), ({"icnet_card": "drawings, a demo"}, "drawings, a demo")):
        sidecar.write_text(json.dumps(right | {"onnx_metadata": notes}))
        with Predictor(engine) as predictor:
            assert predictor.card == card
    sidecar.write_text(json.dumps({"engine_sha256": "0" * 64}))
    with pytest.raises(ModelError, match=r"icnet\.engine: is not the engine that icnet\.engine\.json describes"):
        Predictor(engine)
    for text in ("{", "[]", "{}"):
        sidecar.write_text(text)
        with pytest.raises(ModelError, match="not the sidecar of an engine"):
            Predictor(engine)


def test_an_engine_for_one_size(gpu, small_model, tmp_path):
    import onnx

    model = onnx.load(small_model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    save_model(model, tmp_path / "three.onnx")
    with Predictor(engine_file(tmp_path / "x.plan", tmp_path / "three.onnx", [(3, 3, 3)])) as predictor:
        assert len(predictor.predict_tensors(*group(3))) == 3
        with pytest.raises(ModelError, match="groups of 3 images, got 2; export the model with a dynamic group axis"):
            predictor.predict_tensors(*group(2))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("pycuda", "pycuda.driver"), f"pycuda is not installed: {how_to_install('gpu')}"),
        (("tensorrt", "tensorrt_rtx"), f"TensorRT is not installed: {how_to_install('tensorrt')}"),
    ],
)
def test_missing_packages(gpu, engine, monkeypatch, missing, message):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=re.escape(message)):
        Predictor(engine)
    gc.collect()
    assert gpu.leaks() == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libnvinfer.so.10: cannot open\\nshared object file')", "can't be loaded: libnvinfer.so.10: "),
        ("raise ImportError('undefined symbol')", "tensorrt is installed but can't be loaded: undefined symbol"),
        ("import tensorrt_bindings_of_no_one", "tensorrt is installed but can't be loaded: No module named"),
        ("__version__ = '10.0.1'", "tensorrt 10.0.1 is too old: 10.1 or newer is needed"),
    ],
)
def test_broken_and_old_packages_are_not_missing_ones(gpu, engine, monkeypatch, tmp_path, source, message):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(DependencyError, match=re.escape(message)) as caught:
        Predictor(engine)
    assert "\n" not in str(caught.value)
    gc.collect()
    assert gpu.leaks() == {}


def test_no_such_gpu_and_too_few_slots(gpu, engine):
    with pytest.raises(DependencyError, match=r"GPU 3 can't be used: .*invalid device"):
        Predictor(engine, device=3)
    with pytest.raises(InputError, match="slots=1"):
        Predictor(engine, slots=1)


def test_without_a_driver(engine, monkeypatch, tmp_path):
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    (tmp_path / "pycuda/driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DependencyError, match="no NVIDIA driver"):
        Predictor(engine)


@pytest.fixture
def bank_engines(exports, tmp_path):
    """Engines of a bank export, for up to 4 images, and banks of 2 to 9 in one profile and up to 40 in the other."""
    intra, banked = bank_files(exports)
    bank = [{"images": (1, 4, 4), "sisms": (1, 4, 4), "bank": sizes} for sizes in ((2, 5, 9), (1, 9, 40))]
    name = "icnet " + weights_digest(random_network(1 / 32))
    return (
        engine_file(tmp_path / "icnet.intra.engine", intra, [(1, 4, 4)], name=name),
        engine_file(tmp_path / "icnet.banked.engine", banked, bank, name=name),
    )


def test_packed_engines(any_gpu, exports, tmp_path, expected):
    engine = engine_file(tmp_path / "x.engine", exports.with_name("icnet.packed.onnx"), [(1, 8, 16), (1, 1, 4)])
    rng = random.Random(0)
    stream = [rng.choice(expected) for _ in range(20)]
    with Predictor(engine) as predictor, ThreadPoolExecutor(8) as pool:
        for found, (_, maps) in zip(predictor.predict_groups([group for group, _ in stream]), stream, strict=True):
            np.testing.assert_allclose(np.stack(found), maps, atol=2e-2)
        calls = [images for operation, _, images in any_gpu.log if operation == "execute"]
        found = pool.map(lambda call: predictor.predict_tensors(*call[0]), stream)
        for one, (_, maps) in zip(found, stream, strict=True):
            np.testing.assert_allclose(one, maps, atol=2e-2)
        with pytest.raises(
            ModelError, match=r"groups of 1 to 16, 1 to 4 images, got 17; .*holds 17.*; or run it in chunks"
        ):
            predictor.predict_tensors(*group(17))
    if not any_gpu.bindings:  # otherwise replayed graphs are not in the log
        assert len(calls) < 15
        assert sum(calls) == sum(len(maps) for _, maps in stream)
    assert max(calls) <= 16
    gc.collect()
    assert any_gpu.leaks() == {}


def test_bank_engines(any_gpu, bank_engines, expected):
    with Predictor(bank_export=bank_engines) as predictor:
        for _ in range(3):
            for tensors, maps in expected:
                np.testing.assert_allclose(predictor.predict_tensors(*tensors), maps, atol=2e-2)
        tensors, maps = expected[-1]
        bank = predictor.bank(*tensors)
        assert bank.model == weights_digest(random_network(1 / 32))
        np.testing.assert_allclose(np.stack(predictor.against(bank, *tensors)), maps, atol=2e-2)
        with pytest.raises(ModelError, match=r"banks of 2 to 9, 1 to 40 images, got 48; .* icnet build --max-bank 48"):
            predictor.against(bank + bank + bank + bank, *tensors)
        with pytest.raises(ModelError, match="banks of 2 to 9, 1 to 40 images, got 41"):
            predictor.predict_tensors(*group(41))
    gc.collect()
    assert any_gpu.leaks() == {}


def test_an_engine_and_its_bank_export(gpu, engine, bank_engines, small_model):
    with Predictor(engine, bank_export=bank_engines) as predictor, Predictor(small_model, threads=1) as cpu:
        for n in (12, 13, 30):
            np.testing.assert_allclose(predictor.predict_tensors(*group(n)), cpu.predict_tensors(*group(n)), atol=2e-2)
    gc.collect()
    assert gpu.leaks() == {}


def test_an_error_in_the_second_of_three_models_frees_the_first(gpu, engine, bank_engines):
    bank_engines[1].write_bytes(b"something else")
    with pytest.raises(ModelError, match="Magic tag"):
        Predictor(engine, bank_export=bank_engines)
    gc.collect()
    assert gpu.leaks() == {}


class TestTheSimulationIsStrict:
    """A simulation that lets mistakes pass would prove nothing."""

    @pytest.fixture
    def driver(self, gpu):
        driver = sys.modules["pycuda.driver"]
        driver.Device(0).retain_primary_context().push()
        return driver

    def test_copies_happen_only_when_waited_for(self, driver):
        host, memory, stream = driver.pagelocked_empty((4,), np.uint8), driver.mem_alloc(4), driver.Stream(NON_BLOCKING)
        host[:] = 1
        driver.memcpy_htod_async(memory, host, stream)
        host[:] = 2  # too early: the copy has not happened
        stream.synchronize()
        driver.memcpy_dtoh_async(host, memory, stream)
        stream.synchronize()
        assert host.tolist() == [2, 2, 2, 2]

    def test_pageable_memory_is_refused(self, driver):
        with pytest.raises(Violation, match="pageable"):
            driver.memcpy_htod_async(driver.mem_alloc(4), np.zeros(4, np.uint8), driver.Stream(NON_BLOCKING))

    def test_addresses_outside_an_allocation_are_refused(self, driver):
        host, memory = driver.pagelocked_empty((8,), np.uint8), driver.mem_alloc(4)
        with pytest.raises(Violation, match="not inside one live device allocation"):
            driver.memcpy_htod_async(memory, host, driver.Stream(NON_BLOCKING))

    def test_freed_memory_is_poisoned_and_refused(self, driver):
        host, memory, stream = driver.pagelocked_empty((4,), np.uint8), driver.mem_alloc(4), driver.Stream(NON_BLOCKING)
        driver.memcpy_htod_async(memory, host, stream)
        memory.free()
        with pytest.raises(Violation, match="live device allocation"):
            stream.synchronize()
        host.base.free()
        assert host.tolist() == [FREED] * 4

    def test_a_context_is_needed(self, driver, gpu):
        driver.Context.pop()
        with pytest.raises(Violation, match="without a current context"):
            driver.mem_alloc(4)

    @pytest.mark.parametrize("shape", [(13, 224, 224, 3), (2, 100, 100, 3)])
    def test_shapes_outside_the_profile_are_refused(self, driver, engine, shape):
        trt = sys.modules["tensorrt"]
        log = log_of(trt)
        loaded = trt.Runtime(log.logger).deserialize_cuda_engine(engine.read_bytes())
        context = loaded.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        stream = driver.Stream(NON_BLOCKING).handle
        context.set_optimization_profile_async(1, stream)
        with log.listening() as heard:
            assert not context.set_input_shape("images", shape)
        assert "is not within 2 to 6" in heard.last_error
        with pytest.raises(Violation, match="after a shape was refused"):  # what ran before would run again
            context.execute_async_v3(stream)

    def test_a_logger_must_outlive_all_that_follows(self, driver, engine):
        trt = sys.modules["tensorrt"]
        trt.Runtime(trt.ILogger())
        gc.collect()
        with pytest.raises(Violation, match="the logger is gone"):
            trt.Runtime(log_of(trt).logger).deserialize_cuda_engine(b"something else")
