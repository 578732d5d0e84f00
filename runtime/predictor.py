"""`Predictor`: a group of images and their SISMs in, co-saliency maps at the images' own sizes out."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from runtime.arguments import check_groups, check_pair, check_tensors, images_alone, listed, path_of
from runtime.backends import Backend
from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import CPU
from runtime.backends.opening import open_backend, place
from runtime.bank import Bank
from runtime.bank_models import BankModels, differ, most_images
from runtime.contract import SIZE, ExportKind
from runtime.detector import Detector
from runtime.errors import ICNetError, InputError, ModelError
from runtime.packing import Tensors
from runtime.pipeline import Pipeline
from runtime.preprocess import ImageSource, Pixels, restores
from runtime.stream import Task
from runtime.threads import Workers

logger = logging.getLogger("runtime.detector")

BUILTIN = "builtin"
MAX_THREADS = 1024
GroupSources = tuple[Iterable[ImageSource], Iterable[ImageSource] | None] | Iterable[ImageSource]  # images, and SISMs
Maps = list[NDArray[np.float32]]  # of a group


class Predictor:
    """Runs an exported ICNet.

        with Predictor("icnet.onnx") as predictor:
            maps = predictor(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])

    One Predictor may be called from several threads at once. Close it, or use it as a context manager, to free its
    memory.

    A *packed* model (`icnet export --packed`) takes several groups in one call: those of `predict_groups`, and those
    of several threads at the same time. The two files of a *bank export* (`icnet export --banked`) run groups of any
    size in chunks, and compare images with a kept bank:

        with Predictor(bank_export=("icnet.intra.onnx", "icnet.banked.onnx")) as predictor:
            bank = predictor.bank(["a.jpg", "b.jpg"], ["a_sism.png", "b_sism.png"])
            maps = predictor.against(bank, ["new.jpg"], ["new_sism.png"])

    With a detector of salient objects images are enough, everywhere:

        with Predictor("icnet.onnx", sism_model="u2net.onnx") as predictor:
            maps = predictor(["a.jpg", "b.jpg"])

    Args:
        model: an .onnx file from `icnet export`, run by ONNX Runtime on the CPU; an .mnn file from `icnet build
            --backend mnn`, run by MNN on the CPU; an .xml file from `icnet build --backend openvino`, with its .bin
            beside it, run by OpenVINO; or a TensorRT engine (.engine, .plan or .trt) from `icnet build` or
            `trtexec`, run on a GPU. May be left out if `bank_export` is given.
        bank_export: the files (intra, banked) of a bank export, or what was built from them. Beside a model they run
            the groups that are too large for it.
        sism_model: makes the SISMs of images that come without: a file of any detector, for any of these engines (see
            `Detector`); or "builtin", OpenCV's static saliency, a weak stand-in. It runs with the same threads,
            providers and device.
        sism_normalise: how its pixels are normalised, if that can't be guessed: a name in
            `detector_families.PRESETS`, "MEAN,STD", or (mean, std).
        sism_minmax: whether its maps are stretched to 0 … 1; None for what its family does.
        threads: the size of the pool that decodes, resizes and writes images, and the threads of a call of ONNX
            Runtime, OpenVINO or MNN; None for one per core.
        providers: ONNX Runtime: execution providers in order of preference, e.g. ["CUDAExecutionProvider"]; one that
            was asked for and can't be used is an error. On NVIDIA GPUs groups go through page-locked buffers.
        device: TensorRT: the GPU's number. OpenVINO: its name of a device, "CPU", "GPU", "GPU.1" or "NPU". None for
            the first GPU, or for OpenVINO's CPU. ONNX files have `providers` for it.
        slots: TensorRT: groups in flight at once, each with buffers for the largest group; at least 2.
        allow_host_code: TensorRT: load an engine that brings code for the CPU, as version-compatible ones do.
        max_images: images in one call when groups are packed or run in chunks; a group that needs no chunks may be
            larger. None for the engine's largest size, or 32 with ONNX Runtime.
        max_delay_ms: packed models: the longest that a group which could start waits for groups of other threads.
        verify: whether .onnx, .mnn and .xml files are checked against the SHA-256 that `icnet export`, `calibrate` and
            `build` write into them. A file without one is accepted. An engine is compared with its sidecar, if it has
            one, in any case.

    Attributes:
        path: the model's file, or the banked file of a bank export alone.
        card: what the model's checkpoint is for, e.g. "drawings, a demo", in one line; None if the file doesn't tell.
        detector: what makes missing SISMs, with its `settings`; None if nothing does, or the built-in saliency.
        pipeline: the way of groups through the models, for this package's commands; not part of the stable API.

    Raises:
        ModelError: not a model file, or a damaged one, or not an exported ICNet, or an engine that this TensorRT or
            GPU can't run; or files that are not of one export.
        DependencyError: the engine's packages are not installed, or there is no GPU.
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        bank_export: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
        sism_model: str | os.PathLike[str] | None = None,
        sism_normalise: str | Sequence[object] | None = None,
        sism_minmax: bool | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] = (CPU,),
        device: int | str | None = None,
        slots: int = 2,
        allow_host_code: bool = False,
        max_images: int | None = None,
        max_delay_ms: float = 0,
        verify: bool = True,
    ) -> None:
        if bank_export is not None and not (isinstance(bank_export, tuple | list) and len(bank_export) == 2):
            raise InputError("bank_export: expected two paths, (intra, banked)")
        models = [*([] if model is None and bank_export else [model]), *(bank_export or ())]
        paths = [path_of(file, "model") for file in models]
        detects = None if sism_model is None or sism_model == BUILTIN else path_of(sism_model, "sism_model")
        if detects is None and (sism_normalise is not None or sism_minmax is not None):
            raise InputError("sism_normalise and sism_minmax are for a detector: name its file with sism_model")
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise InputError(f"threads={threads!r}: expected 1 to {MAX_THREADS}, or None for one per core")
        if not (device is None or (isinstance(device, int | str) and not isinstance(device, bool))):
            raise InputError(f"device={device!r}: expected a GPU's number, the name of an OpenVINO device, or None")
        if not (isinstance(slots, int) and slots >= 2):
            raise InputError(f"slots={slots!r}: expected at least 2, so that copies overlap with computing")
        if max_images is not None and not (isinstance(max_images, int) and max_images >= 1):
            raise InputError(f"max_images={max_images!r}: expected a number from 1, or None")
        if not (isinstance(max_delay_ms, int | float) and 0 <= max_delay_ms < math.inf):
            raise InputError(f"max_delay_ms={max_delay_ms!r}: expected milliseconds from 0")

        def start(path: Path) -> Backend:
            backend = open_backend(
                path,
                threads=threads,
                providers=providers,
                device=device,
                slots=slots,
                allow_host_code=allow_host_code,
                verify=verify,
            )
            return opened.enter_context(closing(backend))

        self.path = str(paths[0] if model is not None else paths[-1])
        self._backend: Backend | None = None
        self.detector: Detector | None = None
        self._makes_sisms = sism_model is not None
        banks: BankModels | None = None
        most = 0
        with ExitStack() as opened:  # models that were opened before an error are closed
            workers = Workers(threads)
            opened.callback(workers.close)
            if model is not None:
                self._backend = start(paths[0])
                _check_kind(self._backend)
                most = most_images(max_images, self._backend.largest)
            if bank_export is not None:
                intra, banked = map(start, paths[-2:])
                banks = BankModels(intra, banked, max_images)
                if self._backend is not None and differ(self._backend.weights_digest, banks.weights_digest):
                    raise ModelError(f"{banks.path}: of another network than {self.path}; export them again")
            known = self._backend or banks
            self.card: str | None = known.card if known else None
            if detects is not None:
                options: dict[str, Any] = {"normalise": sism_normalise, "minmax": sism_minmax, "verify": verify}
                options |= {"device": device, "allow_host_code": allow_host_code}
                self.detector = Detector(detects, threads, providers, **options)
                opened.callback(self.detector.close)
                places = [place(path, providers, device) for path in (paths[0], detects)]
                if places[0] != places[1]:
                    logger.warning("%s runs on %s, the detector %s on %s", paths[0], places[0], detects, places[1])
            self.pipeline = Pipeline(self.path, workers, self._backend, banks, most, max_delay_ms / 1000, self.detector)
            opened.callback(self.pipeline.close)
            self._opened: ExitStack | None = opened.pop_all()

    def __call__(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource] | None = None) -> Maps:
        """Co-saliency maps of one group.

        Args:
            images: the group's images: paths, arrays, PIL images or files' contents, of any size (see
                `preprocess.image_tensor`).
            sisms: the SISM of each image, in the same order, likewise; sizes need not be the images'. None: the
                detector makes them.

        Returns:
            One float32 array [height, width] in [0, 1] per image, of its (upright) size.

        Raises:
            InputError: no images, counts that differ, or one that can't be used; the message names it. Or there are no
                SISMs and no `sism_model`.
            ModelError: the model takes groups of another size only, or fails; or the detector does.
        """
        return self._maps(images, sisms)

    def bank(self, images: Iterable[ImageSource], sisms: Iterable[ImageSource] | None = None) -> Bank:
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
        banks = self.pipeline.bank_models()
        pixels = self.pipeline.read(*self._listed(images, sisms), kept=True)
        return Bank(banks.sivs(pixels.images, pixels.sisms), banks.model)

    def against(self, bank: Bank, images: Iterable[ImageSource], sisms: Iterable[ImageSource] | None = None) -> Maps:
        """Co-saliency maps of images against a kept bank: each image as if it alone joined the bank's group.

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
        self.pipeline.bank_models().check(bank)
        return self._maps(images, sisms, bank)

    @overload
    def predict_groups(
        self,
        groups: Iterable[GroupSources],
        *,
        ahead: int = 4,
        on_error: Literal["raise"] = "raise",
    ) -> Iterator[Maps]: ...

    @overload
    def predict_groups(
        self, groups: Iterable[GroupSources], *, ahead: int = 4, on_error: Literal["return"]
    ) -> Iterator[Maps | ICNetError]: ...

    def predict_groups(
        self,
        groups: Iterable[GroupSources],
        *,
        ahead: int = 4,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[Maps | ICNetError]:
        """Co-saliency maps of many groups, in order; images are decoded and resized in threads ahead of the engine.

        A packed model gets several groups at once: the oldest, and the later ones that fit beside it, up to the
        largest number of images that it takes.

        Args:
            groups: (images, sisms) per group, each as for calling the Predictor; with a `sism_model` also the images
                alone. No more of them are read than needed: `ahead` groups, or for a packed model enough to fill one
                call.
            ahead: groups that are decoded before their turn.
            on_error: "raise", or "return" to go on with the other groups after one that fails.

        Returns:
            An iterator: for every group what a call with that group returns; with `on_error="return"`, for one that
            fails the error that such a call raises.

        Raises:
            InputError: an argument is not that.
            ICNetError: from the iterator: as a call with that group does, at that group's turn; or the Predictor was
                closed, whatever `on_error`.
            Exception: from the iterator: what `groups` raises, after all groups before it.
        """
        check_groups(groups, on_error)
        if not (isinstance(ahead, int) and ahead >= 1):
            raise InputError(f"ahead={ahead!r}: expected a number from 1")
        return self._outcomes(self.pipeline.stream(self._tasks(groups), ahead=ahead), on_error == "raise")

    def _outcomes(self, stream: Iterator[Maps | ICNetError], raising: bool) -> Iterator[Maps | ICNetError]:
        for outcome in stream:
            if isinstance(outcome, ICNetError):
                self.pipeline.check_open()
                if raising:
                    raise outcome
            yield outcome

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
            self.pipeline.bank_models().check(bank)
        check_tensors(images, sisms)
        self.pipeline.check_group(len(images), len(sisms), kept=bank is not None)
        return self.pipeline.maps(images, sisms, bank)

    @overload
    def predict_tensor_groups(
        self, groups: Iterable[Tensors], *, on_error: Literal["raise"] = "raise"
    ) -> list[NDArray[np.float32]]: ...

    @overload
    def predict_tensor_groups(
        self, groups: Iterable[Tensors], *, on_error: Literal["return"]
    ) -> list[NDArray[np.float32] | ICNetError]: ...

    def predict_tensor_groups(
        self, groups: Iterable[Tensors], *, on_error: Literal["raise", "return"] = "raise"
    ) -> list[NDArray[np.float32]] | list[NDArray[np.float32] | ICNetError]:
        """Co-saliency maps of several groups that the caller has resized already, as a server joins them.

        A packed model gets several groups at once, as from `predict_groups`.

        Args:
            groups: (images, sisms) per group, each as for `predict_tensors`.
            on_error: "raise", or "return" to go on with the other groups after one that fails.

        Returns:
            For every group what `predict_tensors` returns; with `on_error="return"`, for one that fails the error that
            it raises.

        Raises:
            InputError: an argument is not that.
            ICNetError: as `predict_tensors` does; or the Predictor was closed, whatever `on_error`.
        """
        check_groups(groups, on_error)

        def tasks() -> Iterator[Task[NDArray[np.float32]] | ICNetError]:
            for index, group in enumerate(groups):
                try:
                    check_pair(index, group)
                    check_tensors(*group)
                    self.pipeline.check_group(len(group[0]), len(group[1]))
                except ICNetError as error:
                    yield error
                else:
                    pixels = zip(*group, strict=True)
                    reads = [partial(Pixels, image, sism, (SIZE, SIZE)) for image, sism in pixels]
                    yield Task(reads, lambda _, maps: [lambda: maps])

        outcomes = self._outcomes(self.pipeline.stream(tasks()), on_error == "raise")
        return [outcome if isinstance(outcome, ICNetError) else outcome[0] for outcome in outcomes]

    def _maps(
        self, images: Iterable[ImageSource], sisms: Iterable[ImageSource] | None, bank: Bank | None = None
    ) -> Maps:
        """The maps of a group on its own, or against a bank, at its images' own sizes."""
        pixels = self.pipeline.read(*self._listed(images, sisms), kept=bank is not None)
        maps = self.pipeline.maps(pixels.images, pixels.sisms, bank)
        return self.pipeline.workers.run(restores(pixels, maps))

    def _listed(
        self, images: Iterable[ImageSource], sisms: Iterable[ImageSource] | None
    ) -> tuple[list[ImageSource], list[ImageSource] | None]:
        if sisms is None and self._makes_sisms:
            return listed(images, "images", 4), None
        if sisms is None:
            raise InputError("no SISMs: give one per image, or open the Predictor with a detector: sism_model=FILE")
        return listed(images, "images", 4), listed(sisms, "sisms", 3)

    def _tasks(self, groups: Iterable[Any]) -> Iterator[Task[NDArray[np.float32]] | ICNetError]:
        for index, group in enumerate(groups):
            try:
                if self._makes_sisms and images_alone(group):
                    sources = self._listed(group, None)
                else:
                    check_pair(index, group)
                    sources = self._listed(*group)
                task = Task(self.pipeline.reads(*sources), restores)
            except ICNetError as error:
                yield error
            else:
                yield task

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
        return self.pipeline.packed


def _check_kind(backend: Backend) -> None:
    if backend.interface.kind not in (ExportKind.PLAIN, ExportKind.PACKED):
        raise ModelError(
            f"{backend.path}: one of the two files of a bank export; give both: "
            "Predictor(bank_export=(NAME.intra, NAME.banked))"
        )
