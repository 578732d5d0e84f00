"""The real PyCUDA and cuda-bindings on a CUDA driver without a GPU; see fake_driver.c.

PyCUDA is compiled from its source distribution, once for each Python and version, into build/fake_cuda.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PYCUDA = "2026.1"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SITECONF = """
USE_SHIPPED_BOOST = True
CUDA_TRACE = CUDA_ENABLE_GL = CUDA_ENABLE_CURAND = False
CUDA_INC_DIR = {include}
CUDADRV_LIB_DIR = [{stub}]
CUDADRV_LIBNAME = ["cuda"]
CUDART_LIBNAME = []
CXXFLAGS = ["-O0", "-g0", "-w"]
LDFLAGS = []
"""


class Unavailable(Exception):
    """What is missing."""


def environment() -> dict[str, str]:
    """Environment variables under which a new Python finds the fake driver, PyCUDA and this repository.

    Skips the test where that can't be built; fails it in CI on x86-64 Linux, where it must be.
    """
    try:
        folder = _built()
    except Unavailable as missing:
        if os.environ.get("CI") == "true" and sys.platform == "linux" and platform.machine() == "x86_64":
            pytest.fail(f"no fake CUDA driver: {missing}")
        pytest.skip(f"no fake CUDA driver: {missing}")
    paths = [str(ROOT), str(folder / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }


def _built() -> Path:
    if sys.platform != "linux":
        raise Unavailable("it is built on Linux only")
    for tool in ("gcc", "g++", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool}")
    include = _headers()
    key = f"pycuda-{PYCUDA}-{sys.implementation.cache_tag}-numpy-{importlib.metadata.version('numpy')}"
    source = (HERE / "fake_driver.c").read_bytes() + Path(__file__).read_bytes()
    folder = ROOT / "build" / "fake_cuda" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several test processes may come at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "site" / "pycuda").is_dir():
            _build_pycuda(folder, include)
        digest, stamp = hashlib.sha256(source).hexdigest(), folder / "driver.sha256"
        if not stamp.is_file() or stamp.read_text() != digest:
            _build_driver(folder, include)
            stamp.write_text(digest)
    return folder


def _headers() -> Path:
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime-cu12") or []
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("no nvidia-cuda-runtime-cu12, which has the headers") from None
    return next(Path(str(f.locate())).parent for f in files if f.name == "cuda.h")


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout


def _build_pycuda(folder: Path, include: Path) -> None:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*pip, "--no-binary", ":all:", f"pycuda=={PYCUDA}", cwd=work)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    source = next(path for path in work.iterdir() if path.is_dir())
    shutil.copy(HERE / "cudaProfiler.h", work)
    stub = "int cuInit(unsigned flags) { return 801; }"  # one symbol that is used, or the linker leaves the library out
    (work / "stub.c").write_text(stub)
    _run("gcc", "-shared", "-Wl,-soname,libcuda.so.1", "stub.c", "-o", "libcuda.so", cwd=work)
    (source / "siteconf.py").write_text(SITECONF.format(include=[str(include), str(work)], stub=repr(str(work))))
    _run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "2", cwd=source)
    (folder / "site").mkdir(exist_ok=True)
    (source / "pycuda").rename(folder / "site" / "pycuda")  # last: that it is there means that it is whole
    shutil.rmtree(work)


def _build_driver(folder: Path, include: Path) -> None:
    """Compile the driver, with stubs that fail for what PyCUDA links with and no test calls."""
    work = folder / "driver"
    work.mkdir(exist_ok=True)
    _run("gcc", "-c", "-fPIC", "-O1", "-I", include, HERE / "fake_driver.c", "-o", work / "driver.o", cwd=work)
    (extension,) = (folder / "site" / "pycuda").glob("_driver.*.so")
    wanted = {s for s in _run("nm", "-D", "--undefined-only", extension, cwd=work).split() if s[:2] == "cu"}
    there = set(_run("nm", "--defined-only", work / "driver.o", cwd=work).split())
    stubs = "".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(wanted - there))
    (work / "stubs.c").write_text(stubs)
    _run("gcc", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", "driver.o", "stubs.c", "-ldl",
         "-o", folder / "libcuda.so.1", cwd=work)  # fmt: skip
