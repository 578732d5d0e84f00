"""How groups go through the models: read ahead, run, and what follows (restore, write), in order.

    files, arrays → READING (pool) → READY → RUNNING (engine) → AFTER (pool) → DONE

All that is done to pixels is done in the pool of `Workers`. The caller's thread hands tensors to the engine. While it
waits for the pool, it takes part in the pool's work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.backends.onnx import Finished
from runtime.bank import Bank
from runtime.bank_models import BankModels
from runtime.contract import ExportKind
from runtime.errors import ICNetError, InputError, ModelError
from runtime.packing import Packer, Tensors, first_fit
from runtime.preprocess import ImageSource, Pixels, read_pixels, restore_map
from runtime.threads import Batch, Workers

T = TypeVar("T")
Maps = NDArray[np.float32]
ONE = np.float32(1).view(np.uint32)  # floats from 0 on have the order of their bits; NaN and negative ones have larger


@dataclass(frozen=True)
class GroupPixels:
    """A group as the network takes it.

    Attributes:
        images: RGB uint8 [N, 224, 224, 3].
        sisms: uint8 [N, 224, 224].
        sizes: the images' own (width, height) in pixels.
    """

    images: NDArray[np.uint8]
    sisms: NDArray[np.uint8]
    sizes: tuple[tuple[int, int], ...]


def reads(images: Sequence[ImageSource], sisms: Sequence[ImageSource] | None) -> list[Callable[[], Pixels]]:
    """A call per image that reads it and its SISM; without `sisms` they are built in."""
    every = enumerate(zip(images, [None] * len(images) if sisms is None else sisms, strict=True))
    return [partial(read_pixels, image, sism, f"images[{i}]", f"sisms[{i}]") for i, (image, sism) in every]


def stack(pixels: Sequence[Pixels]) -> GroupPixels:
    """The images of a group in one array, and their SISMs in another."""
    images, sisms = np.stack([p.image for p in pixels]), np.stack([p.sism for p in pixels])
    return GroupPixels(images, sisms, tuple(p.size for p in pixels))


def restores(pixels: GroupPixels, maps: Maps) -> list[Callable[[], Maps]]:
    """A call per image that restores its map, float32 [224, 224], to the image's own size."""
    return [partial(restore_map, *pair) for pair in zip(maps, pixels.sizes, strict=True)]


@dataclass(frozen=True)
class Task(Generic[T]):
    """What is to be done for a group in a stream.

    Attributes:
        reads: a call per image, from `Pipeline.reads`.
        after: what follows on the maps, float32 [N, 224, 224] in [0, 1]: calls for the pool, in any number. Their
            results, in order, are the outcome of the group.
    """

    reads: Sequence[Callable[[], Pixels]]
    after: Callable[[GroupPixels, Maps], Sequence[Callable[[], T]]]


class Pipeline:
    """The models of a `Predictor`, and the way of groups through them. Safe from several threads.

    Args:
        path: what messages call the model.
        workers: the threads for pixels.
        backend: a plain or packed export; None if there are the two files of a bank export only.
        banks: the two files of a bank export, if there are any.
        most: the number of images in a packed call, and of the largest group that `backend` gets if there are `banks`.
        delay: packed exports: seconds that a group waits for those of other threads.
    """

    def __init__(
        self, path: str, workers: Workers, backend: Backend | None, banks: BankModels | None, most: int, delay: float
    ) -> None:
        self.path, self.workers = path, workers
        self._backend, self._banks, self._most = backend, banks, most
        packed = backend is not None and backend.interface.kind is ExportKind.PACKED
        self._packer = Packer(self._run, most, backend.slots, delay) if packed and backend is not None else None
        self._closed = False

    @property
    def packed(self) -> bool:
        """Whether the model takes several groups in one call."""
        return self._packer is not None

    def reads(
        self, images: Sequence[ImageSource], sisms: Sequence[ImageSource] | None, kept: bool = False
    ) -> list[Callable[[], Pixels]]:
        """A call per image that reads it and its SISM, once the group is known to fit the model.

        Args:
            images: paths, arrays or PIL images.
            sisms: likewise, one per image; None for built-in ones.
            kept: the images are for a bank, or are compared with one, so any number will do.

        Raises:
            InputError: no images, or counts that differ.
            ModelError: the model does not take groups of this size.
        """
        self.check_group(len(images), len(images) if sisms is None else len(sisms), kept)
        return [partial(self._while_open, call) for call in reads(images, sisms)]

    def _while_open(self, call: Callable[[], T]) -> T:
        self.check_open()
        return call()

    def read(
        self, images: Sequence[ImageSource], sisms: Sequence[ImageSource] | None, kept: bool = False
    ) -> GroupPixels:
        """A group's pixels; arguments and errors are those of `reads` and `read_pixels`."""
        return stack(self.workers.run(self.reads(images, sisms, kept)))

    def maps(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: Bank | None = None) -> Maps:
        """The maps, float32 [N, 224, 224] in [0, 1], of a group on its own or against a bank.

        Raises:
            ModelError: the model fails.
        """
        if bank is None and self._packer is not None and not self._in_chunks(len(images)):
            return self.checked(self._packer(images, sisms))
        return self.checked(self._run([(images, sisms)], bank))

    def stream(
        self, tasks: Iterable[Task[T] | ICNetError], *, ahead: int = 4, bank: Bank | None = None, pack: bool = True
    ) -> Iterator[list[T] | ICNetError]:
        """The outcomes of many groups, in order.

        Args:
            tasks: the groups; read as far as needed, for a packed model until one call is full. A group that came to
                nothing may be represented by its error, which becomes its outcome.
            ahead: groups that are read before their turn.
            bank: what the images are compared with; None for their own group.
            pack: give a packed model several groups at once.

        Yields:
            The results of the task's `after` calls, or what kept the group from them.

        Raises:
            Exception: what `tasks` raises, after the outcomes of the groups before it.
            InputError: the bank is empty or of another model.
            ModelError: there is a bank but no bank export.
        """
        self.check_open()
        if bank is not None:
            self.bank_models().check(bank)
        full = self._most if pack and bank is None and self._packer is not None else 0
        slots = 1 if bank is not None or self._backend is None else self._backend.slots
        return iter(_Stream(self, tasks, max(ahead, 1), slots, full, bank))

    def start(self, groups: Sequence[Tensors], bank: Bank | None = None) -> Pending:
        """Start on groups in one call; only a packed model takes several.

        Raises:
            ModelError: the model can't take them, or fails.
        """
        self.check_open()
        images, sisms = groups[0] if len(groups) == 1 else map(np.concatenate, zip(*groups, strict=True))
        if bank is not None:
            return Finished(self.bank_models().maps(images, sisms, bank))
        if self._banks is not None and self._in_chunks(len(images)):
            return Finished(self._banks.group(images, sisms))
        assert self._backend is not None
        self._backend.check_group(len(images))
        if self._packer is None:
            return self._backend.submit(images, sisms)
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group[0]) for group in groups])
        return self._backend.submit(images, sisms, labels)

    def finish(self, pending: Pending, sizes: Sequence[int]) -> list[Maps]:
        """Wait for a call: the maps of each of its groups, which have so many images.

        Raises:
            ModelError: the model fails, or does not give a map per image.
        """
        maps, images = pending.result(), sum(sizes)
        if len(maps) != images:
            raise ModelError(
                f"{self.path}: the model gave {len(maps)} maps for {images} images; it is not an ICNet export"
            )
        return np.split(maps, np.cumsum(sizes)[:-1])

    def _run(self, groups: Sequence[Tensors], bank: Bank | None = None) -> Maps:
        """The maps of groups in one call, one group after the other."""
        (maps,) = self.finish(self.start(groups, bank), [sum(len(group[0]) for group in groups)])
        return maps

    def checked(self, maps: Maps) -> Maps:
        """The maps of a group, if they can be maps at all."""
        if (
            maps.size and maps.view(np.uint32).max() <= ONE
        ):  # one pass; of the sign, infinity and NaN the bits are larger
            return maps
        low, high = maps.min(), maps.max()  # NaN is carried through both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(f"{self.path}: the model computed NaN or infinite values; its weights may be damaged")
        if low < 0 or high > 1:
            raise ModelError(f"{self.path}: the model's maps leave [0, 1]: [{low:g}, {high:g}]")
        return maps

    def _in_chunks(self, images: int) -> bool:
        """Whether a group of so many images goes through the bank export."""
        return self._banks is not None and (self._backend is None or images > self._most)

    def check_group(self, images: int, sisms: int, kept: bool = False) -> None:
        """Raise unless a group of this size can be run; arguments and errors are those of `reads`."""
        self.check_open()
        if images != sisms:
            raise InputError(f"{images} images but {sisms} SISMs: every image needs its own")
        if images == 0:
            raise InputError("no images: a group has at least one")
        if kept or self._backend is None or self._in_chunks(images):
            return
        try:
            self._backend.check_group(images)
        except ModelError as error:
            if images <= (self._backend.largest or images):
                raise
            raise ModelError(
                f"{error}; or run it in chunks, with the two files of a bank export: icnet export --banked, then "
                "Predictor(MODEL, bank_export=(NAME.intra, NAME.banked))"
            ) from None

    def bank_models(self) -> BankModels:
        """The bank export.

        Raises:
            ModelError: there is none.
        """
        self.check_open()
        if self._banks is None:
            raise ModelError(
                f"{self.path}: banks take the two files of a bank export: icnet export --banked, then "
                "Predictor(bank_export=(NAME.intra.onnx, NAME.banked.onnx))"
            )
        return self._banks

    def check_open(self) -> None:
        """Raise ICNetError if the pipeline is closed."""
        if self._closed:
            raise ICNetError(f"{self.path}: this Predictor is closed")

    def close(self) -> None:
        """Refuse groups, also those that wait. The Predictor closes the models and the workers, which it opened."""
        self._closed = True
        if self._packer is not None:
            self._packer.close(ICNetError(f"{self.path}: this Predictor is closed"))


class State(Enum):
    """How far a group of a stream has come."""

    READING = auto()  # the pool decodes and resizes
    READY = auto()  # waits for a call
    RUNNING = auto()  # in a call
    AFTER = auto()  # the pool restores, writes …
    DONE = auto()  # has its outcome


class _Job(Generic[T]):
    """A group of a stream, on its way from state to state."""

    def __init__(self, task: Task[T] | ICNetError, workers: Workers) -> None:
        self._workers = workers
        self.state = State.READING
        self.pixels: GroupPixels | None = None
        self.outcome: list[T] | ICNetError = []
        if isinstance(task, ICNetError):
            self.end(task)
            return
        self._after_maps = task.after
        self._reading = workers.submit(task.reads)
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
            self.pixels = stack(self._reading.results())
            self.state = State.READY
        except ICNetError as error:
            self.end(error)

    def follow_up(self, maps: Maps) -> None:
        """From RUNNING to AFTER."""
        assert self.pixels is not None
        self._after = self._workers.submit(self._after_maps(self.pixels, maps))
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


class _Stream(Generic[T]):
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
        pipeline: Pipeline,
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
            self._jobs.append(_Job(task, self._pipeline.workers))
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
