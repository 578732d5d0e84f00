"""`Predictor`: a group of images and their SISMs in, co-saliency maps at the images' own sizes out."""

import os
from collections.abc import Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.backends.onnx import OnnxBackend
from runtime.contract import INPUTS, TensorSpec
from runtime.errors import ICNetError, InputError, ModelError
from runtime.preprocess import ImageSource, image_tensor, restore_map, sism_tensor


class Predictor:
    """Runs an exported ICNet.

        with Predictor("icnet.onnx") as predictor:
            maps = predictor(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])

    One Predictor may be called from several threads at once. Close it, or use it as a context manager, to give its
    memory back.

    Args:
        model: an .onnx file written by `export/to_onnx.py`.
        threads: CPU threads for one call; None for one per physical core.

    Raises:
        ModelError: not an ONNX file, or not an exported ICNet.
        DependencyError: ONNX Runtime is not installed.
        InputError: `threads` is less than 1.
    """

    def __init__(self, model: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.path = os.fspath(model)
        if threads is not None and threads < 1:
            raise InputError(f"threads={threads}: expected at least 1, or None for one per core")
        self._backend: OnnxBackend | None = OnnxBackend(model, threads)

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
        images, sisms = _listed(images, "images", 4), _listed(sisms, "sisms", 3)
        if len(images) != len(sisms):
            raise InputError(f"{len(images)} images but {len(sisms)} SISMs: every image needs its own")
        self._check_group(len(images))
        tensors, sizes = zip(*(image_tensor(image, f"images[{i}]") for i, image in enumerate(images)), strict=True)
        sism_tensors = [sism_tensor(sism, f"sisms[{i}]") for i, sism in enumerate(sisms)]
        maps = self.predict_tensors(np.stack(tensors), np.stack(sism_tensors))
        return [restore_map(tensor, size) for tensor, size in zip(maps, sizes, strict=True)]

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
        if len(images) != len(sisms):
            raise InputError(f"{len(images)} images but {len(sisms)} SISMs: every image needs its own")
        self._check_group(len(images))
        maps = self._open_backend().run(images, sisms)
        if not np.isfinite(maps).all():
            raise ModelError(f"{self.path}: the model computed NaN or infinite values; its weights may be damaged")
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

    def _open_backend(self) -> OnnxBackend:
        if self._backend is None:
            raise ICNetError(f"{self.path}: this Predictor is closed")
        return self._backend

    def _check_group(self, images: int) -> None:
        fixed = self._open_backend().group_size
        if images == 0:
            raise InputError("no images: a group has at least one")
        if fixed not in (None, images):
            raise ModelError(
                f"{self.path}: built for groups of exactly {fixed} images, got {images}; "
                "export it with a dynamic group axis (export/to_onnx.py does)"
            )


def _listed(sources: Iterable[ImageSource], what: str, ndim: int) -> list[ImageSource]:
    """A list with one entry per image; an array must have `ndim` axes at least, or it is one image and no group."""
    if isinstance(sources, str | bytes | os.PathLike) or not isinstance(sources, Iterable):
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
