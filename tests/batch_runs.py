"""`icnet batch` in processes of its own, which can be killed: a Ray cluster on this machine, and runs on it."""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from tests.faults.lab import ROOT, TIME_OUT, same_tree, tree

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}  # as /proc/net/tcp writes it

HEAD = """
import sys, os
import ray
from runtime.commands.batch import LOCAL
os.environ.update(LOCAL)
context = ray.init(num_cpus=int(sys.argv[1]), _temp_dir=sys.argv[2], object_store_memory=100 << 20,
    include_dashboard=False, logging_level="ERROR", log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def environment(**more: str) -> dict[str, str]:
    """For processes that run this tree's code."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


class Cluster:
    """A Ray cluster of one process's children; `address` and `env` are what runs on it take."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.env = environment(
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
        )
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", HEAD, str(cpus), folder], env=self.env, **pipe)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "Ray did not start"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def start(*argv: object, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start `icnet batch`."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "icnet_cli", "batch", *map(str, argv)], env=env, **pipe)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for it: exit code, standard output, standard error."""
    out, err = process.communicate(timeout=TIME_OUT)
    return process.returncode, out, err


def descendants(pid: int) -> list[int]:
    """The processes below one."""
    found = []
    with suppress(OSError):  # ended meanwhile
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def command_line(pid: int) -> bytes:
    """A process's, or nothing if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def actors(pid: int) -> list[int]:
    """Those below a process that compute groups."""
    return [one for one in descendants(pid) if command_line(one).startswith(b"ray::MapWorker")]


def listeners(pids: list[int]) -> set[str]:
    """The addresses at which processes listen, as hexadecimal numbers."""
    own = set()
    for pid in pids:
        with suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    own.add(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [row.split() for t in ("tcp", "tcp6") for row in Path(f"/proc/net/{t}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[9] in own and row[3] == "0A"}


def computed(folder: Path) -> int:
    """How many groups have been computed, about."""
    return sum(1 for _ in folder.glob("*/contact_sheet.jpg"))


def check(folder: Path, expected: Path) -> None:
    """Assert that every group has one row and one set of files, those of `expected`; nothing temporary is left."""
    import pyarrow.parquet as pq

    status = pq.read_table(folder / "status.parquet").to_pylist()
    assert sorted(row["group"] for row in status) == sorted(path.name for path in expected.iterdir())
    assert {row["status"] for row in status} == {"ok"}
    assert {row["error"] for row in status} == {None}
    assert {name for name in tree(folder) if "/" not in name} == {"status.parquet"}
    (folder / "status.parquet").unlink()
    same_tree(folder, expected)


def disturbed(
    rng: np.random.Generator, argv: tuple[object, ...], folder: Path, groups: int, kills: int, env: dict[str, str],
    head: int | None = None,
) -> int:  # fmt: skip
    """Kill an actor `kills` times and the driver once, each at a random number of finished groups; run to the end.

    Args:
        rng: all that is random.
        argv: of `icnet batch`, but for --resume.
        folder: its output.
        groups: how many there are.
        kills: of actors.
        env: of the driver.
        head: the process below which actors run; None for the driver.

    Returns:
        How many actors were killed.
    """
    moments = np.sort(rng.integers(1, max(groups * 3 // 4, 2), kills + 1))
    driver = int(rng.integers(kills // 2, kills + 1))  # which of the kills is the driver's
    process, killed = start(*argv, env=env), 0
    try:
        for number, moment in enumerate(moments):
            while process.poll() is None and computed(folder) < moment:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            if number == driver:
                process.kill()
                code, _, err = ended(process)
                assert code == -signal.SIGKILL, (code, err)
                process = start(*argv, "--resume", env=env)
                continue
            there: list[int] = []
            while process.poll() is None and not there:  # starting, or starting again
                time.sleep(0.01)
                there = actors(head or process.pid)
            if there:
                with suppress(ProcessLookupError):
                    os.kill(there[int(rng.integers(len(there)))], signal.SIGKILL)
                    killed += 1
        code, _, err = ended(process)
    finally:
        process.kill()
    assert (code, err) == (0, "")
    return killed
