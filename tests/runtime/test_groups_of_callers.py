"""`Predictor.predict_groups`: what one group's error, or the caller's own, does to the others; and what is no group."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from runtime import ICNetError, InputError, ModelError, Predictor
from runtime.backends.onnx import OnnxBackend
from runtime.files import bank_files
from tests.helpers import BIRDS
from tests.runtime.test_packing import tensors

BAD = (["none.jpg"], ["none.png"])
PHOTO = min(BIRDS.glob("*.jpg"))


@pytest.fixture(scope="module", params=["icnet.onnx", "icnet.packed.onnx"])
def predictor(request, exports):
    with Predictor(exports.with_name(request.param), threads=1, max_images=8) as predictor:
        yield predictor


def kinds(outcomes):
    return [len(o) if isinstance(o, list) else type(o) for o in outcomes]


def test_errors_are_returned_in_the_place_of_their_groups(predictor):
    groups = [tensors(2), BAD, tensors(1), ([], []), tensors(3), (tensors(2)[0], tensors(1)[1])]
    found = list(predictor.predict_groups(groups, on_error="return"))
    assert kinds(found) == [2, InputError, 1, InputError, 3, InputError]
    assert "none.jpg: no such file" in str(found[1])
    alone = predictor(*groups[4])
    np.testing.assert_allclose(found[4][2], alone[2], atol=2e-2)


def test_a_failure_of_the_model_is_returned_too(exports, monkeypatch):
    submit = OnnxBackend.submit

    def failing(self, *arrays, last=False):
        if len(arrays[0]) == 2:
            raise ModelError("no")
        return submit(self, *arrays, last=last)

    monkeypatch.setattr(OnnxBackend, "submit", failing)
    with Predictor(exports, threads=1) as predictor:
        groups = [tensors(1), tensors(2), tensors(3)]
        assert kinds(predictor.predict_groups(groups, on_error="return")) == [1, ModelError, 3]
        stream = predictor.predict_groups(groups)
        assert len(next(stream)) == 1
        with pytest.raises(ModelError, match="no"):
            next(stream)


@pytest.mark.parametrize("on_error", ["raise", "return"])
@pytest.mark.parametrize("error", [ValueError("mine"), InputError("mine"), OSError(5, "mine")])
def test_an_error_of_the_caller_s_iterator_comes_after_the_groups_before_it(predictor, on_error, error):
    def source():
        yield tensors(2)
        yield tensors(1)
        yield tensors(3)
        raise error

    found = []
    with pytest.raises(type(error), match="mine") as raised:
        found.extend(map(len, predictor.predict_groups(source(), ahead=8, on_error=on_error)))
    assert raised.value is error
    assert found == [2, 1, 3]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (None, r"groups\[1\]: expected \(images, sisms\), got NoneType"),
        (5, r"groups\[1\]: expected \(images, sisms\), got int"),
        ("ab", r"groups\[1\]: expected \(images, sisms\), got str"),
        (([PHOTO],), r"groups\[1\]: expected \(images, sisms\), got 1 entries"),
        (([PHOTO], [PHOTO], True), r"groups\[1\]: expected \(images, sisms\), got 3 entries"),
        (([PHOTO], None), "no SISMs: give one per image, or open the Predictor with a detector"),
        ((BytesIO(b"x\ny"), BytesIO(b"x\ny")), "images: expected a sequence with one entry per image, got BytesIO"),
        ((bytearray(b"xy"), bytearray(b"xy")), "images: expected a sequence with one entry per image, got bytearray"),
    ],
)
def test_what_is_no_group_is_an_error_at_its_turn(predictor, group, message):
    stream = predictor.predict_groups([tensors(1), group])
    assert len(next(stream)) == 1
    with pytest.raises(InputError, match=message):
        next(stream)
    assert kinds(predictor.predict_groups([group, tensors(1)], on_error="return")) == [InputError, 1]


@pytest.mark.parametrize("groups", [None, 5, "groups", {"a": 1}, Path("x"), BytesIO(b"x")])
def test_what_are_no_groups(predictor, groups):
    with pytest.raises(InputError, match=r"groups: expected \(images, sisms\) for each group, got "):
        predictor.predict_groups(groups)


@pytest.mark.parametrize("ahead", [None, 0, -1, 1.5, "4"])
def test_ahead_is_a_number(predictor, ahead):
    with pytest.raises(InputError, match=r"ahead=.*: expected a number from 1"):
        predictor.predict_groups([tensors(1)], ahead=ahead)
    with pytest.raises(InputError, match="on_error='ignore'"):
        predictor.predict_groups([tensors(1)], on_error="ignore")


def test_the_contents_of_files_are_images(predictor):
    content = PHOTO.read_bytes()
    by_path, by_content, by_file = predictor.predict_groups(
        [([PHOTO], [PHOTO]), ([content], [content]), ([BytesIO(content)], [BytesIO(content)])]
    )
    np.testing.assert_allclose(by_content[0], by_path[0], atol=1e-5)
    np.testing.assert_allclose(by_file[0], by_path[0], atol=1e-5)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        (None, "providers=None: expected a list of execution providers"),
        (5, "providers=5: expected"),
        ("CPUExecutionProvider", "providers='CPUExecutionProvider': expected a list"),
        ([], r"providers=\[\]: expected"),
        ([5], r"providers=\[5\]: expected"),
        ([("CPUExecutionProvider",)], "providers=.*: expected"),
        ([("CPUExecutionProvider", 5)], "providers=.*: expected"),
        ([("CPUExecutionProvider", {"threads": 3})], "CPUExecutionProvider has no option 'threads'"),
        ([("CUDAExecutionProvider", {"device_id": "x"})], "device_id='x': expected a device's number"),
    ],
)
def test_what_are_no_providers(exports, providers, message):
    with pytest.raises(InputError, match=message):
        Predictor(exports, providers=providers)


@pytest.mark.parametrize("model", ["", ".", "/", "x" * 300 + ".onnx", "x" * 300 + ".mnn", "x" * 300 + ".engine"])
def test_what_is_no_model(icnet, model, image_folder, tmp_path):
    with pytest.raises(ICNetError, match=r"not a model file|the path is empty|can't be read: File name too long"):
        Predictor(model)
    image_folder("group", "a.png")
    for command in (
        ("predict", tmp_path / "group", "--output", tmp_path / "out"),
        ("bank", tmp_path / "group", "--output", tmp_path / "x.npz"),
    ):
        code, _, err = icnet(*command, "--sisms", tmp_path / "group", "--model", model)
        assert (code, err.count("\n")) == (2, 1), err


def test_max_images_is_that_of_a_chunk_too(exports, monkeypatch):
    sizes = []
    submit = OnnxBackend.submit

    def counting(self, *arrays, last=False):
        sizes.append(len(arrays[0]))
        return submit(self, *arrays, last=last)

    monkeypatch.setattr(OnnxBackend, "submit", counting)
    with Predictor(bank_export=bank_files(exports), max_images=2, threads=1) as predictor:
        predictor.predict_tensors(*tensors(5))
    assert (max(sizes), sum(sizes)) == (2, 2 * 5)
