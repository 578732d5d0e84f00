"""A pipe in the place of a file: reading it would wait for ever."""

import os
import signal

import pytest

from calibration.graph import ExportedModel
from calibration.ranges import read_cache
from calibration.sensitivity import read_precision_plan
from export.checkpoint import load_checkpoint
from export.onnx_file import read_bytes
from runtime import Bank, ICNetError, Predictor
from runtime.backends.engine_file import read_engine
from runtime.files import check_seal, digest


@pytest.fixture
def pipe(tmp_path):
    def hangs(*_):
        raise AssertionError("waits for the pipe")

    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("read", [read_engine, read_bytes, check_seal, digest, load_checkpoint, Bank.load, Predictor])
def test_it_is_refused(pipe, read):
    with pytest.raises(ICNetError, match="pipe"):
        read(pipe)


def test_calibration_refuses_it(pipe, model_file):
    with pytest.raises(ICNetError, match="not a precision plan"):
        read_precision_plan(pipe, ExportedModel(model_file))
    assert read_cache(pipe, {}) == (None, "it is not a calibration cache")
