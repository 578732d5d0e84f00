"""What `make gpu-check` installs, by the card, and Dockerfile.gpu as far as it can be read; nothing is installed."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path):
    """Run `make gpu-check` in a folder with a pip that only notes what it is asked for."""
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)

    def run(capability=None, nvcc=True, tensorrt=True):
        tools = tmp_path / "bin"
        if capability:
            script(tools / "nvidia-smi", f"echo {capability}")
        if nvcc:
            script(tools / "nvcc", "true")
        refused = "" if tensorrt else 'case "$*" in *tensorrt\\>*) exit 1 ;; esac'
        pip = tmp_path / ".venv-gpu" / "bin" / "pip"
        script(pip, f'echo "$@" >> {tmp_path}/asked\n{refused}')
        script(pip.with_name("icnet"), f'echo "icnet $@" >> {tmp_path}/asked')
        tools.mkdir(exist_ok=True)
        for tool in ("sh", "head", "test", "touch", "echo"):
            if not (tools / tool).exists():
                (tools / tool).symlink_to(shutil.which(tool))
        done = subprocess.run(
            [shutil.which("make"), "gpu-check"],
            cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        asked = tmp_path / "asked"
        return done.returncode, done.stdout + done.stderr, asked.read_text().splitlines() if asked.exists() else []

    return run


def test_without_a_gpu_nothing_is_installed(make):
    code, out, asked = make()
    assert (code != 0, asked) == (True, [])
    assert "no NVIDIA driver or GPU: nvidia-smi does not run" in out


def test_without_nvcc_nothing_is_installed(make):
    code, out, asked = make("9.0", nvcc=False)
    assert (code != 0, asked) == (True, [])
    assert "no nvcc on the PATH: PyCUDA is compiled with the CUDA toolkit" in out


def test_onnxruntime_gpu_and_nvidias_tensorrt(make):
    code, out, asked = make("9.0")
    assert code == 0, out
    assert asked == [
        "install --quiet --constraint constraints.txt --editable .[cuda,export,calibrate,gpu]",
        "install --quiet tensorrt>=10.1",
        "icnet bench gpu-check",
    ]


@pytest.mark.parametrize("capability", ["7.5", "8.6", "8.9", "12.0"])
def test_rtx_takes_its_place_where_it_may(make, capability):
    code, out, asked = make(capability, tensorrt=False)
    assert code == 0, out
    assert "TensorRT-RTX takes its place" in out
    assert asked[2] == "install --quiet --constraint constraints.txt tensorrt-rtx"


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_rtx_does_not_where_it_may_not(make, capability):
    code, out, asked = make(capability, tensorrt=False)
    assert code != 0
    assert f"which this GPU needs (compute capability {capability})" in out
    assert len(asked) == 2


def test_the_extras_are_there_and_never_both_onnxruntimes():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in ("Makefile", "Dockerfile.gpu"):
        found = re.search(r'--editable "\.\[(cuda[^\]]*)\]"', (ROOT / file).read_text())
        assert found is not None
        packages = [package for extra in found[1].split(",") for package in extras[extra]]
        assert any(package.startswith("onnxruntime-gpu[cuda,cudnn]") for package in packages)
        assert not any(re.match(r"onnxruntime\b(?!-gpu)", package) for package in packages)


def test_the_container_is_nvidias_and_runs_the_check():
    text = (ROOT / "Dockerfile.gpu").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    values = dict(steps)
    assert re.fullmatch(r"TENSORRT=\d\d\.\d\d-py3", values["ARG"])
    assert values["FROM"] == "nvcr.io/nvidia/tensorrt:${TENSORRT}"
    assert values["ENTRYPOINT"] == '["icnet"]'
    assert values["CMD"].startswith('["bench", "gpu-check"')
    assert os.fspath(".git") in (ROOT / ".dockerignore").read_text().split()
