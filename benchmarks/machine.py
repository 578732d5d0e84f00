"""The machine that results are measured on: its description, its best rates, and its memory."""

import datetime
import os
import platform
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.records import SCHEMA, Gpu, Kind, Machine, Record
from evaluation.record import versions

PACKAGES = (
    "numpy", "pillow", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "MNN", "tensorrt", "tensorrt-rtx",
    "pycuda", "cuda-bindings",
)  # fmt: skip
SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices: large enough for the full rate
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes: far beyond any cache


def header(kind: Kind, threads: int, card: Gpu | None = None) -> Record:
    """The head of every record: the machine, the date, and the versions of the installed packages."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    machine: Machine = {
        **(card or {}),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "versions": versions(PACKAGES),
    }
    return {"schema": SCHEMA, "kind": kind, "machine": machine, "interrupted": False}


@dataclass(frozen=True)
class Work:
    """Something to time; `amount` is the FLOP or bytes of one call of `run`."""

    amount: int
    run: Callable[[], None]


def matrix_product(device: str, threads: int) -> Work:
    """One large matrix product, in FLOP: FP16 on a GPU; FP32 on the CPU, by the faster of two libraries.

    PyTorch's library does not use AVX-512 on every CPU that has it; ONNX Runtime's does.
    """
    if device != "cpu":
        return _by_pytorch(device, threads)
    works = [_by_pytorch(device, threads), _by_onnxruntime(threads)]
    for work in works:
        work.run()
    return min(works, key=lambda work: min(timeit.repeat(work.run, number=1, repeat=3)))


def _by_onnxruntime(threads: int) -> Work:
    from onnx import TensorProto, helper

    from export.onnx_file import cpu_session

    side = SIDES["cpu"]
    a, b, product = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [side, side]) for n in ("a", "b", "product"))
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["product"])], "product", [a, b], [product])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = cpu_session("a matrix product", model.SerializeToString(), threads)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((side, side), np.float32) for name in ("a", "b")}

    def run() -> None:
        session.run(None, feeds)

    return Work(2 * side**3, run)


def _by_pytorch(device: str, threads: int) -> Work:
    import torch

    torch.set_num_threads(threads)
    side = SIDES[torch.device(device).type]
    dtype = torch.float32 if device == "cpu" else torch.float16
    a, b = (torch.randn((side, side), device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=product)
        if product.is_cuda:
            torch.cuda.synchronize()

    return Work(2 * side**3, run)


def copy(device: str, threads: int) -> Work:
    """One large copy from memory to memory, in bytes read and written."""
    import torch

    torch.set_num_threads(threads)
    source = torch.ones(COPIED[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize()

    return Work(2 * source.nbytes, run)


def peak_memory() -> int:
    """The peak of this process's resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage there starts from what the parent process had
        return _kilobytes(status, "VmHWM") or 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """The memory available to a new process in bytes; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    return _kilobytes(meminfo, "MemAvailable") if meminfo.exists() else None


def _kilobytes(path: Path, field: str) -> int | None:
    """A field of one of Linux's files about memory, in bytes."""
    lines = path.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
