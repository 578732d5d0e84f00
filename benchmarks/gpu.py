"""The GPU of a comparison, and how much of its memory a process takes. Torch is imported when needed."""

import re
import shutil
import subprocess
import time

from benchmarks.records import Gpu
from runtime import DependencyError

DEVICE = "cuda"  # PyTorch's name for it


def find() -> Gpu:
    """The first GPU and its software, for the results; the driver is None where `nvidia-smi` is missing.

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
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def slug(name: str) -> str:
    """A GPU's name, fit for a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


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
    """Watch a process to its end, and return the GPU memory that it takes at most, in bytes.

    It is seen from outside, as the loss of free memory while the process runs. So it includes CUDA's own share and that
    of every library, and also what any other process takes meanwhile.
    """
    before = least = free_memory()
    while process.poll() is None:
        least = min(least, free_memory())
        time.sleep(0.002)
    return before - least
