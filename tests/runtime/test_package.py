"""The runtime as others have it: installed from a wheel, type-checked from outside, and without its extras."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel installs."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE", "icnet_cli.py"):
        copy(ROOT / name, source)
    copytree(ROOT / "runtime", source / "runtime")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=source, check=True, capture_output=True, timeout=120)
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


CALLER = """
from pathlib import Path
import numpy as np
from numpy.typing import NDArray
from runtime import Bank, ICNetError, Predictor

def maps(model: Path, images: list[Path], sisms: list[str]) -> list[NDArray[np.float32]]:
    with Predictor(model, threads=2) as predictor:
        for group in predictor.predict_groups([(images, sisms)]):
            return group
        bank: Bank = predictor.bank(images, sisms)
        return predictor.against(bank[1:] + bank, images, sisms)
"""
WRONG = """
def wrong(predictor: Predictor) -> None:
    maps: list[str] = predictor(["a.jpg"], ["a.png"])
    predictor(3, ["a.png"])
    predictor.bank(["a.jpg"], ["a.png"]).nothing
    Predictor("m.onnx", thread=2)
"""


def test_a_caller_sees_the_types(installed, tmp_path):
    """With mypy --strict, on the installed package: it takes `py.typed` for them to count."""
    site = tmp_path / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    copytree(installed / "runtime", site / "runtime")
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    caller = tmp_path / "caller.py"
    caller.write_text(CALLER + WRONG)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), str(caller)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    first = CALLER.count("\n") + 3  # the first wrong line
    found = [line.partition("caller.py:")[2].split(":")[0] for line in done.stdout.splitlines() if ": error:" in line]
    assert found == [str(first + i) for i in range(4)], done.stdout


@pytest.mark.parametrize("package", ["onnxruntime", "MNN"])
def test_what_to_install_is_for_this_copy(installed, package, tmp_path):
    """By the distribution's name from a wheel; from a clone by its path, wherever one stands."""
    suffix, extra = {"onnxruntime": (".onnx", "cpu"), "MNN": (".mnn", "mnn")}[package]
    model = tmp_path / f"m{suffix}"
    model.touch()
    code = f"""
import sys
sys.path.insert(0, sys.argv[1])
sys.modules[{package!r}] = None
from runtime import Predictor
Predictor({str(model)!r})
"""
    for place, folder, expected in [
        (installed, tmp_path, f"'icnet-deploy[{extra}]'"),
        (ROOT, ROOT, f"--editable '.[{extra}]'"),
        (ROOT, tmp_path, f"--editable '{ROOT}[{extra}]'"),
    ]:
        environment = os.environ | {"PYTHONPATH": ""}
        command = [sys.executable, "-c", code, str(place)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert f"{package} is not installed: pip install {expected}" in done.stderr


def test_onnx_runtime_reports_nothing(exports, tmp_path):
    """Its telemetry would leave a number of the device, and what it has not sent yet, in the home folder."""
    quiet = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(tmp_path)}
    code = f"from runtime import Predictor; Predictor({str(exports)!r}).close()"
    subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
