"""`icnet triton`: what it writes, by Triton's own protobuf, and what it refuses."""

import hashlib
import io
import json
import sys

import pytest
from PIL import Image

from runtime.files import bundled, write_bytes
from tests.runtime.detectors import detector_file

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")


@pytest.fixture
def engine(tmp_path):
    """Makes a file that passes for an engine of NVIDIA's TensorRT: only its sidecar is read."""

    def make(**record):
        path = tmp_path / "in" / "icnet.engine"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a plan")
        digest = hashlib.sha256(b"a plan").hexdigest()
        notes = {"tensorrt": "tensorrt", "tensorrt_version": "10.13.0", "profiles": [{"min": 1, "opt": 5, "max": 32}]}
        path.with_name("icnet.engine.json").write_text(json.dumps({"engine_sha256": digest} | notes | record))
        return path

    return make


def parsed(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_ragged_export_for_tritons_own_back_end(icnet, ragged_file, tmp_path):
    options = ("--max-groups", 4, "--queue", 9, "--timeout", 2.5, "--delay", 3, "--instances", 3, "--threads", 2)
    code, out, _ = icnet("triton", "--model", ragged_file, "--output", tmp_path / "new" / "repo", *options)
    assert (code, "up to 4 groups" in out) == (0, True)
    assert tree(tmp_path / "new") == [
        "repo",
        "repo/icnet",
        "repo/icnet/1",
        "repo/icnet/1/model.onnx",
        "repo/icnet/config.pbtxt",
    ]
    assert (tmp_path / "new/repo/icnet/1/model.onnx").read_bytes() == ragged_file.read_bytes()
    config = parsed(tmp_path / "new/repo/icnet")
    assert (config.backend, config.name, config.max_batch_size) == ("onnxruntime", "icnet", 4)
    (rgbs,), (maps,), (shapes,), (scattered,) = config.input, config.output, config.batch_input, config.batch_output
    assert (rgbs.name, list(rgbs.dims), rgbs.allow_ragged_batch) == ("rgbs", [-1, 224, 224, 4], True)
    assert (maps.name, list(maps.dims)) == ("maps", [-1, 224, 224])
    assert shapes.Kind.Name(shapes.kind) == "BATCH_ITEM_SHAPE"
    assert (list(shapes.target_name), list(shapes.source_input)) == (["shapes"], ["rgbs"])
    assert scattered.Kind.Name(scattered.kind) == "BATCH_SCATTER_WITH_INPUT_SHAPE"
    assert (list(scattered.target_name), list(scattered.source_input)) == (["maps"], ["rgbs"])
    queue = config.dynamic_batching.default_queue_policy
    assert config.dynamic_batching.max_queue_delay_microseconds == 3000
    assert (queue.max_queue_size, queue.default_timeout_microseconds, queue.timeout_action) == (9, 2_500_000, 0)
    assert [(group.count, group.kind) for group in config.instance_group] == [(3, 2)]  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_a_ragged_engine(icnet, engine, tmp_path):
    path = engine(kind="ragged")
    code, out, _ = icnet("triton", "--model", path, "--output", tmp_path / "repo", "--gpu", 0, "--gpu", 2)
    assert code == 0
    assert "built by tensorrt 10.13.0: the server needs the same version" in out
    config = parsed(tmp_path / "repo" / "icnet")
    assert config.backend == "tensorrt"
    assert [(group.kind, list(group.gpus)) for group in config.instance_group] == [(1, [0, 2])]  # KIND_GPU
    assert (tmp_path / "repo/icnet/1/model.plan").read_bytes() == b"a plan"


def test_any_other_model_for_the_python_back_end(icnet, exports, tmp_path):
    """With its bank export, as `icnet predict` takes it."""
    options = ("--backend", "python", "--max-images", 7, "--site", "/opt/it's/lib", "--site", "/src", "--name", "a-b")
    code, _, _ = icnet("triton", "--model", exports, "--output", tmp_path / "repo", *options)
    assert code == 0
    folder = tmp_path / "repo" / "a-b"
    files = {"icnet.onnx": "", "icnet.intra.onnx": ".intra", "icnet.banked.onnx": ".banked"}
    assert tree(folder / "1") == sorted([*files, "model.py"])
    for name, kind in files.items():
        assert (folder / "1" / name).read_bytes() == exports.with_suffix(f"{kind}.onnx").read_bytes()
    config = parsed(folder)
    settings = {key: value.string_value for key, value in config.parameters.items()}
    roles = {"model": "icnet.onnx", "intra": "icnet.intra.onnx", "banked": "icnet.banked.onnx"}
    assert settings == roles | {"max_images": "7"}
    assert config.model_warmup[0].inputs["rgbs"].dims == [1, 224, 224, 4]
    assert "sys.path[:0] = [\"/opt/it's/lib\", '/src']" in (folder / "1" / "model.py").read_text()


def test_a_detector_beside_the_model(icnet, exports, tmp_path):
    detector = detector_file(tmp_path / "u2net-small.onnx")
    options = ("--backend", "python", "--sism-model", detector, "--sism-normalise", "half", "--no-sism-minmax")
    assert icnet("triton", "--model", exports, "--output", tmp_path / "repo", *options)[0] == 0
    folder = tmp_path / "repo" / "icnet"
    assert (folder / "1/detector.u2net-small.onnx").read_bytes() == detector.read_bytes()
    config = parsed(folder)
    (files,) = config.input
    assert (files.name, files.data_type, list(files.dims), files.allow_ragged_batch) == ("files", 13, [-1], True)
    settings = {key: value.string_value for key, value in config.parameters.items()}
    wanted = {"detector": "detector.u2net-small.onnx", "sism_normalise": "half", "sism_minmax": "False"}
    assert wanted.items() <= settings.items()
    warmup = config.model_warmup[0].inputs["files"]
    assert (warmup.data_type, warmup.dims, warmup.input_data_file) == (13, [1], "pictures")
    stored = (folder / "warmup/pictures").read_bytes()
    assert int.from_bytes(stored[:4], "little") == len(stored) - 4
    assert Image.open(io.BytesIO(stored[4:])).size == (256, 256)
    assert icnet("triton", "--model", exports, "--output", tmp_path / "repo", "--backend", "python", "--files")[0] == 0
    assert (folder / "1/detector.detector.onnx").read_bytes() == bundled("detector.onnx").read_bytes()


def test_what_is_ours_is_replaced_as_a_whole_or_not_at_all(icnet, exports, ragged_file, tmp_path, monkeypatch):
    arguments = ("--model", exports, "--output", tmp_path / "repo", "--backend", "python")
    assert icnet("triton", *arguments)[0] == 0
    assert icnet("triton", *arguments, "--name", "other")[0] == 0
    before = tree(tmp_path)

    def full(path, content):
        if path.suffix == ".py":
            raise OSError(28, "No space left on device")
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("runtime.commands.triton.write_bytes", full)
        code, _, err = icnet("triton", *arguments, "--max-groups", 5)
        assert (code, "repo/icnet: can't be written: No space left on device" in err) == (2, True)
    assert tree(tmp_path) == before
    assert parsed(tmp_path / "repo" / "icnet").max_batch_size == 8
    (tmp_path / ".icnet-0123456789abcdef").mkdir()  # what a killed run left
    assert icnet("triton", "--model", ragged_file, "--output", tmp_path / "repo")[0] == 0
    assert tree(tmp_path / "repo" / "icnet") == ["1", "1/model.onnx", "config.pbtxt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo"]


def test_what_is_not_ours_is_in_the_way(icnet, exports, tmp_path):
    arguments = ("--model", exports, "--backend", "python", "--output")
    theirs = tmp_path / "repo" / "icnet" / "config.pbtxt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text('name: "icnet"')
    photos = tmp_path / "photos"
    (photos / "holiday").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for repository, message in (
        (theirs.parents[1], "repo/icnet: is there, and icnet triton did not write it"),
        (photos, "photos: no model repository, since holiday is no model"),
        (tmp_path / "file", "file: can't be written: Not a directory"),
    ):
        code, _, err = icnet("triton", *arguments, repository)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    assert tree(tmp_path) == before
    assert icnet("triton", *arguments, theirs.parents[1], "--name", "icnet2")[0] == 0  # beside another's model


def test_what_can_not_be_served(icnet, exports, ragged_file, engine, tmp_path):
    repo, packed = tmp_path / "repo", exports.with_suffix(".packed.onnx")
    python = ("--backend", "python")
    for model, options, message in (
        (exports, (), "a plain export: Triton would join groups of several requests into one. Export it with --ragged"),
        (packed, (), "a packed export: Triton would join"),
        (exports, ("--backend", "onnxruntime"), "a plain export: Triton would join"),
        (exports, ("--backend", "tensorrt"), "a plain export: Triton would join"),
        (ragged_file, python, "a ragged export, which Triton runs itself"),
        (ragged_file, ("--backend", "tensorrt"), "an ONNX file runs with --backend onnxruntime"),
        (exports, ("--files",), "--files and --sism-model: a detector takes --backend python"),
        (exports, (*python, "--sism-model", "none.onnx"), "none.onnx: no such model file"),
        (exports, (*python, "--sism-model", "d.xml"), "d.xml: icnet triton takes a detector's ONNX or MNN file"),
        (exports, (*python, "--sism-normalise", "half"), "--sism-normalise and --sism-minmax: are for a detector"),
        (ragged_file, ("--site", "/x"), "--site: is for --backend python"),
        (ragged_file, ("--device", "tensorrt"), "--device tensorrt: build an engine"),
        (ragged_file, ("--gpu", 1), "--gpu: the model runs on the CPU"),
        (ragged_file, ("--name", "../x"), "--name ../x: expected letters"),
        (ragged_file, ("--max-groups", 2**31), "config.pbtxt: Triton would not take these options"),
        (ragged_file, ("--device", "npu"), "--device npu: is for OpenVINO files"),
        (tmp_path / "icnet.xml", python, "an OpenVINO file; icnet triton takes ONNX files, MNN files and engines"),
        (tmp_path / "none.onnx", (), "none.onnx: no such model file"),
        (tmp_path / "none.onnx", python, "none.onnx: no such model file"),
        (exports.with_suffix(".intra.onnx"), python, "one of the two files of a bank export"),
    ):
        code, _, err = icnet("triton", "--model", model, "--output", repo, *options)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    for record, message in (
        ({}, "not a ragged export, or no sidecar of icnet build says so: Triton would join"),
        ({"kind": "plain"}, "a plain export: Triton would join"),
        ({"kind": "ragged", "tensorrt": "tensorrt_rtx"}, "built by TensorRT-RTX, which Triton does not run"),
        ({"kind": "ragged", "profiles": [{"min": 1}, {"min": 2}]}, "has several profiles, and Triton uses one"),
    ):
        code, _, err = icnet("triton", "--model", engine(**record), "--output", repo)
        assert (code, message in err) == (2, True), err
    assert not repo.exists()


def test_without_tritonclient(icnet, ragged_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    code, _, err = icnet("triton", "--model", ragged_file, "--output", tmp_path / "repo")
    assert (code, "tritonclient is not installed: pip install" in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "repo").exists()
