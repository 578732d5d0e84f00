"""Streams of groups: what overlaps, how far they go ahead, and what they leave behind when they stop."""

import threading
import time
from functools import partial

import numpy as np
import pytest

from runtime import ICNetError, InputError, ModelError, Predictor
from runtime.pipeline import Pipeline
from runtime.stream import Task
from runtime.threads import Workers
from tests.runtime.test_packing import tensors, until


@pytest.fixture
def pipeline(exports):
    with Predictor(exports, threads=2) as predictor:
        yield predictor.pipeline


def means(pixels, maps):
    return [partial(np.mean, map_) for map_ in maps]


def tasks(pipeline, sizes, after=means):
    for n in sizes:
        yield Task(pipeline.reads(*tensors(n)), after)


def test_outcomes_are_in_order_and_errors_among_them(pipeline):
    bad = InputError("a group that came to nothing")
    good = [*tasks(pipeline, (1, 3, 2))]
    unreadable = Task(pipeline.reads(["none.jpg"], ["none.png"]), means)
    found = list(pipeline.stream([good[0], bad, good[1], unreadable, good[2]]))
    assert [o if isinstance(o, ICNetError) else len(o) for o in (*found[:3], found[4])] == [1, bad, 3, 2]
    assert "none.jpg: no such file" in str(found[3])
    for outcome, n in ((found[0], 1), (found[2], 3), (found[4], 2)):
        np.testing.assert_allclose(outcome, pipeline.maps(*tensors(n)).mean((1, 2)), atol=1e-4)


def test_writing_goes_on_while_the_next_group_is_computed(pipeline, monkeypatch):
    """The first group's writing ends only when the second has reached the engine: without overlap that is never."""
    second_started = threading.Event()
    start = Pipeline.start

    def watched(self, groups, bank=None):
        if len(groups[0][0]) == 2:
            second_started.set()
        return start(self, groups, bank)

    monkeypatch.setattr(Pipeline, "start", watched)

    def after(pixels, maps):
        return [lambda: second_started.wait(30)] if len(maps) == 1 else []

    assert list(pipeline.stream(tasks(pipeline, (1, 2), after))) == [[True], []]


def test_images_of_later_groups_are_read_while_a_group_is_computed(pipeline, monkeypatch):
    read = []
    computing = threading.Event()
    start = Pipeline.start

    def slow(self, groups, bank=None):
        computing.set()
        until(lambda: len(read) == 3)
        return start(self, groups, bank)

    monkeypatch.setattr(Pipeline, "start", slow)

    def counted(call, first):
        pixels = call()
        if not first:
            assert computing.wait(30)
            read.append(1)
        return pixels

    def watched():
        for index, task in enumerate(tasks(pipeline, (1, 1, 1, 1))):
            yield Task([partial(counted, call, index == 0) for call in task.reads], task.after)

    assert len(list(pipeline.stream(watched(), ahead=4))) == 4


@pytest.mark.parametrize("ahead", [1, 3])
def test_memory_is_bounded_however_slow_the_writing_is(pipeline, ahead):
    """What has been read and not yet been written grows neither with the stream nor while its user is busy."""
    lock, alive, peak = threading.Lock(), 0, 0

    def count(change):
        nonlocal alive, peak
        with lock:
            alive += change
            peak = max(peak, alive)

    def write():
        time.sleep(0.01)
        count(-1)

    def source():
        for task in tasks(pipeline, [1] * 20, lambda pixels, maps: [write]):
            count(1)
            yield task

    for _ in pipeline.stream(source(), ahead=ahead):
        time.sleep(0.005)
    assert alive == 0
    assert peak <= ahead + 3  # in the engine, written behind it, and the one whose outcome is due


def test_a_failed_write_is_the_outcome_of_its_group_alone(pipeline):
    def fail():
        raise ModelError("disk")

    def after(pixels, maps):
        return [fail, lambda: 1] if len(maps) == 2 else [lambda: 1]

    found = list(pipeline.stream(tasks(pipeline, (1, 2, 3), after)))
    assert found[0] == found[2] == [1]
    assert str(found[1]) == "disk"


def test_a_stream_that_is_interrupted_finishes_what_it_has_computed(pipeline, monkeypatch):
    written = []
    start = Pipeline.start

    def interrupted(self, groups, bank=None):
        if len(groups[0][0]) == 3:
            raise KeyboardInterrupt
        return start(self, groups, bank)

    monkeypatch.setattr(Pipeline, "start", interrupted)

    def after(pixels, maps):
        def write(index):
            time.sleep(0.02)
            written.append((len(maps), index))

        return [partial(write, index) for index in range(len(maps))]

    with pytest.raises(KeyboardInterrupt):
        list(pipeline.stream(tasks(pipeline, (2, 3, 1), after)))
    assert sorted(set(written)) == [(2, 0), (2, 1)]
    assert len(list(pipeline.stream(tasks(pipeline, (1,))))) == 1  # the pool is free for others


def test_a_stream_that_is_left_reads_no_more(pipeline):
    read = []

    def watched():
        for task in tasks(pipeline, [1] * 50):
            read.append(1)
            yield task

    stream = pipeline.stream(watched(), ahead=2)
    next(stream)
    stream.close()
    assert len(read) <= 1 + 2 + 1


def test_a_closed_predictor_ends_its_streams(exports):
    predictor = Predictor(exports, threads=1)
    stream = predictor.predict_groups([tensors(1)] * 9, ahead=1)
    next(stream)
    predictor.close()
    with pytest.raises(ICNetError, match="closed"):
        list(stream)


def test_a_batch_is_finished_by_its_own_thread_if_the_pool_is_busy():
    release = threading.Event()
    with Workers(1) as workers:
        busy = workers.submit([lambda: release.wait(30)])
        assert workers.submit([threading.current_thread] * 3).results() == [threading.current_thread()] * 3

        nested = workers.submit([lambda: workers.submit([lambda: 5, lambda: 6]).results()])
        release.set()
        assert busy.results() == [True]
        assert nested.results() == [[5, 6]]


def test_after_a_failed_call_the_rest_of_its_batch_is_not_begun():
    begun, free = [], threading.Event()

    def fail():
        raise InputError("no such file")

    with Workers(1) as workers:
        busy = workers.submit([lambda: free.wait(30)])
        batch = workers.submit([fail, partial(begun.append, 1)])
        with pytest.raises(InputError, match="no such file"):
            batch.results()
        free.set()
        assert busy.results() == [True]
    assert begun == []


def test_groups_that_came_to_nothing_are_not_taken_ahead_without_end(pipeline):
    taken = []

    def errors():
        while len(taken) < 1000:
            taken.append(InputError(f"group {len(taken)}"))
            yield taken[-1]

    stream = pipeline.stream(errors(), ahead=3)
    for i in range(10):
        assert next(stream) is taken[i]
        assert len(taken) <= i + 1 + 3
    stream.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [(1.5, r"leave \[0, 1\]: \[0.5, 1.5\]"), (-0.5, r"leave \[0, 1\]: \[-0.5, 0.5\]"), (np.nan, "NaN or infinite")],
)
def test_maps_that_can_not_be_maps(value, message):
    pipeline = Pipeline("icnet.onnx", None, None, None, 0, 0)
    maps = np.full((2, 3, 3), 0.5, np.float32)
    maps[0, 0] = 0, 1, -0.0
    assert pipeline.checked(maps) is maps
    maps[0] = 0.5
    maps[1, 2, 1] = value
    with pytest.raises(ModelError, match=message):
        pipeline.checked(maps)


def test_a_cancelled_batch_is_not_begun():
    release, ran = threading.Event(), []
    with Workers(1) as workers:
        busy = workers.submit([lambda: release.wait(30)])
        workers.submit([lambda: ran.append(1)]).cancel()
        release.set()
        busy.results()
    assert ran == []
    with pytest.raises(ICNetError, match="closed"):
        workers.submit([lambda: 1])


def test_a_missing_sism_is_not_taken_for_a_built_in_one(exports):
    images, _ = tensors(2)
    with Predictor(exports) as predictor, pytest.raises(InputError, match=r"sisms\[1\]: .* got NoneType"):
        predictor(images, [images[0], None])
