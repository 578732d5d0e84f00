"""Several groups in one call: a packed export against a plain one; and how groups of several threads meet."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export.onnx_file import save_model
from export.samples import smooth_group
from export.to_onnx import write_onnx
from runtime import InputError, ModelError, Predictor
from runtime.packing import Packer, _Request, first_fit
from tests.helpers import random_network

NOISE = {"atol": 2e-2, "rtol": 0}  # two pixels of equal attention may change places; the mean is what counts
NOISE_MEAN = 1e-4


def close(found, expected):
    np.testing.assert_allclose(found, expected, **NOISE)
    assert np.abs(found - expected).mean() < NOISE_MEAN


@pytest.fixture(scope="module")
def packed(exports):
    with Predictor(exports.with_name("icnet.packed.onnx"), max_images=16, threads=1) as predictor:
        assert predictor.packed
        yield predictor


@pytest.fixture(scope="module")
def plain(exports):
    with Predictor(exports, threads=1) as predictor:
        assert not predictor.packed
        yield predictor


def tensors(n, seed=0):
    group = smooth_group(n, seed=1000 * seed + n)
    return group.images, group.sisms


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_packed_groups_are_those_of_one_by_one_in_order(packed, plain, sizes):
    groups = [tensors(n, seed) for seed, n in enumerate(sizes)]
    found = list(packed.predict_groups(iter(groups), ahead=2))
    assert [len(maps) for maps in found] == sizes
    for maps, group in zip(found, groups, strict=True):
        close(np.stack(maps), plain.predict_tensors(*group))


def test_groups_of_tensors_are_packed_by_their_images(exports, plain, monkeypatch):
    groups = [tensors(n, seed) for seed, n in enumerate((3, 5, 6, 1, 2, 9))]
    calls = []
    with Predictor(exports.with_name("icnet.packed.onnx"), max_images=8, threads=1) as packed:
        submit = packed.pipeline._backend.submit
        monkeypatch.setattr(packed.pipeline._backend, "submit", lambda i, *t: calls.append(len(i)) or submit(i, *t))
        found = packed.predict_tensor_groups(iter(groups))
    assert calls == [3 + 5, 6 + 1, 2, 9]
    for maps, group in zip(found, groups, strict=True):
        close(maps, plain.predict_tensors(*group))


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1], [7, -3, 7, -3, -3], [-(2**31), 5, 2**31 - 1, 5, 5], [3] * 5])
def test_any_labels_in_any_order(exports, plain, labels):
    session = onnxruntime.InferenceSession(exports.with_name("icnet.packed.onnx"))
    images, sisms = tensors(5)
    labels = np.array(labels, np.int32)
    (maps,) = session.run(None, {"images": images, "sisms": sisms, "groups": labels})
    for label in set(labels):
        mine = labels == label
        close(maps[mine], plain.predict_tensors(images[mine], sisms[mine]))


def test_a_group_of_noise_moves_no_map_of_another(exports):
    """The same group beside one of smooth images, and beside one of noise: not a bit of it changes."""
    session = onnxruntime.InferenceSession(exports.with_name("icnet.packed.onnx"))
    images, sisms = tensors(4)
    rng = np.random.default_rng(0)
    others = [tensors(3), (rng.integers(0, 256, (3, 224, 224, 3), np.uint8), np.full((3, 224, 224), 255, np.uint8))]
    labels = np.array([1, 1, 1, 1, 0, 0, 0], np.int32)
    maps = []
    for other_images, other_sisms in others:
        together = {"images": np.concatenate([images, other_images]), "sisms": np.concatenate([sisms, other_sisms])}
        maps.append(session.run(None, together | {"groups": labels}))
    np.testing.assert_array_equal(maps[0][0][:4], maps[1][0][:4])
    assert np.abs(maps[0][0][4:] - maps[1][0][4:]).mean() > 0.01


def test_groups_of_several_threads(packed, plain):
    groups = [tensors(n) for n in (1, 2, 3, 9, 17, 4, 2, 1)]
    expected = [plain.predict_tensors(*group) for group in groups]
    with ThreadPoolExecutor(8) as pool:
        for found, right in zip(pool.map(lambda group: packed.predict_tensors(*group), groups), expected, strict=True):
            close(found, right)


def test_a_bad_group_among_good_ones_is_an_error_at_its_turn(packed):
    stream = packed.predict_groups([tensors(2), tensors(3), (["none.jpg"], ["none.png"]), tensors(1)])
    assert [len(next(stream)), len(next(stream))] == [2, 3]
    with pytest.raises(InputError, match=r"none\.jpg: no such file"):
        next(stream)


@pytest.mark.parametrize("model", ["packed", "plain"])
def test_a_bad_group_of_tensors_fails_alone(request, model):
    predictor = request.getfixturevalue(model)
    images, sisms = good = tensors(2)
    bad = [
        (images[:0], sisms[:0]),
        (images, sisms[:1]),
        (images[:, 1:], sisms),
        (images.astype(np.float32), sisms),
        (images,),
        (images, None),
    ]
    messages = ["no images", "2 images but 1 SISMs", "223", "float32", "got 1 entries", "got NoneType"]
    found = predictor.predict_tensor_groups([good, *bad, good], on_error="return")
    for maps in (found[0], found[-1]):
        close(maps, predictor.predict_tensors(*good))
    for error, message in zip(found[1:-1], messages, strict=True):
        assert isinstance(error, InputError)
        assert message in str(error)
    for group, message in zip(bad, messages, strict=True):
        with pytest.raises(InputError, match=message):
            predictor.predict_tensor_groups([good, group])
    assert predictor.predict_tensor_groups([]) == []
    for arguments, message in (({"groups": 3}, "groups: expected"), ({"groups": [], "on_error": "skip"}, "on_error=")):
        with pytest.raises(InputError, match=message):
            predictor.predict_tensor_groups(**arguments)


def test_what_can_not_be_packed(exports, icnet, image_folder, tmp_path):
    image_folder("one", "a.png")
    arguments = (tmp_path / "one", "--model", exports, "--sisms", tmp_path / "one", "--output", tmp_path / "out")
    code, _, err = icnet("predict", *arguments, "--pack")
    assert (code, err.count("\n")) == (2, 1)
    assert "takes one group at a time; --pack takes a model from icnet export --packed" in err
    for options, message in [
        ({"max_images": 0}, "max_images=0"),
        ({"max_delay_ms": -1}, "max_delay_ms=-1"),
        ({"max_delay_ms": float("inf")}, "max_delay_ms=inf"),
    ]:
        with pytest.raises(InputError, match=message):
            Predictor(exports, **options)


def test_icnet_predict_pack(exports, icnet, image_folder, tmp_path, plain):
    names = [f"{i}.png" for i in range(3)]
    for group in "abcd":
        image_folder(f"data/img/{group}", *names)
        image_folder(f"data/sism/{group}", *names, mode="L")
    image_folder("data/img/e", "0.png")  # without a SISM
    out = tmp_path / "out"
    arguments = (tmp_path / "data", "--model", exports.with_name("icnet.packed.onnx"), "--output", out, "--pack")
    code, _, err = icnet("predict", *arguments)
    assert code == 2
    assert "no SISM for it" in err
    assert "1 of 5 groups failed" in err
    for group in "abcd":
        folders = (tmp_path / "data" / kind / group for kind in ("img", "sism"))
        expected = plain(*([folder / name for name in names] for folder in folders))
        for name, map_ in zip(names, expected, strict=True):
            assert np.abs(np.asarray(Image.open(out / group / name)) / 255 - map_).mean() < 1 / 255
    assert "4 of 5 groups were finished already" in icnet("predict", *arguments, "--resume")[1]


@pytest.mark.parametrize(
    ("sizes", "limit", "chosen"),
    [
        ([3, 4, 5], 12, [0, 1, 2]),
        ([3, 8, 5, 2, 1, 1], 10, [0, 2, 3]),
        ([20, 1, 1], 16, [0]),  # larger than a call: by itself
        ([5], 0, [0]),
    ],
)
def test_first_fit(sizes, limit, chosen):
    assert first_fit(sizes, limit) == chosen


class Engine:
    """Stands for a model: remembers the sizes of its calls, and computes only when let."""

    def __init__(self):
        self.calls, self.free = [], threading.Event()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.fail = False

    def __call__(self, groups):
        with self.lock:
            self.calls.append([len(images) for images, _ in groups])
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        assert self.free.wait(30)
        with self.lock:
            self.at_once -= 1
        if self.fail:
            raise ModelError("no")
        return np.concatenate([images[:, 0, 0, 0].astype(np.float32) for images, _ in groups])


def numbered(n, value):
    return np.full((n, 1, 1, 3), value, np.uint8), np.zeros((n, 1, 1), np.uint8)


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_groups_that_come_while_a_call_runs_share_the_next():
    engine = Engine()
    packer = Packer(engine, limit=10, slots=1, delay=0)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(packer, *numbered(2, 0))
        until(lambda: engine.calls)  # a group that comes alone does not wait
        later = []
        for value, n in enumerate([4, 7, 5, 1, 20, 3], 1):
            later.append(pool.submit(packer, *numbered(n, value)))
            until(lambda: len(packer._waiting) == len(later))
        engine.free.set()
        assert first.result(30).tolist() == [0, 0]
        for value, (n, future) in enumerate(zip([4, 7, 5, 1, 20, 3], later, strict=True), 1):
            assert future.result(30).tolist() == [value] * n
    assert engine.calls == [[2], [4, 5, 1], [7, 3], [20]]
    assert engine.most_at_once == 1
    assert packer._waiting == []


def test_a_bounded_wait_for_others_ends_when_a_call_is_full():
    engine = Engine()
    engine.free.set()
    packer = Packer(engine, limit=4, slots=2, delay=30)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: packer(*numbered(1, value)), range(4)))
    assert time.monotonic() - start < 15
    assert engine.calls == [[1, 1, 1, 1]]
    packer = Packer(engine, limit=4, slots=2, delay=0.05)
    start = time.monotonic()
    packer(*numbered(1, 0))
    assert time.monotonic() - start >= 0.05


def test_max_delay_ms_is_in_milliseconds(exports):
    with (
        Predictor(exports.with_name("icnet.packed.onnx"), max_images=16, max_delay_ms=400) as predictor,
        ThreadPoolExecutor(1) as pool,
    ):
        start = time.monotonic()
        try:
            assert pool.submit(predictor.predict_tensors, *tensors(1)).result(20).shape == (1, 224, 224)
        finally:
            predictor.close()  # ends the wait, if it is still on
        assert time.monotonic() - start >= 0.4


def test_the_wait_for_others_ends_with_the_oldest_group_s():
    """Whichever thread collects: a group that has waited long enough takes one that has just come along at once."""
    engine = Engine()
    engine.free.set()
    packer = Packer(engine, limit=10, slots=1, delay=30)
    oldest = _Request(numbered(2, 7), time.monotonic() - 1)
    packer._waiting.append(oldest)
    start = time.monotonic()
    assert packer(*numbered(1, 5)).tolist() == [5]
    assert time.monotonic() - start < 15
    assert engine.calls == [[2, 1]]
    assert oldest.outcome.tolist() == [7, 7]


def test_many_groups_from_many_threads():
    engine = Engine()
    engine.free.set()
    packer = Packer(engine, limit=16, slots=2, delay=0)

    def work(thread):
        rng = np.random.default_rng(thread)
        for _ in range(200):
            n, value = int(rng.integers(1, 12)), int(rng.integers(256))
            assert packer(*numbered(n, value)).tolist() == [value] * n

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [None] * 16
    assert engine.most_at_once <= 2
    assert sum(len(call) for call in engine.calls) == 16 * 200
    assert all(sum(call) <= 16 for call in engine.calls)
    assert (packer._waiting, packer._in_work, packer._collecting) == ([], 0, False)


def test_an_error_reaches_all_groups_of_its_call():
    engine = Engine()
    engine.fail = True
    packer = Packer(engine, limit=10, slots=1, delay=0)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(packer, *numbered(2, value)) for value in range(4)]
        until(lambda: len(packer._waiting) == 3)
        engine.free.set()
        for future in futures:
            with pytest.raises(ModelError, match="no"):
                future.result(30)
    engine.fail = False
    assert packer(*numbered(1, 5)).tolist() == [5]


def test_an_interrupted_call_leaves_the_others_with_an_error_and_the_packer_usable():
    def interrupted(groups):
        raise KeyboardInterrupt

    packer = Packer(interrupted, limit=10, slots=1, delay=0)
    with pytest.raises(KeyboardInterrupt):
        packer(*numbered(1, 0))
    packer._run = Engine()
    packer._run.free.set()
    assert packer(*numbered(1, 5)).tolist() == [5]


def test_a_packed_model_that_gives_too_many_maps_is_an_error(exports, tmp_path):
    import onnx

    model = onnx.load(exports.with_name("icnet.packed.onnx"))
    for node in model.graph.node:
        node.output[:] = ["other" if name == "maps" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Concat", ["other", "other"], ["maps"], axis=0))
    save_model(model, tmp_path / "x.onnx")
    with Predictor(tmp_path / "x.onnx") as predictor:
        with pytest.raises(ModelError, match="gave 4 maps for 2 images"):
            predictor.predict_tensors(*tensors(2))
        with pytest.raises(ModelError, match="gave 4 maps for 2 images"):
            list(predictor.predict_groups([tensors(2)]))


def test_a_wider_network_in_half_precision_is_packed_too(tmp_path):
    from export.fp16 import half_precision

    network = half_precision(random_network(1 / 16))
    write_onnx(network, tmp_path / "packed.onnx", "packed")
    write_onnx(network, tmp_path / "plain.onnx")
    groups = [tensors(n) for n in (2, 3, 1)]
    with Predictor(tmp_path / "packed.onnx") as packed, Predictor(tmp_path / "plain.onnx") as plain:
        for maps, group in zip(packed.predict_groups(groups), groups, strict=True):
            assert np.abs(np.stack(maps) - plain.predict_tensors(*group)).mean() < 1e-3
