"""TensorRT and TensorRT-RTX engines from any builder, through page-locked buffers on CUDA streams.

A *slot* is all that one call needs on its way through the device: an execution context, a stream, an event,
page-locked host buffers and device buffers for the largest tensors of any profile, allocated once. A call's copies in,
its execution and its copies out are queued on its slot's stream; the only wait is for the event behind them. With two
slots the next call's images are copied in while this one is computed.
"""

import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda import Capture, Cuda
from runtime.backends.engine_file import KernelCache, Lengths, LoadedEngine, load_engine, read_engine
from runtime.contract import ExportKind
from runtime.errors import DeviceLostError, ICNetError, ModelError, one_line

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """A TensorRT engine that follows the contract; nothing but the engine is needed to run it.

    Args:
        path: an engine, from `icnet build` or `trtexec`.
        slots: groups in flight at once; at least 2, so that copies overlap with computing.
        graphs: group sizes, per slot, whose work is captured as a CUDA graph when they come a second time. 0: none.
        device: the GPU's number.
        allow_host_code: load an engine that brings code for the CPU, as version-compatible ones do.
        eager_kernels: TensorRT-RTX: compile the kernels for a size before its first call, instead of beside the
            calls, which run slower ones meanwhile. For measurements.

    Raises:
        DependencyError: no TensorRT, PyCUDA, driver or GPU.
        ModelError: not an engine of an exported ICNet, or of another TensorRT or GPU, or with code that is not
            allowed; or not enough memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        slots: int = 2,
        graphs: int = 16,
        device: int = 0,
        allow_host_code: bool = False,
        eager_kernels: bool = False,
    ) -> None:
        self.path = path
        content, self.card = read_engine(path)
        self.slots = slots
        cuda = Cuda(device)
        try:
            with cuda, ExitStack() as stack:  # slots that were made before an error are freed
                loaded = load_engine(path, content, allow_host_code)
                self.interface, self.weights_digest = loaded.interface, loaded.weights_digest
                self._profiles = loaded.profiles
                self.largest: int | None = max(high for _, high in self._profiles.groups)
                contexts = _Contexts(path, loaded, graphs > 0, eager_kernels)
                slots_made = []
                for _ in range(self.slots):
                    slots_made.append(_Slot(cuda, contexts, graphs))
                    stack.callback(slots_made[-1].free)
                self._pool = _Pool(cuda, contexts, slots_made)
                stack.pop_all()  # from here on the pool frees them
        except BaseException:
            cuda.close()
            raise
        self._finalizer = weakref.finalize(self, self._pool.close)

    def check_group(self, images: int, bank_size: int = 1) -> None:
        """Raise ModelError unless some profile takes so many images at once, and a bank of so many SIVs."""
        groups = self._profiles.groups
        if not any(low <= images <= high for low, high in groups):
            remedy = f"rebuild it with --profile MIN:OPT:MAX that holds {images} (icnet build)"
            if self.interface.size is not None:
                remedy = "export the model with a dynamic group axis (icnet export does), and build that"
            raise ModelError(f"{self.path}: built for groups of {_either(groups)} images, got {images}; {remedy}")
        if self.interface.kind is ExportKind.BANKED and self._profiles.index((images, images, bank_size)) is None:
            raise ModelError(
                f"{self.path}: built for banks of {_either(self._profiles.banks)} images, got "
                f"{bank_size}; rebuild it with a profile that holds {bank_size}: icnet build --max-bank {bank_size}"
            )

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> "Pending":
        """Queue a call: a tensor for each of the interface's inputs. Returns at once if a slot is free.

        Slots keep their memory, even after the `last`.

        Raises:
            ModelError: the engine does not take tensors of this length, or the GPU failed.
        """
        return self._pool.submit(*tensors)

    def close(self) -> None:
        """Wait for the groups in flight and free everything."""
        self._finalizer()


class Pending:
    """A group in flight. Its own caller may finish it, or a thread that needs its slot."""

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
                self._error = _failure(self._pool.path, self._images, error)
            except BaseException as error:  # Ctrl-C; without an output there must be an error
                self._error = error
                raise
            finally:
                self._pool.give_back(self, slot)


class _Pool:
    """The slots: which are free, and which groups are in flight."""

    def __init__(self, cuda: Cuda, contexts: "_Contexts", slots: list["_Slot"]) -> None:
        self.path = contexts.path
        self._cuda, self._contexts = cuda, contexts
        self._slots = len(slots)
        self._free = deque(slots)
        self._in_flight: deque[Pending] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, *tensors: NDArray[Any]) -> Pending:
        slot = self._acquire()
        try:
            with self._cuda:
                slot.queue(*tensors, alone=not self._in_flight)
        except BaseException as error:
            with self._changed:
                self._free.append(slot)
                self._changed.notify_all()
            if isinstance(error, ICNetError) or not isinstance(error, Exception):
                raise
            raise _failure(self.path, len(tensors[0]), error) from error  # PyCUDA's and TensorRT's own
        pending = Pending(self, slot, len(tensors[0]))
        with self._changed:
            self._in_flight.append(pending)
            self._changed.notify_all()
        return pending

    def _acquire(self) -> "_Slot":
        """A free slot. If there is none, finish the oldest group in flight, whichever thread waits for it."""
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
        with ExitStack() as stack:
            stack.callback(self._cuda.close)
            with suppress(DeviceLostError):  # its memory is gone then
                stack.enter_context(self._cuda)
                self._contexts.save_kernels()
            stack.callback(self._contexts.close)
            while self._free:
                stack.callback(self._free.pop().free)


class _Contexts:
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


class _Slot:
    """One group's way through the device. Whatever it allocates, it allocates here."""

    def __init__(self, cuda: Cuda, contexts: _Contexts, graphs: int) -> None:
        self._cuda, self._contexts, self._profiles = cuda, contexts, contexts.loaded.profiles
        self._log = contexts.loaded.log
        interface = contexts.loaded.interface
        self._inputs, self._output = interface.inputs, interface.output
        self._most_graphs = 0 if contexts.captures_itself else graphs
        self._graphs: dict[Lengths, Capture] = {}
        self._captured: list[Any] = []  # the graphs' contexts, which must outlive them
        self._seen: Counter[Lengths] = Counter()
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        largest = self._profiles.longest
        with ExitStack() as stack:
            for spec, length in zip((*self._inputs, self._output), (*largest, largest[0]), strict=True):
                buffer = cuda.pinned((length, *spec.sizes), spec.dtype)
                stack.callback(cuda.free_pinned, buffer)
                memory = cuda.allocate(buffer.nbytes)
                stack.callback(memory.free)
                self._host[spec.name], self._device[spec.name] = buffer, memory
            self._scratch = cuda.allocate(contexts.scratch_size)  # shared by the slot's contexts: one runs at a time
            stack.callback(self._scratch.free)
            self._stream, self._spinning, self._sleeping = cuda.stream(), cuda.event(), cuda.event(blocking=True)
            self._event = self._spinning  # behind the last call
            for made in (self._stream, self._spinning, self._sleeping):
                stack.callback(made.free)
            self._plain = self._context()
            self._buffers = stack.pop_all()

    def free(self) -> None:
        """Give everything back; the slot can't be used any more."""
        try:
            with self._cuda:  # a call that failed or was interrupted may have left work behind
                self._stream.synchronize()
        except ModelError as error:  # the GPU is lost, and with it all that this waits for
            logger.debug("freed without waiting: %s", error)
        for capture in self._graphs.values():
            capture.free()
        self._graphs.clear()
        self._captured.clear()
        del self._plain, self._contexts  # contexts go before the memory that they work on
        self._buffers.close()

    def queue(self, *tensors: NDArray[Any], alone: bool = True) -> None:
        """Queue copies in, execution and copies out of a call, and the event that ends them.

        Waiting for a call that is alone spins, which notices its end soonest. Beside others it sleeps: the GPU has more
        to do meanwhile, and a spinning wait would take a core from the threads that decode and restore.
        """
        lengths = tuple(len(array) for array in tensors)
        profile = self._profiles.index(lengths)
        if profile is None:
            raise ModelError(f"{self._contexts.path}: no profile takes inputs of lengths {lengths}")
        for spec, array in zip(self._inputs, tensors, strict=True):
            np.copyto(self._host[spec.name][: len(array)], array)
        self._seen[lengths] += 1
        if lengths not in self._graphs and self._seen[lengths] == 2 and len(self._graphs) < self._most_graphs:
            self._capture(lengths, profile)
        if lengths in self._graphs:
            self._graphs[lengths].launch()
        else:
            self._prepare(self._plain, lengths, profile)
            self._enqueue(self._plain, lengths)
        self._event = self._spinning if alone else self._sleeping
        self._event.record(self._stream)

    def wait(self, n: int) -> NDArray[np.float32]:
        """Wait for the queued call; its output, out of the slot's buffer."""
        with self._cuda:
            self._event.synchronize()
        return self._host[self._output.name][:n].copy()

    def _context(self) -> Any:
        """An execution context on the slot's memory."""
        context = self._contexts.make(self._scratch)
        for name, memory in self._device.items():
            self._check(context.set_tensor_address(name, int(memory)), f"refused the address of {name}")
        return context

    def _check(self, accepted: bool, refusal: str) -> None:
        """TensorRT's answer to a call: False is an error, after which the values before it would hold."""
        if not accepted:
            raise ModelError(f"{self._contexts.path}: TensorRT {refusal}")

    def _prepare(self, context: Any, lengths: Lengths, profile: int) -> None:
        """Set a call's profile and shapes."""
        with self._log.listening() as heard:
            if context.active_optimization_profile != profile:
                set_profile = context.set_optimization_profile_async
                self._check(set_profile(profile, self._stream.handle), f"refused profile {profile}: {heard.last_error}")
            for spec, length in zip(self._inputs, lengths, strict=True):
                shape = (length, *spec.sizes)
                accepted = context.set_input_shape(spec.name, shape)
                self._check(accepted, f"refused {spec.name} of shape {shape}: {heard.last_error}")

    def _enqueue(self, context: Any, lengths: Lengths) -> None:
        for spec, length in zip(self._inputs, lengths, strict=True):
            self._cuda.copy_in(self._device[spec.name], self._host[spec.name][:length], self._stream)
        with self._log.listening() as heard:
            started = context.execute_async_v3(self._stream.handle)
            self._check(started, f"refused to run a group of {lengths[0]}: {heard.last_error}")
        name = self._output.name
        self._cuda.copy_out(self._host[name][: lengths[0]], self._device[name], self._stream)

    def _capture(self, lengths: Lengths, profile: int) -> None:
        """Capture calls of these lengths as a graph, on a context of its own, which nothing changes afterwards.

        Whatever goes wrong, e.g. for want of memory, only means that there will be no more graphs.
        """
        try:
            capture = self._cuda.capture(self._stream)
            if capture is None:
                self._most_graphs = 0
                return
            context = self._context()
            self._captured.append(context)
            self._prepare(context, lengths, profile)
            self._enqueue(context, lengths)  # TensorRT finishes its set-up for a shape in the first, uncaptured run
            self._stream.synchronize()
            with capture:
                self._enqueue(context, lengths)
            self._graphs[lengths] = capture
        except Exception as error:  # ours, PyCUDA's and TensorRT's
            logger.warning("no more CUDA graphs: %s", one_line(error))
            self._most_graphs = len(self._graphs)
            self._drop_context()

    def _drop_context(self) -> None:
        """Free the context of a graph that came to nothing, once the stream is done with it."""
        try:
            self._stream.synchronize()
        except Exception as error:  # then the call itself fails, and says so
            logger.debug("after a failed capture: %s", one_line(error))
            return
        del self._captured[len(self._graphs) :]


def _failure(path: Path, images: int, error: Exception) -> ICNetError:
    if isinstance(error, DeviceLostError):
        return error
    return ModelError(
        f"{path}: the GPU failed on a group of {images}: {one_line(error)}; if it does so again, close this Predictor "
        "and open it again"
    )


def _either(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{low} to {high}" if low < high else str(low) for low, high in dict.fromkeys(ranges))
