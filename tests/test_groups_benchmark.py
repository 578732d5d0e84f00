import json

import pytest


def test_what_packing_and_chunks_cost(icnet, exports, tmp_path):
    options = ("--groups", 3, "--rounds", 1, "--large", 9, "--chunk", 2, "--threads", 1)
    code, out, _ = icnet("groups", "--model", exports, *options, "--output", tmp_path / "r.json")
    assert code == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["mean_difference"] < 1e-4
    assert set(results["seconds"]) == {"one by one", "packed"}
    assert list(results["peak_memory"]) == ["2 at once", "2 in chunks of 2", "9 in chunks of 2"]
    assert min(results["peak_memory"].values()) > 30e6  # of a whole process
    ratio = results["seconds"]["one by one"] / results["seconds"]["packed"]
    assert f"packed is {ratio:.3f} times as fast" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--sizes", 5, 3), "--sizes takes FEWEST ≤ MOST"),
        (("--rounds", 0), "numbers from 1"),
        (("--model", "gone.onnx"), "gone.onnx: can't be read"),
    ],
)
def test_bad_options(icnet, exports, extra, message):
    code, _, err = icnet("groups", "--model", exports, *extra)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
