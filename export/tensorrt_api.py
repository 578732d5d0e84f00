"""TensorRT's Python API around a build: progress monitor, parser, timing cache and layer lists.

Nothing here depends on ICNet; `trt` is the module, `tensorrt` or `tensorrt_rtx`.
"""

import ctypes
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from runtime.contract import TensorSpec
from runtime.errors import DependencyError, ModelError, one_line
from runtime.tensorrt_library import Heard

DTYPES = {"FLOAT": "float32", "HALF": "float16"}  # TensorRT's names, where they are not NumPy's in capitals
PRECISIONS = {"FLOAT": "FP32", "HALF": "FP16"}


def make_monitor(trt: Any, progress: Progress) -> Any:
    """A TensorRT progress monitor that shows in `progress`; setting its `cancelled` stops the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """One bar per phase, indented below its parent's. May be called from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self.phases: dict[str, tuple[TaskID, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = self.phases[parent_phase][1] + 1 if parent_phase in self.phases else 0
            self.phases[phase_name] = (progress.add_task("  " * depth + escape(phase_name), total=num_steps), depth)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                progress.update(self.phases[phase_name][0], completed=step + 1)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.phases:
                progress.remove_task(self.phases.pop(phase_name)[0])

    return Monitor()


@contextmanager
def cancelled_by_signals(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM only tell the monitor, and take effect after the block.

    No exception must be raised through TensorRT's C++.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
        yield
        return

    received: list[int] = []

    def cancel(number: int, _: object) -> None:
        monitor.cancelled = True
        received.append(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, cancel) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def parse(trt: Any, logger: Any, heard: Heard, path: Path, data: bytes) -> tuple[Any, Any, Any]:
    """Builder and network of an ONNX file, and the parser, which owns the weights and must outlive the build.

    Raises:
        ModelError: TensorRT can't read it.
        DependencyError: TensorRT does not start.
    """
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the bindings raise it where TensorRT returned nothing
        raise DependencyError(f"{trt.__name__} {trt.__version__} does not start: {heard.last_error}") from error
    # TensorRT 10 needs the flag; in 11 and RTX all networks are strongly typed, and the flag may be gone one day.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data, str(path)):
        reason = heard.last_error
        if parser.num_errors:
            first = parser.get_error(0)
            node = " ".join(filter(None, (first.node_operator(), first.node_name())))
            reason = one_line(first.desc()) + (f" (node {node})" if node else "")
        raise ModelError(f"{path}: TensorRT can't read it: {reason}")
    return builder, network, parser


def tensors(network: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a parsed network."""

    def spec(tensor: Any) -> TensorSpec:
        dtype = tensor.dtype.name
        shape = tuple(None if d < 0 else d for d in tensor.shape)
        return TensorSpec(tensor.name, DTYPES.get(dtype, dtype.lower()), shape)

    inputs = [spec(network.get_input(i)) for i in range(network.num_inputs)]
    return inputs, [spec(network.get_output(i)) for i in range(network.num_outputs)]


def narrow_types(network: Any) -> set[str]:
    """The floating-point and quantised types of a parsed network that are narrower than FP32."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    types = {layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs)}
    return types & {"HALF", "BF16", "INT8", "FP8", "INT4", "FP4"}


def use_timing_cache(config: Any, heard: Heard, data: bytes) -> tuple[str, Any]:
    """Give a build its timing cache: "read", "new" or "refused", and the cache, which must outlive the build."""
    with no_deprecations():
        if data:
            before = len(heard.warnings)
            cache = config.create_timing_cache(data)
            # A cache of another version comes back empty, with a warning; one of another GPU is not accepted.
            if cache is not None and config.set_timing_cache(cache, False) and len(heard.warnings) == before:
                return "read", cache
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return "refused" if data else "new", cache


def no_deprecations() -> AbstractContextManager[object]:
    """Silence TensorRT-RTX, which warns at each call that its timing caches do nothing."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def list_layers(trt: Any, logger: Any, plan: Any, network: Any) -> dict[str, Any]:
    """Name, type and output precision of the engine's layers, or, without the GPU to load it on, of the network's.

    A strongly typed engine keeps the network's types. Only the engine knows which layers are fused, and the formats.
    """
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # a version-compatible engine brings its own runtime; this one is ours
    engine = runtime.deserialize_cuda_engine(plan)
    rows = []
    if engine is None:
        for layer in (network.get_layer(i) for i in range(network.num_layers)):
            types = (layer.get_output(i).dtype.name for i in range(layer.num_outputs))
            if layer.type != trt.LayerType.CONSTANT:
                rows.append((layer.name, layer.type.name, _distinct(PRECISIONS.get(t, t) for t in types)))
        return {"of": "network", "layers": rows}
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):  # of some layers TensorRT keeps only the name
            layer = {"Name": layer}
        fields = ("Format/Datatype", "DataType", "Format")  # the first is TensorRT 10's, the others are 11's
        formats = (" ".join(str(o[f]) for f in fields if f in o) for o in layer.get("Outputs", []))
        rows.append((layer.get("Name", ""), layer.get("LayerType", ""), _distinct(formats)))
    return {"of": "engine", "layers": rows}


def _distinct(texts: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def layer_table(layers: dict[str, Any]) -> Table:
    """The record's layers, for a terminal."""
    title = "Layers of the engine"
    if layers["of"] == "network":
        title = "Layers of the parsed network, without constants: the engine can't be loaded here"
    table = Table("layer", "type", "output", title=title)
    for row in layers["layers"]:
        table.add_row(*map(escape, row))
    return table


def gpu() -> dict[str, str] | None:
    """Name and compute capability of the GPU in use, asked of the driver itself; None without one."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if (
        cuda.cuInit(0)
        or (cuda.cuCtxGetDevice(ctypes.byref(device)) and cuda.cuDeviceGet(ctypes.byref(device), 0))
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    ):
        return None
    return {"name": name.value.decode(), "compute_capability": f"{major.value}.{minor.value}"}
