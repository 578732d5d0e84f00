from pathlib import Path

import pytest

from benchmarks.agreement import prepare
from tests import simulated_gpu


@pytest.fixture(autouse=True)
def small_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products and copies that take no time."""
    monkeypatch.setattr("benchmarks.machine.SIDES", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("benchmarks.machine.COPIED", {"cpu": 1 << 20, "cuda": 1 << 20})


@pytest.fixture(scope="session")
def prepared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    prepare(folder, checkpoint, half=True)
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Engines that the simulated TensorRT was asked to build: (file, profiles)."""
    built = []

    def build_engine(onnx_path, output, profiles):
        built.append((output.name, [str(profile) for profile in profiles]))
        simulated_gpu.engine_file(output, onnx_path, [(p.min, p.opt, p.max) for p in profiles])

    monkeypatch.setattr("export.tensorrt_engine.build_engine", build_engine)
    return built
