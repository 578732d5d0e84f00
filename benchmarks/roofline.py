"""python benchmarks/roofline.py: how far is a model from what the machine could do, and which nodes cost most?

Operations and bytes come from the file (`operations.py`), the machine's rates from a large matrix product and a large
copy that run among the model's calls, and the time of each node from ONNX Runtime's profiler on the same file. The
*bound* is what the roofline model (Williams, Waterman & Patterson, 2009) allows: node by node the larger of operations
over the matrix-product rate and bytes over the copy rate, where every node reads and writes memory; and for the whole
file, where only its inputs, weights and outputs do. An engine that needs fewer multiplications (Winograd) can be
faster than either.

With --card nothing is run: the bound for a card from NVIDIA's data sheets.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet roofline`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["roofline", *sys.argv[1:]]))

import argparse
import json
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.agreement import prepare
from benchmarks.machine import copy, machine, matrix_product, name_of, wide_console
from benchmarks.runners import OURS_ONNX, REFERENCE_ONNX, inputs
from benchmarks.timing import Times, interleaved, warm_up
from export.operations import Node, count
from runtime import InputError, ModelError, OutputError, Predictor
from runtime.contract import SIZE
from runtime.errors import one_line
from runtime.files import digest, replacing, same_file, write_json
from runtime.predictor import MAX_THREADS
from runtime.threads import cores

COSTLIEST = 10
INSERTED = "layout"  # what the table calls nodes that ONNX Runtime puts in itself
# FLOP/s of dense matrix products (no sparsity) with FP32 as FP32, and in FP16; bytes/s. From NVIDIA's data sheets.
CARDS = {
    "v100-sxm2": {"fp32": 15.7e12, "fp16": 125e12, "copy": 900e9},
    "a100-sxm-40gb": {"fp32": 19.5e12, "fp16": 312e12, "copy": 1555e9},
    "a100-sxm-80gb": {"fp32": 19.5e12, "fp16": 312e12, "copy": 2039e9},
    "a10": {"fp32": 31.2e12, "fp16": 125e12, "copy": 600e9},
    "l4": {"fp32": 30.3e12, "fp16": 121e12, "copy": 300e9},
    "h100-sxm": {"fp32": 67e12, "fp16": 989e12, "copy": 3350e9},
    "h200-sxm": {"fp32": 67e12, "fp16": 989e12, "copy": 4800e9},
}

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet roofline`."""
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL.onnx", help="default: ours and the paper's, both exported here")
    add("--checkpoint", type=Path, help="without MODEL: what to export (default: random weights of width 1)")
    add("--size", type=int, default=5, metavar="N", help="images in the group (default 5)")
    add("--rounds", type=int, default=7, help="timed calls (default 7)")
    add("--threads", type=int, default=cores(), help="CPU threads (default: all)")
    add("--card", choices=CARDS, help="only the bound, for this card")
    add("--precision", choices=["fp32", "fp16"], help="with --card: of its products (default: as the file says)")
    add("--output", type=Path, help="write the results as JSON")
    add("--plot", type=Path, metavar="PNG", help="draw the roofline with every node")


def run(args: argparse.Namespace) -> int:
    """Count, measure, print tables and write the results; of an interrupted run, what was measured until then.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: an option below 1, or options that don't go together.
        CheckpointError: the checkpoint can't be loaded.
        ModelError: the file can't be counted or run.
        OutputError: the results can't be written.
    """
    if min(args.size, args.rounds) < 1 or not 1 <= args.threads <= MAX_THREADS:
        raise InputError(f"--size, --rounds and --threads take numbers from 1 (--threads to {MAX_THREADS})")
    if args.model and args.checkpoint:
        raise InputError("--checkpoint: a MODEL has its own weights; give one of the two")
    if args.card and args.plot:
        raise InputError("--plot: nothing is measured with --card; give one of the two")
    for path in filter(None, (args.output, args.plot)):
        if any(same_file(path, model) for model in filter(None, (args.model, args.checkpoint))):
            raise OutputError(f"{path}: is the model itself; choose another name for the results")
    console = wide_console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with ExitStack() as stack:
        output, plot = (stack.enter_context(replacing(p)) if p else None for p in (args.output, args.plot))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = None
        model = args.model
        with console.status("exporting") if console.is_terminal and not model else ExitStack():
            if model is None:
                prepare(folder, args.checkpoint)
                model, reference = folder / OURS_ONNX, folder / REFERENCE_ONNX
        nodes = count(model, args.size)
        results: Results = {
            "machine": machine(args.threads),
            "model": {"name": model.name, "sha256": digest(model)},
            "n": args.size,
            **_totals(model, nodes),
            "levels": levels({"ours" if reference else model.name: nodes} | _reference_nodes(reference, args.size)),
        }
        if args.card:
            results |= _on_card(args.card, args.precision or _precision(model), nodes, results)
        else:
            results |= measure(model, nodes, args.size, args.rounds, args.threads, folder, console, results)
            if results["nodes"]:
                console.print(table(results))
        console.print(level_table(results))
        for text in summary(results):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if output:
            write_json(output, results)
        if plot:
            draw(results, plot)
    if results.get("interrupted"):
        console.print("interrupted: this is what was measured until then")
        return 130
    return 0


def bound(nodes: Sequence[Node], flop_per_s: float, bytes_per_s: float) -> float:
    """Seconds that the nodes take at least, if each reads and writes memory."""
    return sum(max(node.flop / flop_per_s, node.bytes / bytes_per_s) for node in nodes)


def levels(models: dict[str, Sequence[Node]]) -> dict[str, dict[str, int]]:
    """FLOP of every part of the network, for each model."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(models, 0))
    for name, nodes in models.items():
        for node in nodes:
            found[node.level][name] += node.flop
    return {level: flop for level, flop in found.items() if any(flop.values())}


def _reference_nodes(path: Path | None, n: int) -> dict[str, Sequence[Node]]:
    return {} if path is None else {"paper": count(path, n)}


def _totals(path: Path, nodes: Sequence[Node]) -> Results:
    """FLOP, bytes if every node reads and writes memory, and bytes if only inputs, weights and outputs do."""
    n_bytes = sum(node.bytes for node in nodes)
    model = onnx.load(path)
    weights = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    return {"flop": sum(node.flop for node in nodes), "bytes": n_bytes, "weight_bytes": weights}


def _edges(n: int) -> int:
    """Bytes of a group's inputs and outputs."""
    return n * SIZE**2 * (3 + 1 + 4)  # RGB and SISM in bytes, map in FP32


def _bounds(nodes: Sequence[Node], totals: Results, n: int, flop_per_s: float, bytes_per_s: float) -> Results:
    least = max(totals["flop"] / flop_per_s, (totals["weight_bytes"] + _edges(n)) / bytes_per_s)
    return {
        "matrix_product_flop_per_s": flop_per_s,
        "copy_bytes_per_s": bytes_per_s,
        "bound_s": least,
        "bound_by_node_s": bound(nodes, flop_per_s, bytes_per_s),
    }


def _precision(path: Path) -> str:
    """Of a file's weights: FP16 if most are."""
    kinds = [tensor.data_type for tensor in onnx.load(path).graph.initializer]
    return "fp16" if kinds.count(onnx.TensorProto.FLOAT16) > kinds.count(onnx.TensorProto.FLOAT) else "fp32"


def _on_card(name: str, precision: str, nodes: Sequence[Node], totals: Results) -> Results:
    rates = CARDS[name]
    found = _bounds(nodes, totals, totals["n"], rates[precision], rates["copy"])
    return {"card": name, "precision": precision} | found


def measure(
    path: Path,
    nodes: Sequence[Node],
    n: int,
    rounds: int,
    threads: int,
    folder: Path,
    console: Console,
    totals: Results,
) -> Results:
    """Time the model among matrix products and copies, then each of its nodes, on the CPU.

    Returns:
        What was measured; after Ctrl-C between the first round and the end, without the nodes, and it says so.

    Raises:
        ModelError: the file does not run.
    """
    tensors = inputs(n)
    works = {"matrix product": matrix_product("cpu", threads), "copy": copy("cpu", threads)}
    times: Times = {}
    kernels: dict[tuple[str, str], float] = {}
    interrupted = False
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        Predictor(path, threads=threads) as predictor,
    ):
        bar = progress.add_task("timing", total=rounds + 1)
        calls: dict[str, Callable[[], object]] = {name: work.run for name, work in works.items()}
        calls["model"] = partial(predictor.predict_tensors, *tensors)
        for call in calls.values():
            warm_up(call)
        try:
            for _ in interleaved(calls, times, rounds):
                progress.advance(bar)
            progress.update(bar, description="profiling")
            kernels = profile(path, tensors, rounds, threads, folder)
        except KeyboardInterrupt:
            if not times:
                raise
            interrupted = True
    median = float(np.median(times["model"]))
    rates = {name: work.amount / min(times[name]) for name, work in works.items()}  # the best: they are limits
    found = _bounds(nodes, totals, n, rates["matrix product"], rates["copy"])
    found |= {"median_s": median, "share_of_bound": found["bound_s"] / median}
    return found | {"interrupted": interrupted, "nodes": _costs(path, nodes, kernels)}


def profile(
    path: Path, tensors: tuple[Any, Any], rounds: int, threads: int, folder: Path
) -> dict[tuple[str, str], float]:
    """Seconds of every kernel, by name and operator: the median of several calls.

    Raises:
        ModelError: ONNX Runtime can't run the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {**dict(zip(("images", "sisms"), tensors, strict=True)), "groups": np.zeros(len(tensors[0]), np.int32)}
        feeds = {tensor.name: feeds[tensor.name] for tensor in session.get_inputs()}  # the groups of a packed export
        for _ in range(rounds + 1):
            session.run(None, feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
        raise ModelError(f"{path}: ONNX Runtime can't profile it: {one_line(error)}") from error
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            times[key].append(event["dur"] / 1e6)
    return {key: float(np.median(took[1:])) for key, took in times.items()}  # the first call is a warm-up


def _costs(path: Path, nodes: Sequence[Node], kernels: dict[tuple[str, str], float]) -> list[Results]:
    """A row per kernel, the costliest first, with the operations of the file's node that it computes.

    ONNX Runtime names a kernel after the node; one that it has fused, after the node or the tensor that comes out.
    """
    by_name = {node.name: node for node in nodes}
    graph = onnx.load(path, load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    rows = []
    for (kernel, op), took in kernels.items():
        name = re.sub(r"_token_\d+$", "", kernel.partition("/")[0])
        found = by_name.get(name)
        if found is None:
            producer = producers.get(name.removesuffix("_nchwc"))
            while (
                producer is not None and not op.endswith(producer.op_type) and len(producer.input) > 0
            ):  # Conv, Add, Relu → Conv
                producer = producers.get(producer.input[0])
            found = by_name.get(producer.name) if producer is not None else None
        row = {"module": found.module if found else INSERTED, "op": op, "seconds": took}
        rows.append(row | {"flop": found.flop if found else 0, "bytes": found.bytes if found else 0})
    return sorted(rows, key=lambda row: -row["seconds"])


def table(results: Results) -> Table:
    """The costliest nodes, for a terminal."""
    total = sum(row["seconds"] for row in results["nodes"])
    peak, rate = results["matrix_product_flop_per_s"], results["copy_bytes_per_s"]
    grid = Table(
        title=escape(f"{name_of(results['machine'])}; {results['model']['name']}, group of {results['n']}"),
        caption="of bound: the node's bound (operations or bytes, whichever takes longer) over its time",
    )
    grid.add_column("node")
    for heading in ("operator", "time", "of all", "GFLOP/s", "GB/s", "bound by", "of bound"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in results["nodes"][:COSTLIEST]:
        compute, move = row["flop"] / peak, row["bytes"] / rate
        cells = [row["op"], f"{row['seconds'] * 1e3:.1f} ms", f"{row['seconds'] / total:.1%}"]
        cells += [f"{row['flop'] / row['seconds'] / 1e9:.0f}", f"{row['bytes'] / row['seconds'] / 1e9:.1f}"]
        cells += ["products" if compute > move else "memory", f"{max(compute, move) / row['seconds']:.0%}"]
        grid.add_row(escape(row["module"] or "–"), *cells)
    return grid


def level_table(results: Results) -> Table:
    """GFLOP of every part of the network, for a terminal."""
    names = [*next(iter(results["levels"].values()))]
    grid = Table(title=f"GFLOP of convolutions and products, group of {results['n']}")
    grid.add_column("part")
    for name in names:
        grid.add_column(escape(name), justify="right")
    rows = dict(results["levels"])
    rows["all"] = {name: sum(flop[name] for flop in rows.values()) for name in names}
    for level, flop in rows.items():
        grid.add_row(level, *(f"{flop[name] / 1e9:.3f}" for name in names))
    return grid


def summary(results: Results) -> list[str]:
    """The rates, the bounds and what was reached, in lines."""
    rates = results["matrix_product_flop_per_s"] / 1e9, results["copy_bytes_per_s"] / 1e9
    where = f"{results['card']}, {results['precision']}" if "card" in results else "measured"
    lines = [f"{where}: {rates[0]:.0f} GFLOP/s (matrix product), {rates[1]:.0f} GB/s (copy)"]
    work = f"{results['flop'] / 1e9:.1f} GFLOP, {results['bytes'] / 1e9:.2f} GB if every node reads and writes memory"
    bounds = f"{results['bound_s'] * 1e3:.3g} ms ({results['bound_by_node_s'] * 1e3:.3g} ms node by node)"
    lines.append(f"group of {results['n']}: {work}; bound {bounds}")
    if "median_s" in results:
        took = results["median_s"]
        rate = results["flop"] / took / 1e9
        lines.append(f"took {took * 1e3:.0f} ms: {rate:.0f} GFLOP/s, {results['share_of_bound']:.0%} of the bound")
    return lines


def draw(results: Results, path: Path, metadata: dict[str, str] | None = None) -> None:
    """The roofline: rate against intensity, a dot per node with products, its area the time; no dots if none ran."""
    from matplotlib.figure import Figure

    peak, rate = results["matrix_product_flop_per_s"] / 1e9, results["copy_bytes_per_s"] / 1e9
    nodes = results.get("nodes", [])
    rows = [row for row in nodes if row["flop"] and row["bytes"]]
    x = np.array([row["flop"] / row["bytes"] for row in rows])
    y = np.array([row["flop"] / row["seconds"] / 1e9 for row in rows])
    share = np.array([row["seconds"] for row in rows]) / sum(row["seconds"] for row in nodes)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(min([*x, peak / rate / 10]) / 2, max([*x, peak / rate * 10]) * 2, 200)
    axes.plot(intensity, np.minimum(peak, intensity * rate), color="0.3")
    for op in sorted({row["op"] for row in rows}):
        of_op = np.array([row["op"] == op for row in rows])
        axes.scatter(x[of_op], y[of_op], s=10 + 3000 * share[of_op], alpha=0.6, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.set_title(f"{results['model']['name']}, group of {results['n']}; area: time", parse_math=False)
    if rows:
        for handle in axes.legend(loc="lower right").legend_handles:
            handle.set_sizes([40])  # type: ignore[union-attr]
    figure.savefig(path, dpi=120, metadata=metadata)
