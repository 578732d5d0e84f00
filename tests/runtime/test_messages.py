"""What reaches a terminal: one line of ours, whatever is in the names of files, and nothing of libraries."""

import os
import pickle

import numpy as np
import onnx
import pytest
from PIL import Image

import icnet_cli
from export.onnx_file import load_model, save_model
from runtime import InputError, ModelError, Predictor
from tests.runtime.test_packing import tensors


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb.png", r"a\nb.png"),
        ("a\r\x1b[2Kb.png", r"a\r\x1b[2Kb.png"),
        ("a\x9b31mb.png", r"a\x9b31mb.png"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("a\u2028b.png", r"a\u2028b.png"),
        ("a\udce9b.png", r"a\udce9b.png"),
        ("Käse 猫 👩\u200d🔬 \u0645\u06cc\u200c.png", "Käse 猫 👩\u200d🔬 \u0645\u06cc\u200c.png"),
        (r"a\n b.png", r"a\n b.png"),
    ],
)
def test_names_of_files_are_shown_on_one_line(icnet, tmp_path, name, shown):
    path = tmp_path / name
    error = InputError(f"{path}: no such file")
    assert str(error) == f"{tmp_path}/{shown}: no such file"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    code, _, err = icnet("predict", path, "--model", "m.onnx", "--output", tmp_path / "out")
    assert (code, err) == (2, f"icnet predict: error: {tmp_path}/{shown}: no such folder\n")


def test_options_are_shown_on_one_line(icnet, capsys):
    with pytest.raises(SystemExit):
        icnet_cli.main(["predict", "x", "--threads", "\x1b[2J\n"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def failing(path, to):
    """A copy of a model that loads, and fails on any group of fewer than 7 images."""
    model = load_model(path)
    for node in model.graph.node:
        node.output[:] = ["other" if name == "maps" else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([6], np.int64), "seventh"))
    for kind, inputs, output in (
        ("Gather", ["other", "seventh"], "map"),
        ("Sub", ["map", "map"], "zero"),
        ("Add", ["other", "zero"], "maps"),
    ):
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [output]))
    save_model(model, to)


def test_onnx_runtime_writes_no_lines_of_its_own(exports, tmp_path, capfd):
    failing(exports, tmp_path / "x.onnx")
    with Predictor(tmp_path / "x.onnx", threads=1) as predictor:
        capfd.readouterr()
        with pytest.raises(ModelError, match="Gather"):
            predictor.predict_tensors(*tensors(2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "jpeg", "zstd"])
def test_libtiff_writes_no_lines_of_its_own(exports, tmp_path, capfd, compression):
    folder = tmp_path / "group"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.tif", compression=compression)
    content = bytearray((folder / "a.tif").read_bytes())
    content[8:68] = bytes(byte ^ 0x5A for byte in content[8:68])
    (folder / "a.tif").write_bytes(content)
    capfd.readouterr()
    code = icnet_cli.main(
        ["predict", str(folder), "--model", str(exports), "--sisms", "builtin", "--output", str(tmp_path / "out")]
    )
    err = capfd.readouterr().err
    assert code == 2
    assert err.count("\n") == 1, err
    assert "a.tif: damaged or truncated image" in err


@pytest.mark.skipif(os.name != "posix", reason="names of files are text here")
def test_a_model_whose_name_is_not_utf8(exports, mnn_file, tmp_path):
    for source in (exports, mnn_file):
        path = tmp_path / os.fsdecode(b"caf\xe9" + source.suffix.encode())
        path.write_bytes(source.read_bytes())
        if source.suffix == ".mnn":
            with pytest.raises(ModelError, match=r"caf\\udce9\.mnn: MNN takes names .* UTF-8 only; rename it"):
                Predictor(path)
        else:
            with Predictor(path, threads=1) as predictor:
                assert len(predictor.predict_tensors(*tensors(2))) == 2
