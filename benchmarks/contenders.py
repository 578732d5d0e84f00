"""The ways to run ICNet that are raced against each other, each a function from tensors to maps.

As a program (`python -m benchmarks.contenders NAME FOLDER N THREADS DEVICE`) it runs one of them once, in a process
that loads nothing else, and prints the process's peak memory in bytes.
"""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKPOINT = "icnet.pth"  # the files in a race's folder
ORACLE_ONNX = "oracle.onnx"
OURS_ONNX = "icnet.onnx"
HALF_ONNX = "icnet.fp16.onnx"  # these two for races on a GPU only
HALF_NETWORK = "icnet.fp16.pt"

Runner = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Setting:
    """What the contenders of a race are started with.

    Attributes:
        folder: holds the files above; engines are built into it.
        threads: CPU threads.
        sizes: the group sizes of the race.
        device: where PyTorch runs, "cpu" or "cuda".
    """

    folder: Path
    threads: int
    sizes: Sequence[int]
    device: str = "cpu"


Start = Callable[[Setting], AbstractContextManager[Runner]]


def inputs(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A group of n random images and SISMs: uint8 [n, 224, 224, 3] and [n, 224, 224]."""
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 224, 224, 3), np.uint8), rng.integers(0, 256, (n, 224, 224), np.uint8)


@contextmanager
def _torch(setting: Setting, oracle: bool) -> Iterator[Runner]:
    """PyTorch on the CPU."""
    import torch

    torch.set_num_threads(setting.threads)
    module = _module(setting.folder, oracle, half=False)

    def run(images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            maps: NDArray[np.float32] = module(torch.from_numpy(images), torch.from_numpy(sisms)).numpy()
        return maps

    yield run


@contextmanager
def _torch_on_gpu(setting: Setting, oracle: bool, half: bool) -> Iterator[Runner]:
    """PyTorch on the GPU, with the work that a Predictor does: bytes in from the host, copies of the maps out."""
    import torch

    device = torch.device(setting.device)
    on_gpu, most = device.type == "cuda", max(setting.sizes)
    module = _module(setting.folder, oracle, half).to(device)
    host_images = torch.empty((most, 224, 224, 3), dtype=torch.uint8, pin_memory=on_gpu)
    host_sisms = torch.empty((most, 224, 224), dtype=torch.uint8, pin_memory=on_gpu)
    host_maps = torch.empty((most, 224, 224), dtype=torch.float32, pin_memory=on_gpu)
    # The paper's network has no FP16 of its own; this is PyTorch's, which keeps norms and softmax in FP32.
    mixed = torch.autocast(device.type, torch.float16, enabled=oracle and half)

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


def _module(folder: Path, oracle: bool, half: bool) -> Any:
    """The paper's network or ours, behind the file contract."""
    import torch

    from export.checkpoint import load_checkpoint
    from export.icnet import Uint8Interface
    from export.reference import ReferenceICNet

    if half and not oracle:
        return Uint8Interface(torch.load(folder / HALF_NETWORK, weights_only=False)).eval()  # a file of this race
    network = load_checkpoint(folder / CHECKPOINT)
    return Uint8Interface(ReferenceICNet.of(network) if oracle else network).eval()


@contextmanager
def _onnxruntime(setting: Setting, name: str, provider: str = "CPUExecutionProvider") -> Iterator[Runner]:
    from runtime import Predictor

    with Predictor(setting.folder / name, threads=setting.threads, providers=[provider]) as predictor:
        yield predictor.predict_tensors


@contextmanager
def _tensorrt(setting: Setting, name: str) -> Iterator[Runner]:
    """An engine, built here unless it has been, with a profile tuned for each size of the race."""
    from export.build_engine import Profile, build_engine
    from runtime import Predictor
    from runtime.cuda import Cuda

    engine = (setting.folder / name).with_suffix(".engine")
    if not engine.exists():
        Cuda().close()  # where it can't run, it need not be built
        sizes = sorted(set(setting.sizes))
        smaller = [0, *sizes[:-1]]
        build_engine(setting.folder / name, engine, [Profile(m + 1, n, n) for m, n in zip(smaller, sizes, strict=True)])
    with Predictor(engine) as predictor:
        yield predictor.predict_tensors


# The first is what all others are compared with.
CONTENDERS: dict[str, Start] = {
    "paper, PyTorch": partial(_torch, oracle=True),
    "ours, PyTorch": partial(_torch, oracle=False),
    "paper, ONNX Runtime": partial(_onnxruntime, name=ORACLE_ONNX),
    "ours, ONNX Runtime": partial(_onnxruntime, name=OURS_ONNX),
}
GPU_CONTENDERS: dict[str, Start] = {
    "paper, PyTorch FP32": partial(_torch_on_gpu, oracle=True, half=False),
    "ours, PyTorch FP32": partial(_torch_on_gpu, oracle=False, half=False),
    "paper, PyTorch FP16": partial(_torch_on_gpu, oracle=True, half=True),
    "ours, PyTorch FP16": partial(_torch_on_gpu, oracle=False, half=True),
    "ours, ONNX Runtime FP32": partial(_onnxruntime, name=OURS_ONNX, provider="CUDAExecutionProvider"),
    "ours, ONNX Runtime FP16": partial(_onnxruntime, name=HALF_ONNX, provider="CUDAExecutionProvider"),
    "ours, TensorRT FP32": partial(_tensorrt, name=OURS_ONNX),
    "ours, TensorRT FP16": partial(_tensorrt, name=HALF_ONNX),
}


def peak_memory() -> int:
    """The most memory that this process had resident so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage there starts from what the parent process had
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    label, folder, n, threads, device = sys.argv[1:]
    with (CONTENDERS | GPU_CONTENDERS)[label](Setting(Path(folder), int(threads), [int(n)], device)) as runner:
        runner(*inputs(int(n)))
        print(peak_memory())
