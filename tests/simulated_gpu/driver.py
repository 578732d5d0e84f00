"""CUDA's driver, as PyCUDA, cuda-bindings and ctypes show it."""

from types import ModuleType, SimpleNamespace

import numpy as np

from tests.simulated_gpu.device import FREED, FRESH, Violation, check


def pycuda_driver(gpu):
    """`pycuda.driver`."""
    driver = ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class Context:
        def __init__(self):
            gpu.make("context")

        def push(self):
            gpu.thread.depth = getattr(gpu.thread, "depth", 0) + 1

        @staticmethod
        def pop():
            gpu.need_context()
            gpu.thread.depth -= 1

        def detach(self):
            gpu.drop("context")

    class Device:
        def __init__(self, number):
            if number != 0:
                raise Error("cuDeviceGet failed: invalid device ordinal")

        def retain_primary_context(self):
            return Context()

    class DeviceAllocation:
        def __init__(self, size):
            self.address = next(gpu.addresses)
            gpu.allocations[self.address] = np.full(size, FRESH, np.uint8)
            gpu.make("device memory")

        def __int__(self):
            return self.address

        def free(self):
            gpu.need_context()
            check(self.address in gpu.allocations, "device memory freed twice")
            gpu.allocations.pop(self.address)[:] = FREED
            gpu.drop("device memory")

    def mem_alloc(size):
        gpu.need_context()
        if gpu.used() + size > gpu.memory:
            raise Error("cuMemAlloc failed: out of memory")
        return DeviceAllocation(size)

    class PinnedAllocation:
        """What lies behind the array that `pagelocked_empty` returns: its `.base`."""

        def __init__(self, shape, dtype):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.block = np.full(size, FRESH, np.uint8)
            address = self.block.__array_interface__["data"][0]
            self.__array_interface__ = {
                "shape": shape, "typestr": np.dtype(dtype).str, "data": (address, False), "version": 3
            }  # fmt: skip
            gpu.pinned[address] = self.block
            gpu.make("page-locked memory")

        def free(self):
            gpu.need_context()
            address = self.block.__array_interface__["data"][0]
            check(address in gpu.pinned, "page-locked memory freed twice")
            gpu.pinned.pop(address)[:] = FREED
            gpu.drop("page-locked memory")

    def pagelocked_empty(shape, dtype):
        gpu.need_context()
        return np.asarray(PinnedAllocation(shape, dtype))

    class Stream:
        def __init__(self, flags):
            check(flags == 1, "a blocking stream, whose captures break on legacy calls")
            gpu.need_context()
            self.handle = next(gpu.handles)
            self.queue, self.capturing = [], None
            gpu.streams[self.handle] = self

        def check_alive(self):
            check(self.handle in gpu.streams, "a stream that does not exist")

        def run_until(self, marker):
            with gpu.lock:
                while self.queue:
                    work = self.queue.pop(0)
                    if work is marker:
                        return
                    work()

        def synchronize(self):
            gpu.need_context()
            if gpu.sticky:
                raise Error(f"cuStreamSynchronize failed: error {gpu.sticky}")
            check(self.capturing is None, "a capturing stream was synchronised")
            self.run_until(None)

    class Event:
        def __init__(self, flags=0):
            gpu.need_context()
            self.wait = "sleep" if flags & 1 else None
            self.stream: Stream | None = None

        def record(self, stream):
            gpu.need_context()
            check(stream.capturing is None, "an event was recorded on a capturing stream")
            self.stream, self.marker = stream, lambda: None
            stream.queue.append(self.marker)
            gpu.note("record", stream.handle)

        def synchronize(self):
            gpu.need_context()
            if gpu.sticky:
                raise Error(f"cuEventSynchronize failed: error {gpu.sticky}")
            if self.stream is None:
                raise Violation("waited for an event that was never recorded")
            gpu.note("wait", self.stream.handle, self.wait)
            if self.marker in self.stream.queue:
                self.stream.run_until(self.marker)

    def memcpy_htod_async(destination, source, stream):
        gpu.need_context()
        if gpu.sticky:
            raise Error(f"cuMemcpyHtoDAsync failed: error {gpu.sticky}")
        data, address = gpu.pinned_bytes(source), int(destination)
        gpu.device_view(address, data.size)

        def copy():
            gpu.device_view(address, data.size)[:] = gpu.pinned_bytes(source)

        gpu.queue(stream, "copy in", data.size, copy)

    def memcpy_dtoh_async(destination, source, stream):
        gpu.need_context()
        data, address = gpu.pinned_bytes(destination), int(source)
        gpu.device_view(address, data.size)

        def copy():
            gpu.pinned_bytes(destination)[:] = gpu.device_view(address, data.size)

        gpu.queue(stream, "copy out", data.size, copy)

    vars(driver).update(
        Error=Error, Context=Context, Device=Device, Stream=Stream, Event=Event, init=lambda: None,
        event_flags=SimpleNamespace(DISABLE_TIMING=2, BLOCKING_SYNC=1),
        mem_alloc=mem_alloc, pagelocked_empty=pagelocked_empty,
        memcpy_htod_async=memcpy_htod_async, memcpy_dtoh_async=memcpy_dtoh_async,
    )  # fmt: skip
    return driver


def library(gpu):
    """`libcuda.so.1`, as far as `runtime.backends.cuda_driver.PageLocked` calls it."""

    def retain(context, device):
        gpu.make("context")
        return 0

    def release(device):
        gpu.drop("context")
        return 0

    def push(context):
        gpu.thread.depth = getattr(gpu.thread, "depth", 0) + 1
        return 0

    def pop(context):
        gpu.need_context()
        gpu.thread.depth -= 1
        return 0

    def allocate(pointer, size, flags):
        gpu.need_context()
        if sum(block.size for block in gpu.pinned.values()) + size.value > gpu.memory:
            return 2
        block = np.full(size.value, FRESH, np.uint8)
        pointer._obj.value = block.ctypes.data
        gpu.pinned[block.ctypes.data] = block
        gpu.make("page-locked memory")
        return 0

    def free(address):
        gpu.need_context()
        check(address.value in gpu.pinned, "page-locked memory freed twice")
        gpu.freed.append(gpu.pinned.pop(address.value))  # kept, so that a late access finds poison
        gpu.freed[-1][:] = FREED
        gpu.drop("page-locked memory")
        return 0

    def version(pointer):
        pointer._obj.value = 12020
        return 0

    return SimpleNamespace(
        cuDriverGetVersion=version, cuInit=lambda flags: 0, cuDeviceGet=lambda device, number: 101 if number else 0,
        cuDevicePrimaryCtxRetain=retain, cuDevicePrimaryCtxRelease_v2=release, cuCtxPushCurrent_v2=push,
        cuCtxPopCurrent_v2=pop, cuMemHostAlloc=allocate, cuMemFreeHost=free,
        cuMemGetInfo_v2=lambda free, total: gpu.sticky, cuThreadExchangeStreamCaptureMode=lambda mode: 0,
    )  # fmt: skip


def graphs(gpu):
    """`cuda.bindings.driver`: stream capture."""
    bindings = ModuleType("cuda.bindings.driver")
    mode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def begin(handle, mode):
        gpu.need_context()
        stream = gpu.streams[handle]
        check(stream.capturing is None, "capture within a capture")
        check(not stream.queue, "capture began on a stream with work queued")
        stream.capturing = []
        return (0,)

    def end(handle):
        stream = gpu.streams[handle]
        graph, stream.capturing = stream.capturing, None
        gpu.make("graph")
        return 0, graph

    def instantiate(graph, flags):
        gpu.make("executable graph")
        return 0, list(graph)

    def launch(executable, handle):
        gpu.need_context()
        if gpu.fail_launch or gpu.sticky:
            return (gpu.sticky or 719,)
        gpu.note("launch", handle)
        gpu.streams[handle].queue.extend(executable)
        return (0,)

    def destroy(kind):
        def function(_):
            gpu.need_context()
            gpu.drop(kind)
            return (0,)

        return function

    vars(bindings).update(
        CUstreamCaptureMode=mode,
        cuStreamBeginCapture=begin, cuStreamEndCapture=end, cuGraphInstantiate=instantiate, cuGraphLaunch=launch,
        cuGraphDestroy=destroy("graph"), cuGraphExecDestroy=destroy("executable graph"),
    )  # fmt: skip
    return bindings
