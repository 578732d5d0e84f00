"""Page-locked buffers, device memory, streams, events and graphs: the only file that knows PyCUDA.

Everything lives in the device's primary context, the one that TensorRT uses, and is called with that context pushed:

    with cuda:
        stream = cuda.stream()

What is made here may be freed, dropped or closed in any thread.
"""

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.backends import cuda_driver
from runtime.errors import DependencyError, ICNetError, ModelError, how_to_install

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA does not name
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Cuda:
    """One GPU, through its primary context; entering pushes the context on this thread, leaving pops it.

    Dropped without `close`, or at the interpreter's exit, it closes itself.

    Args:
        device: the GPU's number.

    Raises:
        DependencyError: PyCUDA is not installed, or there is no NVIDIA driver or GPU, or the driver does not fit.
        DeviceLostError: the GPU stopped at an earlier error in this process.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self._driver = importlib.import_module("pycuda.driver")
        except ImportError as error:
            if "libcuda" in str(error):
                raise DependencyError("no NVIDIA driver on this machine (libcuda.so.1): a GPU is needed") from error
            if (driver := cuda_driver.unfit(error)) is not None:  # PyCUDA was compiled for a newer one
                raise driver from error
            raise DependencyError(f"pycuda is not installed: {how_to_install('gpu')}") from error
        library = cuda_driver.load_driver()
        try:
            self._driver.init()
            context = self._driver.Device(device).retain_primary_context()
        except self._driver.Error as error:
            raise cuda_driver.unfit(error) or DependencyError(f"GPU {device} can't be used: {error}") from error
        self._primary = _Primary(self._driver, library, context, device)
        self._finalizer = weakref.finalize(self, self._primary.close)
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        self._primary.push()
        return self

    def __exit__(self, *_: object) -> None:
        self._primary.pop()

    def check(self) -> None:
        """Raise DeviceLostError if the GPU stopped at an error: ours, or one that TensorRT or PyTorch met."""
        with self:
            self._primary.look("an earlier call")
        self._primary.refuse_if_lost()

    def close(self) -> None:
        """Free all that was made here and release the primary context; other users of it are not affected.

        In any thread. While another thread is inside, that happens when it leaves.
        """
        self._finalizer()

    def stream(self) -> "Stream":
        """A new stream that does not wait for the legacy stream.

        A capture on a stream that does would break, and be broken by, legacy calls anywhere in the process.
        """
        with self._primary.calls():
            return Stream(self._primary, self._driver.Stream(NON_BLOCKING))

    def event(self, *, blocking: bool = False) -> "Event":
        """A new event, without timing. Waiting for it spins, which notices it soonest; `blocking`: sleeps."""
        flags = self._driver.event_flags.DISABLE_TIMING
        if blocking:
            flags |= self._driver.event_flags.BLOCKING_SYNC
        with self._primary.calls():
            return Event(self._primary, self._driver.Event(flags))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array, as asynchronous copies need it. It lives until `free_pinned` or `close`.

        Raises:
            ModelError: the system refuses so much.
        """
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._primary.calls(cuda_driver.out_of_memory("page-locked host", wanted)):
            array: NDArray[Any] = self._driver.pagelocked_empty(shape, dtype)
        base: Any = array.base
        self._primary.keep(id(array), array, base.free)
        return array

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Free what `pinned` returned; neither it nor a view of it may be touched afterwards."""
        self._primary.drop(id(array))

    def allocate(self, size: int) -> "Memory":
        """Device memory of `size` bytes; `int()` of it is its address.

        Raises:
            ModelError: there is not that much.
        """
        with self._primary.calls(cuda_driver.out_of_memory("device", size)):
            return Memory(self._primary, self._driver.mem_alloc(size))

    def copy_in(self, destination: "Memory", source: NDArray[Any], stream: "Stream") -> None:
        """Queue a copy of page-locked memory to the device."""
        with self._primary.calls():
            self._driver.memcpy_htod_async(destination.object, source, stream.object)

    def copy_out(self, destination: NDArray[Any], source: "Memory", stream: "Stream") -> None:
        """Queue a copy from the device to page-locked memory."""
        with self._primary.calls():
            self._driver.memcpy_dtoh_async(destination, source.object, stream.object)

    def capture(self, stream: "Stream") -> "Capture | None":
        """A context manager that records what is queued on `stream` as a graph; None without `cuda-bindings`."""
        try:
            bindings = importlib.import_module("cuda.bindings.driver")
        except ImportError:  # PyCUDA can't capture
            return None
        return Capture(self._primary, bindings, stream)


class _Primary:
    """A reference to the primary context and all that was made in it.

    PyCUDA frees an object, and releases a context, only in the thread that made the context or where it is current;
    else it leaks them. So this keeps the only references, and drops them with the context pushed.
    """

    def __init__(self, driver: Any, library: Any, context: Any, device: int) -> None:
        self._driver, self._library, self._context, self._device = driver, library, context, device
        self._lock = threading.RLock()  # a garbage collection may free something within
        self._kept: dict[int, tuple[Any, Callable[[], None] | None]] = {}
        self._inside = 0
        self._closed = self._released = False
        self._lost: str | None = None

    def push(self) -> None:
        self.refuse_if_lost()
        with self._lock:
            if self._closed:
                raise ICNetError("this GPU context is closed")
            self._push()

    def _push(self) -> None:
        with self.calls():
            self._context.push()
        self._inside += 1

    def pop(self) -> None:
        self._driver.Context.pop()
        with self._lock:
            self._inside -= 1
            self._release_if_unused()

    def keep(self, key: int, kept: Any, destroy: Callable[[], None] | None = None) -> None:
        """Hold an object of the context until `drop`, which calls `destroy` or else drops the last reference."""
        with self._lock:
            self._kept[key] = kept, destroy

    def find(self, key: int) -> Any:
        """An object that is kept."""
        found = self._kept.get(key)
        if found is None:
            raise ICNetError("used after it was freed, or after its GPU context was closed")
        return found[0]

    def drop(self, key: int) -> None:
        """Free an object, in any thread; nothing if that has been done."""
        with self._lock:
            if key not in self._kept or self._lost is not None:  # a lost context takes its objects along
                return
            try:
                self._push()
            except ModelError:
                return
            try:
                self._destroy(key)
            finally:
                self.pop()

    def _destroy(self, key: int) -> None:
        with self._relaxed():
            kept, destroy = self._kept.pop(key)
            try:
                if destroy is not None:
                    destroy()
            except (self._driver.Error, ModelError) as error:  # its owner could do nothing about it
                self.look(str(error))
            del kept, destroy

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._release_if_unused()

    def _release_if_unused(self) -> None:
        if not self._closed or self._inside or self._released:
            return
        self._released = True
        self._context.push()
        self.look("an earlier call")
        if self._lost is None:
            for key in list(self._kept):
                self._destroy(key)
        # `detach` releases the context and never pops it. Popped behind PyCUDA's back it is gone from the driver's
        # stack; PyCUDA still takes it for the current one, as it must to release it in whatever thread.
        self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        self._context.detach()
        self._kept.clear()

    @contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Allow freeing while this thread captures: a garbage collection may come at any time."""
        mode = ctypes.c_int(RELAXED)
        self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    @contextmanager
    def calls(self, out_of_memory: str | None = None) -> Iterator[None]:
        """Turn PyCUDA's errors into ours."""
        try:
            yield
        except self._driver.Error as error:
            self.look(str(error))
            self.refuse_if_lost()
            refused = out_of_memory is not None and "out of memory" in str(error)
            raise ModelError(str(out_of_memory) if refused else f"GPU {self._device}: {error}") from error

    def look(self, cause: str) -> None:
        """Note whether the context is lost; needs it pushed. `cause` names the call that failed."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        code = self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        if code in cuda_driver.STICKY:
            self._lost = self._lost or f"{cause}, error {code}"

    def refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise cuda_driver.lost(self._device, self._lost)


class _Owned:
    """Something of PyCUDA's in a context. Freed by `free`, by the garbage collector, or with the context."""

    def __init__(self, primary: _Primary, owned: Any) -> None:
        self._primary = primary
        primary.keep(id(self), owned, getattr(owned, "free", None))

    @property
    def object(self) -> Any:
        """PyCUDA's object."""
        return self._primary.find(id(self))

    def free(self) -> None:
        """Destroy it, in any thread."""
        self._primary.drop(id(self))

    def __del__(self) -> None:
        self.free()


class Stream(_Owned):
    """A stream; `handle` is its CUstream."""

    @property
    def handle(self) -> int:
        """Its CUstream, as TensorRT and cuda-bindings take it."""
        return int(self.object.handle)

    def synchronize(self) -> None:
        """Wait for all that is queued; needs the context pushed."""
        with self._primary.calls():
            self.object.synchronize()


class Event(_Owned):
    """A mark in a stream."""

    def record(self, stream: Stream) -> None:
        """Put it behind all that is queued on the stream."""
        with self._primary.calls():
            self.object.record(stream.object)

    def synchronize(self) -> None:
        """Wait until the stream has come to it; needs the context pushed."""
        with self._primary.calls():
            self.object.synchronize()


class Memory(_Owned):
    """Device memory; `int()` of it is its address."""

    def __int__(self) -> int:
        return int(self.object)


class Capture:
    """Records a stream while entered; afterwards `launch` queues all of it at once. Errors leave no graph behind."""

    def __init__(self, primary: _Primary, bindings: Any, stream: Stream) -> None:
        self._primary = primary
        self._bindings = bindings
        self._stream = stream

    def __enter__(self) -> Self:
        # Thread-local: what other threads do with CUDA meanwhile is theirs.
        mode = self._bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream.handle, mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:  # the capture may be invalid for the same reason: the first error says more
            _, graph = self._bindings.cuStreamEndCapture(self._stream.handle)
            if graph is not None and int(graph):
                self._bindings.cuGraphDestroy(graph)
            return
        graph = self._call("cuStreamEndCapture", self._stream.handle)
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        self._primary.keep(id(self), executable, partial(self._bindings.cuGraphExecDestroy, executable))

    def launch(self) -> None:
        """Queue the recorded work on the stream that it was recorded from."""
        self._call("cuGraphLaunch", self._primary.find(id(self)), self._stream.handle)

    def free(self) -> None:
        """Destroy the graph, in any thread."""
        self._primary.drop(id(self))

    def __del__(self) -> None:
        self.free()

    def _call(self, function: str, *args: Any) -> Any:
        code, *results = getattr(self._bindings, function)(*args)
        if int(code) != 0:
            self._primary.look(f"{function} failed")
            self._primary.refuse_if_lost()
            raise ModelError(f"CUDA graph: {function} failed with {code}")
        return results[0] if results else None
