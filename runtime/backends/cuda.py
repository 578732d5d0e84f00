"""Page-locked buffers, device memory, streams, events and graphs: the only file that knows PyCUDA or the driver.

Everything lives in the device's primary context, the one that TensorRT uses, and is called with that context pushed:

    with cuda:
        stream = cuda.stream()
"""

import ctypes
import importlib
import sys
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.errors import DependencyError, ModelError


class Cuda:
    """One GPU, through its primary context; entering pushes the context on this thread, leaving pops it.

    Args:
        device: the GPU's number.

    Raises:
        DependencyError: PyCUDA is not installed, or there is no NVIDIA driver or GPU.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self._driver = importlib.import_module("pycuda.driver")
        except ImportError as error:
            if "libcuda" in str(error):
                raise DependencyError("no NVIDIA driver on this machine (libcuda.so.1): a GPU is needed") from error
            raise DependencyError("pycuda is not installed: pip install 'icnet-deploy[gpu]'") from error
        try:
            self._driver.init()
            self._context = self._driver.Device(device).retain_primary_context()
        except self._driver.Error as error:
            raise DependencyError(f"GPU {device} can't be used: {error}") from error

    def __enter__(self) -> Self:
        self._context.push()
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.Context.pop()

    def close(self) -> None:
        """Release the primary context; other users of it are not affected."""
        self._context.detach()

    def stream(self) -> Any:
        """A new stream; `.handle` is its CUstream."""
        return self._driver.Stream()

    def event(self) -> Any:
        """A new event, without timing; waiting for it spins, which is the fastest way to notice it."""
        return self._driver.Event(self._driver.event_flags.DISABLE_TIMING)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array, as asynchronous copies need it; give it back with `free_pinned`."""
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            array: NDArray[Any] = self._driver.pagelocked_empty(shape, dtype)
        except self._driver.Error as error:
            raise _out_of_memory("page-locked host", wanted) from error
        return array

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Free what `pinned` returned; the array must not be touched afterwards."""
        array.base.free()  # type: ignore[union-attr]

    def allocate(self, size: int) -> Any:
        """Device memory of `size` bytes; `int()` of it is its address, `.free()` gives it back.

        Raises:
            ModelError: there is not that much.
        """
        try:
            return self._driver.mem_alloc(size)
        except self._driver.Error as error:
            raise _out_of_memory("device", size) from error

    def copy_in(self, destination: Any, source: NDArray[Any], stream: Any) -> None:
        """Queue a copy of page-locked memory to the device."""
        self._driver.memcpy_htod_async(destination, source, stream)

    def copy_out(self, destination: NDArray[Any], source: Any, stream: Any) -> None:
        """Queue a copy from the device to page-locked memory."""
        self._driver.memcpy_dtoh_async(destination, source, stream)

    def capture(self, stream: Any) -> "Capture | None":
        """A context manager that records what is queued on `stream` as a graph; None without `cuda-bindings`."""
        try:
            bindings = importlib.import_module("cuda.bindings.driver")
        except ImportError:  # PyCUDA can't capture
            return None
        return Capture(bindings, stream)


class Capture:
    """Records a stream while entered; afterwards `launch` queues all of it at once. Errors leave no graph behind."""

    def __init__(self, bindings: Any, stream: Any) -> None:
        self._bindings = bindings
        self._stream = stream
        self._executable: Any = None

    def __enter__(self) -> Self:
        # Thread-local: what other threads do with CUDA meanwhile is theirs.
        mode = self._bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream.handle, mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        graph = self._call("cuStreamEndCapture", self._stream.handle)
        try:
            if error is None:
                self._executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Queue the recorded work on the stream that it was recorded from."""
        self._call("cuGraphLaunch", self._executable, self._stream.handle)

    def free(self) -> None:
        """Destroy the graph."""
        self._call("cuGraphExecDestroy", self._executable)

    def _call(self, function: str, *args: Any) -> Any:
        code, *results = getattr(self._bindings, function)(*args)
        if int(code) != 0:
            raise ModelError(f"CUDA graph: {function} failed with {code}")
        return results[0] if results else None


class PageLocked:
    """Page-locked host memory, asked of the driver itself: for engines that work without PyCUDA.

    Args:
        device: the number of the GPU that copies from and to it.

    Raises:
        DependencyError: there is no NVIDIA driver or no such GPU.
    """

    def __init__(self, device: int = 0) -> None:
        self._driver = _load_driver()
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        for function, *args in (
            ("cuInit", 0),
            ("cuDeviceGet", ctypes.byref(self._device), device),
            ("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device),
        ):
            if code := getattr(self._driver, str(function))(*args):
                raise DependencyError(f"GPU {device} can't be used: {function} failed with {code}")

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array; give it back with `free`.

        Raises:
            ModelError: there is not that much.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        code = self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        if code or address.value is None:
            raise ModelError(
                f"out of page-locked host memory: {size / 2**20:.0f} MiB were wanted (error {code}); split the group"
            )
        memory: Any = (ctypes.c_ubyte * size).from_address(address.value)
        array: NDArray[Any] = np.frombuffer(memory, dtype).reshape(shape)
        return array

    def free(self, array: NDArray[Any]) -> None:
        """Free what `allocate` returned; the array must not be touched afterwards."""
        self._call("cuMemFreeHost", ctypes.c_void_p(array.ctypes.data))

    def close(self) -> None:
        """Release the primary context; other users of it are not affected."""
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def _call(self, function: str, *args: Any) -> int:
        """Call with the context current on this thread; the driver's code, 0 for success."""
        previous = ctypes.c_void_p()
        self._driver.cuCtxPushCurrent_v2(self._context)
        try:
            return int(getattr(self._driver, function)(*args))
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(previous))


def _load_driver() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DependencyError(f"no NVIDIA driver on this machine ({name}): a GPU is needed") from error


def _out_of_memory(kind: str, wanted: int) -> ModelError:
    return ModelError(
        f"out of {kind} memory: {wanted / 2**20:.0f} MiB were wanted; build the engine for smaller groups (--max), "
        "or use fewer slots"
    )
