"""How a stream of groups goes through the models: read ahead, run, and what follows (restore, write), in order.

    files, arrays → READING (pool) → READY → RUNNING (engine) → AFTER (pool) → DONE

All that is done to pixels is done in the pool of `Workers`. The caller's thread hands tensors to the engines, the
detector's before ICNet's. While it waits for the pool, it takes part in the pool's work. So on a CPU, where each engine
uses every core, they take turns; an engine that computes on its own (TensorRT) has a group while the detector has the
next one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Pending
from runtime.bank import Bank
from runtime.detector import Undetected
from runtime.errors import ICNetError
from runtime.packing import Tensors, first_fit
from runtime.preprocess import GroupPixels, Pixels
from runtime.threads import Batch, Workers

T = TypeVar("T")
Maps = NDArray[np.float32]
Detected = Callable[[int, NDArray[np.uint8]], object]


@dataclass(frozen=True)
class Task(Generic[T]):
    """What is to be done for a group in a stream.

    Attributes:
        reads: a call per image, from `Pipeline.reads`.
        detected: called in the pool with the index and the SISM, uint8 [height, width] of the image's size, of each
            image whose SISM a detector made; None: nobody wants them.
        after: what follows on the maps, float32 [N, 224, 224] in [0, 1]: calls for the pool, in any number. Their
            results, in order, are the outcome of the group.
    """

    reads: Sequence[Callable[[], Pixels | Undetected]]
    after: Callable[[GroupPixels, Maps], Sequence[Callable[[], T]]]
    detected: Detected | None = None


class Runs(Protocol):
    """What a stream needs of a `Pipeline`, whose methods these are."""

    workers: Workers

    def complete(self, read: Sequence[Pixels | Undetected], detected: Detected | None = None) -> GroupPixels:
        """A group's pixels, after the detector has made the SISMs that are missing."""

    def start(self, groups: Sequence[Tensors], bank: Bank | None = None) -> Pending:
        """Start on groups in one call."""

    def finish(self, pending: Pending, sizes: Sequence[int]) -> list[Maps]:
        """Wait for a call: the maps of each of its groups."""

    def checked(self, maps: Maps) -> Maps:
        """The maps of a group, if they can be maps at all."""


class State(Enum):
    """How far a group of a stream has come."""

    READING = auto()  # the pool decodes and resizes; a detector makes missing SISMs
    READY = auto()  # waits for a call
    RUNNING = auto()  # in a call
    AFTER = auto()  # the pool restores, writes …
    DONE = auto()  # has its outcome


class _Job(Generic[T]):
    """A group of a stream, on its way from state to state."""

    def __init__(self, task: Task[T] | ICNetError, pipeline: Runs) -> None:
        self._pipeline = pipeline
        self.state = State.READING
        self.pixels: GroupPixels | None = None
        self.outcome: list[T] | ICNetError = []
        if isinstance(task, ICNetError):
            self.end(task)
            return
        self._task = task
        self._reading = pipeline.workers.submit(task.reads)
        self._after: Batch[T] | None = None

    @property
    def tensors(self) -> Tensors:
        assert self.pixels is not None
        return self.pixels.images, self.pixels.sisms

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.tensors[0])

    def wait_for_pixels(self) -> None:
        """From READING to READY, or to DONE if an image can't be used."""
        try:
            self.pixels = self._pipeline.complete(self._reading.results(), self._task.detected)
            self.state = State.READY
        except ICNetError as error:
            self.end(error)

    def follow_up(self, maps: Maps) -> None:
        """From RUNNING to AFTER."""
        assert self.pixels is not None
        self._after = self._pipeline.workers.submit(self._task.after(self.pixels, maps))
        self.pixels = None  # kept by the calls that need them
        self.state = State.AFTER

    def wait_for_outcome(self) -> None:
        """From AFTER to DONE."""
        assert self._after is not None
        try:
            self.outcome = self._after.results()
            self.state = State.DONE
        except ICNetError as error:
            self.end(error)

    def end(self, error: ICNetError) -> None:
        """From any state to DONE."""
        self.outcome, self.state, self.pixels = error, State.DONE, None

    def stop(self) -> None:
        """Read no more images; but what has been computed is finished, so that a group's files are all there."""
        if self.state is State.READING:
            self._reading.cancel()
        elif self.state is State.AFTER:
            self.wait_for_outcome()


class Stream(Generic[T]):
    """The groups of one stream that are under way, in their order, and the calls that are in work.

    Args:
        pipeline: runs the calls.
        tasks: the groups.
        ahead: groups that are READING at once.
        slots: calls in work at once.
        full: images in a call of several groups; 0 for one group per call.
        bank: what the images are compared with, if not with their own group.
    """

    def __init__(
        self,
        pipeline: Runs,
        tasks: Iterable[Task[T] | ICNetError],
        ahead: int,
        slots: int,
        full: int,
        bank: Bank | None,
    ) -> None:
        self._pipeline, self._tasks = pipeline, iter(tasks)
        self._ahead, self._slots, self._full, self._bank = ahead, slots, full, bank
        self._ended: Exception | None = None  # what the groups' source raised
        self._jobs: deque[_Job[T]] = deque()
        self._calls: deque[tuple[Pending, list[_Job[T]]]] = deque()

    def __iter__(self) -> Iterator[list[T] | ICNetError]:
        try:
            while self._read_ahead():
                first = self._jobs[0]
                while first.state is not State.DONE:
                    self._step(first)
                self._jobs.popleft()
                yield first.outcome
            if self._ended is not None:
                raise self._ended
        finally:
            for job in self._jobs:
                job.stop()

    def _step(self, first: _Job[T]) -> None:
        """Do what brings the stream forward: first of all keep the engine busy, then wait for the oldest group."""
        if len(self._calls) < self._slots and (batch := self._next_batch()):
            self._start(batch)
        elif first.state is State.AFTER:
            first.wait_for_outcome()
        elif self._calls:
            self._finish()

    def _read_ahead(self) -> bool:
        """Begin to read the next groups; whether any are under way."""
        reading = sum(job.state in (State.READING, State.DONE) for job in self._jobs)
        while reading < self._ahead and (task := self._next_task()) is not None:
            self._jobs.append(_Job(task, self._pipeline))
            reading += 1
        return bool(self._jobs)

    def _next_task(self) -> Task[T] | ICNetError | None:
        try:
            return next(self._tasks, None)
        except Exception as error:
            self._ended, self._tasks = error, iter(())
            return None

    def _next_batch(self) -> list[_Job[T]]:
        """The groups of the next call: the oldest that is READY, and of those behind it all that fit beside it."""
        ready: list[_Job[T]] = []
        index = 0
        while self._read_ahead() and index < len(self._jobs):
            job = self._jobs[index]
            if job.state is State.READING:
                job.wait_for_pixels()
            if job.state is State.READY:
                ready.append(job)
                if sum(job.size for job in ready) >= self._full:
                    break
            index += 1
        return [ready[i] for i in first_fit([job.size for job in ready], self._full)] if ready else []

    def _start(self, batch: list[_Job[T]]) -> None:
        try:
            self._calls.append((self._pipeline.start([job.tensors for job in batch], self._bank), batch))
            for job in batch:
                job.state = State.RUNNING
        except ICNetError as error:
            for job in batch:
                job.end(error)

    def _finish(self) -> None:
        """Wait for the oldest call."""
        pending, batch = self._calls.popleft()
        try:
            maps_of = self._pipeline.finish(pending, [job.size for job in batch])
        except ICNetError as error:
            for job in batch:
                job.end(error)
            return
        for job, maps in zip(batch, maps_of, strict=True):
            try:
                job.follow_up(self._pipeline.checked(maps))
            except ICNetError as error:
                job.end(error)
