"""Files for MNN: how they are built and what refuses to be, and what only this backend has to get right."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest

from export import to_mnn
from export.cpu_proof import sample_calls
from export.to_mnn import build_mnn, convert
from runtime import ICNetError, ModelError, Predictor
from runtime.backends.mnn import MnnBackend
from runtime.contract import CARD, FILE_DIGEST, INTERFACES, WEIGHTS
from runtime.files import bank_files, digest
from tests.helpers import convert_to_mnn

MNN = pytest.importorskip("MNN", reason="MNN is not installed")


GROUPS = [(call["images"], call["sisms"]) for call in sample_calls(INTERFACES[0])]


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1e-3


def test_the_command_builds_a_file_that_says_what_it_was_made_from(icnet, exports, tmp_path):
    path = tmp_path / "new" / "icnet.mnn"
    code, out, err = icnet("build", "--backend", "mnn", "--onnx", exports, "--output", path)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "groups of any size" in out
    assert [p.name for p in path.parent.iterdir()] == ["icnet.mnn"]
    info = MNN.nn.load_module_from_file(str(path), ["images", "sisms"], ["maps"]).get_info()
    notes = json.loads(info["bizCode"])
    assert notes["onnx_sha256"] == digest(exports)
    found = {p.key: p.value for p in onnx.load(exports).metadata_props}
    assert notes["onnx_metadata"] | {FILE_DIGEST: found[FILE_DIGEST]} == found
    assert FILE_DIGEST not in notes["onnx_metadata"]  # which is the ONNX file's alone


def test_a_file_knows_its_network(exports, mnn_exports, tmp_path):
    (weights,) = (p.value for p in onnx.load(exports).metadata_props if p.key == WEIGHTS)
    assert MnnBackend(mnn_exports).weights_digest == weights
    path = tmp_path / "others.mnn"
    for notes in ("", "[1]", json.dumps({"onnx_metadata": {WEIGHTS: 5}})):
        convert(path, onnx.load(exports), path, notes, [])
        assert MnnBackend(path).weights_digest is None
        assert MnnBackend(path).card is None
    convert(path, onnx.load(exports), path, json.dumps({"onnx_metadata": {WEIGHTS: "0" * 64, CARD: "drawings"}}), [])
    with Predictor(path) as predictor:
        assert predictor.card == "drawings"
    with pytest.raises(ModelError, match="of another network than"):
        Predictor(path, bank_export=bank_files(exports))


@pytest.mark.parametrize(
    ("kind", "width", "most", "bank"),
    [
        ("", None, 111, 1),  # 96 channels of 224×224 values; a file of others is taken for the paper's network
        ("", "1", 111, 1),
        ("", "0.5", 222, 1),
        ("", "0.03125", 585, 1),  # 585² pairs of two maps of 28×28 values
        (".packed", "0.03125", 585, 1),
        (".intra", "0.03125", 668, 1),
        (".banked", "0.03125", 32, 10699),
    ],
)
def test_groups_whose_bytes_mnn_can_not_count_are_refused(exports, tmp_path, kind, width, most, bank):
    """Maps were others at 113 images (width 1), 460 (0.25) and 620 (1/16); at 128 (1) and 590 (1/16) it crashed."""
    path = tmp_path / "x.mnn"
    notes = "" if width is None else json.dumps({"onnx_metadata": {"width": width}})
    convert(path, onnx.load(exports.with_name(f"icnet{kind}.onnx")), path, notes, [])
    backend = MnnBackend(path)
    backend.check_group(most, bank)
    with pytest.raises(ModelError, match=rf"x\.mnn: {most + 1} images.* are too many at once for MNN"):
        backend.check_group(most + 1, bank)
    backend.close()


def test_two_at_once_with_several_threads_each(mnn_exports):
    """MNN's threads serve all sessions of a process."""
    with Predictor(mnn_exports, threads=1) as one, Predictor(mnn_exports, threads=3) as other:
        expected = [one.predict_tensors(*group) for group in GROUPS]
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(p.predict_tensors, *group) for group in GROUPS * 3 for p in (one, other)]
        for call, right in zip(calls, [e for e in expected * 3 for _ in range(2)], strict=True):
            close(call.result(), right)


@pytest.mark.parametrize("operator", ["ReduceL2", "MatMul"])
def test_what_mnn_gets_wrong_is_not_written(exports, tmp_path, monkeypatch, operator):
    """Leave one of the operators as it is: MNN runs the file, and its maps are others."""
    spell_out = to_mnn.spell_out

    def all_but_one(model):
        model = onnx.ModelProto.FromString(model.SerializeToString())
        for node in model.graph.node:
            if node.op_type == operator:
                node.op_type = "Kept"
        model = spell_out(model)
        for node in model.graph.node:
            if node.op_type == "Kept":
                node.op_type = operator
        return model

    monkeypatch.setattr(to_mnn, "spell_out", all_but_one)
    with pytest.raises(ICNetError, match=r"x\.mnn: not written: MNN's maps differ from ONNX Runtime's"):
        build_mnn(exports, tmp_path / "x.mnn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "m.onnx: no such file"),
        (lambda p: p.mkdir(), "m.onnx: not a model file"),
        (lambda p: p.write_bytes(b"not a model"), "m.onnx: not an ONNX model"),
        (lambda p: p.write_bytes(b""), "m.onnx: not an ICNet export"),
    ],
)
def test_what_is_no_model(icnet, tmp_path, write, message):
    write(tmp_path / "m.onnx")
    assert message in refused(icnet, tmp_path)


def refused(icnet, folder):
    """What `icnet build` says of the model; it leaves nothing behind."""
    code, out, err = icnet("build", "--backend", "mnn", "--onnx", folder / "m.onnx", "--output", folder / "out/x.mnn")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not list(folder.glob("out/*"))
    return err


def test_the_model_itself_is_not_overwritten(icnet, exports):
    before = exports.read_bytes()
    code, _, err = icnet("build", "--backend", "mnn", "--onnx", exports, "--output", exports)
    assert code == 2
    assert "is an input of this run" in err
    assert exports.read_bytes() == before


def test_nothing_but_the_result_is_printed(mnn_exports, tmp_path, image_folder):
    """MNN's C++ prints when it is imported, and when it refuses a file."""
    image_folder("one", "a.png")
    (tmp_path / "bad.mnn").write_bytes(b"not a model")
    command = [sys.executable, "-m", "icnet_cli", "predict", tmp_path / "one", "--sisms", "builtin"]
    command += ["--output", tmp_path / "out", "--model"]
    done = subprocess.run([*command, mnn_exports], capture_output=True, text=True, check=True)
    starts = ("1 group", "maps: ", "to look at: ", "nearly empty", "nearly full")
    assert all(line.startswith(starts) for line in done.stdout.splitlines())
    assert "maps: " in done.stdout
    assert done.stderr == ""
    done = subprocess.run([*command, tmp_path / "bad.mnn"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "bad.mnn: not an MNN model" in done.stderr


def test_a_truncated_file_is_refused(mnn_exports, tmp_path):
    path = tmp_path / "half.mnn"
    path.write_bytes(mnn_exports.read_bytes()[: mnn_exports.stat().st_size // 2])
    with pytest.raises(ICNetError, match=r"half\.mnn: not an MNN model"):
        Predictor(path)


def test_a_file_that_fails_on_other_sizes_says_so(exports, tmp_path):
    """MNN shows a group axis of 1 and a dynamic one alike, so a file of others may be fixed without notice."""
    model = onnx.load(exports)
    graph = model.graph
    shape = onnx.numpy_helper.from_array(np.array([1, 224, 224]), "one")
    graph.initializer.append(shape)
    graph.node[-1].output[0] = "dynamic"
    graph.node.append(onnx.helper.make_node("Reshape", ["dynamic", "one"], ["maps"]))
    path = tmp_path / "one.mnn"
    onnx.save(model, path)
    convert_to_mnn(path)
    one, two = GROUPS[:2]
    with Predictor(path) as predictor:
        assert predictor.predict_tensors(*one).shape == (1, 224, 224)
        with pytest.raises(ICNetError, match=r"one\.mnn: "):
            predictor.predict_tensors(*two)
        assert predictor.predict_tensors(*one).shape == (1, 224, 224)


def test_closing_waits_for_the_call_in_work(mnn_exports):
    group = GROUPS[2]
    for _ in range(5):
        predictor = Predictor(mnn_exports)
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(predictor.predict_tensors, *group) for _ in range(4)]
            predictor.close()
        for call in calls:  # each is either whole or refused
            if call.exception() is None:
                assert call.result().shape == (5, 224, 224)
            else:
                assert "closed" in str(call.exception())
