"""The simulated modules in place of the real ones."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from tests.simulated_gpu.driver import graphs, library, pycuda_driver
from tests.simulated_gpu.tensorrt import tensorrt


def modules(gpu):
    """What to put into `sys.modules`."""
    pycuda = ModuleType("pycuda")
    driver = vars(pycuda)["driver"] = pycuda_driver(gpu)
    found = {"pycuda": pycuda, "pycuda.driver": driver, "tensorrt": None, "tensorrt_rtx": None}
    found["tensorrt_rtx" if gpu.rtx else "tensorrt"] = tensorrt(gpu)
    cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    found |= {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.driver": None}
    if gpu.bindings:
        found["cuda.bindings.driver"] = vars(bindings)["driver"] = graphs(gpu)
    return found


def install(gpu, monkeypatch):
    """Put the simulated modules and driver in place of the real ones, until `monkeypatch` is undone."""
    for name, module in modules(gpu).items():
        if module is not None:
            module.__spec__ = ModuleSpec(name, None)  # PyTorch looks for it
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("runtime.backends.cuda_driver.load_driver", lambda: library(gpu))
    return gpu
