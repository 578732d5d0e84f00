import time

import numpy as np
import pytest

from benchmarks import timing


def test_every_round_calls_all_in_an_order_of_its_own():
    order, times = [], {}
    calls = {name: (lambda name=name: order.append(name)) for name in "abcde"}
    for _ in timing.interleaved(calls, times, rounds=20):
        pass
    rounds = [tuple(order[i : i + 5]) for i in range(0, 100, 5)]
    assert all(sorted(names) == list("abcde") for names in rounds)
    assert len(set(rounds)) > 10
    assert {name: len(took) for name, took in times.items()} == dict.fromkeys("abcde", 20)


def test_a_round_that_is_broken_off_does_not_count():
    calls, times = iter(range(5)), {}

    def third_stops():
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in timing.interleaved({"a": lambda: None, "b": third_stops}, times, rounds=9):
            pass
    assert len(times["a"]) == len(times["b"]) == 2


def test_no_round_begins_after_the_limit_but_three_there_are():
    times = {}
    for _ in timing.interleaved({"a": lambda: time.sleep(0.01)}, times, rounds=100, limit=0.001):
        pass
    assert len(times["a"]) == 3


def test_warm_up_goes_on_until_calls_are_no_faster(monkeypatch):
    clock, took = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        clock[0] += took.pop(0)

    took[:] = [4.0, 2.0, 1.0, 0.984375, 0.5]
    assert timing.warm_up(call) == 0.984375
    assert took == [0.5]
    took[:] = [2.0, 2.0, 2.0, 2.0]
    assert timing.warm_up(call, fewest=3) == 2.0
    assert took == [2.0]
    took[:] = [11.0, 5.0]
    assert timing.warm_up(call) == 11.0  # ten seconds have passed
    took[:] = [0.5**i for i in range(20)]
    timing.warm_up(call)
    assert len(took) == 8


def test_the_interval_is_of_pairs():
    """What slows a round slows both: a ratio that is the same in every round is certain, however the times vary."""
    times = np.random.default_rng(0).uniform(1, 9, 7)
    exact = timing.ratio(2 * times, times)
    assert exact == pytest.approx({"ratio": 2, "ratio_low": 2, "ratio_high": 2})
    found = timing.ratio(np.random.default_rng(1).uniform(1, 9, 7), times)
    assert found["ratio_low"] < found["ratio"] < found["ratio_high"]


def test_a_line_through_points_on_a_line():
    assert timing.line([1, 2, 300], [5, 7, 603]) == pytest.approx((3, 2))


def test_a_line_is_as_close_to_small_values_as_to_large_ones():
    """Without weights the last point would decide, and the line would miss the first by two thirds."""
    offset, slope = timing.line([1, 2, 4, 100], [1, 2, 4, 150])
    assert [offset + slope * x for x in (1, 2, 4)] == pytest.approx([1, 2, 4], rel=0.15)
