"""A strict imitation of the parts of PyCUDA, cuda-bindings and TensorRT that the runtime calls, over host memory.

Work that is queued on a stream happens only when an event behind it is waited for, or the stream is synchronised; the
network is computed by ONNX Runtime at that moment, from what lies in the simulated device memory then. What real
hardware would let pass and punish later is an error here: pageable memory in an asynchronous copy, addresses outside a
live allocation, shapes outside the profile, calls without a current context, a changed context behind a captured graph.
Freed memory is poisoned, and everything alive is counted.

An "engine" is what `engine_file` writes: a JSON header and an ONNX model.
"""

import itertools
import json
import sys
import threading
from collections import Counter
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime

MAGIC = b"simulated engine\n"
FRESH, FREED = 0xCD, 0xDD


class Violation(AssertionError):
    """The program did what a GPU may punish. Not a CUDA error: nothing may catch and survive it."""


def check(condition, message):
    if not condition:
        raise Violation(message)


def engine_file(path, onnx_path, profiles, version="10.16.0", name="Unnamed Network 0"):
    """Write an engine for the simulated TensorRT of that version.

    A profile is (min, opt, max), the lengths of all inputs, or a dict of such by the inputs' names.
    """
    header = json.dumps({"version": version, "profiles": profiles, "name": name}).encode() + b"\n"
    path.write_bytes(MAGIC + header + onnx_path.read_bytes())
    return path


class Gpu:
    """The device: memory, streams and a log of what was issued, as (operation, stream handle, detail)."""

    def __init__(self, memory=1 << 34, rtx=False, version="10.16.0", bindings=True):
        self.memory, self.rtx, self.version, self.bindings = memory, rtx, version, bindings
        self.lock = threading.RLock()
        self.thread = threading.local()
        self.allocations = {}  # address -> uint8 array
        self.pinned = {}  # address -> array
        self.freed = []  # page-locked memory that is no longer allocated
        self.streams = {}
        self.alive = Counter()  # kind -> number now
        self.made = Counter()  # kind -> number ever
        self.log = []
        self.handles = itertools.count(1)
        self.addresses = itertools.count(1 << 40, 1 << 33)
        self.fail_launch = False

    # --- bookkeeping

    def make(self, kind):
        with self.lock:
            self.alive[kind] += 1
            self.made[kind] += 1

    def drop(self, kind):
        with self.lock:
            self.alive[kind] -= 1

    def leaks(self):
        return {kind: number for kind, number in self.alive.items() if number}

    def note(self, operation, stream, detail=None):
        with self.lock:
            self.log.append((operation, stream, detail))

    def need_context(self):
        check(getattr(self.thread, "depth", 0) > 0, "called without a current context on this thread")

    def device_view(self, address, size):
        for start, block in self.allocations.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise Violation(f"{size} bytes at {address:#x} are not inside one live device allocation")

    def pinned_bytes(self, array):
        address = array.__array_interface__["data"][0]
        check(array.flags.c_contiguous, "asynchronous copy of an array that is not contiguous")
        inside = any(
            start <= address and address + array.nbytes <= start + whole.nbytes for start, whole in self.pinned.items()
        )
        check(inside, "asynchronous copy of pageable memory")
        return array.reshape(-1).view(np.uint8)

    def queue(self, stream, operation, detail, work):
        stream.check_alive()
        self.note(operation, stream.handle, detail)
        (stream.queue if stream.capturing is None else stream.capturing).append(work)

    # --- the modules

    def modules(self):
        """What to put into `sys.modules`."""
        pycuda = ModuleType("pycuda")
        pycuda.driver = self.driver()
        modules = {"pycuda": pycuda, "pycuda.driver": pycuda.driver, "tensorrt": None, "tensorrt_rtx": None}
        modules["tensorrt_rtx" if self.rtx else "tensorrt"] = self.tensorrt()
        cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        modules |= {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.driver": None}
        if self.bindings:
            modules["cuda.bindings.driver"] = bindings.driver = self.graphs()
        return modules

    def driver(self):
        gpu = self
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
            if sum(a.size for a in gpu.allocations.values()) + size > gpu.memory:
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
            def __init__(self):
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
                check(self.capturing is None, "a capturing stream was synchronised")
                self.run_until(None)

        class Event:
            def __init__(self, flags=0):
                gpu.need_context()
                self.stream = None

            def record(self, stream):
                gpu.need_context()
                check(stream.capturing is None, "an event was recorded on a capturing stream")
                self.stream, self.marker = stream, lambda: None
                stream.queue.append(self.marker)
                gpu.note("record", stream.handle)

            def synchronize(self):
                gpu.need_context()
                check(self.stream is not None, "waited for an event that was never recorded")
                gpu.note("wait", self.stream.handle)
                if self.marker in self.stream.queue:
                    self.stream.run_until(self.marker)

        def memcpy_htod_async(destination, source, stream):
            gpu.need_context()
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
            event_flags=SimpleNamespace(DISABLE_TIMING=2), mem_alloc=mem_alloc, pagelocked_empty=pagelocked_empty,
            memcpy_htod_async=memcpy_htod_async, memcpy_dtoh_async=memcpy_dtoh_async,
        )  # fmt: skip
        return driver

    def library(self):
        """`libcuda.so.1`, as far as `runtime.backends.cuda.PageLocked` calls it."""
        gpu = self

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

        return SimpleNamespace(
            cuInit=lambda flags: 0, cuDeviceGet=lambda device, number: 101 if number else 0,
            cuDevicePrimaryCtxRetain=retain, cuDevicePrimaryCtxRelease_v2=release, cuCtxPushCurrent_v2=push,
            cuCtxPopCurrent_v2=pop, cuMemHostAlloc=allocate, cuMemFreeHost=free,
        )  # fmt: skip

    def graphs(self):
        """`cuda.bindings.driver`: stream capture."""
        gpu = self
        bindings = ModuleType("cuda.bindings.driver")
        bindings.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

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
            if gpu.fail_launch:
                return (719,)
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
            cuStreamBeginCapture=begin, cuStreamEndCapture=end, cuGraphInstantiate=instantiate, cuGraphLaunch=launch,
            cuGraphDestroy=destroy("graph"), cuGraphExecDestroy=destroy("executable graph"),
        )  # fmt: skip
        return bindings

    def tensorrt(self):
        """`tensorrt` 10, or `tensorrt_rtx`."""
        gpu = self
        trt = ModuleType("tensorrt_rtx" if gpu.rtx else "tensorrt")
        Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
        Strategy = IntEnum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
        Mode = IntEnum("Mode", "NONE INPUT OUTPUT", start=0)

        class ILogger:
            def __init__(self):
                pass

        ILogger.Severity = Severity

        class ExecutionContext:
            def __init__(self, engine, config):
                gpu.need_context()
                gpu.make("execution context")
                self.engine, self.config = engine, config
                self.active_optimization_profile = 0
                self.shapes, self.addresses, self.scratch = {}, {}, None
                self.version = 0  # counts changes: a captured graph holds for one
                self.ran = None  # the version that has run uncaptured

            def __del__(self):
                gpu.drop("execution context")

            def set_device_memory(self, address, size):
                check(size >= self.engine.device_memory_size_v2, "scratch memory too small")
                gpu.device_view(address, size)
                self.scratch = address, size
                self.version += 1

            def set_tensor_address(self, name, address):
                check(name in self.engine.tensors, f"no tensor {name}")
                self.addresses[name] = address
                self.version += 1
                return True

            def set_optimization_profile_async(self, index, stream):
                check(0 <= index < self.engine.num_optimization_profiles, f"no profile {index}")
                check(stream in gpu.streams, "profile set on no stream")
                self.active_optimization_profile = index
                self.shapes = {}
                self.version += 1
                return True

            def set_input_shape(self, name, shape):
                check(self.engine.is_input(name), f"no input {name}")
                low, _, high = self.engine.lengths(name, self.active_optimization_profile)
                check(low <= shape[0] <= high, f"{name}: {shape} outside profile {low} … {high}")
                check(tuple(shape[1:]) == tuple(self.engine.tensors[name].shape[1:]), f"{name}: shape {shape}")
                self.shapes[name] = tuple(shape)
                self.version += 1
                return True

            def execute_async_v3(self, handle):
                gpu.need_context()
                check(handle in gpu.streams, "executed on no stream")
                check(self.scratch is not None, "executed without scratch memory")
                check(set(self.shapes) == set(self.engine.inputs), "executed without all input shapes")
                check(set(self.addresses) == set(self.engine.tensors), "executed without all addresses")
                stream, version = gpu.streams[handle], self.version
                captured = stream.capturing is not None
                if captured:
                    check(self.ran == version, "captured before an uncaptured run with these shapes")
                else:
                    self.ran = version
                shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch

                def work():
                    check(self.version == version or not captured, "a context was changed behind its captured graph")
                    gpu.device_view(*scratch)[:8] = 1
                    self.engine.compute(shapes, addresses)

                gpu.queue(stream, "execute", shapes["images"][0], work)
                return True

        class Engine:
            def __init__(self, content):
                gpu.make("engine")
                header, _, model = content.removeprefix(MAGIC).partition(b"\n")
                self.profiles, self.name = (json.loads(header)[key] for key in ("profiles", "name"))
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
                self.inputs = {t.name: t for t in self.session.get_inputs()}
                self.tensors = self.inputs | {t.name: t for t in self.session.get_outputs()}
                self.num_io_tensors = len(self.tensors)
                self.num_optimization_profiles = len(self.profiles)
                self.device_memory_size_v2 = 4096 * max(
                    self.lengths("images", i)[2] for i in range(self.num_optimization_profiles)
                )

            def __del__(self):
                gpu.drop("engine")

            def lengths(self, name, index):
                profile = self.profiles[index]
                return profile[name] if isinstance(profile, dict) else profile

            def is_input(self, name):
                return name in self.inputs

            def get_tensor_name(self, index):
                return list(self.tensors)[index]

            def get_tensor_dtype(self, name):
                types = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int32)": "int32"}
                return types[self.tensors[name].type]

            def get_tensor_shape(self, name):
                return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

            def get_tensor_mode(self, name):
                return Mode.INPUT if self.is_input(name) else Mode.OUTPUT

            def get_tensor_profile_shape(self, name, index):
                return [(n, *self.tensors[name].shape[1:]) for n in self.lengths(name, index)]

            def create_runtime_config(self):
                config = SimpleNamespace(cuda_graph_strategy=0, strategy=Strategy.STATIC)
                config.set_execution_context_allocation_strategy = lambda s: setattr(config, "strategy", s)
                return config

            def create_execution_context(self, config):
                strategy = config.strategy if gpu.rtx else config
                check(strategy == Strategy.USER_MANAGED, "the context would allocate its own memory")
                return ExecutionContext(self, config)

            def compute(self, shapes, addresses):
                feeds = {}
                for name, shape in shapes.items():
                    dtype = np.dtype(self.get_tensor_dtype(name))
                    data = gpu.device_view(addresses[name], int(np.prod(shape)) * dtype.itemsize)
                    feeds[name] = data.copy().view(dtype).reshape(shape)
                (output,) = self.tensors.keys() - self.inputs.keys()
                found = self.session.run([output], feeds)[0]
                gpu.device_view(addresses[output], found.nbytes)[:] = found.reshape(-1).view(np.uint8)

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, content):
                gpu.need_context()
                header = content.removeprefix(MAGIC).partition(b"\n")[0]
                if not content.startswith(MAGIC):
                    self.logger.log(Severity.ERROR, "Magic tag does not match")
                    return None
                version = json.loads(header)["version"]
                if version != gpu.version:
                    self.logger.log(Severity.ERROR, f"engine was serialised by {version}, this is {gpu.version}")
                    return None
                try:
                    return Engine(content)
                except Exception as error:
                    self.logger.log(Severity.ERROR, f"Deserialization failed: {error}")
                    return None

        vars(trt).update(
            __version__=gpu.version, ILogger=ILogger, Runtime=Runtime, TensorIOMode=Mode, nptype=np.dtype,
            ExecutionContextAllocationStrategy=Strategy,
        )  # fmt: skip
        if gpu.rtx:
            trt.CudaGraphStrategy = IntEnum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE", start=0)
        return trt


def install(gpu, monkeypatch):
    """Put the simulated modules and driver in place of the real ones, until `monkeypatch` is undone."""
    for name, module in gpu.modules().items():
        if module is not None:
            module.__spec__ = ModuleSpec(name, None)  # PyTorch looks for it
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("runtime.backends.cuda._load_driver", gpu.library)
    return gpu
