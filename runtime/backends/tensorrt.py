"""TensorRT and TensorRT-RTX engines, built by us or by anybody, through page-locked buffers on CUDA streams.

A *slot* is all that one call needs on its way through the device: an execution context, a stream, an event,
page-locked host buffers and device buffers for the largest tensors of any profile, allocated once. A call's copies in,
its execution and its copies out are queued on its slot's stream; the only wait is for the event behind them. With two
slots the next call's images are copied in while this one is computed.
"""

import hashlib
import importlib
import json
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda import Capture, Cuda
from runtime.contract import ENGINE_NAME, Interface, TensorSpec, check_contract
from runtime.errors import DependencyError, ICNetError, ModelError

logger = logging.getLogger(__name__)

Range = tuple[int, int, int]  # the smallest, the best and the largest length of a tensor's first axis
Profile = tuple[Range, ...]  # of each input
Lengths = tuple[int, ...]  # likewise, those of a call


class TensorRTBackend:
    """A TensorRT engine that follows the contract; nothing but the engine is needed to run it.

    Args:
        path: an engine, from `icnet build` or `trtexec`.
        slots: groups in flight at once; at least 2, so that copies overlap with computing.
        graphs: group sizes, per slot, whose work is captured as a CUDA graph when they come a second time. 0: none.
        device: the GPU's number.

    Raises:
        DependencyError: no TensorRT, PyCUDA, driver or GPU.
        ModelError: not an engine of ours, or of another TensorRT or GPU; or not enough memory.
    """

    def __init__(self, path: Path, *, slots: int = 2, graphs: int = 16, device: int = 0) -> None:
        self.path = path
        content = _read(path)
        self.slots = slots
        cuda = Cuda(device)
        try:
            with cuda, ExitStack() as stack:  # slots that were made before an error are freed
                engine, trt = _deserialise(path, content)
                specs = _specs(trt, engine)
                inputs = [spec for spec, is_input in specs if is_input]
                self.interface = check_contract(path, inputs, [spec for spec, is_input in specs if not is_input])
                self.profiles = _profiles(engine, self.interface)
                self._images = len(self.interface.inputs) - (self.interface.kind == "banked")  # inputs of length N
                self.largest: int | None = max(high for _, high in self._ranges())
                name = str(getattr(engine, "name", ""))
                self.weights = name.removeprefix(ENGINE_NAME) if name.startswith(ENGINE_NAME) else None
                slots_made = []
                for _ in range(self.slots):
                    slots_made.append(_Slot(cuda, trt, engine, self.interface, self.profiles, graphs))
                    stack.callback(slots_made[-1].free)
                self._pool = _Pool(cuda, slots_made)
                stack.pop_all()  # from here on the pool frees them
        except BaseException:
            cuda.close()
            raise
        self._finalizer = weakref.finalize(self, self._pool.close)

    def check_group(self, images: int, bank: int = 1) -> None:
        """Raise ModelError unless some profile takes so many images at once, and a bank of so many SIVs."""
        if not any(low <= images <= high for low, high in self._ranges()):
            raise ModelError(
                f"{self.path}: built for groups of {_either(self._ranges())} images, got {images}; "
                f"rebuild it with a profile that holds {images}: icnet build --max {images}"
            )
        if self.interface.kind == "banked" and not any(_fits(p, (images, images, bank)) for p in self.profiles):
            raise ModelError(
                f"{self.path}: built for banks of {_either([(p[2][0], p[2][2]) for p in self.profiles])} images, got "
                f"{bank}; rebuild it with a profile that holds {bank}: icnet build --max-bank {bank}"
            )

    def _ranges(self) -> list[tuple[int, int]]:
        """The smallest and the largest number of images of each profile."""
        inputs = [profile[: self._images] for profile in self.profiles]
        return [(max(low for low, _, _ in ranges), min(high for _, _, high in ranges)) for ranges in inputs]

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> "Pending":
        """Queue a call: a tensor for each of the interface's inputs. Returns at once if a slot is free.

        Slots keep their memory, even after the `last`.
        """
        return self._pool.submit(*tensors)

    def close(self) -> None:
        """Wait for the groups in flight and free everything."""
        self._finalizer()


class Pending:
    """A group in flight. Anybody may finish it: its own caller, or one who needs its slot."""

    def __init__(self, pool: "_Pool", slot: "_Slot", images: int) -> None:
        self._pool, self._images = pool, images
        self._slot: _Slot | None = slot
        self._lock = threading.Lock()
        self._output: NDArray[np.float32] | None = None
        self._error: BaseException | None = None

    def result(self) -> NDArray[np.float32]:
        """Wait for the group: the model's output."""
        self.finish()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    def finish(self) -> None:
        """Wait, take the output out of the slot and give the slot back; an error is kept for `result`."""
        with self._lock:
            if self._slot is None:
                return
            slot, self._slot = self._slot, None
            try:
                self._output = slot.wait(self._images)
            except Exception as error:
                self._error = ModelError(f"the GPU failed on a group of {self._images}: {error}")
            self._pool.give_back(self, slot)


class _Pool:
    """The slots, and who has them."""

    def __init__(self, cuda: Cuda, slots: list["_Slot"]) -> None:
        self._cuda = cuda
        self._slots = len(slots)
        self._free = deque(slots)
        self._in_flight: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, *tensors: NDArray[Any]) -> Pending:
        slot = self._acquire()
        try:
            with self._cuda:
                slot.queue(*tensors)
        except BaseException:
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()
            raise
        pending = Pending(self, slot, len(tensors[0]))
        with self._changed:
            self._in_flight.append(pending)
            self._changed.notify_all()
        return pending

    def _acquire(self) -> "_Slot":
        """A free slot. If there is none, finish the oldest group in flight, whoever waits for it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._free or self._in_flight)
                if self._closed:
                    raise ICNetError("this Predictor is closed")
                if self._free:
                    return self._free.popleft()
                oldest = self._in_flight[0]
            oldest.finish()

    def give_back(self, pending: Pending, slot: "_Slot") -> None:
        with self._changed:
            self._in_flight.remove(pending)
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse new groups, finish those in flight, and free everything once all slots are back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._in_flight or len(self._free) == self._slots)
                if not self._in_flight:
                    break
                oldest = self._in_flight[0]
            oldest.finish()
        with self._cuda:
            while self._free:
                self._free.pop().free()
        self._cuda.close()


class _Slot:
    """One group's way through the device. Whatever it allocates, it allocates here."""

    def __init__(
        self, cuda: Cuda, trt: Any, engine: Any, interface: Interface, profiles: Sequence[Profile], graphs: int
    ) -> None:
        self._cuda, self._trt, self._engine, self._profiles = cuda, trt, engine, profiles
        self._inputs, self._output = interface.inputs, interface.output
        self._use_graphs = graphs > 0
        self._captures_itself = hasattr(trt, "CudaGraphStrategy")  # TensorRT-RTX does, for any shape
        self._most_graphs = 0 if self._captures_itself else graphs
        self._graphs: dict[Lengths, Capture] = {}
        self._captured: list[Any] = []  # the graphs' contexts, which must outlive them
        self._seen: Counter[Lengths] = Counter()
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        largest = [max(high for _, _, high in ranges) for ranges in zip(*profiles, strict=True)]
        with ExitStack() as stack:
            for spec, length in zip((*self._inputs, self._output), (*largest, largest[0]), strict=True):
                buffer = cuda.pinned((length, *spec.sizes), spec.dtype)
                stack.callback(cuda.free_pinned, buffer)
                memory = cuda.allocate(buffer.nbytes)
                stack.callback(memory.free)
                self._host[spec.name], self._device[spec.name] = buffer, memory
            self._scratch_size = max(int(engine.device_memory_size_v2), 1)
            self._scratch = cuda.allocate(self._scratch_size)  # shared by the slot's contexts: one runs at a time
            stack.callback(self._scratch.free)
            self._stream, self._event = cuda.stream(), cuda.event()
            self._plain = self._context()
            self._buffers = stack.pop_all()

    def free(self) -> None:
        """Give everything back; the slot can't be used any more."""
        for capture in self._graphs.values():
            capture.free()
        self._graphs.clear()
        self._captured.clear()
        del self._plain, self._engine, self._stream, self._event  # contexts go before the memory that they work on
        self._buffers.close()

    def queue(self, *tensors: NDArray[Any]) -> None:
        """Queue copies in, execution and copies out of a call, and the event that ends them."""
        lengths = tuple(len(array) for array in tensors)
        for spec, array in zip(self._inputs, tensors, strict=True):
            np.copyto(self._host[spec.name][: len(array)], array)
        self._seen[lengths] += 1
        if lengths not in self._graphs and self._seen[lengths] == 2 and len(self._graphs) < self._most_graphs:
            self._capture(lengths)
        if lengths in self._graphs:
            self._graphs[lengths].launch()
        else:
            self._prepare(self._plain, lengths)
            self._enqueue(self._plain, lengths)
        self._event.record(self._stream)

    def wait(self, n: int) -> NDArray[np.float32]:
        """Wait for the queued call; its output, out of the slot's buffer."""
        with self._cuda:
            self._event.synchronize()
        return self._host[self._output.name][:n].copy()

    def _context(self) -> Any:
        """An execution context on the slot's scratch memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._captures_itself:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self._use_graphs:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise ModelError("TensorRT could not create an execution context; it may be out of device memory")
        context.set_device_memory(int(self._scratch), self._scratch_size)
        for name, memory in self._device.items():
            context.set_tensor_address(name, int(memory))
        return context

    def _prepare(self, context: Any, lengths: Lengths) -> None:
        """Choose the profile that fits a call most closely, and set the shapes."""
        fitting = [
            ([high for _, _, high in profile], index)
            for index, profile in enumerate(self._profiles)
            if _fits(profile, lengths)
        ]
        _, index = min(fitting)
        if context.active_optimization_profile != index:
            context.set_optimization_profile_async(index, self._stream.handle)
        for spec, length in zip(self._inputs, lengths, strict=True):
            context.set_input_shape(spec.name, (length, *spec.sizes))

    def _enqueue(self, context: Any, lengths: Lengths) -> None:
        for spec, length in zip(self._inputs, lengths, strict=True):
            self._cuda.copy_in(self._device[spec.name], self._host[spec.name][:length], self._stream)
        if not context.execute_async_v3(self._stream.handle):
            raise ModelError(f"TensorRT refused to run a group of {lengths[0]}")
        name = self._output.name
        self._cuda.copy_out(self._host[name][: lengths[0]], self._device[name], self._stream)

    def _capture(self, lengths: Lengths) -> None:
        """Capture calls of these lengths as a graph, on a context of its own, which nothing changes afterwards."""
        capture = self._cuda.capture(self._stream)
        if capture is None:
            self._most_graphs = 0
            return
        context = self._context()
        self._prepare(context, lengths)
        self._enqueue(context, lengths)  # TensorRT finishes its set-up for a shape in the first, uncaptured run
        self._stream.synchronize()
        try:
            with capture:
                self._enqueue(context, lengths)
        except ModelError as error:
            logger.warning("no CUDA graphs: %s", str(error))
            self._most_graphs = 0
            return
        self._graphs[lengths] = capture
        self._captured.append(context)


def _read(path: Path) -> bytes:
    """The engine's bytes, checked against its sidecar if there is one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    sidecar = path.with_name(path.name + ".json")
    if sidecar.is_file():
        try:
            expected = json.loads(sidecar.read_text())["engine_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{sidecar}: not the sidecar of an engine; delete it or rebuild with icnet build"
            ) from error
        if expected != hashlib.sha256(content).hexdigest():
            raise ModelError(f"{path}: is not the engine that {sidecar.name} describes; rebuild it with icnet build")
    return content


def _deserialise(path: Path, content: bytes) -> tuple[Any, Any]:
    """The engine, and the module (`tensorrt` or `tensorrt_rtx`) that can load it."""
    heard: list[str] = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            trt = importlib.import_module(name)
        except ImportError:
            continue

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            """Keeps the errors, which TensorRT would print."""

            def log(self, severity: Any, message: str, trt: Any = trt, name: str = name) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    heard.append(f"{name} {trt.__version__}: {message}")

        runtime = trt.Runtime(Logger())
        engine = runtime.deserialize_cuda_engine(content)
        if engine is not None:
            return engine, trt
    if not heard:
        raise DependencyError("TensorRT is not installed: pip install 'icnet-deploy[tensorrt]' (or [tensorrt-rtx])")
    raise ModelError(
        f"{path}: can't be loaded; an engine runs with the TensorRT version and on the kind of GPU that it was built "
        f"for: rebuild it here with icnet build --onnx MODEL.onnx --output {path} ({heard[0]})"
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


def _profiles(engine: Any, interface: Interface) -> list[Profile]:
    """Per profile, what each input takes; a fixed axis is a range of one."""

    def lengths(spec: TensorSpec, index: int) -> Range:
        if isinstance(spec.shape[0], int):
            return (spec.shape[0],) * 3
        low, best, high = (int(shape[0]) for shape in engine.get_tensor_profile_shape(spec.name, index))
        return low, best, high

    count = engine.num_optimization_profiles if any(not isinstance(s.shape[0], int) for s in interface.inputs) else 1
    return [tuple(lengths(spec, index) for spec in interface.inputs) for index in range(count)]


def _fits(profile: Profile, lengths: Lengths) -> bool:
    return all(low <= length <= high for (low, _, high), length in zip(profile, lengths, strict=True))


def _either(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{low} to {high}" if low < high else str(low) for low, high in dict.fromkeys(ranges))
