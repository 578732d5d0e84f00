"""Timing of calls against each other, and the statistics of the times."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.records import Percentiles, Ratio

STEADY = 0.05  # warm-up is over once a call is faster than the best so far by less than this share
MAX_WARM_UPS = 12
WARM_UP_SECONDS = 10.0
RESAMPLES = 2000
MIN_ROUNDS = 3

Times = dict[str, list[float]]


def seconds(call: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def warm_up(call: Callable[[], object], fewest: int = 2) -> float:
    """Call until the times have settled, or twelve times or ten seconds have passed.

    Returns:
        The best time, in seconds.
    """
    begin = time.perf_counter()
    best, calls = float("inf"), 0
    while True:
        took = seconds(call)
        calls += 1
        settled = took > best * (1 - STEADY)
        best = min(best, took)
        if calls >= MAX_WARM_UPS or time.perf_counter() - begin > WARM_UP_SECONDS or (settled and calls >= fewest):
            return best


def interleaved(
    calls: Mapping[str, Callable[[], object]], times: Times, rounds: int, limit: float | None = None
) -> Iterator[None]:
    """Time calls against each other: all of them in every round, in a new random order.

    Args:
        calls: what to time.
        times: filled with the times in seconds of every whole round.
        rounds: how often.
        limit: seconds; once they have passed and there are three rounds, no further round begins.

    Yields:
        After every round.
    """
    begin = time.perf_counter()
    done = 0
    while done < rounds:
        if limit is not None and done >= MIN_ROUNDS and time.perf_counter() - begin > limit:
            return
        names = random.sample(list(calls), len(calls))
        for name, took in [(name, seconds(calls[name])) for name in names]:  # a round that is broken off is lost
            times.setdefault(name, []).append(took)
        done += 1
        yield


def percentiles(times: Sequence[float]) -> Percentiles:
    """Median, 90th and 99th percentile, in the times' unit."""
    median, p90, p99 = map(float, np.percentile(times, [50, 90, 99]))
    return {"median_s": median, "p90_s": p90, "p99_s": p99}


def ratio(base: Sequence[float], times: Sequence[float]) -> Ratio:
    """How many times as fast as `base`: the ratio of the medians, and its 95 % bootstrap interval.

    Args:
        base: times of the reference, by round.
        times: those of the other in the same rounds. Whole rounds are resampled (Efron & Tibshirani, 1993), because
            a slow round is slow for both.
    """
    first, other = np.asarray(base), np.asarray(times)
    rounds = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    ratios = np.median(first[rounds], axis=1) / np.median(other[rounds], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "ratio": float(np.median(first) / np.median(other)),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def interval(row: Mapping[str, Any]) -> str:
    """A ratio and its interval, for a table."""
    return f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Offset and slope of the straight line with the least relative error: large values do not outweigh small ones."""
    weights = 1 / np.maximum(np.asarray(y, float), 1e-12)
    slope, offset = np.polyfit(x, y, 1, w=weights)
    return float(offset), float(slope)


def extrapolated(values: Mapping[int, float], n: int) -> float:
    """The value at n, from those at other sizes by a straight line; 0 if they are fewer than two."""
    if n in values or len(values) < 2:
        return values.get(n, 0)
    offset, slope = line([*values], [*values.values()])
    return offset + slope * n
