"""A real Triton from PyPI, without a GPU: nvidia-pytriton brings the server and its Python back end, and no other.

It and what the model needs are installed once into build/, with NumPy 1: with NumPy 2 this release of the back end
(24.10) gives empty outputs.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.export_cache import FOLDER, locked

PYTRITON, NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
MODELS = ("onnxruntime", "pillow")  # of the versions that the tests run with
ROOT = Path(__file__).parents[1]
STARTED = FINISHED = 120  # seconds that it has to get ready, and to finish what it has


def installed() -> Path:
    """The folder of the packages, installed if need be; skips the test where that can't be done."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("nvidia-pytriton has no wheel for this platform")
    if not library().exists():
        pytest.skip(f"Triton's stub needs {library()}, which this Python was built without")
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in MODELS]
    wanted = " ".join([sys.version.split()[0], PYTRITON, NUMPY, *versions])
    FOLDER.mkdir(parents=True, exist_ok=True)
    site, note = FOLDER / "triton", FOLDER / "triton" / "installed.txt"
    with locked(FOLDER / "triton.lock"):
        if not note.exists() or note.read_text() != wanted:
            shutil.rmtree(site, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
            done = subprocess.run([*pip, PYTRITON, NUMPY, *versions], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{PYTRITON} can't be installed: {done.stderr.strip().splitlines()[-1]}")
            server = site / "pytriton" / "tritonserver"
            stub = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
            if not stub.exists():
                pytest.skip(f"{PYTRITON} has no stub for this Python")
            shutil.copy(stub, server / "backends" / "python")
            (server / "bin" / "tritonserver").chmod(0o755)
            note.write_text(wanted)
    return site


def library() -> Path:
    """This Python as a shared library."""
    return Path(sysconfig.get_config_var("LIBDIR"), str(sysconfig.get_config_var("INSTSONAME")))


class Server:
    """A server on a model repository, from its start until it is closed.

    Args:
        site: from `installed`.
        folder: what it is started in; its log goes there.
        repository: the models.
        models: which of them it loads at once.

    Attributes:
        http, grpc, metrics: addresses, HOST:PORT.
    """

    def __init__(self, site: Path, folder: Path, repository: Path, *models: str) -> None:
        server = site / "pytriton" / "tritonserver"
        addresses = {}
        for service in ("http", "grpc", "metrics"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                addresses[service] = free.getsockname()[1]
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in addresses.values())
        places = [f"--{name}-{what}={value}" for name, port in addresses.items() for what, value in
                  (("address", "127.0.0.1"), ("port", port))]  # fmt: skip
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    server / "bin" / "tritonserver",
                    f"--model-repository={repository}",
                    f"--backend-directory={server / 'backends'}",
                    "--model-control-mode=explicit",
                    *(f"--load-model={model}" for model in models),
                    *places,
                    "--allow-gpu-metrics=false",
                    f"--exit-timeout-secs={FINISHED}",
                ],
                cwd=folder,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(folder),
                    "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{library().parent}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + STARTED
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                pytest.fail(f"Triton did not start: {self.log.read_text()}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """Whether it says that it is ready."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def statistics(self, model: str) -> dict[str, Any]:
        """Triton's own statistics of a model."""
        with urllib.request.urlopen(f"http://{self.http}/v2/models/{model}/stats", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)["model_stats"][0]
        return found

    def processes(self) -> list[int]:
        """The server, and the stubs that run models."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [self.process.pid, *(int(pid) for one in children for pid in one.read_text().split())]

    def sockets(self) -> set[tuple[str, str]]:
        """Local and remote address of every TCP socket of these processes, as hexadecimal numbers without the port."""
        found = set()
        for pid in self.processes():
            own = set()
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    own.add(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
            for table in ("tcp", "tcp6"):
                rows = [row.split() for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
                found |= {(row[1].partition(":")[0], row[2].partition(":")[0]) for row in rows if row[9] in own}
        return found

    def close(self) -> None:
        """Stop it at once."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raw(address: str, model: str, body: bytes, header: str = "0") -> Sequence[Any]:
    """Status and body of a request that is sent as it is."""
    request = urllib.request.Request(f"http://{address}/v2/models/{model}/infer", body)
    request.add_header("Inference-Header-Content-Length", header)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
