"""The GPU of a race: what it is, how fast it multiplies matrices, and how much of its memory a process takes."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.utils.flop_counter import FlopCounterMode

from export.icnet import SIZE, Uint8Interface
from export.reference import ReferenceICNet
from runtime import DependencyError

SIDE = 8192  # of the matrices: large enough for the full rate, 0.4 GB in all
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "pycuda", "cuda-bindings")


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch uses.

    Attributes:
        name: as the driver gives it.
        compute_capability: "8.9" and the like.
        driver: the driver's version; None where `nvidia-smi` is missing.
        memory_bytes: what it has.
        device: PyTorch's name for it.
    """

    name: str
    compute_capability: str
    driver: str | None
    memory_bytes: int
    device: str = "cuda"

    @property
    def slug(self) -> str:
        """The name, fit for a file's."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_") or "unknown"


def find() -> Gpu:
    """The first GPU.

    Raises:
        DependencyError: PyTorch can't use one.
    """
    if not torch.cuda.is_available():
        reason = "it finds no NVIDIA driver or GPU; see what nvidia-smi says"
        if torch.version.cuda is None:
            reason = "it is built without CUDA; install PyTorch's CUDA build"
        raise DependencyError(f"--device cuda: no GPU that PyTorch {torch.__version__} can use: {reason}")
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(properties.name, capability, _driver(), properties.total_memory)


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return lines[0] if lines else None


def versions() -> dict[str, object]:
    """Of CUDA and cuDNN as PyTorch has them, and of the packages that matter, as far as they are there."""
    found: dict[str, object] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def flop_per_image(width: float) -> int:
    """Convolutions and matrix products of the paper's network for a group of one; a multiply-add counts 2."""
    with torch.device("meta"):
        network = Uint8Interface(ReferenceICNet(width)).eval()
        images = torch.empty((1, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(images, images[..., 0])
    return counter.get_total_flops()


def matrix_product(device: str) -> tuple[int, Callable[[], None]]:
    """The FLOP of one large FP16 matrix product, and a function that computes it and waits."""
    a, b = (torch.randn((SIDE, SIDE), device=device).half() for _ in range(2))
    product = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=product)
        if product.is_cuda:
            torch.cuda.synchronize()

    return 2 * SIDE**3, run


def free_memory() -> int:
    """Free memory of the whole GPU, in bytes."""
    return torch.cuda.mem_get_info()[0]


def peak_memory(command: Sequence[str], folder: str) -> int | None:
    """The GPU memory that a process takes at most, in bytes; None if it fails.

    It is seen from outside, as what is missing of the free memory while the process runs: CUDA's own share and that of
    every library is in it, and so is whatever another user of the GPU takes meanwhile.
    """
    before = least = free_memory()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            least = min(least, free_memory())
            time.sleep(0.002)
    return before - least if process.returncode == 0 else None
