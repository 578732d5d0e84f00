"""A Predictor that is closed, or a Python that exits, while groups are under way."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from runtime import ICNetError, Predictor
from runtime.backends.mnn import MnnBackend
from runtime.backends.onnx import OnnxBackend
from runtime.files import bank_files
from runtime.pipeline import Pipeline
from runtime.stream import Task
from runtime.threads import Workers
from tests.runtime.test_packing import tensors, until

ROOT = Path(__file__).parents[2]
CLOSED = "this Predictor is closed"


def test_a_call_in_chunks_ends_with_the_chunk_in_work(exports, monkeypatch):
    predictor = Predictor(bank_export=bank_files(exports), max_images=2, threads=1)
    bank = predictor.bank(*tensors(2))
    calls = []
    submit = OnnxBackend.submit

    def closing(self, *arrays, last=False):
        pending = submit(self, *arrays, last=last)
        calls.append(len(arrays[0]))
        if len(calls) == 2:
            predictor.close()
        return pending

    monkeypatch.setattr(OnnxBackend, "submit", closing)
    with pytest.raises(ICNetError, match=CLOSED):
        predictor.predict_tensors(*tensors(8), bank)
    assert calls == [2, 2]


def test_groups_that_wait_for_a_packed_call_end_at_once(exports):
    predictor = Predictor(exports.with_name("icnet.packed.onnx"), max_images=16, max_delay_ms=25_000, threads=1)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(predictor.predict_tensors, *tensors(2)) for _ in range(3)]
        until(lambda: len(predictor.pipeline._packer._waiting) == 3)
        start = time.monotonic()
        predictor.close()
        for future in waiting:
            with pytest.raises(ICNetError, match=CLOSED):
                future.result(60)
        assert time.monotonic() - start < 10
    with pytest.raises(ICNetError, match=CLOSED):
        predictor.predict_tensors(*tensors(2))


def test_groups_that_wait_for_their_turn_in_mnn_end_after_the_one_in_work(mnn_file, monkeypatch):
    predictor = Predictor(mnn_file, threads=1)
    run, release, runs = MnnBackend._run, threading.Event(), []

    def slow(self, arrays):
        runs.append(arrays)
        assert release.wait(30)
        return run(self, arrays)

    monkeypatch.setattr(MnnBackend, "_run", slow)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(predictor.predict_tensors, *tensors(1))
        until(lambda: runs)
        others = [pool.submit(predictor.predict_tensors, *tensors(1)) for _ in range(3)]
        time.sleep(0.2)  # so that they wait
        closing = pool.submit(predictor.close)
        time.sleep(0.2)
        release.set()
        assert len(first.result(30)) == 1
        for other in others:
            with pytest.raises(ICNetError, match=CLOSED):
                other.result(30)
        closing.result(30)
    assert len(runs) == 1


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_stream_ends_in_its_midst_whatever_is_made_of_errors(exports, on_error):
    predictor = Predictor(exports, threads=1)
    stream = predictor.predict_groups((tensors(1) for _ in range(9)), ahead=2, on_error=on_error)
    assert len(next(stream)) == 1
    predictor.close()
    with pytest.raises(ICNetError, match=CLOSED):
        next(stream)


def test_what_a_closed_stream_has_computed_is_finished_and_no_more_is_read(exports, monkeypatch):
    """All of a group's results are there, or none; images that had not been read are not read any more."""
    predictor = Predictor(exports, threads=2)
    read, written = [], []
    start = Pipeline.start

    def closing(self, groups, bank=None):
        pending = start(self, groups, bank)
        if len(groups[0][0]) == 2:
            self.close()  # as `Predictor.close` does first of all
        return pending

    monkeypatch.setattr(Pipeline, "start", closing)

    def reading(call, n):
        pixels = call()
        read.append(n)
        return pixels

    def after(pixels, maps):
        def write(index):
            time.sleep(0.05)
            written.append((len(maps), index))

        return [partial(write, index) for index in range(len(maps))]

    def tasks():
        for n in (3, 2, 4):
            yield Task([partial(reading, call, n) for call in predictor.pipeline.reads(*tensors(n))], after)

    found = []
    with pytest.raises(ICNetError, match=CLOSED):
        found.extend(predictor.pipeline.stream(tasks(), ahead=1))
    predictor.close()
    assert found[0] == [None] * 3
    assert sorted(written) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert 4 not in read


def test_images_that_a_left_stream_has_not_begun_to_read_are_not_read(exports):
    read, release = [], threading.Event()
    with Predictor(exports, threads=1) as predictor:
        predictor.pipeline.workers.submit([partial(release.wait, 30)])  # the pool is busy: this thread reads

        def reading(call, index):
            read.append(index)
            return call()

        def tasks():
            for index in range(5):
                yield Task([partial(reading, call, index) for call in predictor.pipeline.reads(*tensors(1))], restore)

        def restore(pixels, maps):
            return []

        stream = predictor.pipeline.stream(tasks(), ahead=4)
        next(stream)
        stream.close()
        release.set()
    assert read == [0, 1]  # the second is in the engine


def test_closing_waits_for_what_is_being_read():
    ended = []
    workers = Workers(1)
    started = threading.Event()

    def slow():
        started.set()
        time.sleep(0.1)
        ended.append(1)

    workers.submit([slow])
    assert started.wait(30)
    workers.close()
    assert ended == [1]


EXIT = """
import sys, threading, time
import numpy as np
from runtime import Predictor

predictor = Predictor(sys.argv[1], threads=1)
group = np.zeros((5, 224, 224, 3), np.uint8), np.zeros((5, 224, 224), np.uint8)
predictor.predict_tensors(*group)
calls = []

def work():
    while True:
        calls.append(1)
        predictor.predict_tensors(*group)

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
while len(calls) < 3:
    time.sleep(0.001)
"""


@pytest.mark.parametrize("model_file", ["onnx_file", "mnn_file"], indirect=True)
def test_python_exits_cleanly_while_daemon_threads_compute(model_file):
    """Without a word, and with exit code 0, however often."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", EXIT, model_file], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
