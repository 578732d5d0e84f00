"""`Predictor`: a group of images and their SISMs in, co-saliency maps at the images' own sizes out."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.backends.mnn import MnnBackend
from runtime.backends.onnx import CPU, Finished, OnnxBackend, Provider
from runtime.backends.tensorrt import TensorRTBackend
from runtime.bank import Bank, BankModels, differ, most_images
from runtime.contract import INPUTS, TensorSpec
from runtime.errors import ICNetError, InputError, ModelError
from runtime.packing import Packer, Tensors, first_fit
from runtime.preprocess import ImageSource, image_tensor, restore_map, sism_tensor
from runtime.threads import in_threads

MAX_THREADS = 1024
UNORDERED = (str, bytes, os.PathLike, set, frozenset, dict)  # iterable, perhaps, but no sequence of images
ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}
MNN_SUFFIX = ".mnn"


class Predictor:
    """Runs an exported ICNet.

        with Predictor("icnet.onnx") as predictor:
            maps = predictor(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])

    One Predictor may be called from several threads at once. Close it, or use it as a context manager, to give its
    memory back.

    A *packed* model (`icnet export --packed`) takes several groups in one call: those of `predict_groups`, and those
    that several threads ask for at the same time. The two files of a *bank export* (`icnet export --banked`) run groups
    of any size in chunks, and compare images with a kept bank:

        with Predictor(bank=("icnet.intra.onnx", "icnet.banked.onnx")) as predictor:
            bank = predictor.bank(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])
            maps = predictor.against(bank, ["new.jpg"], ["new_sism.png"])

    Args:
        model: an .onnx file from `icnet export`, run by ONNX Runtime on the CPU; an .mnn file from `icnet build
            --backend mnn`, run by MNN on the CPU; or a TensorRT engine (.engine, .plan or .trt) from `icnet build` or
            `trtexec`, run on a GPU. May be left out if `bank` is given.
        bank: the files (intra, banked) of a bank export, or what was built from them. Beside a model they run the
            groups that are too large for it.
        threads: CPU threads for one call, which decode and resize images, and compute with ONNX Runtime or MNN; None
            for one per core.
        providers: ONNX Runtime: execution providers in order of preference, e.g. ["CUDAExecutionProvider"]; one that
            was asked for and can't be used is an error. On NVIDIA GPUs groups go through page-locked buffers.
        device: TensorRT: the GPU's number.
        slots: TensorRT: groups in flight at once, each with buffers for the largest group; at least 2.
        max_images: images in one call when groups are packed or run in chunks; a group that needs no chunks may be
            larger. None for what the engine takes, and 32 with ONNX Runtime.
        max_delay_ms: packed models: how long a group waits for those of other threads, though it could start.

    Raises:
        ModelError: not a model file, or not an exported ICNet, or an engine that this TensorRT or GPU can't run; or
            files that are not of one export.
        DependencyError: the engine's packages are not installed, or there is no GPU.
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        bank: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        device: int = 0,
        slots: int = 2,
        max_images: int | None = None,
        max_delay_ms: float = 0,
    ) -> None:
        if bank is not None and not (isinstance(bank, tuple | list) and len(bank) == 2):
            raise InputError("bank: expected two paths, (intra, banked)")
        paths: list[Path] = []
        for file in (*([] if model is None and bank else [model]), *(bank or ())):
            if not isinstance(file, str | os.PathLike) or not isinstance(os.fspath(file), str):
                raise InputError(f"model: expected a path, got {type(file).__name__}")
            paths.append(Path(os.fspath(file)))
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise InputError(f"threads={threads!r}: expected 1 to {MAX_THREADS}, or None for one per core")
        if not (isinstance(slots, int) and slots >= 2):
            raise InputError(f"slots={slots!r}: expected at least 2, so that copies overlap with computing")
        if max_images is not None and not (isinstance(max_images, int) and max_images >= 1):
            raise InputError(f"max_images={max_images!r}: expected a number from 1, or None")
        if not (isinstance(max_delay_ms, int | float) and 0 <= max_delay_ms < math.inf):
            raise InputError(f"max_delay_ms={max_delay_ms!r}: expected milliseconds from 0")

        def start(path: Path) -> Backend:
            if path.suffix.lower() in ENGINE_SUFFIXES:
                backend: Backend = TensorRTBackend(path, slots=slots, device=device)
            elif path.suffix.lower() == MNN_SUFFIX:
                backend = MnnBackend(path, threads)
            else:
                backend = OnnxBackend(path, threads, providers)
            opened.callback(backend.close)
            return backend

        self.path = str(paths[0] if model is not None else paths[-1])
        self._threads = threads
        self._backend: Backend | None = None
        self._banks: BankModels | None = None
        self._packer: Packer | None = None
        self._most = 0
        with ExitStack() as opened:  # models that were opened before an error are closed
            if model is not None:
                self._backend = start(paths[0])
                _check_kind(self._backend)
                self._most = most_images(max_images, self._backend.largest)
                if self._backend.interface.kind == "packed":
                    self._packer = Packer(self._run, self._most, self._backend.slots, max_delay_ms / 1000)
            if bank is not None:
                intra, banked = map(start, paths[-2:])
                self._banks = BankModels(intra, banked, max_images)
                if self._backend is not None and differ(self._backend.weights, self._banks.weights):
                    raise ModelError(f"{self._banks.path}: of another network than {self.path}; export them again")
            self._opened: ExitStack | None = opened.pop_all()

    def __call__(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource]) -> list[NDArray[np.float32]]:
        """Co-saliency maps of one group.

        Args:
            images: the group's images: paths, arrays or PIL images of any size (see `preprocess.image_tensor`).
            sisms: the SISM of each image, in the same order, likewise; sizes need not be the images'.

        Returns:
            One float32 array [height, width] in [0, 1] per image, of its (upright) size.

        Raises:
            InputError: no images, counts that differ, or one that can't be used; the message names it.
            ModelError: the model takes groups of another size only, or fails.
        """
        tensors, sism_tensors, sizes = self._prepare(images, sisms)
        return self._restored(self._maps(tensors, sism_tensors), sizes)

    def bank(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource]) -> Bank:
        """The bank of a group's images, to compare others with.

        Args:
            images: as for calling the Predictor; any number, one at least.
            sisms: likewise.

        Returns:
            One row of SIVs per image, in their order.

        Raises:
            InputError: as for calling the Predictor.
            ModelError: there are no files of a bank export, or they fail.
        """
        banks = self._bank_models()
        tensors, sism_tensors, _ = self._prepare(images, sisms, kept=True)
        return Bank(banks.sivs(tensors, sism_tensors), banks.model)

    def against(
        self, bank: Bank, images: Iterable[ImageSource], sisms: Iterable[ImageSource]
    ) -> list[NDArray[np.float32]]:
        """Co-saliency maps of images against a kept bank: each as if it were in the bank's group, by itself.

        Args:
            bank: from `bank` or `Bank.load`; the images need not be in it.
            images: as for calling the Predictor; any number, one at least.
            sisms: likewise.

        Returns:
            As from calling the Predictor.

        Raises:
            InputError: as for calling the Predictor; or the bank is empty or of another model.
            ModelError: there are no files of a bank export, or they don't take a bank of this size, or fail.
        """
        self._bank_models().check(bank)
        tensors, sism_tensors, sizes = self._prepare(images, sisms, kept=True)
        return self._restored(self._maps(tensors, sism_tensors, bank), sizes)

    def predict_groups(
        self, groups: Iterable[tuple[Iterable[ImageSource], Iterable[ImageSource]]], *, ahead: int = 4
    ) -> Iterator[list[NDArray[np.float32]]]:
        """Co-saliency maps of many groups, in order; images are decoded and resized in threads ahead of the engine.

        A packed model gets several groups at once: the oldest, and of those that came after it all that fit beside it,
        up to the largest number of images that it takes.

        Args:
            groups: (images, sisms) per group, each as for calling the Predictor; read as far as needed, for a packed
                model until one call is full.
            ahead: groups that are decoded before their turn.

        Yields:
            What a call with that group returns.

        Raises:
            ICNetError: as a call with that group does, when it is that group's turn.
        """
        self._check_open()
        slots = 1 if self._backend is None else self._backend.slots
        full = self._most if self._packer else 0  # images; a plain model gets one group after the other
        source = enumerate(groups)
        decoding: deque[tuple[int, Future[_Prepared]]] = deque()
        waiting: list[tuple[int, _Prepared]] = []
        in_work: deque[tuple[Pending, list[tuple[int, _Prepared]]]] = deque()
        finished: dict[int, NDArray[np.float32] | ICNetError] = {}
        sizes_of: dict[int, Sequence[tuple[int, int]]] = {}
        pool = ThreadPoolExecutor(thread_name_prefix="icnet-decode")
        try:
            for turn in count():
                while turn not in finished:
                    for number, group in islice(source, max(ahead, 1) - len(decoding)):
                        decoding.append((number, pool.submit(self._prepare, *group)))
                    images = [len(group[0]) for _, group in waiting]
                    if len(in_work) < slots and decoding and (not waiting or sum(images) < full):
                        number, future = decoding.popleft()
                        try:
                            waiting.append((number, future.result()))
                        except ICNetError as error:
                            finished[number] = error
                    elif len(in_work) < slots and waiting:
                        chosen = first_fit(images, full)
                        batch = [waiting[index] for index in chosen]
                        waiting = [group for index, group in enumerate(waiting) if index not in chosen]
                        try:
                            in_work.append((self._start([group[:2] for _, group in batch]), batch))
                        except ICNetError as error:
                            finished.update((number, error) for number, _ in batch)
                    elif in_work:
                        pending, batch = in_work.popleft()
                        try:
                            ends = np.cumsum([len(group[0]) for _, group in batch])
                            maps = np.split(self._finish(pending, ends[-1]), ends[:-1])
                            finished.update((number, m) for (number, _), m in zip(batch, maps, strict=True))
                        except ICNetError as error:
                            finished.update((number, error) for number, _ in batch)
                        sizes_of.update((number, group[2]) for number, group in batch)
                    else:
                        return
                outcome = finished.pop(turn)
                if isinstance(outcome, ICNetError):
                    raise outcome
                yield self._restored(self._checked(outcome), sizes_of.pop(turn))
        finally:
            pool.shutdown(cancel_futures=True)

    def predict_tensors(
        self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: Bank | None = None
    ) -> NDArray[np.float32]:
        """Co-saliency maps of one group that the caller has resized already.

        Args:
            images: RGB, uint8 [N, 224, 224, 3], N ≥ 1.
            sisms: uint8 [N, 224, 224].
            bank: a kept bank to compare the images with, as for `against`; None for their own group.

        Returns:
            float32 [N, 224, 224] in [0, 1].

        Raises:
            InputError: wrong dtype or shape, or a bank that can't be used.
            ModelError: the model takes groups of another size only, or fails.
        """
        if bank is not None:
            self._bank_models().check(bank)
        for spec, array in zip(INPUTS, (images, sisms), strict=True):
            _check_tensor(spec, array)
        self._check_group(len(images), len(sisms), kept=bank is not None)
        return self._maps(images, sisms, bank)

    def _prepare(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource], kept: bool = False) -> "_Prepared":
        """A group as the network's tensors, and its images' own sizes."""
        images, sisms = _listed(images, "images", 4), _listed(sisms, "sisms", 3)
        self._check_group(len(images), len(sisms), kept)
        pairs = enumerate(zip(images, sisms, strict=True))
        read = in_threads([partial(_read, i, *pair) for i, pair in pairs], self._threads)
        tensors, sism_tensors, sizes = zip(*read, strict=True)
        return np.stack(tensors), np.stack(sism_tensors), sizes

    def _maps(
        self, images: NDArray[np.uint8], sisms: NDArray[np.uint8], bank: Bank | None = None
    ) -> NDArray[np.float32]:
        """The maps of a group on its own, or against a bank."""
        if bank is not None:
            return self._checked(self._bank_models().maps(images, sisms, bank.sivs))
        if self._packer is not None and not self._in_chunks(len(images)):
            return self._checked(self._packer(images, sisms))
        return self._checked(self._run([(images, sisms)]))

    def _in_chunks(self, images: int) -> bool:
        """Whether a group of so many images goes through the bank export."""
        return self._banks is not None and (self._backend is None or images > self._most)

    def _start(self, groups: Sequence[Tensors]) -> Pending:
        """Start on groups in one call; a plain model takes one."""
        self._check_open()
        images, sisms = groups[0] if len(groups) == 1 else map(np.concatenate, zip(*groups, strict=True))
        if self._banks is not None and self._in_chunks(len(images)):
            return Finished(self._banks.group(images, sisms))
        assert self._backend is not None
        self._backend.check_group(len(images))
        if self._packer is None:
            return self._backend.submit(images, sisms)
        labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group[0]) for group in groups])
        return self._backend.submit(images, sisms, labels)

    def _run(self, groups: Sequence[Tensors]) -> NDArray[np.float32]:
        """The maps of groups in one call, one after the other."""
        return self._finish(self._start(groups), sum(len(group[0]) for group in groups))

    def _finish(self, pending: Pending, images: int) -> NDArray[np.float32]:
        """The maps of a call."""
        maps = pending.result()
        if len(maps) != images:
            raise ModelError(
                f"{self.path}: the model gave {len(maps)} maps for {images} images; it is not an ICNet export"
            )
        return maps

    def _checked(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """The maps of a group, if they can be maps at all."""
        low, high = maps.min(), maps.max()  # NaN is carried through both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(f"{self.path}: the model computed NaN or infinite values; its weights may be damaged")
        if low < 0 or high > 1:
            raise ModelError(f"{self.path}: the model's maps leave [0, 1]: [{low:g}, {high:g}]")
        return maps

    def _restored(self, maps: NDArray[np.float32], sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
        """The maps of a group at its images' own sizes."""
        return in_threads([partial(restore_map, *pair) for pair in zip(maps, sizes, strict=True)], self._threads)

    def close(self) -> None:
        """Give back the models' memory; calls after this raise `ICNetError`. Closing twice is fine."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def packed(self) -> bool:
        """Whether the model takes several groups in one call."""
        return self._packer is not None

    def _check_open(self) -> None:
        if self._opened is None:
            raise ICNetError(f"{self.path}: this Predictor is closed")

    def _bank_models(self) -> BankModels:
        self._check_open()
        if self._banks is None:
            raise ModelError(
                f"{self.path}: banks take the two files of a bank export: icnet export --banked, then "
                "Predictor(bank=(NAME.intra.onnx, NAME.banked.onnx))"
            )
        return self._banks

    def _check_group(self, images: int, sisms: int, kept: bool) -> None:
        """Check a group's size; one for a kept bank may have any."""
        self._check_open()
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
                "Predictor(MODEL, bank=(NAME.intra, NAME.banked))"
            ) from None


def _read(
    index: int, image: ImageSource, sism: ImageSource
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int]]:
    """An image and its SISM as the network's tensors, and the image's own size."""
    tensor, size = image_tensor(image, f"images[{index}]")
    return tensor, sism_tensor(sism, f"sisms[{index}]"), size


def _check_kind(backend: Backend) -> None:
    if backend.interface.kind not in ("plain", "packed"):
        raise ModelError(
            f"{backend.path}: one of the two files of a bank export; give both: "
            "Predictor(bank=(NAME.intra, NAME.banked))"
        )


_Prepared = tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[tuple[int, int]]]


def _listed(sources: Iterable[ImageSource], what: str, ndim: int) -> list[ImageSource]:
    """A list with one entry per image; an array must have `ndim` axes at least, or it is one image and no group."""
    if isinstance(sources, UNORDERED) or not isinstance(sources, Iterable):
        raise InputError(f"{what}: expected a sequence with one entry per image, got {type(sources).__name__}")
    if isinstance(sources, np.ndarray) and sources.ndim < ndim:
        raise InputError(
            f"{what}: expected a sequence with one entry per image, got one array of shape {sources.shape}"
        )
    return list(sources)


def _check_tensor(spec: TensorSpec, array: object) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{spec.name}: expected a NumPy array, got {type(array).__name__}")
    found = TensorSpec(spec.name, str(array.dtype), array.shape)
    if len(array.shape) != len(spec.shape) or not spec.accepts(found):
        raise InputError(f"expected {spec}, got {found}")
