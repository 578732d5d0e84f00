"""The NVIDIA driver's own library, through ctypes: loading it, what its errors mean, memory without PyCUDA."""

import ctypes
import re
import sys
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.errors import DependencyError, DeviceLostError, ModelError, one_line

# After these the driver wants the process to end (cuda.h: "the process must be terminated and relaunched").
STICKY = {214, 220, 700, 702, 709, 710, *range(714, 720), 721}
# What the driver, CUDA's runtime, and what is built on it say of a driver that does not fit, and what to do then.
UNFIT = (
    (
        r"insufficient for CUDA runtime|not supported in the installed CUDA driver|unsupported toolchain"
        r"|undefined symbol: cu[A-Z]|(?:error|with):? (?:35|222)\b",
        "is too old for the installed packages: update it, or install them for that CUDA",
    ),
    (
        r"unsupported display driver|(?:error|with):? 803\b",
        "does not fit the kernel's part of it: restart the machine if the driver was updated; a container needs the "
        "host's libcuda",
    ),
    (
        r"forward compatibility was attempted|(?:error|with):? 804\b",
        "comes from a compatibility package (cuda-compat) that this GPU can't use: remove it, or update the driver",
    ),
    (r"stub library|(?:error|with):? 34\b", "is a stub to link with: take its folder out of LD_LIBRARY_PATH"),
)


def load_driver() -> Any:
    """The driver's library.

    Raises:
        DependencyError: there is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DependencyError(f"no NVIDIA driver on this machine ({name}): a GPU is needed") from error


def unfit(cause: object) -> DependencyError | None:
    """The error for what a failed call said, if the driver is too old for the caller or does not fit the machine."""
    for pattern, remedy in UNFIT:
        if re.search(pattern, str(cause)):
            version = ctypes.c_int()
            known = load_driver().cuDriverGetVersion(ctypes.byref(version)) == 0
            runs = f" (it runs CUDA up to {version.value // 1000}.{version.value % 1000 // 10})" if known else ""
            return DependencyError(f"the NVIDIA driver{runs} {remedy} ({one_line(cause)})")
    return None


def lost(device: int, cause: str) -> DeviceLostError:
    """The error of a GPU whose context is lost, by `cause`."""
    return DeviceLostError(
        f"GPU {device} stopped ({cause}) and can't be used again in this process: restart the process"
    )


def out_of_memory(kind: str, wanted: int) -> str:
    """The message for `wanted` bytes that were refused; `kind` is "device" or "page-locked host"."""
    limit = "; raise the system's limit on locked memory (ulimit -l)" if kind != "device" else ""
    return (
        f"out of {kind} memory: {wanted / 2**20:.0f} MiB were wanted; split the group, use fewer slots, or "
        f"build the engine for smaller groups (icnet build --max){limit}"
    )


class PageLocked:
    """Page-locked host memory, asked of the driver itself: for engines that work without PyCUDA.

    Dropped without `close`, or at the interpreter's exit, it closes itself.

    Args:
        device: the number of the GPU that copies from and to it.

    Raises:
        DependencyError: there is no NVIDIA driver or no such GPU, or the driver does not fit.
    """

    def __init__(self, device: int = 0) -> None:
        self._driver, self._number = load_driver(), device
        number, self._context = ctypes.c_int(), ctypes.c_void_p()
        for function, *args in (
            ("cuInit", 0),
            ("cuDeviceGet", ctypes.byref(number), device),
            ("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number),
        ):
            if code := getattr(self._driver, str(function))(*args):
                failed = f"{function} failed with {code}"
                raise unfit(failed) or DependencyError(f"GPU {device} can't be used: {failed}")
        self._allocated: set[int] = set()
        self._finalizer = weakref.finalize(
            self, _release_page_locked, self._driver, number, self._context, self._allocated
        )

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array. It lives until `free` or `close`.

        Raises:
            ModelError: there is not that much.
            DeviceLostError: the GPU stopped at an earlier error in this process.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        code = self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        if code in STICKY:
            raise lost(self._number, f"error {code}")
        if code or address.value is None:
            raise ModelError(f"{out_of_memory('page-locked host', size)} (error {code})")
        self._allocated.add(address.value)
        memory: Any = (ctypes.c_ubyte * size).from_address(address.value)
        array: NDArray[Any] = np.frombuffer(memory, dtype).reshape(shape)
        return array

    def free(self, array: NDArray[Any]) -> None:
        """Free what `allocate` returned; neither it nor a view of it may be touched afterwards."""
        self._allocated.discard(array.ctypes.data)
        self._call("cuMemFreeHost", ctypes.c_void_p(array.ctypes.data))

    def close(self) -> None:
        """Free what is left and release the primary context; other users of it are not affected."""
        self._finalizer()

    def _call(self, function: str, *args: Any) -> int:
        return _call_within(self._driver, self._context, function, *args)


def _call_within(driver: Any, context: ctypes.c_void_p, function: str, *args: Any) -> int:
    """Call the driver with a context current on this thread; its code, 0 for success."""
    if code := driver.cuCtxPushCurrent_v2(context):
        return int(code)
    try:
        return int(getattr(driver, function)(*args))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _release_page_locked(driver: Any, device: ctypes.c_int, context: ctypes.c_void_p, allocated: set[int]) -> None:
    while allocated:
        _call_within(driver, context, "cuMemFreeHost", ctypes.c_void_p(allocated.pop()))
    driver.cuDevicePrimaryCtxRelease_v2(device)
