"""`icnet web`: what it writes, and what it refuses; `test_browser.py` has the site itself."""

import hashlib
import io
import json
import re
import tarfile
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from runtime.commands import web
from tests.helpers import BIRDS, DATA

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm package with small files under onnxruntime-web's names; its digest is taken for the pinned one."""
    path = tmp_path / "ort.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("other.js", *web.ORT_FILES):
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    monkeypatch.setattr(web, "ORT_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def site(icnet: Run, exports: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Build a site in tmp_path / "site" with more options; no models come with the package."""
    monkeypatch.setattr(web, "bundled", lambda name: None)

    def build(*options: object, model: Path = exports) -> tuple[int, str, str]:
        return icnet("web", "--model", model, "--output", tmp_path / "site", "--ort", package, *options)

    return build


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def detector(path: Path, name: str = "images", batch: Any = "B", output: str = "sisms", size: Any = "H") -> Path:
    """A file whose output is the mean of its input's channels."""
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", [name], ["floats"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axis"], [output], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(name, kinds.UINT8, [batch, size, size, 3])]
    outputs = [helper.make_tensor_value_info(output, kinds.FLOAT, [batch, size, size])]
    graph = helper.make_graph(nodes, "mean", inputs, outputs, [helper.make_tensor("axis", kinds.INT64, [1], [3])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_a_site_is_whole_and_says_what_it_has(site: Run, exports: Path, tmp_path: Path) -> None:
    found = detector(tmp_path / "detector.onnx", size=224)
    code, out, err = site("--sism-model", found, "--samples", DATA / "pasted/img/owl")
    assert (code, err) == (0, "")
    assert str(tmp_path / "site") in out
    written = files(tmp_path / "site")
    config = json.loads(written["site.json"])
    assert sorted(config["models"]) == ["banked", "detector", "intra"]
    assert written["models/intra.onnx"] == exports.with_name("icnet.intra.onnx").read_bytes()
    assert written["models/detector.onnx"] == found.read_bytes()
    assert len(written["models/check.bin"]) == 2 * 224 * 224
    assert {name for name in written if name.startswith("ort/")} == {f"ort/{name}" for name in web.ORT_FILES}
    (sample,) = config["samples"]
    assert sample["name"] == "owl"
    first = sorted((DATA / "pasted/img/owl").iterdir())[0]
    assert sample["images"][0]["name"] == first.name
    assert written[sample["images"][0]["file"]] == first.read_bytes()
    assert "sism" not in sample["images"][0]


def test_what_the_page_loads_is_there(site: Run, tmp_path: Path) -> None:
    """Whatever a page or module names lies in the site; and nothing is named with a scheme, but a namespace."""
    site()
    written = files(tmp_path / "site")
    for name in [name for name in written if name.endswith((".html", ".css", ".js")) and "/" not in name]:
        text = written[name].decode()
        for target in re.findall(r"""(?:from|import\(|src=|href=|Worker\(|fetch\()\s*['"](?:\./)?([^'"]+)['"]""", text):
            assert target in written, (name, target)
        assert not re.search(r"https?://", text), name


def test_the_policy_is_the_same_in_the_page_and_in_the_headers() -> None:
    page = (web.ASSETS / "index.html").read_text(encoding="utf-8")
    in_page = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    in_headers = re.search(r"Content-Security-Policy: (.+)", (web.ASSETS / web.HEADERS).read_text(encoding="utf-8"))
    assert in_page is not None
    assert in_headers is not None
    assert in_page[1] == in_headers[1]
    assert "default-src 'none'" in in_page[1]
    assert "unsafe-inline" not in in_page[1]


def test_a_site_is_replaced_and_a_folder_of_others_is_not(site: Run, exports: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    assert site()[0] == 0
    (folder / "stale.js").write_text("old")
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(exports.read_bytes())
    assert site(model=plain)[0] == 0
    assert not (folder / "stale.js").exists()
    assert json.loads((folder / "site.json").read_text())["models"] == {"model": "model.onnx"}
    (folder / "site.json").write_text("{}")
    before = files(folder)
    code, _, err = site()
    assert code == 2
    assert f"{folder}: was not made by icnet web and would be replaced" in err
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".icnet")] == []


def test_a_failure_leaves_the_old_site(site: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site()
    before = files(tmp_path / "site")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(web, "write_bytes", full)
    code, _, err = site()
    assert code == 2
    assert "No space left on device" in err
    assert files(tmp_path / "site") == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "pixels"}, "not a detector for a site: expected images uint8 [B, H, W, 3], found pixels"),
        ({"output": "maps"}, "not a detector for a site: expected sisms float32 [B, H, W], found maps"),
        ({"batch": 4}, "takes 4 images at once"),
    ],
)
def test_other_detectors_are_refused(site: Run, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    code, _, err = site("--sism-model", detector(tmp_path / "detector.onnx", **options))
    assert code == 2
    assert f"{tmp_path / 'detector.onnx'}: {reason}" in err
    assert not (tmp_path / "site").exists()


def test_other_models_are_refused(site: Run, exports: Path, tmp_path: Path) -> None:
    for model, reason in (
        (detector(tmp_path / "other.onnx"), "not an ICNet export"),
        (exports.with_name("icnet.packed.onnx"), "a packed export"),
        (tmp_path / "none.onnx", "no such model file"),
    ):
        code, _, err = site(model=model)
        assert code == 2
        assert reason in err
    assert site("--sism-model", exports)[0] == 2
    assert not (tmp_path / "site").exists()


def test_samples_that_a_browser_could_not_map_are_refused(site: Run, tmp_path: Path) -> None:
    tiff = tmp_path / "photos" / "a.tif"
    tiff.parent.mkdir()
    tiff.write_bytes(b"tiff")
    for options, reason in (
        (("--samples", BIRDS, "--sisms", "builtin"), "bird: a sample needs SISM files, or --sism-model"),
        (
            ("--samples", tiff.parent, "--sism-model", detector(tmp_path / "d.onnx")),
            f"{tiff}: browsers don't show .tif",
        ),
    ):
        code, _, err = site(*options)
        assert code == 2
        assert reason in err


def test_the_package_must_be_the_pinned_one(
    icnet: Run, exports: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.write_bytes(package.read_bytes() + b"\0")
    options = ("web", "--model", exports, "--output", tmp_path / "site")
    code, _, err = icnet(*options, "--ort", package)
    assert code == 2
    assert f"{package}: not the package {web.ORT} with SHA-256" in err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = icnet(*options)
    assert code == 2
    assert "npm is not installed" in err
    assert "--ort" in err


def test_the_server_sends_the_headers_and_the_types(site: Run, tmp_path: Path) -> None:
    site()
    with web.server(tmp_path / "site", 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        for name, kind in (
            ("", "text/html"),
            ("app.js", "text/javascript"),
            (f"ort/{web.ORT_FILES[2]}", "application/wasm"),
        ):
            with urllib.request.urlopen(f"http://127.0.0.1:{running.server_port}/{name}") as answer:
                assert answer.headers["Content-Type"] == kind
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        running.shutdown()
        thread.join()


def test_a_port_that_is_taken_is_named(site: Run, tmp_path: Path) -> None:
    site()
    with web.server(tmp_path / "site", 0) as running:
        code, _, err = site("--serve", running.server_port)
    assert code == 2
    assert f"--serve {running.server_port}: " in err
