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
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.cuda import Capture, Cuda
from runtime.backends.engine_file import Contexts, Shape, Shapes, load_engine, read_engine
from runtime.contract import Contract, ExportKind, check_contract
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
        contract: what its tensors must be; of another network than ICNet, another check.

    Attributes:
        limits: the smallest and the largest shape of the first input, in any profile.

    Raises:
        DependencyError: no TensorRT, PyCUDA, driver or GPU.
        ModelError: not an engine, or not what `contract` asks for, or of another TensorRT or GPU, or with code that is
            not allowed; or not enough memory.
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
        contract: Contract = check_contract,
    ) -> None:
        self.path = path
        content, self.card = read_engine(path)
        self.slots = slots
        cuda = Cuda(device)
        try:
            with cuda, ExitStack() as stack:  # slots that were made before an error are freed
                loaded = load_engine(path, content, allow_host_code, contract)
                self.interface, self.weights_digest = loaded.interface, loaded.weights_digest
                self.name, self._profiles = loaded.name, loaded.profiles
                self.limits = self._profiles.smallest[0], self._profiles.largest[0]
                self.largest: int | None = max(high for _, high in self._profiles.groups)
                contexts = Contexts(path, loaded, graphs > 0, eager_kernels)
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
        lengths = images, images, bank_size
        shapes = tuple((n, *spec.sizes) for n, spec in zip(lengths, self.interface.inputs, strict=False))
        if self.interface.kind is ExportKind.BANKED and self._profiles.index(shapes) is None:
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
                self._output = slot.wait()
            except Exception as error:
                self._error = _failure(self._pool.path, self._images, error)
            except BaseException as error:  # Ctrl-C; without an output there must be an error
                self._error = error
                raise
            finally:
                self._pool.give_back(self, slot)


class _Pool:
    """The slots: which are free, and which groups are in flight."""

    def __init__(self, cuda: Cuda, contexts: "Contexts", slots: list["_Slot"]) -> None:
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


class _Slot:
    """One group's way through the device. Whatever it allocates, it allocates here."""

    def __init__(self, cuda: Cuda, contexts: Contexts, graphs: int) -> None:
        self._cuda, self._contexts, self._profiles = cuda, contexts, contexts.loaded.profiles
        self._log = contexts.loaded.log
        interface = contexts.loaded.interface
        self._inputs, self._output = interface.inputs, interface.output
        self._shape: Shape = ()  # of the last call's output
        self._most_graphs = 0 if contexts.captures_itself else graphs
        self._graphs: dict[Shapes, tuple[Capture, Shape]] = {}  # and the shape of the output
        self._captured: list[Any] = []  # the graphs' contexts, which must outlive them
        self._seen: Counter[Shapes] = Counter()
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        largest = self._profiles.largest
        outputs = (self._output, *interface.others)
        # Elements. Of outputs whose size follows the image's, a guess: no larger than the image. Every call checks it.
        rooms = [prod(spec.sizes) * (largest[0][0] if spec.is_sized else prod(largest[0])) for spec in outputs]
        self._unsized = {spec.name: room for spec, room in zip(outputs, rooms, strict=True) if not spec.is_sized}
        with ExitStack() as stack:
            for spec, room in zip((*self._inputs, *outputs), (*map(prod, largest), *rooms), strict=True):
                self._device[spec.name] = memory = cuda.allocate(room * np.dtype(spec.dtype).itemsize)
                stack.callback(memory.free)
                if spec not in interface.others:  # which nothing reads
                    self._host[spec.name] = buffer = cuda.pinned((room,), spec.dtype)
                    stack.callback(cuda.free_pinned, buffer)
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
        for capture, _ in self._graphs.values():
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
        shapes = tuple(array.shape for array in tensors)
        profile = self._profiles.index(shapes)
        if profile is None:
            raise ModelError(f"{self._contexts.path}: no profile takes inputs of shapes {', '.join(map(str, shapes))}")
        for spec, array in zip(self._inputs, tensors, strict=True):
            np.copyto(self._host[spec.name][: array.size].reshape(array.shape), array)
        self._seen[shapes] += 1
        if shapes not in self._graphs and self._seen[shapes] == 2 and len(self._graphs) < self._most_graphs:
            self._capture(shapes, profile)
        if shapes in self._graphs:
            capture, self._shape = self._graphs[shapes]
            capture.launch()
        else:
            self._shape = self._prepare(self._plain, shapes, profile)
            self._enqueue(self._plain, shapes, self._shape)
        self._event = self._spinning if alone else self._sleeping
        self._event.record(self._stream)

    def wait(self) -> NDArray[np.float32]:
        """Wait for the queued call; its output, out of the slot's buffer."""
        with self._cuda:
            self._event.synchronize()
        return self._host[self._output.name][: prod(self._shape)].reshape(self._shape).copy()

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

    def _prepare(self, context: Any, shapes: Shapes, profile: int) -> Shape:
        """Set a call's profile and shapes; the shape of its output."""
        with self._log.listening() as heard:
            if context.active_optimization_profile != profile:
                set_profile = context.set_optimization_profile_async
                self._check(set_profile(profile, self._stream.handle), f"refused profile {profile}: {heard.last_error}")
            for spec, shape in zip(self._inputs, shapes, strict=True):
                accepted = context.set_input_shape(spec.name, shape)
                self._check(accepted, f"refused {spec.name} of shape {shape}: {heard.last_error}")
        found = {name: tuple(map(int, context.get_tensor_shape(name))) for name in self._unsized}
        for name, room in self._unsized.items():
            fits = min(found[name]) > 0 and prod(found[name]) <= room
            self._check(fits, f"gives {name} of shape {found[name]} for images {shapes[0]}: there is no room for more")
        return found.get(self._output.name, (shapes[0][0], *self._output.sizes))

    def _enqueue(self, context: Any, shapes: Shapes, output: Shape) -> None:
        for spec, shape in zip(self._inputs, shapes, strict=True):
            self._cuda.copy_in(self._device[spec.name], self._host[spec.name][: prod(shape)], self._stream)
        with self._log.listening() as heard:
            started = context.execute_async_v3(self._stream.handle)
            self._check(started, f"refused to run a group of {shapes[0][0]}: {heard.last_error}")
        name = self._output.name
        self._cuda.copy_out(self._host[name][: prod(output)], self._device[name], self._stream)

    def _capture(self, shapes: Shapes, profile: int) -> None:
        """Capture calls of these shapes as a graph, on a context of its own, which nothing changes afterwards.

        Whatever goes wrong, e.g. for want of memory, only means that there will be no more graphs.
        """
        try:
            capture = self._cuda.capture(self._stream)
            if capture is None:
                self._most_graphs = 0
                return
            context = self._context()
            self._captured.append(context)
            output = self._prepare(context, shapes, profile)
            # TensorRT finishes its set-up for a shape in the first, uncaptured run.
            self._enqueue(context, shapes, output)
            self._stream.synchronize()
            with capture:
                self._enqueue(context, shapes, output)
            self._graphs[shapes] = capture, output
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
