"""The ways to run ICNet that are raced against each other, each a function from tensors to maps.

As a program (`python -m benchmarks.contenders NAME FOLDER N THREADS`) it runs one of them once, in a process that
loads nothing else, and prints the process's peak memory in bytes.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHECKPOINT = "icnet.pth"  # the files in a race's folder
ORACLE_ONNX = "oracle.onnx"
OURS_ONNX = "icnet.onnx"

Runner = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float32]]


def inputs(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A group of n random images and SISMs: uint8 [n, 224, 224, 3] and [n, 224, 224]."""
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 224, 224, 3), np.uint8), rng.integers(0, 256, (n, 224, 224), np.uint8)


def _torch(folder: Path, threads: int, oracle: bool) -> Runner:
    import torch

    from export.checkpoint import load_checkpoint
    from export.icnet import Uint8Interface
    from export.reference import ReferenceICNet

    torch.set_num_threads(threads)
    network = load_checkpoint(folder / CHECKPOINT)
    module = Uint8Interface(ReferenceICNet.of(network) if oracle else network).eval()

    def run(images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            maps: NDArray[np.float32] = module(torch.from_numpy(images), torch.from_numpy(sisms)).numpy()
        return maps

    return run


def _onnxruntime(path: Path, threads: int) -> Runner:
    from runtime import Predictor

    return Predictor(path, threads=threads).predict_tensors


# The first is what all others are compared with.
CONTENDERS: dict[str, Callable[[Path, int], Runner]] = {
    "paper, PyTorch": lambda folder, threads: _torch(folder, threads, oracle=True),
    "ours, PyTorch": lambda folder, threads: _torch(folder, threads, oracle=False),
    "paper, ONNX Runtime": lambda folder, threads: _onnxruntime(folder / ORACLE_ONNX, threads),
    "ours, ONNX Runtime": lambda folder, threads: _onnxruntime(folder / OURS_ONNX, threads),
}


def peak_memory() -> int:
    """The most memory that this process had resident so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage there starts from what the parent process had
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    name, folder, n, threads = sys.argv[1:]
    CONTENDERS[name](Path(folder), int(threads))(*inputs(int(n)))
    print(peak_memory())
