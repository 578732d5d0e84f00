"""The GPU of a comparison: what it is, and how much of its memory a process takes. Torch is imported when needed."""

import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from benchmarks import records
from runtime import DependencyError


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

    def description(self) -> records.Gpu:
        """The GPU and its software, for the results."""
        import torch

        return {
            "gpu": self.name,
            "compute_capability": self.compute_capability,
            "driver": self.driver,
            "gpu_memory_bytes": self.memory_bytes,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


def find() -> Gpu:
    """The first GPU.

    Raises:
        DependencyError: PyTorch can't use one.
    """
    import torch

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


def free_memory() -> int:
    """Free memory of the whole GPU, in bytes."""
    import torch

    return torch.cuda.mem_get_info()[0]


def most_memory(process: subprocess.Popen[str]) -> int:
    """Watch a process to its end: the GPU memory that it takes at most, in bytes.

    It is seen from outside, as what is missing of the free memory while the process runs: CUDA's own share and that of
    every library is in it, and so is whatever another user of the GPU takes meanwhile.
    """
    before = least = free_memory()
    while process.poll() is None:
        least = min(least, free_memory())
        time.sleep(0.002)
    return before - least
