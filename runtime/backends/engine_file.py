"""A TensorRT engine's file: read, checked, deserialised; the sizes that it takes; its contexts and kernels."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.cuda_driver import unfit
from runtime.contract import ENGINE_NAME, Contract, ExportKind, Interface, TensorSpec, card_of
from runtime.errors import DependencyError, ModelError, OutputError
from runtime.files import check_model_file, replacing
from runtime.tensorrt_library import NAMES, Log, load, log_of, not_installed

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # the smallest, the best and the largest shape of a tensor
Profile = tuple[Range, ...]  # of each input
Shapes = tuple[Shape, ...]  # likewise, those of a call


class Profiles:
    """What an engine takes.

    Args:
        ranges: per profile, what each input takes; a fixed shape is a range of one.
        images: the number of inputs whose length is the number of images; a bank comes after them.
    """

    def __init__(self, ranges: Sequence[Profile], images: int) -> None:
        self.ranges = list(ranges)
        inputs = [profile[:images] for profile in ranges]
        # Of each profile, the smallest and the largest number of images.
        self.groups = [(max(low[0] for low, _, _ in each), min(high[0] for _, _, high in each)) for each in inputs]
        self.banks = [(profile[-1][0][0], profile[-1][2][0]) for profile in ranges]
        # Of each input, the smallest and the largest length of every axis in any profile.
        self.smallest = [_axes(min, [low for low, _, _ in each]) for each in zip(*ranges, strict=True)]
        self.largest = [_axes(max, [high for _, _, high in each]) for each in zip(*ranges, strict=True)]
        self._found: dict[Shapes, int | None] = {}

    def index(self, shapes: Shapes) -> int | None:
        """The number of the profile that fits a call most closely; None if none does."""
        if shapes not in self._found:
            fitting = [
                ([high for _, _, high in profile], index)
                for index, profile in enumerate(self.ranges)
                if all(_within(shape, low, high) for (low, _, high), shape in zip(profile, shapes, strict=True))
            ]
            self._found[shapes] = min(fitting)[1] if fitting else None
        return self._found[shapes]


def _axes(extreme: Callable[[Iterable[int]], int], shapes: Sequence[Shape]) -> Shape:
    return tuple(extreme(lengths) for lengths in zip(*shapes, strict=True))


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine that follows the contract.

    Attributes:
        trt: the module that loaded it, `tensorrt` or `tensorrt_rtx`.
        log: what that module says.
        engine: TensorRT's own object.
        interface: its tensors.
        profiles: what it takes.
        name: the engine's.
        weights_digest: of the network's weights, if the name tells.
    """

    trt: Any
    log: Log
    engine: Any
    interface: Interface
    profiles: Profiles
    name: str
    weights_digest: str | None


def load_engine(path: Path, content: bytes, allow_host_code: bool, contract: Contract) -> LoadedEngine:
    """Deserialise an engine, with the GPU's context current.

    Args:
        path: its file, for messages.
        content: from `read_engine`.
        allow_host_code: load an engine that brings code for the CPU, as those of `--version-compatible` do.
        contract: what its tensors must be.

    Raises:
        ModelError: not an engine, or of another TensorRT or GPU, or one with code that is not allowed, or not what
            `contract` asks for.
        DependencyError: TensorRT is not installed, or broken.
    """
    trt, log, engine = _deserialise(path, content, allow_host_code)
    specs = _specs(trt, engine)
    inputs = [spec for spec, is_input in specs if is_input]
    interface = contract(path, inputs, [spec for spec, is_input in specs if not is_input])
    images = len(interface.inputs) - (interface.kind is ExportKind.BANKED)
    name = str(getattr(engine, "name", ""))
    weights = name.removeprefix(ENGINE_NAME) if name.startswith(ENGINE_NAME) else None
    return LoadedEngine(trt, log, engine, interface, Profiles(_ranges(engine, interface), images), name, weights)


def read_engine(path: Path) -> tuple[bytes, str | None]:
    """The engine's bytes, checked against its sidecar if there is one, and what the sidecar says that it is for.

    Raises:
        ModelError: it can't be read, or the sidecar is another's.
    """
    check_model_file(path)  # reading a pipe would wait for ever
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    sidecar = path.with_name(path.name + ".json")
    card = None
    if sidecar.is_file():
        try:
            record = json.loads(sidecar.read_text())
            expected, card = record["engine_sha256"], card_of(record.get("onnx_metadata") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{sidecar}: not the sidecar of an engine; delete it or rebuild with icnet build"
            ) from error
        if expected != hashlib.sha256(content).hexdigest():
            raise ModelError(f"{path}: is not the engine that {sidecar.name} describes; rebuild it with icnet build")
    return content, card


def _deserialise(path: Path, content: bytes, allow_host_code: bool) -> tuple[Any, Log, Any]:
    """The module that can load the engine, its log, and the engine."""
    said: list[str] = []
    broken: DependencyError | None = None
    for name in NAMES:
        try:
            trt = load(name)
        except DependencyError as error:  # the other one may do
            broken = broken or error
            continue
        if trt is None:
            continue
        log = log_of(trt)
        with log.listening() as heard:
            runtime = trt.Runtime(log.logger)
            runtime.engine_host_code_allowed = allow_host_code
            engine = runtime.deserialize_cuda_engine(content)
        if engine is not None:
            return trt, log, engine
        if (driver := unfit("; ".join(heard.errors))) is not None:
            raise driver
        said.append(f"{name} {trt.__version__}: {heard.errors[0] if heard.errors else heard.last_error}")
        if not allow_host_code and any(re.search(r"host.?code", text, re.IGNORECASE) for text in heard.errors):
            raise ModelError(
                f"{path}: brings code that would run on this host, as a version-compatible engine does; if you "
                "trust its source, use Predictor(..., allow_host_code=True)"
            )
    if broken:
        raise broken
    if not said:
        raise not_installed()
    raise ModelError(
        f"{path}: can't be loaded; an engine runs with the TensorRT version and on the kind of GPU that it was built "
        f"for: rebuild it here with icnet build --onnx MODEL.onnx --output {path} ({said[0]})"
    )


def _specs(trt: Any, engine: Any) -> list[tuple[TensorSpec, bool]]:
    """The engine's tensors, and whether each is an input."""
    specs = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = str(np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
        shape = tuple(None if d == -1 else d for d in engine.get_tensor_shape(name))
        specs.append((TensorSpec(name, dtype, shape), engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT))
    return specs


def _ranges(engine: Any, interface: Interface) -> list[Profile]:
    def shapes(spec: TensorSpec, index: int) -> Range:
        if spec.is_fixed:
            return ((*(n for n in spec.shape if isinstance(n, int)),),) * 3
        low, best, high = (tuple(map(int, shape)) for shape in engine.get_tensor_profile_shape(spec.name, index))
        return low, best, high

    count = 1 if all(spec.is_fixed for spec in interface.inputs) else engine.num_optimization_profiles
    return [tuple(shapes(spec, index) for spec in interface.inputs) for index in range(count)]


class KernelCache:
    """The kernels that TensorRT-RTX has compiled for an engine: shared by its contexts, and kept in a file beside it.

    Args:
        path: the engine's file.
        engine: TensorRT-RTX's own object.

    Attributes:
        cache: what a context's configuration takes; it must outlive the contexts.
    """

    def __init__(self, path: Path, engine: Any) -> None:
        self._path = path.with_name(path.name + ".kernels")
        self.cache: Any = engine.create_runtime_config().create_runtime_cache()
        try:
            self._saved = self._path.read_bytes() if self._path.is_file() else b""
        except OSError:  # there is none yet
            self._saved = b""
        if self._saved and not self.cache.deserialize(self._saved):
            logger.info("%s: kernels of another GPU or TensorRT-RTX; they are compiled again", self._path)
            self._saved = b""

    def save(self) -> None:
        """Write the file if there are new kernels; that it can't be written is no error."""
        content = bytes(self.cache.serialize())
        if not content or content == self._saved:
            return
        try:
            with replacing(self._path) as temporary:
                temporary.write_bytes(content)
            self._saved = content
        except OutputError as error:
            logger.info("compiled kernels are not kept: %s", error)


class Contexts:
    """Makes the execution contexts of an engine, with what they share."""

    def __init__(self, path: Path, loaded: LoadedEngine, use_graphs: bool, eager_kernels: bool) -> None:
        self.path, self.loaded = path, loaded
        self.captures_itself = hasattr(loaded.trt, "CudaGraphStrategy")  # TensorRT-RTX does, for any shape
        self._use_graphs, self._eager = use_graphs, eager_kernels
        self.scratch_size = max(int(loaded.engine.device_memory_size_v2), 1)
        self._kernels = KernelCache(path, loaded.engine) if self.captures_itself else None

    def make(self, scratch: Any) -> Any:
        """An execution context on device memory of `scratch_size`."""
        trt, engine = self.loaded.trt, self.loaded.engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self.loaded.log.listening() as heard:
            if self._kernels is not None:
                config = engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(strategy)
                config.set_runtime_cache(self._kernels.cache)
                if self._use_graphs:
                    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                if self._eager:
                    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                    config.dynamic_shapes_kernel_specialization_strategy = eager
                context = engine.create_execution_context(config)
            else:
                context = engine.create_execution_context(strategy)
            if context is None:
                raise ModelError(
                    f"{self.path}: TensorRT could not create an execution context; it may be out of device memory: "
                    f"use fewer slots, or build the engine for smaller groups ({heard.last_error})"
                )
        context.set_device_memory(int(scratch), self.scratch_size)
        return context

    def save_kernels(self) -> None:
        """Keep the kernels that were compiled."""
        if self._kernels is not None:
            self._kernels.save()

    def close(self) -> None:
        """Drop the engine, which goes with the last context."""
        del self.loaded
