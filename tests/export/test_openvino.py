"""Files for OpenVINO: how they are built and what refuses to be, and what only this backend has to get right."""

import json
import logging
import shutil
import threading
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import to_openvino
from export.cpu_proof import sample_calls
from export.noise import with_bf16
from export.onnx_file import cpu_session
from export.to_openvino import build_openvino
from runtime import DependencyError, ICNetError, InputError, ModelError, Predictor
from runtime.backends.openvino import OpenVinoBackend
from runtime.contract import INTERFACES, WEIGHTS, ExportKind
from runtime.files import digest
from tests.helpers import flipped
from tests.runtime.test_device_option import command

openvino = pytest.importorskip("openvino", reason="openvino is not installed")

GROUPS = [(call["images"], call["sisms"]) for call in sample_calls(INTERFACES[0])]


@pytest.fixture
def copied(openvino_exports, tmp_path):
    """The plain file, to be spoilt."""
    for suffix in (".xml", ".bin"):
        shutil.copy(openvino_exports.with_suffix(suffix), tmp_path)
    return tmp_path / "icnet.xml"


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1e-3


def test_the_command_builds_files_that_say_what_they_were_made_from(icnet, exports, tmp_path):
    path = tmp_path / "new" / "icnet.xml"
    code, out, err = icnet("build", "--backend", "openvino", "--onnx", exports, "--output", path)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert "groups of any size" in out
    assert sorted(p.name for p in path.parent.iterdir()) == ["icnet.bin", "icnet.xml"]
    notes = json.loads(openvino.Core().read_model(path).get_rt_info(["icnet", "notes"]).value)
    assert notes["onnx_sha256"] == digest(exports)
    assert notes["bin_sha256"] == digest(path.with_suffix(".bin"))
    assert notes["precision"] == "fp32"
    (weights,) = (p.value for p in onnx.load(exports).metadata_props if p.key == WEIGHTS)
    assert OpenVinoBackend(path).weights_digest == weights


def test_threads_of_callers_get_their_own_maps(openvino_exports):
    with Predictor(openvino_exports, threads=1) as predictor, ThreadPoolExecutor(6) as pool:
        expected = [predictor.predict_tensors(*group) for group in GROUPS]
        calls = [pool.submit(predictor.predict_tensors, *group) for group in GROUPS[:3] * 4]
        for call, right in zip(calls, expected[:3] * 4, strict=True):
            np.testing.assert_array_equal(call.result(), right)


def test_closing_waits_for_the_call_in_work(openvino_exports, monkeypatch):
    run, begun = OpenVinoBackend._run, threading.Event()

    def slow(self, *arguments):
        begun.set()
        return run(self, *arguments)

    monkeypatch.setattr(OpenVinoBackend, "_run", slow)
    backend = OpenVinoBackend(openvino_exports)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.submit, *GROUPS[3])
        assert begun.wait(10)
        backend.close()
        assert call.done() or call.result()
        assert call.result().result().shape == (12, 224, 224)
    with pytest.raises(ICNetError, match="is closed"):
        backend.submit(*GROUPS[0])


def test_it_is_compiled_for_fp32_unless_the_file_says_bf16(exports, openvino_exports, tmp_path, monkeypatch, caplog):
    """OpenVINO's own choice on a CPU with BF16 would be BF16."""
    asked = []
    compile_model = openvino.Core.compile_model

    def watched(self, model, device, options):
        asked.append(options["INFERENCE_PRECISION_HINT"])
        return compile_model(self, model, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", watched)
    Predictor(openvino_exports).close()
    path = tmp_path / "bf16.xml"
    record = build_openvino(exports, path, "bf16")
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with caplog.at_level(logging.WARNING):
        Predictor(path).close()
    assert asked == ["f32", "bf16" if has else "f32", "bf16" if has else "f32"]
    assert record["proved"] == ("bf16" if has else "fp32")
    assert ("has no BF16: computing in FP32" in caplog.text) is not has
    monkeypatch.setattr("runtime.openvino_library.has_bf16", lambda *_: True)
    Predictor(path).close()
    assert asked[-1] == "bf16"


def test_bf16_keeps_what_leads_to_the_order_of_the_pixels(icnet, exports, tmp_path):
    """The marks are those that OpenVINO reads: it writes them again, and from there on its CPU keeps such nodes."""
    options = ("--onnx", exports, "--output", tmp_path / "bf16.xml", "--precision", "bf16")
    code, out, _ = icnet("build", "--backend", "openvino", *options)
    assert code == 0
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert ("in FP32, as this CPU has no BF16" in out) is not has
    model = openvino.Core().read_model(tmp_path / "bf16.xml")
    openvino.serialize(model, str(tmp_path / "again.xml"))
    marked, others = [], []
    for layer in ElementTree.parse(tmp_path / "again.xml").iterfind("layers/layer"):
        names = [attribute.attrib["name"] for attribute in layer.iterfind("rt_info/attribute")]
        (marked if "DisablePrecisionConversion" in names else others).append(layer.attrib["type"])
    assert "Convolution" not in marked
    assert "TopK" not in others
    assert "SoftMax" in marked
    assert "SoftMax" not in others
    assert "ReduceL2" not in others
    assert {"ReduceMax", "ReduceMin"} & {*marked}
    assert not {"ReduceMax", "ReduceMin"} & {*others}
    assert {"MatMul", "Gather"} <= {*others}  # of RSCF, behind the order


def test_bf16s_noise_is_that_of_eight_bits(exports):
    """The floor of a BF16 file: its maps are other than FP32's, and not by much more than 2⁻⁸ explains."""
    model = onnx.load(exports)
    call = dict(zip(("images", "sisms"), GROUPS[2], strict=True))
    exact = cpu_session(exports, model.SerializeToString()).run(None, call)[0]
    rounded = cpu_session(exports, with_bf16(model), optimised=False).run(None, call)[0]
    assert 1e-4 < np.abs(rounded - exact).mean() < 5e-2


def test_memory_does_not_grow_over_a_stream_of_mixed_sizes(openvino_exports):
    resident = None
    with Predictor(openvino_exports, threads=1) as predictor:
        for turn in range(4):
            for n in (1, 3, 2, 5, 4):
                predictor.predict_tensors(*(array[:n] for array in GROUPS[3]))
            now = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            if turn == 1:
                resident = now
        assert now - resident < 8e6


def test_what_computes_something_else_is_not_written(exports, tmp_path, monkeypatch):
    run = to_openvino._run
    monkeypatch.setattr(to_openvino, "_run", lambda *a: [array * 0.9 for array in run(*a)])
    with pytest.raises(ICNetError, match=r"x\.xml: not written: OpenVINO's maps differ from ONNX Runtime's"):
        build_openvino(exports, tmp_path / "x.xml")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_missing_or_anothers(copied, openvino_exports):
    weights = copied.with_suffix(".bin")
    shutil.copy(openvino_exports.with_name("icnet.banked.bin"), weights)
    with pytest.raises(ModelError, match=r"icnet\.xml: .*icnet\.bin is (damaged, or )?another"):
        Predictor(copied)
    whole = openvino_exports.with_suffix(".bin").read_bytes()
    weights.write_bytes(flipped(whole, len(whole) // 2))
    with pytest.raises(ModelError, match=r"icnet\.xml: icnet\.bin is damaged, or another model's"):
        Predictor(copied)
    Predictor(copied, verify=False).close()
    weights.unlink()
    with pytest.raises(ModelError, match=r"icnet\.xml: its weights are not beside it, as icnet\.bin"):
        Predictor(copied)


def test_graphs_that_are_damaged_or_of_a_newer_openvino(copied):
    text = copied.read_text()
    copied.write_text(text.replace('type="TopK"', 'type="TopQ"', 1))
    with pytest.raises(ModelError, match=r"icnet\.xml: damaged, or edited"):
        Predictor(copied)
    with pytest.raises(ModelError, match=r"icnet\.xml: not an OpenVINO model, or one for a newer OpenVINO.*TopQ"):
        Predictor(copied, verify=False)
    copied.write_text(text[: len(text) // 2])
    with pytest.raises(ModelError, match=r"icnet\.xml: not an OpenVINO model"):
        Predictor(copied)
    copied.write_text(text.replace('version="11"', 'version="12"', 1))
    with pytest.raises(ModelError, match=r"icnet\.xml: "):
        Predictor(copied, verify=False)


def test_files_of_others_run_as_they_are(exports, tmp_path):
    """Converted from our ONNX file, whose digest OpenVINO copies."""
    path = tmp_path / "others.xml"
    model = openvino.Core().read_model(exports)
    openvino.serialize(model, str(path))
    with Predictor(exports) as reference, Predictor(path) as predictor:
        close(predictor.predict_tensors(*GROUPS[1]), reference.predict_tensors(*GROUPS[1]))


def test_devices(icnet, exports, openvino_exports, tmp_path):
    Predictor(openvino_exports, device="CPU").close()
    with pytest.raises(DependencyError, match="device XPU: OpenVINO has no such device here; it has CPU"):
        Predictor(openvino_exports, device="XPU")
    with pytest.raises(InputError, match=r"device=0: .*icnet\.xml takes OpenVINO's name of a device"):
        Predictor(openvino_exports, device=0)
    with pytest.raises(InputError, match=r"device='GPU': is for OpenVINO's files"):
        Predictor(exports, device="GPU")
    with pytest.raises(InputError, match=r"device=1\.5: expected a GPU's number"):
        Predictor(openvino_exports, device=1.5)
    code, _, err = icnet(*command("predict", openvino_exports, tmp_path / "out"), "--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "an OpenVINO file runs on cpu, gpu, npu" in err
    code, _, err = icnet(*command("predict", exports, tmp_path / "out"), "--device", "npu")
    assert (code, err.count("\n")) == (2, 1)
    assert "--device npu: is for OpenVINO files" in err
    assert icnet(*command("predict", openvino_exports, tmp_path / "out"), "--device", "cpu")[0] == 0
    for absent in {"gpu", "npu"} - {name.partition(".")[0].lower() for name in openvino.Core().available_devices}:
        code, _, err = icnet(*command("predict", openvino_exports, tmp_path / "out"), "--device", absent)
        assert (code, err.count("\n")) == (2, 1)
        assert f"device {absent.upper()}: OpenVINO has no such device here; it has CPU" in err


def test_every_kind_has_a_file(openvino_exports):
    kinds = {OpenVinoBackend(path).interface.kind for path in openvino_exports.parent.glob("*.xml")}
    assert kinds == set(ExportKind) - {ExportKind.FLOAT32, ExportKind.RAGGED, ExportKind.DETECTOR}
