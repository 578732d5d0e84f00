"""TensorRT's runtime. An engine is a JSON header and an ONNX model, computed by ONNX Runtime."""

import json
import threading
import weakref
from enum import IntEnum
from types import ModuleType

import numpy as np
import onnxruntime

from tests.simulated_gpu.device import Violation, check

MAGIC = b"simulated engine\n"


def engine_file(path, onnx_path, profiles, version="10.16.0", name="Unnamed Network 0", host_code=False):
    """Write an engine for the simulated TensorRT of that version.

    A profile is (min, opt, max), the lengths of all inputs, or a dict of such by the inputs' names. A length may be a
    whole shape, where other axes than the first are dynamic.
    """
    fields = {"version": version, "profiles": profiles, "name": name, "host_code": host_code}
    header = json.dumps(fields).encode() + b"\n"
    path.write_bytes(MAGIC + header + onnx_path.read_bytes())
    return path


def tensorrt(gpu):
    """`tensorrt` 10, or `tensorrt_rtx`."""
    trt = ModuleType("tensorrt_rtx" if gpu.rtx else "tensorrt")
    Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
    Strategy = IntEnum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
    Mode = IntEnum("Mode", "NONE INPUT OUTPUT", start=0)

    class ILogger:
        Severity: type[IntEnum]

        def __init__(self):
            pass

    ILogger.Severity = Severity

    def say(severity, message):
        """A message to the first logger that TensorRT was given, from a thread of TensorRT's own."""
        logger = gpu.first_logger()
        if logger is None:
            raise Violation("the logger is gone")
        thread = threading.Thread(target=logger.log, args=(severity, message))
        thread.start()
        thread.join()

    class ExecutionContext:
        def __init__(self, engine, config):
            gpu.make("execution context")
            self.engine, self.config = engine, config
            self.active_optimization_profile = 0
            self.shapes, self.addresses = {}, {}
            self.scratch: tuple[int, int] | None = None
            self.refused = False  # the last shape
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
            low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
            within = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            if gpu.refuse_shapes or not within:
                limits = f"{low[0]} to {high[0]}, {low[1:]} to {high[1:]}"
                say(Severity.ERROR, f"setInputShape: {name} {shape} is not within {limits}")
                self.refused = True
                return False
            self.shapes[name] = tuple(shape)
            self.refused = False
            self.version += 1
            return True

        def get_tensor_shape(self, name):
            check(set(self.shapes) == set(self.engine.inputs), "asked for a shape before all inputs have theirs")
            known = {
                axis: length
                for each, shape in self.shapes.items()
                for axis, length in zip(self.engine.tensors[each].shape, shape, strict=True)
            }
            return tuple(known.get(axis, axis) for axis in self.engine.tensors[name].shape)

        def execute_async_v3(self, handle):
            gpu.need_context()
            check(handle in gpu.streams, "executed on no stream")
            if gpu.sticky:
                say(Severity.ERROR, f"CUDA error {gpu.sticky}")
                return False
            check(not self.refused, "executed after a shape was refused: the shape before it would run")
            if self.scratch is None:
                raise Violation("executed without scratch memory")
            check(set(self.shapes) == set(self.engine.inputs), "executed without all input shapes")
            check(set(self.addresses) == set(self.engine.tensors), "executed without all addresses")
            stream, version = gpu.streams[handle], self.version
            captured = stream.capturing is not None
            if captured:
                check(self.ran == version, "captured before an uncaptured run with these shapes")
            else:
                self.ran = version
            if gpu.rtx:
                self.config.compile(self.active_optimization_profile)
            shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch

            def work():
                check(self.version == version or not captured, "a context was changed behind its captured graph")
                address, size = scratch
                gpu.device_view(address, size)[:8] = 1
                self.engine.compute(shapes, addresses)

            gpu.queue(stream, "execute", next(iter(shapes.values()))[0], work)
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
            first = next(iter(self.inputs))
            self.device_memory_size_v2 = 4096 * max(
                self.get_tensor_profile_shape(first, i)[2][0] for i in range(self.num_optimization_profiles)
            )

        def __del__(self):
            gpu.drop("engine")

        def is_input(self, name):
            return name in self.inputs

        def get_tensor_name(self, index):
            return list(self.tensors)[index]

        def get_tensor_dtype(self, name):
            names = {"tensor(float)": "float32"}
            return names.get(self.tensors[name].type, self.tensors[name].type.removeprefix("tensor(").rstrip(")"))

        def get_tensor_shape(self, name):
            return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

        def get_tensor_mode(self, name):
            return Mode.INPUT if self.is_input(name) else Mode.OUTPUT

        def get_tensor_profile_shape(self, name, index):
            profile = self.profiles[index]
            lengths = profile[name] if isinstance(profile, dict) else profile
            return [tuple(n) if isinstance(n, list) else (n, *self.tensors[name].shape[1:]) for n in lengths]

        def create_runtime_config(self):
            return RuntimeConfig()

        def create_execution_context(self, config):
            strategy = config.strategy if gpu.rtx else config
            check(strategy == Strategy.USER_MANAGED, "the context would allocate its own memory")
            gpu.need_context()
            if gpu.fail_contexts:
                raise RuntimeError("CUDA initialization failure")
            if gpu.used() + gpu.context_memory > gpu.memory:
                say(Severity.ERROR, "createExecutionContext: out of memory")
                return None
            return ExecutionContext(self, config)

        def compute(self, shapes, addresses):
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(self.get_tensor_dtype(name))
                data = gpu.device_view(addresses[name], int(np.prod(shape)) * dtype.itemsize)
                feeds[name] = data.copy().view(dtype).reshape(shape)
            outputs = [name for name in self.tensors if name not in self.inputs]
            for name, found in zip(outputs, self.session.run(outputs, feeds), strict=True):
                gpu.device_view(addresses[name], found.nbytes)[:] = found.reshape(-1).view(np.uint8)

    class RuntimeCache:
        """The compiled kernels: here, the profiles that have run."""

        def __init__(self):
            self.profiles: set[int] = set()

        def serialize(self):
            return json.dumps({"version": gpu.version, "profiles": sorted(self.profiles)}).encode()

        def deserialize(self, blob):
            found = json.loads(blob)
            if found["version"] != gpu.version:
                return False
            self.profiles.update(found["profiles"])
            return True

    class RuntimeConfig:
        """RTX: how contexts are made."""

        def __init__(self):
            self.cuda_graph_strategy, self.strategy = 0, Strategy.STATIC
            self.dynamic_shapes_kernel_specialization_strategy = 0
            self.cache = RuntimeCache()

        def set_execution_context_allocation_strategy(self, strategy):
            self.strategy = strategy

        def create_runtime_cache(self):
            return RuntimeCache()

        def set_runtime_cache(self, cache):
            self.cache = cache
            return True

        def compile(self, profile):
            if profile not in self.cache.profiles:
                gpu.made["compiled kernel"] += 1
            self.cache.profiles.add(profile)

    class Runtime:
        def __init__(self, logger):
            self.engine_host_code_allowed = False
            if gpu.first_logger is None:
                gpu.first_logger = weakref.ref(logger)

        def deserialize_cuda_engine(self, content):
            gpu.need_context()
            header = content.removeprefix(MAGIC).partition(b"\n")[0]
            if not content.startswith(MAGIC):
                say(Severity.ERROR, "Magic tag does not match")
                return None
            fields = json.loads(header)
            if fields["version"] != gpu.version:
                say(Severity.ERROR, f"engine was serialised by {fields['version']}, this is {gpu.version}")
                return None
            if fields["host_code"] and not self.engine_host_code_allowed:
                say(Severity.ERROR, "API Usage Error (Engine has host code, which engineHostCodeAllowed forbids)")
                return None
            try:
                return Engine(content)
            except Exception as error:
                say(Severity.ERROR, f"Deserialization failed: {error}")
                return None

    vars(trt).update(
        __version__=gpu.version, ILogger=ILogger, Runtime=Runtime, TensorIOMode=Mode, nptype=np.dtype,
        ExecutionContextAllocationStrategy=Strategy,
    )  # fmt: skip
    if gpu.rtx:
        CudaGraphStrategy = IntEnum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE", start=0)
        Specialization = IntEnum("Specialization", "LAZY EAGER NONE", start=0)
        vars(trt).update(
            CudaGraphStrategy=CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy=Specialization
        )  # fmt: skip
    return trt
