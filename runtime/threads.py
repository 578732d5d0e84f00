"""Work in threads, and how many are worth having."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(calls: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """The calls' results, in order; Pillow decodes, resizes and encodes outside Python's lock.

    Args:
        calls: what to do.
        threads: how many at once; None for one per CPU.

    Raises:
        Exception: of the calls that failed the first one's; those that had not begun are left out.
    """
    threads = min(len(calls), threads or cores())
    if threads < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(threads, "icnet-images") as pool:
        return list(pool.map(lambda call: call(), calls))
