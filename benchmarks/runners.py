"""The ways to run ICNet that are compared against each other, each a function from tensors to maps.

As a program (`python -m benchmarks.runners TASK`, where TASK is JSON), it runs one of them in a process that loads
nothing else, and prints its times and memory as JSON; see `alone`.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks import gpu
from benchmarks.machine import peak_memory
from benchmarks.records import Alone
from benchmarks.timing import seconds
from runtime import DependencyError, ICNetError, ModelError, Predictor
from runtime.backends.onnx_session import CPU
from runtime.errors import how_to_install, one_line
from runtime.files import bank_files, digest

CHECKPOINT = "icnet.pth"  # the files in a comparison's folder
REFERENCE_ONNX = "reference.onnx"
OURS_ONNX = "icnet.onnx"
HALF_ONNX = "icnet.fp16.onnx"  # these three for comparisons on a GPU only
PACKED_ONNX = "icnet.fp16.packed.onnx"
HALF_NETWORK = "icnet.fp16.pt"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"

MAX_REASON = 400  # characters of why a runner does not run

Run = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Setting:
    """What the runners of a comparison are started with.

    Attributes:
        folder: holds the files above; engines are built into it.
        threads: CPU threads.
        sizes: the group sizes of the comparison.
        device: where PyTorch runs, "cpu" or "cuda".
        chunk: images at once; larger groups are run in chunks, by the two files of a bank export beside the model.
            None: at once, whatever the size.
    """

    folder: Path
    threads: int
    sizes: Sequence[int]
    device: str = "cpu"
    chunk: int | None = None


class Died(ModelError):
    """A process ended without a result; its runner could end this process too."""


@dataclass(frozen=True)
class Runner:
    """One way to run ICNet.

    Attributes:
        start: loads it.
        precision: "fp32", "bf16", "fp16", "int8" or "winograd", by which its maps are judged.
    """

    start: Callable[[Setting], AbstractContextManager[Run]]
    precision: str = "fp32"


def picture(rng: np.random.Generator, width: int, height: int, steepness: float = 1) -> NDArray[np.uint8]:
    """Noise with a photograph's spectrum (1/f) or a steeper one, uint8 [height, width, 3].

    White noise would do for times, but INT8 files are not calibrated for it, and JPEG files of it decode more slowly.
    """
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    falling = np.maximum(np.hypot(x, y), 1 / width)[..., None] ** steepness
    pixels = np.fft.irfft2(spectrum / falling, (height, width), axes=(0, 1))
    return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def inputs(n: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A group of n made-up images and SISMs: uint8 [n, 224, 224, 3] and [n, 224, 224]."""
    rng = np.random.default_rng((n, seed))
    images, sisms = np.empty((n, 224, 224, 3), np.uint8), np.empty((n, 224, 224), np.uint8)
    for i in range(n):
        images[i], sisms[i] = picture(rng, 224, 224), picture(rng, 224, 224, 2)[..., 0]
    return images, sisms


@contextmanager
def _torch(setting: Setting, reference: bool, compiled: bool = False) -> Iterator[Run]:
    """PyTorch on the CPU."""
    import torch

    torch.set_num_threads(setting.threads)
    module = _module(setting.folder, reference, half=False, compiled=compiled)

    def run(images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            maps: NDArray[np.float32] = module(torch.from_numpy(images), torch.from_numpy(sisms)).numpy()
        return maps

    yield run


@contextmanager
def _torch_on_gpu(setting: Setting, reference: bool, half: bool, compiled: bool = False) -> Iterator[Run]:
    """PyTorch on the GPU, with the copies that a Predictor makes: bytes in from the host, maps out to it."""
    import torch

    device = torch.device(setting.device)
    on_gpu, most = device.type == "cuda", max(setting.sizes)
    module = _module(setting.folder, reference, half, compiled).to(device)
    host_images = torch.empty((most, 224, 224, 3), dtype=torch.uint8, pin_memory=on_gpu)
    host_sisms = torch.empty((most, 224, 224), dtype=torch.uint8, pin_memory=on_gpu)
    host_maps = torch.empty((most, 224, 224), dtype=torch.float32, pin_memory=on_gpu)
    # The paper's network has no FP16 of its own; this is PyTorch's, which keeps norms and softmax in FP32.
    mixed = torch.autocast(device.type, torch.float16, enabled=reference and half)

    def run(images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        n = len(images)
        with torch.inference_mode(), mixed:
            tensors = []
            for host, array in ((host_images[:n], images), (host_sisms[:n], sisms)):
                host.copy_(torch.from_numpy(array))
                tensors.append(host.to(device, non_blocking=True))
            host_maps[:n].copy_(module(*tensors), non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()
            maps: NDArray[np.float32] = host_maps[:n].numpy().copy()
        return maps

    yield run


def _module(folder: Path, reference: bool, half: bool, compiled: bool) -> Any:
    """The paper's network or ours, behind the file contract."""
    import torch

    from export.checkpoint import load_checkpoint
    from export.icnet import Uint8Interface
    from export.reference import ReferenceICNet

    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if compiled and shutil.which(compiler) is None:
        raise DependencyError(f"torch.compile needs a C++ compiler, and there is no {compiler}")
    if half and not reference:
        network = torch.load(folder / HALF_NETWORK, weights_only=False)  # a file of this comparison
    else:
        network = load_checkpoint(folder / CHECKPOINT)
    module = Uint8Interface(ReferenceICNet.of(network) if reference else network).eval()
    return torch.compile(module, dynamic=True) if compiled else module


@contextmanager
def _openvino(setting: Setting, name: str) -> Iterator[Run]:
    """OpenVINO by hand, with its own choices: BF16 where the CPU has it."""
    try:
        import openvino
    except ImportError as error:
        raise DependencyError(f"openvino is not installed: {how_to_install('bench')}") from error
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": setting.threads, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(setting.folder / name, "CPU", options)

    def run(images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        maps: NDArray[np.float32] = model({"images": images, "sisms": sisms})["maps"]
        return maps

    yield run


@contextmanager
def _tensorrt(setting: Setting, name: str, graphs: bool = True) -> Iterator[Run]:
    """An engine, built here unless it has been, with a profile tuned for each size of the comparison.

    `name` is that of a file in the comparison's folder, or a path elsewhere.
    """
    from export.tensorrt_engine import Profile, build_engine
    from runtime.backends.cuda import Cuda
    from runtime.backends.tensorrt import TensorRTBackend

    engine = engine_of(setting.folder, name)
    if not engine.exists():
        Cuda().close()  # fails where an engine could not run either, before one is built
        sizes = sorted(set(setting.sizes))
        smaller = [0, *sizes[:-1]]
        build_engine(setting.folder / name, engine, [Profile(m + 1, n, n) for m, n in zip(smaller, sizes, strict=True)])
    if graphs:
        with Predictor(engine) as predictor:
            yield predictor.predict_tensors
        return
    backend = TensorRTBackend(engine, graphs=0)
    try:
        yield lambda images, sisms: backend.submit(images, sisms).result()
    finally:
        backend.close()


def engine_of(folder: Path, name: str) -> Path:
    """Where the engine of an ONNX file is built; files of other folders may share a name."""
    path = folder / name
    return path.with_suffix(".engine") if path.parent == folder else folder / f"{digest(path)}.engine"


def load(path: Path, setting: Setting, max_images: int | None = None, provider: str | None = None) -> Predictor:
    """A model file as users run it; `provider` is ONNX Runtime's. Raises what `Predictor` does."""
    return Predictor(
        path,
        bank_export=None if setting.chunk is None else bank_files(path),
        threads=setting.threads,
        providers=[provider or (CUDA if setting.device == "cuda" else CPU)],
        max_images=max_images or setting.chunk,
    )


@contextmanager
def _openvino_file(setting: Setting, name: str, precision: str = "fp32") -> Iterator[Run]:
    """Our files for OpenVINO, built here unless they have been."""
    from export.to_openvino import build_openvino

    path = (setting.folder / name).with_suffix(f".{precision}.xml")
    if not path.exists():
        build_openvino(setting.folder / name, path, precision)
    with load(path, setting) as predictor:
        yield predictor.predict_tensors


@contextmanager
def _file(setting: Setting, name: str, provider: str | None = None) -> Iterator[Run]:
    """A model file; `name` as for `_tensorrt`."""
    with load(setting.folder / name, setting, provider=provider) as predictor:
        yield predictor.predict_tensors


def given(path: Path, precision: str = "int8", build: bool = False) -> Runner:
    """A model file that a Predictor runs as a runner; `build`: an ONNX file, built into a TensorRT engine."""
    return Runner(partial(_tensorrt if build else _file, name=str(path.absolute())), precision)


# The first is what all others are compared with.
RUNNERS: dict[str, Runner] = {
    "paper, PyTorch": Runner(partial(_torch, reference=True)),
    "ours, PyTorch": Runner(partial(_torch, reference=False)),
    "paper, torch.compile": Runner(partial(_torch, reference=True, compiled=True)),
    "ours, torch.compile": Runner(partial(_torch, reference=False, compiled=True)),
    # It refuses kernels known at run time only.
    "paper, OpenVINO by hand": Runner(partial(_openvino, name=REFERENCE_ONNX), "bf16"),
    "ours, OpenVINO by hand": Runner(partial(_openvino, name=OURS_ONNX), "bf16"),
    "ours, OpenVINO": Runner(partial(_openvino_file, name=OURS_ONNX)),
    "ours, OpenVINO BF16": Runner(partial(_openvino_file, name=OURS_ONNX, precision="bf16"), "bf16"),
    "paper, ONNX Runtime": Runner(partial(_file, name=REFERENCE_ONNX)),
    "ours, ONNX Runtime": Runner(partial(_file, name=OURS_ONNX)),
}
GPU_RUNNERS: dict[str, Runner] = {
    "paper, PyTorch FP32": Runner(partial(_torch_on_gpu, reference=True, half=False)),
    "ours, PyTorch FP32": Runner(partial(_torch_on_gpu, reference=False, half=False)),
    "paper, PyTorch FP16": Runner(partial(_torch_on_gpu, reference=True, half=True), "fp16"),
    "ours, PyTorch FP16": Runner(partial(_torch_on_gpu, reference=False, half=True), "fp16"),
    "paper, torch.compile FP16": Runner(partial(_torch_on_gpu, reference=True, half=True, compiled=True), "fp16"),
    "ours, torch.compile FP16": Runner(partial(_torch_on_gpu, reference=False, half=True, compiled=True), "fp16"),
    "paper, ONNX Runtime CUDA FP32": Runner(partial(_file, name=REFERENCE_ONNX, provider=CUDA)),
    "ours, ONNX Runtime CUDA FP32": Runner(partial(_file, name=OURS_ONNX, provider=CUDA)),
    "ours, ONNX Runtime CUDA FP16": Runner(partial(_file, name=HALF_ONNX, provider=CUDA), "fp16"),
    "ours, ONNX Runtime TensorRT FP16": Runner(partial(_file, name=HALF_ONNX, provider=TENSORRT), "fp16"),
    "ours, TensorRT FP32": Runner(partial(_tensorrt, name=OURS_ONNX)),
    "ours, TensorRT FP16": Runner(partial(_tensorrt, name=HALF_ONNX), "fp16"),
    "ours, TensorRT FP16, no CUDA graphs": Runner(partial(_tensorrt, name=HALF_ONNX, graphs=False), "fp16"),
    "ours, TensorRT FP16, packed": Runner(partial(_tensorrt, name=PACKED_ONNX), "fp16"),
}


def alone(name: str, setting: Setting, n: int, calls: int = 1) -> Alone:
    """Run a runner in a process that loads nothing else.

    Args:
        name: one of the runners above, or a model file's path.
        setting: what it is started with.
        n: the group's size.
        calls: how often it is run on that group.

    Returns:
        `first_map_s`, from the start of the process, with imports and loading, to the first group's maps; `times_s` of
        the calls after it; `peak_memory_bytes` of the process; on a GPU also `peak_gpu_memory_bytes`.

    Raises:
        ModelError: it can't run.
        Died: its process crashed or was killed.
    """
    how = asdict(setting) | {"folder": str(setting.folder), "sizes": [n]}
    task = {"runner": name, "n": n, "calls": calls, "setting": how, "started": time.time()}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.runners", json.dumps(task)],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            gpu_memory = gpu.most_memory(process) if setting.device == "cuda" else None
            out, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise Died(f"its process was killed by signal {-process.returncode}, for lack of memory perhaps")
    try:
        found: dict[str, Any] = json.loads(out.splitlines()[-1])  # an engine may print other lines before
    except (ValueError, IndexError) as error:
        raise Died("its process failed") from error
    if "error" in found:
        raise ModelError(found["error"].removeprefix(f"{name}: "))  # the caller has a shorter name for it
    return cast(Alone, found if gpu_memory is None else found | {"peak_gpu_memory_bytes": gpu_memory})


def _main(task: dict[str, Any]) -> None:
    """The process of `alone`: run its task, print what it took."""
    name = task["runner"]
    runner = (RUNNERS | GPU_RUNNERS).get(name) or given(Path(name))
    setting = Setting(**task["setting"] | {"folder": Path(task["setting"]["folder"])})
    tensors = inputs(task["n"])
    try:
        with runner.start(setting) as run:
            run(*tensors)
            first_map = time.time() - task["started"]
            times = [seconds(partial(run, *tensors)) for _ in range(task["calls"] - 1)]
    except Exception as error:  # engines raise exceptions of any class; the comparison goes on without this runner
        print(json.dumps({"error": reason(error)}))
        return
    print(json.dumps({"first_map_s": first_map, "times_s": times, "peak_memory_bytes": peak_memory()}))


def reason(error: Exception) -> str:
    """The reason why a runner does not run, in one line of at most 400 characters."""
    text = one_line(error) if isinstance(error, ICNetError) else f"{type(error).__name__}: {one_line(error)}"
    return textwrap.shorten(text, MAX_REASON, placeholder=" …")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
