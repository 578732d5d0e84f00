"""Several groups in one call of a packed model: which go together, and how groups of several threads are joined."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ICNetError

Tensors = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # images and SISMs of a group


def first_fit(sizes: Sequence[int], limit: int) -> list[int]:
    """The waiting groups that go into the next call: the first in any case, then each that fits in the room left.

    Args:
        sizes: images of each group, in the order in which they came; one at least.
        limit: images that a call takes.

    Returns:
        Indices, ascending.
    """
    chosen, room = [0], limit - sizes[0]
    for index, size in enumerate(sizes[1:], 1):
        if size <= room:
            chosen.append(index)
            room -= size
    return chosen


class Packer:
    """Joins groups from several threads into calls.

    One of the waiting threads *collects*: when fewer than `slots` calls are in work, it takes the oldest group and all
    that fit beside it, and runs them in one call. Groups that come meanwhile wait for the next collector. So a group
    that comes alone runs at once, and calls fill up under load.

    Args:
        run: computes groups in one call; returns the maps of all, one after the other.
        limit: images that a call takes. A larger group gets a call of its own.
        slots: calls in work at once.
        delay: seconds that a group waits at most for others, though a call could start.
    """

    def __init__(
        self, run: Callable[[Sequence[Tensors]], NDArray[np.float32]], limit: int, slots: int, delay: float
    ) -> None:
        self._run, self._limit, self._slots, self._delay = run, limit, slots, delay
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._collecting = False
        self._in_work = 0
        self._closed: ICNetError | None = None

    def __call__(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The maps of one group, float32 [N, 224, 224].

        Raises:
            Exception: what `run` raises.
            ICNetError: the error given to `close`.
        """
        request = _Request((images, sisms), time.monotonic() + self._delay)
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            while batch := self._next_batch(request):
                self._compute(batch)
        finally:
            with self._changed:  # still there only if this thread was interrupted
                if request in self._waiting:
                    self._waiting.remove(request)
        if isinstance(request.outcome, BaseException):
            raise request.outcome
        assert request.outcome is not None
        return request.outcome

    def close(self, error: ICNetError) -> None:
        """End the groups that wait with this error, at once, and later ones too; calls in work are finished."""
        with self._changed:
            self._closed = error
            for request in self._waiting:
                request.outcome = error
            self._waiting = []
            self._changed.notify_all()

    def _next_batch(self, request: "_Request") -> "list[_Request]":
        """Wait until the request is answered (nothing), or this thread has collected a batch, of its own or not."""
        with self._changed:
            self._changed.wait_for(
                lambda: request.outcome is not None or (request in self._waiting and not self._collecting)
            )
            if request.outcome is not None:
                return []
            self._collecting = True
            try:
                self._changed.wait_for(lambda: self._in_work < self._slots or not self._waiting)
                if self._waiting:
                    self._changed.wait_for(self._full, self._waiting[0].deadline - time.monotonic())
                if not self._waiting:  # closed meanwhile
                    return []
                chosen = first_fit([request.size for request in self._waiting], self._limit)
                batch = [self._waiting[index] for index in chosen]
                self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
                self._in_work += 1
                return batch
            finally:
                self._collecting = False
                self._changed.notify_all()

    def _full(self) -> bool:
        return not self._waiting or sum(request.size for request in self._waiting) >= self._limit

    def _compute(self, batch: "list[_Request]") -> None:
        outcomes: list[NDArray[np.float32] | BaseException] = [ICNetError("a call was interrupted")] * len(batch)
        try:
            maps = self._run([request.tensors for request in batch])
            ends = np.cumsum([request.size for request in batch])
            outcomes = [*np.split(maps, ends[:-1])]
        except Exception as error:
            outcomes = [error] * len(batch)
        finally:
            with self._changed:
                self._in_work -= 1
                for request, outcome in zip(batch, outcomes, strict=True):
                    request.outcome = outcome
                self._changed.notify_all()


class _Request:
    """A group that waits for its maps; compared by identity."""

    def __init__(self, tensors: Tensors, deadline: float) -> None:
        self.tensors, self.deadline = tensors, deadline
        self.size = len(tensors[0])
        self.outcome: NDArray[np.float32] | BaseException | None = None
