"""The checks of `icnet bench gpu-check`: each runs something on the GPU and raises if it is missing or wrong.

Maps are compared with those of ONNX Runtime on the CPU in FP32. The mean of |Δ| over all groups may be four noise
floors of the precision (`export.noise`, `benchmarks.agreement`).
"""

import ctypes
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_subject import LARGE, Figures, Subject
from benchmarks.runners import CUDA, TENSORRT, Run, inputs
from runtime import DependencyError, ModelError, Predictor
from runtime.backends import cuda_driver
from runtime.backends.cuda import Capture, Cuda
from runtime.backends.cuda_driver import PageLocked
from runtime.backends.tensorrt import TensorRTBackend
from runtime.contract import ExportKind
from runtime.errors import how_to_install

PROVIDERS = {"onnxruntime": CUDA, "onnxruntime-tensorrt": TENSORRT}
ENGINES = ("tensorrt", *PROVIDERS)
STREAM = (2, 4, 2, 9, 1, 2, 4, 9, 16, 3, 3, 1)  # sizes of groups
MAX_GROWTH = 64 << 20  # bytes, of memory over a long stream
WARM_UP = 100  # groups of that stream after which memory should grow no more
THREADS = 6


@dataclass(frozen=True)
class Check:
    """One check; `usable` raises if what all checks of its kind need is missing."""

    name: str
    run: Callable[[Subject], Figures]
    usable: Callable[[], None]


def checks(engine: str) -> list[Check]:
    """The checks of an engine, one of `ENGINES`."""
    if engine == "tensorrt":
        ready = usable_gpu  # that TensorRT is missing shows when an engine is built
        return [
            Check("page-locked copies", page_locked_copies, ready),
            Check("copies from the driver's memory", driver_copies, ready),
            Check("captured copies", captured_copies, ready),
            Check("TensorRT FP32", partial(engine_maps, "fp32", False), ready),
            Check("TensorRT FP32 with TF32", partial(engine_maps, "fp32", True), ready),
            Check("TensorRT FP16", partial(engine_maps, "fp16", False), ready),
            Check("TensorRT INT8", partial(engine_maps, "int8", False), ready),
            Check("CUDA graphs on and off", graphs_on_and_off, ready),
            Check("packed groups", packed_groups, ready),
            Check("kept bank", kept_bank, ready),
            Check("group in chunks", chunked_groups, ready),
            Check("stream of mixed sizes", mixed_stream, ready),
            Check("memory of a long stream", long_stream, ready),
        ]
    provider = PROVIDERS[engine]
    name, ready = f"ONNX Runtime {provider.removesuffix('ExecutionProvider')}", partial(usable_onnxruntime, provider)
    found = [
        Check(f"{name} {precision.upper()}", partial(onnxruntime_maps, provider, precision), ready)
        for precision in ("fp32", "fp16")
    ]
    if provider == CUDA:  # TensorRT's provider computes parts of the graph as one node
        found.append(Check(f"{name}: convolutions on the GPU", partial(onnxruntime_convolutions, provider), ready))
    return found


def page_locked_copies(_: Subject) -> Figures:
    """Page-locked memory of PyCUDA goes to the device and back."""
    with gpu() as cuda:
        here, there = (cuda.pinned((3, 5), np.float32) for _ in range(2))
        figures = _copied(cuda, here, there)
        cuda.free_pinned(here)
        cuda.free_pinned(there)
    return figures


def driver_copies(_: Subject) -> Figures:
    """So does page-locked memory of the driver itself, which ONNX Runtime's groups lie in."""
    memory = PageLocked()
    try:
        here, there = (memory.allocate((3, 5), np.float32) for _ in range(2))
        with gpu() as cuda:
            figures = _copied(cuda, here, there)
        memory.free(here)
        memory.free(there)
    finally:
        memory.close()
    return figures


def captured_copies(_: Subject) -> Figures:
    """A captured graph copies what is in the buffers when it is launched."""
    with gpu() as cuda:
        stream = cuda.stream()
        capture = _capture(cuda, stream)
        here, there = cuda.pinned((8,), np.uint8), cuda.pinned((8,), np.uint8)
        memory = cuda.allocate(8)
        with capture:
            cuda.copy_in(memory, here, stream)
            cuda.copy_out(there, memory, stream)
        for value in (1, 2):
            here[:] = value
            capture.launch()
            stream.synchronize()
            if there.tolist() != [value] * 8:
                raise ModelError(f"a graph copied {there.tolist()} where {value} was expected")
        capture.free()
        memory.free()
        cuda.free_pinned(here)
        cuda.free_pinned(there)
    return {}


def engine_maps(precision: str, tf32: bool, subject: Subject) -> Figures:
    """An engine's maps of all profiles' sizes are the CPU's."""
    with Predictor(subject.engine(precision, tf32=tf32)) as predictor:
        return subject.judge("tf32" if tf32 else precision, _one_by_one(predictor.predict_tensors, subject)) | _times(
            predictor.predict_tensors
        )


def graphs_on_and_off(subject: Subject) -> Figures:
    """Calls that are replayed as CUDA graphs give the same maps; none is refused."""
    with gpu() as cuda:
        _capture(cuda, cuda.stream())  # a backend that can't capture does without, and says nothing
    figures: Figures = {}
    for name, graphs in (("with_graphs", 16), ("without", 0)):
        with _warnings() as heard:
            backend = TensorRTBackend(subject.engine("fp16"), graphs=graphs)
            try:
                run = lambda *group, backend=backend: backend.submit(*group).result()  # noqa: E731
                for _ in range(3):  # captured when a size comes the second time
                    found = subject.judge("fp16", _one_by_one(run, subject))
                figures |= {f"{name}_{key}": value for key, value in (found | _times(run)).items() if key != "bound"}
            finally:
                backend.close()
        if refused := [text for text in heard if "graph" in text.lower()]:
            raise ModelError(refused[0])
    return figures


def packed_groups(subject: Subject) -> Figures:
    """Several groups in one call get the maps that each gets alone."""
    with Predictor(subject.engine("fp16", ExportKind.PACKED)) as predictor:
        return subject.judge("fp16", map(np.stack, predictor.predict_groups(subject.groups)))


def kept_bank(subject: Subject) -> Figures:
    """Images against a kept bank get the CPU's maps."""
    bank_of, (images, sisms) = subject.groups[-1], subject.groups[2]
    found = []
    on_cpu = subject.onnx("fp32", ExportKind.INTRA), subject.onnx("fp32", ExportKind.BANKED)
    for files in (on_cpu, subject.banks("fp16")):
        with Predictor(bank_export=files) as predictor:
            found.append(predictor.predict_tensors(images, sisms, predictor.bank(*bank_of)))
    return subject.judge("fp16", found[1:], found[:1])


def chunked_groups(subject: Subject) -> Figures:
    """A group that is too large for one call gets the CPU's maps."""
    with Predictor(subject.engine("fp16"), bank_export=subject.banks("fp16"), max_images=LARGE // 2) as predictor:
        return subject.judge("fp16", _one_by_one(predictor.predict_tensors, subject))


def mixed_stream(subject: Subject) -> Figures:
    """A stream of groups of mixed sizes, and calls from several threads, give what calls one by one give."""
    groups = [inputs(n) for n in STREAM]
    with Predictor(subject.engine("fp16")) as predictor:
        alone = [predictor.predict_tensors(*group) for group in groups]
        started = time.perf_counter()
        streamed = [np.stack(maps) for maps in predictor.predict_groups(groups)]
        took = time.perf_counter() - started
        with ThreadPoolExecutor(THREADS) as pool:
            at_once = list(pool.map(lambda group: predictor.predict_tensors(*group), groups))
        for maps, other, right in zip(streamed, at_once, alone, strict=True):
            if not (np.allclose(maps, right, rtol=0, atol=1e-2) and np.allclose(other, right, rtol=0, atol=1e-2)):
                raise ModelError(f"a group of {len(right)} got other maps in a stream than alone")
        return subject.judge("fp16", _one_by_one(predictor.predict_tensors, subject)) | {
            "images_per_s": sum(STREAM) / took
        }


def long_stream(subject: Subject) -> Figures:
    """A long stream takes no more memory than its beginning, on the GPU and beside it."""
    groups = [inputs(n) for n in STREAM]
    before = (0, 0)
    with Predictor(subject.engine("fp16")) as predictor:
        for number, _ in enumerate(predictor.predict_groups(islice(cycle(groups), subject.calls)), 1):
            if number == min(WARM_UP, subject.calls // 2):
                before = used_gpu_memory(), used_memory()
        grown = used_gpu_memory() - before[0], used_memory() - before[1]
    for where, growth in zip(("GPU's", "process's"), grown, strict=True):
        if growth > MAX_GROWTH:
            raise ModelError(f"the {where} memory grew by {growth / 2**20:.0f} MiB in {subject.calls} groups")
    return {"groups": subject.calls, "gpu_growth_bytes": grown[0], "growth_bytes": grown[1]}


def onnxruntime_maps(provider: str, precision: str, subject: Subject) -> Figures:
    """ONNX Runtime's maps are the CPU's, one by one and from several threads."""
    with Predictor(subject.onnx(precision), providers=[provider]) as predictor:
        figures = subject.judge(precision, _one_by_one(predictor.predict_tensors, subject))
        with ThreadPoolExecutor(THREADS) as pool:
            subject.judge(precision, pool.map(lambda group: predictor.predict_tensors(*group), subject.groups))
        return figures | _times(predictor.predict_tensors)


def onnxruntime_convolutions(provider: str, subject: Subject) -> Figures:
    """All convolutions are computed by the provider; ONNX Runtime leaves what a provider refuses to the CPU."""
    import onnxruntime

    onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(subject.folder / "profile")
    session = onnxruntime.InferenceSession(str(subject.onnx("fp16")), options, providers=[provider])
    images, sisms = subject.groups[0]
    session.run(None, {"images": images, "sisms": sisms})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    where = [node["provider"] for node in nodes if "Conv" in node["op_name"]]
    if not where or set(where) != {provider}:
        elsewhere = sum(one != provider for one in where)
        raise ModelError(f"{elsewhere} of {len(where)} convolutions were not computed by {provider}")
    return {"convolutions": len(where)}


def usable_gpu() -> None:
    """Raises DependencyError without a driver, a GPU and PyCUDA."""
    Cuda().close()


def usable_onnxruntime(provider: str) -> None:
    """Raises DependencyError without a driver, a GPU and an ONNX Runtime that has the provider."""
    PageLocked().close()
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(f"onnxruntime-gpu is not installed: {how_to_install('cuda')}") from error
    if provider not in onnxruntime.get_available_providers():
        raise DependencyError(
            f"this onnxruntime has no {provider}: pip uninstall onnxruntime, then {how_to_install('cuda')} (never both)"
        )


def used_gpu_memory() -> int:
    """Bytes of the GPU's memory that are in use, by any process.

    Raises:
        ModelError: the driver does not tell.
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with gpu():
        code = cuda_driver.load_driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if code:
        raise ModelError(f"the driver does not tell how much memory is in use: cuMemGetInfo failed with {code}")
    return total.value - free.value


def used_memory() -> int:
    """Bytes of memory that this process has resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@contextmanager
def gpu() -> Iterator[Cuda]:
    """The GPU, with its context current."""
    cuda = Cuda()
    try:
        with cuda:
            yield cuda
    finally:
        cuda.close()


def _copied(cuda: Cuda, here: NDArray[np.float32], there: NDArray[np.float32]) -> Figures:
    """Copy an array to the device and back; raises ModelError if it comes back changed."""
    stream, event = cuda.stream(), cuda.event()
    memory = cuda.allocate(here.nbytes)
    here[:] = np.arange(here.size).reshape(here.shape)
    there[:] = -1
    cuda.copy_in(memory, here, stream)
    cuda.copy_out(there, memory, stream)
    event.record(stream)
    event.synchronize()
    memory.free()
    if not np.array_equal(here, there):
        raise ModelError("what was copied to the GPU and back is not what it was")
    return {}


def _capture(cuda: Cuda, stream: Any) -> Capture:
    capture = cuda.capture(stream)
    if capture is None:
        raise DependencyError(f"cuda-bindings is not installed, which captures CUDA graphs: {how_to_install('gpu')}")
    return capture


def _one_by_one(run: Run, subject: Subject) -> Iterator[NDArray[np.float32]]:
    return (run(*group) for group in subject.groups)


def _times(run: Run, calls: int = 20) -> Figures:
    """The median time of a group of five."""
    group, times = inputs(5), []
    for _ in range(calls):
        started = time.perf_counter()
        run(*group)
        times.append(time.perf_counter() - started)
    return {"median_s": float(np.median(times[calls // 4 :]))}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What this package's runtime warns of meanwhile."""
    heard: list[str] = []

    class Listener(logging.Handler):
        """Keeps the messages."""

        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    handler, log = Listener(logging.WARNING), logging.getLogger("runtime")
    log.addHandler(handler)
    try:
        yield heard
    finally:
        log.removeHandler(handler)
