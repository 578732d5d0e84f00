"""What the servers around an engine cost, on this machine: python -m tests.serving_cost icnet.packed.onnx

The same groups, in turn: tensors to a Predictor in this process, and to a real Triton with its Python back end, which
joins requests or does not; files to `icnet predict`, and to `icnet batch` with one actor and with two. All have the
same cores. Prints medians over the rounds and their ratios, and writes all rounds as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tritonclient.grpc as grpc

from benchmarks.machine import header
from icnet_cli import main as icnet
from runtime import Predictor
from runtime.files import digest, replacing, write_json
from runtime.threads import cores
from tests.batch_runs import Cluster, environment
from tests.faults.lab import make_data
from tests.helpers import group
from tests.triton_server import ROOT, Server, installed

SIZES = range(3, 9)  # images of a group
Outcome = tuple[float, list[float]]  # seconds in all, and of each group


def timed(call: Callable[[int], object], groups: int, callers: int) -> Outcome:
    """Call for each group, from several threads."""

    def one(k: int) -> float:
        begun = time.perf_counter()
        call(SIZES[k % len(SIZES)])
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        seconds = [*pool.map(one, range(groups))]
    return time.perf_counter() - begun, seconds


def command(*argv: object, env: dict[str, str]) -> Outcome:
    """Run `icnet`; batch's own table has the groups' seconds."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "icnet_cli", *map(str, argv)], env=env, check=True, capture_output=True)
    seconds, out = time.perf_counter() - begun, Path(str(argv[-1]))
    return seconds, pq.read_table(out / "status.parquet")["seconds"].to_pylist() if argv[0] == "batch" else []


def ways(model: Path, groups: int, callers: int, folder: Path, stack: ExitStack) -> dict[str, Callable[[], Outcome]]:
    """What is measured; all that serves is started."""
    site, threads = installed(), cores()
    tensors = {n: group(n) for n in SIZES}
    for name, options in (("joined", ()), ("single", ("--max-groups", "1"))):
        argv = ["--backend", "python", "--name", name, "--timeout", "300", "--site", str(site), "--site", str(ROOT)]
        assert icnet(["triton", "-m", str(model), "-o", str(folder / "models"), *argv, *options]) == 0
    predictor = stack.enter_context(Predictor(model, max_delay_ms=5))
    server = stack.enter_context(Server(site, folder, folder / "models", "joined", "single"))
    local = threading.local()

    def ask(name: str, n: int) -> None:
        if not hasattr(local, "client"):
            local.client = grpc.InferenceServerClient(server.grpc)
        images, sisms = tensors[n]
        tensor = grpc.InferInput("rgbs", [1, n, 224, 224, 4], "UINT8")
        tensor.set_data_from_numpy(np.concatenate([images, sisms[..., None]], -1)[None])
        local.client.infer(name, [tensor])

    short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="c", dir="/tmp")))  # for Ray's sockets
    cluster = stack.enter_context(Cluster(short, threads + 2))
    data = make_data(folder / "data", {f"g{k:04}": SIZES[k % len(SIZES)] for k in range(groups)})
    files = (data, "-m", model, "-t")

    def batch(actors: int) -> Outcome:
        more = ("--actors", actors, "--address", cluster.address, "-o", folder / "batch")
        return command("batch", *files, max(threads // actors, 1), *more, env=cluster.env)

    return {
        "Predictor": lambda: timed(lambda n: predictor.predict_tensors(*tensors[n]), groups, callers),
        "Triton, requests joined": lambda: timed(lambda n: ask("joined", n), groups, callers),
        "Triton, one by one": lambda: timed(lambda n: ask("single", n), groups, callers),
        "icnet predict": lambda: command("predict", *files, threads, "-o", folder / "predict", env=environment()),
        "icnet batch, 1 actor": lambda: batch(1),
        "icnet batch, 2 actors": lambda: batch(2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed export")
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serving.json")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measured = ways(args.model.absolute(), args.groups, args.callers, folder, stack)
        for number in range(args.rounds + 1):
            for name, run in measured.items():
                seconds, each = run()
                row = {"groups_per_s": args.groups / seconds}
                row |= {f"p{p}_s": float(np.percentile(each, p)) for p in (50, 99) if each}
                if number:  # the first one warms up
                    rounds.setdefault(name, []).append(row)
    found: dict[str, Any] = {**header("throughput", cores()), "kind": "serving", "model": digest(args.model)}
    found |= {"groups": args.groups, "callers": args.callers, "rounds": rounds}
    median = {
        name: {key: float(np.median([row[key] for row in rows])) for key in rows[0]} for name, rows in rounds.items()
    }
    for name, row in median.items():
        base = median["Predictor" if name[0] in "PT" else "icnet predict"]["groups_per_s"]
        latency = ", ".join(f"{key[:3]} {1000 * value:.0f} ms" for key, value in row.items() if key != "groups_per_s")
        print(f"{name:24} {row['groups_per_s']:7.2f} groups/s  {row['groups_per_s'] / base:5.2f}×  {latency}")
    with replacing(args.output) as temporary:
        write_json(temporary, found | {"median": median})
    print(json.dumps(str(args.output)))


if __name__ == "__main__":
    main()
