"""`icnet calibrate`: the file that it writes, its groups, and bad input."""

import json
import re
import shutil

import onnx
import pytest

from calibration.graph import int8_share
from calibration.groups import open_groups
from runtime import ModelError
from runtime.files import check_seal
from tests.helpers import flipped


def test_icnet_calibrate_writes_a_file_that_explains_itself(icnet, narrow, groups, tmp_path):
    output = tmp_path / "new" / "icnet.int8.onnx"
    code, out, err = icnet("calibrate", "--onnx", narrow, "--groups", groups, "--output", output)
    assert code == 0
    assert "3 groups to calibrate on; 8 are enough" in err
    assert "% of the convolutions' operations in int8, entropy" in out
    assert "icnet.int8.onnx: against icnet.onnx, 6 images, which it was calibrated on: IoU at 0.5 " in out
    assert "run by onnxruntime" in out
    model = onnx.load(output)
    notes = {p.key: p.value for p in model.metadata_props}
    assert (notes["precision"], notes["rest"], notes["width"]) == ("int8", "fp32", "0.0625")
    assert (notes["calibration_groups"], notes["calibration_images"]) == ("3", "6")
    assert len(notes["source_sha256"]) == len(notes["calibration_sha256"]) == 64
    check_seal(output)
    with pytest.raises(ModelError, match="damaged, or edited"):
        check_seal(output, flipped(output.read_bytes(), output.stat().st_size // 2))
    assert float(notes["int8_share"]) == pytest.approx(int8_share(model), abs=1e-4)
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    assert icnet("predict", groups, "--model", output, "--output", tmp_path / "maps")[0] == 0


def test_bad_groups_are_named_and_skipped_only_if_asked(icnet, narrow, groups, tmp_path):
    folder = shutil.copytree(groups, tmp_path / "groups")
    (folder / "img/b/1.png").write_bytes(b"x")
    (folder / "sism/c/0.png").unlink()
    arguments = ("--onnx", narrow, "--groups", folder, "--output", tmp_path / "x.onnx", "--method", "minmax")
    code, _, err = icnet("calibrate", *arguments)
    assert code == 2
    assert "img/b/1.png: not an image" in err
    assert "--skip-bad" in err
    assert not (tmp_path / "x.onnx").exists()
    code, _, err = icnet("calibrate", *arguments, "--skip-bad")
    assert code == 0
    assert "group b is left out" in err
    assert "group c is left out" in err
    assert {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["calibration_groups"] == "1"
    (folder / "img/a/1.png").write_bytes(b"x")
    code, _, err = icnet("calibrate", *arguments, "--skip-bad")
    assert code == 2
    assert "none of its 3 groups can be read" in err


def test_a_file_that_agrees_poorly_with_its_export_warns(icnet, narrow, groups, validation, tmp_path):
    """Ranges of a thirtieth of what they were cut nearly everything off."""
    cache = tmp_path / "ranges.json"
    arguments = ("--onnx", narrow, "--groups", groups, "--method", "minmax", "--cache", cache)
    arguments += ("--validation", validation, "--output", tmp_path / "x.onnx")
    code, out, _ = icnet("calibrate", *arguments)
    assert code == 0
    assert "x.onnx: against icnet.onnx, 2 images: IoU" in out
    content = json.loads(cache.read_text())
    content["ranges"] = {name: limit / 30 for name, limit in content["ranges"].items()}
    cache.write_text(json.dumps(content))
    code, _, err = icnet("calibrate", *arguments)
    assert code == 0
    assert re.search(
        r"icnet calibrate: warning: x\.onnx: of 2 images \d have an IoU below 0\.5 with icnet\.onnx \(v/", err
    )


def test_groups_are_known_by_what_is_in_them(groups, tmp_path):
    first = open_groups(groups, groups / "sism")
    other = shutil.copytree(groups, tmp_path / "other")
    for kind in ("img", "sism"):
        (other / kind / "a").rename(other / kind / "z")  # now the last
    assert open_groups(other, other / "sism").sha256 == first.sha256
    assert open_groups(other, None).sha256 != first.sha256
    shutil.copy(other / "img/b/0.png", other / "img/z/0.png")
    assert open_groups(other, other / "sism").sha256 != first.sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", 0.01), "--max-drop and --validation go together"),
        (("--max-drop", -1, "--validation", "v"), "--max-drop -1: expected 0 to 1"),
        (("--max-drop", 0.1, "--validation", "v", "--precision-plan", "d"), "give one or the other"),
        (("--percentile", 0), "--percentile 0: expected more than 0"),
        (("--threads", 0), "--threads 0: expected 1"),
        (("--plot", "x.png"), "--plot draws what --max-drop found"),
        (("--rest", "fp16"), "is fp32, so what is not int8 can't be fp16: calibrate an export with --precision fp16"),
        (("--cache", "out.onnx"), "out.onnx: is another file of this run"),
        (("--precision-plan", "bad.json"), "bad.json: not a precision plan; icnet calibrate --max-drop writes one"),
        (("--precision-plan", "other.json"), "has no layer conv9"),
        (("--groups", "nowhere", "--sisms", "builtin"), "nowhere: no such folder"),
        (("--groups", "empty"), "empty: no images in it"),
        (("--groups", "empty", "--sisms", "builtin"), "empty: no images in it"),
        (("--sisms", "nowhere"), "nowhere: no such folder (it should hold the SISMs)"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(icnet, narrow, groups, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "other.json").write_text('{"float_layers": ["conv9"]}')
    (tmp_path / "empty" / "sism").mkdir(parents=True)
    arguments = ["--onnx", narrow, "--groups", groups, "--output", "out.onnx"]
    if "empty" in options and "--sisms" not in options:
        options = (*options, "--sisms", "empty/sism")
    code, _, err = icnet("calibrate", *arguments, *options)
    assert code == 2
    assert err.startswith("icnet calibrate: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out.onnx").exists()
