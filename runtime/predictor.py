"""`Predictor`: a group of images and their SISMs in, co-saliency maps at the images' own sizes out."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.backends import Backend, Pending
from runtime.backends.onnx import CPU, OnnxBackend, Provider
from runtime.backends.tensorrt import TensorRTBackend
from runtime.contract import INPUTS, TensorSpec
from runtime.errors import ICNetError, InputError, ModelError
from runtime.preprocess import ImageSource, image_tensor, restore_map, sism_tensor

MAX_THREADS = 1024
UNORDERED = (str, bytes, os.PathLike, set, frozenset, dict)  # iterable, perhaps, but no sequence of images
ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}


class Predictor:
    """Runs an exported ICNet.

        with Predictor("icnet.onnx") as predictor:
            maps = predictor(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])

    One Predictor may be called from several threads at once. Close it, or use it as a context manager, to give its
    memory back.

    Args:
        model: an .onnx file from `icnet export`, run by ONNX Runtime on the CPU; or a TensorRT engine (.engine, .plan
            or .trt) from `icnet build` or `trtexec`, run on a GPU.
        threads: ONNX Runtime: CPU threads for one call; None for one per physical core.
        providers: ONNX Runtime: execution providers in order of preference, e.g. ["CUDAExecutionProvider"]; one that
            was asked for and can't be used is an error. On NVIDIA GPUs groups go through page-locked buffers.
        device: TensorRT: the GPU's number.
        slots: TensorRT: groups in flight at once, each with buffers for the largest group; at least 2.

    Raises:
        ModelError: not a model file, or not an exported ICNet, or an engine that this TensorRT or GPU can't run.
        DependencyError: the engine's packages are not installed, or there is no GPU.
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        device: int = 0,
        slots: int = 2,
    ) -> None:
        if not isinstance(model, str | os.PathLike) or not isinstance(os.fspath(model), str):
            raise InputError(f"model: expected a path, got {type(model).__name__}")
        self.path = os.fspath(model)
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise InputError(f"threads={threads!r}: expected 1 to {MAX_THREADS}, or None for one per core")
        if not (isinstance(slots, int) and slots >= 2):
            raise InputError(f"slots={slots!r}: expected at least 2, so that copies overlap with computing")
        path = Path(model)
        self._backend: Backend | None
        if path.suffix.lower() in ENGINE_SUFFIXES:
            self._backend = TensorRTBackend(path, slots=slots, device=device)
        else:
            self._backend = OnnxBackend(path, threads, providers)

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
        return self._restored(self._open_backend().submit(tensors, sism_tensors), sizes)

    def predict_groups(
        self, groups: Iterable[tuple[Iterable[ImageSource], Iterable[ImageSource]]], *, ahead: int = 4
    ) -> Iterator[list[NDArray[np.float32]]]:
        """Co-saliency maps of many groups, in order; images are decoded and resized in threads ahead of the engine.

        Args:
            groups: (images, sisms) per group, each as for calling the Predictor; read as far as needed.
            ahead: groups that are decoded before their turn.

        Yields:
            What a call with that group returns.

        Raises:
            ICNetError: as a call with that group does, when it is that group's turn.
        """
        backend = self._open_backend()
        source = iter(groups)
        prepared: deque[Future[_Prepared]] = deque()
        in_work: deque[tuple[Pending | ICNetError, Sequence[tuple[int, int]]]] = deque()
        pool = ThreadPoolExecutor(thread_name_prefix="icnet-decode")
        try:
            prepared.extend(pool.submit(self._prepare, *group) for group in islice(source, max(ahead, 1)))
            while prepared or in_work:
                if prepared and len(in_work) < backend.slots:
                    try:
                        images, sisms, sizes = prepared.popleft().result()
                        in_work.append((backend.submit(images, sisms), sizes))
                    except ICNetError as error:
                        in_work.append((error, ()))
                    prepared.extend(pool.submit(self._prepare, *group) for group in islice(source, 1))
                    continue
                pending, sizes = in_work.popleft()
                if isinstance(pending, ICNetError):
                    raise pending
                yield self._restored(pending, sizes)
        finally:
            pool.shutdown(cancel_futures=True)

    def predict_tensors(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Co-saliency maps of one group that the caller has resized already.

        Args:
            images: RGB, uint8 [N, 224, 224, 3], N ≥ 1.
            sisms: uint8 [N, 224, 224].

        Returns:
            float32 [N, 224, 224] in [0, 1].

        Raises:
            InputError: wrong dtype or shape.
            ModelError: the model takes groups of another size only, or fails.
        """
        for spec, array in zip(INPUTS, (images, sisms), strict=True):
            _check_tensor(spec, array)
        self._check_group(len(images), len(sisms))
        return self._checked(self._open_backend().submit(images, sisms), len(images))

    def _prepare(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource]) -> "_Prepared":
        """A group as the network's tensors, and its images' own sizes."""
        images, sisms = _listed(images, "images", 4), _listed(sisms, "sisms", 3)
        self._check_group(len(images), len(sisms))
        tensors, sizes = zip(*(image_tensor(image, f"images[{i}]") for i, image in enumerate(images)), strict=True)
        sism_tensors = [sism_tensor(sism, f"sisms[{i}]") for i, sism in enumerate(sisms)]
        return np.stack(tensors), np.stack(sism_tensors), sizes

    def _restored(self, pending: Pending, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
        """The maps of a group at its images' own sizes."""
        maps = self._checked(pending, len(sizes))
        return [restore_map(tensor, size) for tensor, size in zip(maps, sizes, strict=True)]

    def _checked(self, pending: Pending, images: int) -> NDArray[np.float32]:
        """The maps of a group, if they can be maps at all."""
        maps = pending.result()
        if len(maps) != images:
            raise ModelError(
                f"{self.path}: the model gave {len(maps)} maps for {images} images; it is not an ICNet export"
            )
        low, high = maps.min(), maps.max()  # NaN is carried through both
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError(f"{self.path}: the model computed NaN or infinite values; its weights may be damaged")
        if low < 0 or high > 1:
            raise ModelError(f"{self.path}: the model's maps leave [0, 1]: [{low:g}, {high:g}]")
        return maps

    def close(self) -> None:
        """Give back the model's memory; calls after this raise `ICNetError`. Closing twice is fine."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise ICNetError(f"{self.path}: this Predictor is closed")
        return self._backend

    def _check_group(self, images: int, sisms: int) -> None:
        backend = self._open_backend()
        if images != sisms:
            raise InputError(f"{images} images but {sisms} SISMs: every image needs its own")
        if images == 0:
            raise InputError("no images: a group has at least one")
        backend.check_group(images)


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
