"""Detectors in other engines: files for OpenVINO and MNN as `icnet build` makes them, engines on a simulated GPU."""

import gc
import json
import logging
import shutil
import sys

import numpy as np
import onnx
import pytest

from export import to_mnn, to_openvino
from export.noise import DIRECT, WINOGRAD, with_noise
from export.onnx_file import load_model
from export.tensorrt_engine import Options, Profile, build_engine, trtexec_commands
from runtime import DependencyError, InputError, ModelError, Predictor
from runtime.detector import Detector
from tests.export.engines import SIZES
from tests.helpers import HAS_TENSORRT_RTX, convert_to_mnn
from tests.runtime.detectors import detector_file, kept, picture
from tests.simulated_gpu import Gpu, engine_file, install

ENGINES = (".xml", ".mnn", ".engine")
SIDES = [1, 32, 32, 3], [2, 96, 128, 3], [4, 320, 480, 3]  # of EGNet's engine
IMAGES = [picture(0, (97, 60)), picture(1, (97, 60)), picture(2, (64, 48))]


def build(source, suffix, path=None):
    """The file for another engine, made from an ONNX file; the one beside that file is made once."""
    beside, path = path is None, path or source.with_suffix(suffix)
    if beside and path.exists():
        return path
    if suffix == ".xml":
        pytest.importorskip("openvino", reason="openvino is not installed")
        to_openvino.build_openvino(source, path)
    elif suffix == ".mnn":
        pytest.importorskip("MNN", reason="MNN is not installed")
        to_mnn.build_mnn(source, path)
    else:
        engine_file(path, source, [{"images": SIDES}], name=source.stem)
    return path


@pytest.fixture
def gpu(monkeypatch):
    return install(Gpu(), monkeypatch)


def maps_of(detector, images):
    return detector([detector.look(image) for image in images])


def distance(found, expected):
    """|Δ| of maps, at most and on average."""
    assert [one.shape for one in found] == [one.shape for one in expected]
    delta = np.concatenate([np.abs(one - other).ravel() for one, other in zip(found, expected, strict=True)])
    return np.array([delta.max(), delta.mean()])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("suffix", "noise"), [(".xml", DIRECT), (".mnn", WINOGRAD), (".engine", None)])
def test_egnets_maps_are_those_of_onnx_runtime_at_every_size(egnet_file, tmp_path, suffix, noise):
    """As near as the rounding of the engine's convolutions allows; the simulated GPU has ONNX Runtime's own."""
    detector = Detector(build(egnet_file, suffix), threads=1)
    expected = maps_of(Detector(egnet_file, threads=1), IMAGES)
    assert all(one.max() - one.min() > 0.3 for one in expected)
    allowed = np.zeros(2)
    if noise is not None:
        (tmp_path / "noisy.onnx").write_bytes(with_noise(load_model(egnet_file), noise))
        allowed = 4 * distance(maps_of(Detector(tmp_path / "noisy.onnx", threads=1), IMAGES), expected)
        assert allowed[1] < 2e-3
    for _ in range(3):  # on a GPU: plain, captured, replayed
        assert (distance(maps_of(detector, IMAGES), expected) <= allowed).all()
    seen = [detector.look(image) for image in IMAGES]
    detector.close()
    with pytest.raises(Exception, match="this Predictor is closed"):
        detector(seen)


@pytest.mark.parametrize("suffix", ENGINES)
@pytest.mark.parametrize(
    "shape",
    [
        {"maps": 7, "size": (320, 320)},
        {"layout": "NHWC", "dtype": "uint8", "batch": "B"},
        {"layout": "NHWC", "dtype": "float16"},
        {"tail": None, "batch": 3},
    ],
    ids=["seven maps", "bytes", "half", "logits"],
)
def test_detectors_of_others(tmp_path, gpu, suffix, shape):
    """They are known by the name of the file that theirs was made from."""
    source = detector_file(tmp_path / "u2netp.onnx", **shape)
    path = tmp_path / f"x{suffix}"
    if suffix == ".engine":
        engine_file(path, source, [(1, 2, 4)], name="u2netp")
    else:
        build(source, suffix, path)
    reference, detector = Detector(source, threads=1), Detector(path, threads=1)
    assert detector.settings == reference.settings
    assert "by its name" in detector.settings
    most = 2e-3 if shape.get("dtype") == "float16" else 1e-5
    assert distance(maps_of(detector, IMAGES), maps_of(reference, IMAGES))[0] < most
    detector.close()
    gc.collect()
    assert gpu.leaks() == {}


@pytest.mark.parametrize("suffix", ENGINES)
def test_the_chain_is_the_detector_then_icnet_to_the_bit(exports, egnet_file, tmp_path, gpu, suffix):
    path = build(egnet_file, suffix)
    model = engine_file(tmp_path / "icnet.engine", exports, [(1, 2, 4)]) if suffix == ".engine" else exports
    with Predictor(model, sism_model=path, threads=2) as predictor:
        files = kept(predictor.detector, IMAGES, tmp_path)
        for one, other in zip(predictor(IMAGES), predictor(IMAGES, files), strict=True):
            assert np.array_equal(one, other)
    gc.collect()
    assert gpu.leaks() == {}


def test_the_detector_has_the_next_group_while_the_gpu_has_this(exports, egnet_file, tmp_path, gpu, monkeypatch):
    call = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda *a: gpu.note("detect", None) or call(*a))
    model = engine_file(tmp_path / "icnet.engine", exports, [(1, 2, 4)])
    with Predictor(model, sism_model=egnet_file, threads=1) as predictor:
        assert len(list(predictor.predict_groups([IMAGES[:2]] * 4))) == 4
    detects, waits = ([i for i, (kind, *_) in enumerate(gpu.log) if kind == name] for name in ("detect", "wait"))
    assert len(detects) == len(waits) == 4
    assert all(detects[k + 1] < waits[k] for k in range(3))


@pytest.mark.usefixtures("gpu")
def test_an_engines_own_range_of_sizes_holds(egnet_file, tmp_path, caplog):
    """Smaller and larger images are resized to what it takes; more than one call takes go in several."""
    detector = Detector(build(egnet_file, ".engine", tmp_path / "x.engine"))
    assert "at their own size, of 32 to 480 pixels on a side" in detector.settings
    with caplog.at_level(logging.WARNING):
        seen = [detector.look(picture(i, size)) for i, size in enumerate([(20, 50), (900, 300), (300, 900), (40, 40)])]
    assert [image.seen.shape[:2] for image in seen] == [(50, 32), (160, 480), (320, 160), (40, 40)]
    assert [record.getMessage() for record in caplog.records] == [
        "image: 900×300 pixels; images of more than 480 on a side are resized to that for the detector"
    ]
    several = [detector.look(picture(i, (48, 48))) for i in range(9)]
    alone = [detector([image])[0] for image in several]
    for one, other in zip(detector(several), alone, strict=True):
        assert np.abs(one - other).max() < 1e-5


@pytest.mark.usefixtures("gpu")
def test_memory_that_maps_of_any_size_would_not_fit_into(egnet_file, tmp_path):
    model = onnx.load(egnet_file)
    model.graph.output[0].type.tensor_type.shape.dim[1].ClearField("dim_param")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0  # as of an axis that follows from nothing
    onnx.save(model, tmp_path / "x.onnx")
    detector = Detector(engine_file(tmp_path / "x.engine", tmp_path / "x.onnx", [{"images": SIDES}]))
    with pytest.raises(ModelError, match=r"x\.engine: TensorRT gives sisms of shape .*there is no room"):
        detector([detector.look(IMAGES[0])])


def mistaken(detector_file_, exports, tmp_path, suffix):
    """A detector and an ICNet for an engine."""
    if suffix == ".engine":
        icnet = engine_file(tmp_path / "icnet.engine", exports, [(1, 2, 4)])
        return engine_file(tmp_path / "d.engine", detector_file_, [(1, 2, 4)]), icnet
    icnet = tmp_path / f"icnet{suffix}"
    if suffix == ".xml":
        to_openvino.convert(onnx.load(exports), icnet, icnet.with_suffix(".bin"))
    else:
        shutil.copy(exports, icnet)
        convert_to_mnn(icnet)
    return build(detector_file_, suffix), icnet


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("suffix", ENGINES)
def test_icnet_as_detector_and_a_detector_as_icnet(exports, tmp_path, suffix):
    detector, icnet = mistaken(detector_file(tmp_path / "u2net.onnx"), exports, tmp_path, suffix)
    with pytest.raises(InputError, match=rf"icnet{suffix}: ICNet, not a detector: it is for the model"):
        Predictor(exports, sism_model=icnet)
    with pytest.raises(ModelError, match=rf"{suffix}: .*takes one image .* a detector goes in sism_model"):
        Predictor(detector)


@pytest.mark.parametrize("suffix", [".xml", ".mnn"])
def test_damaged_files(exports, egnet_file, tmp_path, suffix):
    path = shutil.copy(build(egnet_file, suffix), tmp_path / f"d{suffix}")
    if suffix == ".xml":
        shutil.copy(egnet_file.with_suffix(".bin"), path.with_suffix(".bin"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(ModelError, match=rf"d\{suffix}: damaged, or edited"):
        Predictor(exports, sism_model=path)
    path.write_bytes(whole[:100])
    with pytest.raises(ModelError, match=rf"d\{suffix}: not an? (MNN|OpenVINO) model"):
        Predictor(exports, sism_model=path, verify=False)


def test_without_its_weights_or_a_gpu(exports, egnet_file, tmp_path, monkeypatch):
    path = shutil.copy(build(egnet_file, ".xml"), tmp_path / "d.xml")
    with pytest.raises(ModelError, match=r"d\.xml: its weights are not beside it, as d\.bin"):
        Predictor(exports, sism_model=path)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(DependencyError, match="pycuda is not installed"):
        Predictor(exports, sism_model=build(egnet_file, ".engine", tmp_path / "d.engine"))


@pytest.mark.usefixtures("gpu")
def test_where_each_runs_is_said_if_they_differ(exports, egnet_file, caplog):
    engine, xml, mnn = (build(egnet_file, suffix) for suffix in (".engine", ".xml", ".mnn"))
    with caplog.at_level(logging.WARNING):
        for path, device in ((xml, None), (mnn, None), (egnet_file, None), (engine, 0)):
            Predictor(exports, sism_model=path, device=device).close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{exports} runs on the CPU, the detector {engine} on the GPU"
    ]


@pytest.mark.parametrize(("backend", "suffix"), [("openvino", ".xml"), ("mnn", ".mnn")])
def test_the_command_builds_files_for_cpus(icnet, egnet_file, tmp_path, backend, suffix, monkeypatch):
    output = tmp_path / f"d{suffix}"
    argv = ["build", "--backend", backend, "--onnx", egnet_file, "--output", output]
    code, out, err = icnet(*argv)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert "single images; |Δ| to ONNX Runtime" in out
    code, _, err = icnet(*argv, "--sides", "1:2:3")
    assert (code, "--sides: is for TensorRT" in err) == (2, True)
    output.unlink()
    module = to_mnn if backend == "mnn" else to_openvino
    run = module.run_onnx
    monkeypatch.setattr(module, "run_onnx", lambda *a, **k: [array + 0.1 for array in run(*a, **k)])
    code, _, err = icnet(*argv)
    assert code == 2
    assert "not written: " in err
    assert "'s sisms differ from ONNX Runtime's" in err
    assert not output.exists()


@pytest.mark.skipif(not HAS_TENSORRT_RTX, reason="tensorrt-rtx has no wheel for this platform")
def test_tensorrt_builds_them_with_profiles_over_batch_and_size(icnet, egnet_file, tmp_path):
    output = tmp_path / "d.engine"
    code, _, err = icnet("build", "--onnx", egnet_file, "-o", output, *SIZES, "--sides", "32:96:160", "--inspect")
    assert (code, err) == (0, "")
    record = json.loads(output.with_name("d.engine.json").read_text())
    assert record["kind"] == "detector"
    assert record["options"]["sides"] == {"min": 32, "opt": 96, "max": 160}
    code, _, err = icnet("triton", "--model", output, "--output", tmp_path / "repository")
    assert (code, "d.engine: a detector, and icnet triton is for ICNet's files" in err) == (2, True)
    others = detector_file(tmp_path / "u2net.onnx", maps=7)
    record = build_engine(others, output, [Profile(1, 1, 1)])
    assert (record["kind"], record["onnx"]) == ("detector", "u2net.onnx")
    code, _, err = icnet("build", "--onnx", others, "-o", output, "--max", 1, "--sides", "32:96:160")
    assert (code, "takes images of one size; leave it out" in err) == (2, True)
    code, _, err = icnet("build", "--onnx", egnet_file, "-o", output, "--max", 1, "--sides", "32:96")
    assert (code, "--sides 32:96: expected three numbers of pixels" in err) == (2, True)


def test_trtexec_builds_the_same(egnet_file, tmp_path):
    texts = trtexec_commands(egnet_file, tmp_path / "x.engine", [Profile(1, 2, 4)], Options(sides=Profile(32, 96, 160)))
    for name, shape in {"min": "1x32x32x3", "opt": "2x96x96x3", "max": "4x160x160x3"}.items():
        assert f"--{name}Shapes=images:{shape}" in texts[11]
