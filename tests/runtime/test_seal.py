"""A model file says itself whether it is as it was written."""

import numpy as np
import onnx
import pytest

from export.onnx_file import save_model
from export.to_mnn import build_mnn, convert
from runtime import ModelError, Predictor
from runtime.contract import FILE_DIGEST, WEIGHTS
from runtime.files import check_seal
from tests.helpers import flipped, group

NAMES = ("icnet.onnx", "icnet.packed.onnx", "icnet.intra.onnx", "icnet.banked.onnx", "icnet.mnn")
RUN = ("icnet.onnx", "icnet.mnn")
SIGN = 7  # the bit, in the last byte of a little-endian float


@pytest.fixture(scope="module")
def folder(exports):
    """The exports of a narrow network, and the plain one for MNN."""
    pytest.importorskip("MNN", reason="MNN is not installed")
    build_mnn(exports, exports.with_suffix(".mnn"))
    return exports.parent


@pytest.fixture
def damaged(exports, tmp_path):
    """The plain export with one bit flipped: the sign of a weight."""
    path = tmp_path / "damaged.onnx"
    whole = exports.read_bytes()
    path.write_bytes(flipped(whole, weight(whole, exports), SIGN))
    return path


def weight(data, export):
    """Where the last byte of the first convolution's first weight is."""
    model = onnx.load(export)
    first = next(i for i in model.graph.initializer if i.name.endswith("vgg.0.weight"))
    return data.index(onnx.numpy_helper.to_array(first).tobytes()) + 3


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bits_are_noticed(folder, tmp_path, name):
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(0)
    check_seal(folder / name)
    key = whole.index(FILE_DIGEST.encode())
    for position, bit in zip(rng.integers(0, len(whole), 200), rng.integers(0, 8, 200), strict=True):
        if key <= position < key + len(FILE_DIGEST) + 4:
            continue  # without its key the digest is not found
        with pytest.raises(ModelError, match="x: damaged, or edited"):
            check_seal(tmp_path / "x", flipped(whole, position, bit))
    for position in range(key + len(FILE_DIGEST) + 4, key + len(FILE_DIGEST) + 60):  # the digest's own digits
        with pytest.raises(ModelError, match="x: damaged, or edited"):
            check_seal(tmp_path / "x", flipped(whole, position))


@pytest.mark.parametrize("name", RUN)
def test_a_weight_that_changes_the_maps_is_noticed_before_it_runs(folder, tmp_path, name):
    path, whole = tmp_path / name, (folder / name).read_bytes()
    path.write_bytes(flipped(whole, weight(whole, folder / "icnet.onnx"), SIGN))
    with Predictor(folder / name) as predictor, Predictor(path, verify=False) as unverified:
        maps = [each.predict_tensors(*group(2)) for each in (predictor, unverified)]
    assert np.abs(maps[0] - maps[1]).max() > 1e-3
    with pytest.raises(ModelError, match=rf"{name}: damaged, or edited: .*; export or build it again"):
        Predictor(path)


@pytest.mark.parametrize("name", RUN)
def test_a_file_that_is_cut_off_is_refused(folder, tmp_path, name):
    path, whole, rng = tmp_path / name, (folder / name).read_bytes(), np.random.default_rng(0)
    for length in (*rng.integers(0, len(whole), 10), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=name):
            Predictor(path)


def test_an_edited_file_is_refused_until_its_digest_is_gone(exports, tmp_path):
    """`onnx.save` keeps the metadata, whatever was changed."""
    path = tmp_path / "edited.onnx"
    model = onnx.load(exports)
    notes = {p.key: p.value for p in model.metadata_props} | {WEIGHTS: "0" * 64}
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, path)
    with pytest.raises(
        ModelError, match=rf"on purpose\? Remove {FILE_DIGEST} from its metadata, or use .*verify=False"
    ):
        Predictor(path)
    Predictor(path, verify=False).close()
    del notes[FILE_DIGEST]
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, path)
    Predictor(path).close()
    save_model(model, path)
    check_seal(path)
    assert FILE_DIGEST.encode() in path.read_bytes()


def test_the_bank_files_are_verified_too(exports, tmp_path):
    files = []
    for name in ("icnet.intra.onnx", "icnet.banked.onnx"):
        whole = exports.with_name(name).read_bytes()
        files.append(tmp_path / name)
        files[-1].write_bytes(flipped(whole, len(whole) // 2))
    for bank in ((files[0], exports.with_name("icnet.banked.onnx")), (exports.with_name("icnet.intra.onnx"), files[1])):
        with pytest.raises(ModelError, match="damaged, or edited"):
            Predictor(bank_export=bank)


def test_what_others_convert_has_no_digest(folder, tmp_path):
    """MNN's converter copies the metadata of the ONNX file, with that file's digest."""
    convert(folder / "icnet.onnx", onnx.load(folder / "icnet.onnx"), tmp_path / "x.mnn", "", [])
    assert FILE_DIGEST.encode() in (tmp_path / "x.mnn").read_bytes()
    Predictor(tmp_path / "x.mnn").close()


@pytest.mark.parametrize(
    "command",
    [
        "predict DATA/img/cats --sisms builtin --model MODEL --output OUT",
        "evaluate DATA --models MODEL --output OUT/r.json",
        "calibrate --onnx MODEL --groups DATA --output OUT/int8.onnx",
        "build --onnx MODEL --max 4 --output OUT/x.engine",
        "build --onnx MODEL --max 4 --output OUT/x.engine --trtexec",
        "build --backend mnn --onnx MODEL --output OUT/x.mnn",
        "bench roofline MODEL --size 1 --output OUT/r.json",
    ],
    ids=lambda command: " ".join(command.split()[:2]),
)
def test_no_command_reads_a_damaged_model(icnet, image_folder, damaged, tmp_path, command):
    for part in ("img", "gt", "sism"):
        image_folder(f"data/{part}/cats", "a.png", "b.png", mode="RGB" if part == "img" else "L")
    for word, path in {"DATA": tmp_path / "data", "MODEL": damaged, "OUT": tmp_path / "out"}.items():
        command = command.replace(word, str(path))
    code, out, err = icnet(*command.split())
    assert (code, out) == (2, "")
    assert "damaged.onnx: damaged, or edited" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").rglob("*.*")]
