"""A lasting pool of threads, in which Pillow decodes, resizes and encodes outside Python's lock; engines' calls."""

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, Self, TypeVar

from runtime.errors import ICNetError

T = TypeVar("T")


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeCalls:
    """Counts the threads that are inside an engine's code, as a context manager; the interpreter waits for them.

    An engine's C++ code asks for Python's lock when it returns. After the interpreter has ended, a daemon thread does
    not get it: the thread is ended inside the engine, and that aborts the process.

    Raises:
        SystemExit: on entering, in another thread than the main one when the interpreter ends: it ends that thread.
    """

    def __init__(self) -> None:
        self._reset()
        atexit.register(self.end)
        if hasattr(os, "register_at_fork"):  # the child has none of the other threads, and perhaps their lock
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._ended = False

    def __enter__(self) -> None:
        with self._changed:
            if self._ended and threading.current_thread() is not threading.main_thread():
                raise SystemExit
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def end(self) -> None:
        """Refuse further calls, and wait for those in work."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._inside == 0)


native_calls = NativeCalls()


class Batch(Generic[T]):
    """Calls that were given to a pool."""

    def __init__(self, calls: Sequence[Callable[[], T]], futures: Sequence[Future[T]]) -> None:
        self._calls, self._futures = calls, futures

    def results(self) -> list[T]:
        """The calls' results, in order. The waiting thread runs the calls that no thread of the pool has begun.

        So a batch is finished however busy the pool is, even by a thread of the pool itself.

        Raises:
            Exception: the first failed call's, in the order of the calls. The calls that have not begun are cancelled.
        """
        try:
            pairs = zip(self._calls, self._futures, strict=True)
            return [call() if future.cancel() else future.result() for call, future in pairs]
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel the calls that have not begun, and wait for the others."""
        wait([future for future in self._futures if not future.cancel()])


@contextmanager
def beside(call: Callable[[], object]) -> Iterator[None]:
    """Run a call in a thread of its own while the block runs. If both fail, the error is the call's."""
    with ThreadPoolExecutor(1, "icnet-beside") as pool:
        future = pool.submit(call)
        try:
            yield
        finally:
            future.result()


class Workers:
    """A pool of threads; they start with the first calls and end with `close`.

    Args:
        threads: the number of threads; None for one per CPU.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or cores()
        self._pool = ThreadPoolExecutor(self._threads, "icnet-images")
        self._closed = False

    def submit(self, calls: Sequence[Callable[[], T]]) -> Batch[T]:
        """Begin with calls and return at once.

        Raises:
            ICNetError: the pool is closed.
        """
        try:
            return Batch(calls, [self._pool.submit(call) for call in calls])
        except RuntimeError as error:
            if not self._closed:
                raise
            raise ICNetError("this Predictor is closed") from error

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The calls' results, in order; in the calling thread alone if the pool has one thread.

        Raises:
            Exception: as `Batch.results`.
            ICNetError: the pool is closed.
        """
        if self._threads == 1 or len(calls) < 2:
            return [call() for call in calls]
        return self.submit(calls).results()

    def close(self) -> None:
        """Finish the calls that were submitted, and end the threads."""
        self._closed = True
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
