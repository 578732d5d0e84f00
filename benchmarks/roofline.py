"""`icnet bench roofline`: how far is a model from what the machine could do, and which nodes cost most?

Operations and bytes come from the file (`export/onnx_file.py`), the machine's rates from a large matrix product and a
large copy that run among the model's calls, and the time of each node from ONNX Runtime's profiler on the same file.
The *bound* is what the roofline model (Williams, Waterman & Patterson, 2009) allows: the larger of operations over the
matrix-product rate and bytes over the copy rate. It is given for the whole file, where only its inputs, weights and
outputs are moved, and node by node, where every node reads and writes memory. An engine that needs fewer
multiplications (Winograd) can be faster than either.

With --card nothing is run: the bound is that of a card's data sheet (`benchmarks/cards.py`).
"""

import argparse
import json
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from rich.progress import Progress

from benchmarks import describe
from benchmarks.agreement import prepare
from benchmarks.cards import CARDS
from benchmarks.command import add_common_arguments, measuring
from benchmarks.machine import copy, header, matrix_product
from benchmarks.records import NodeRow, Roofline
from benchmarks.render import Plot, to_png
from benchmarks.runners import OURS_ONNX, REFERENCE_ONNX, inputs
from benchmarks.timing import Times, interleaved, warm_up
from export.onnx_file import Node, count, cpu_session, load_model
from runtime import InputError, ModelError, Predictor
from runtime.commands.options import number
from runtime.contract import SIZE
from runtime.errors import one_line
from runtime.files import digest

INSERTED = "layout"  # the table's name for nodes that ONNX Runtime adds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench roofline`."""
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL.onnx", help="default: ours and the paper's, both exported here")
    add("--checkpoint", type=Path, help="without MODEL: what to export (default: random weights of width 1)")
    add("--size", type=number(), default=5, metavar="N", help="images in the group (default 5)")
    add("--rounds", type=number(), default=7, help="timed calls (default 7)")
    add("--card", choices=CARDS, help="only the bound, for this card")
    precisions = ["fp32", "fp16", "int8"]
    add("--precision", choices=precisions, help="with --card: of its products (default: as the file says)")
    add("--plot", type=Path, metavar="PNG", help="draw the roofline with every node")
    add_common_arguments(parser, device=False)


def run(args: argparse.Namespace) -> int:
    """Count, measure, print tables and write the results; an interrupted run leaves what it has measured.

    Returns:
        0, or 130 if it was interrupted.

    Raises:
        InputError: options don't go together.
        CheckpointError: the checkpoint can't be loaded.
        ModelError: the file can't be counted or run.
        OutputError: the results can't be written.
    """
    if args.model and args.checkpoint:
        raise InputError("--checkpoint: a MODEL has its own weights; give one of the two")
    if args.card and args.plot:
        raise InputError("--plot: nothing is measured with --card; give one of the two")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    results = cast(Roofline, header("roofline", args.threads))
    draw = {args.plot: lambda path: to_png(cast(Plot, describe.roofline(results).plot), path)} if args.plot else {}

    def keep() -> bool:
        return "median_s" in results

    read = args.model, args.checkpoint
    with (
        tempfile.TemporaryDirectory() as folder,
        measuring(results, args.output, inputs=read, others=draw, keep=keep) as progress,
    ):
        _fill(results, args, Path(folder), progress)
    return 130 if results["interrupted"] else 0


def _fill(results: Roofline, args: argparse.Namespace, folder: Path, progress: Progress) -> None:
    bar = progress.add_task("exporting" if args.model is None else "counting", total=args.rounds + 1)
    path = args.model or folder / OURS_ONNX
    if not args.model:
        prepare(folder, args.checkpoint)
    nodes = count(path, args.size)
    counted = {path.name: nodes} if args.model else {"ours": nodes, "paper": count(folder / REFERENCE_ONNX, args.size)}
    results["model"] = {"name": path.name, "sha256": digest(path)}
    results["n"] = args.size
    results["flop"], results["bytes"] = sum(node.flop for node in nodes), sum(node.bytes for node in nodes)
    weights = load_model(path).graph.initializer
    results["weight_bytes"] = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in weights)
    results["levels"] = levels(counted)
    results["nodes"] = []
    if args.card:
        kinds = [tensor.data_type for tensor in weights]
        half = kinds.count(onnx.TensorProto.FLOAT16) > kinds.count(onnx.TensorProto.FLOAT)
        card, precision = CARDS[args.card], args.precision or ("fp16" if half else "fp32")
        if precision not in card.rates:
            known = " and ".join(card.rates)
            raise InputError(f"--card {args.card}: its {precision} rate is not known; give --precision {known}")
        results["card"], results["precision"] = args.card, precision
        results["least_memory_bytes"] = least_memory(path, nodes)
        results["card_memory_bytes"] = card.memory_bytes
        _bound(results, nodes, card.rates[precision], card.bytes_per_s)
    else:
        measure(results, path, nodes, args.rounds, folder, lambda: progress.advance(bar))


def bound(nodes: Sequence[Node], flop_per_s: float, bytes_per_s: float) -> float:
    """Seconds that the nodes take at least, if each reads and writes memory."""
    return sum(max(node.flop / flop_per_s, node.bytes / bytes_per_s) for node in nodes)


def least_memory(path: Path, nodes: Sequence[Node]) -> int:
    """Bytes that any engine must hold at once: the weights, and what goes into and out of the largest product."""
    graph = load_model(path).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer}
    moved = [
        node.bytes - sum(weights.get(name, 0) for name in source.input)
        for node, source in zip(nodes, graph.node, strict=True)
        if node.flop
    ]
    return sum(weights.values()) + max(moved, default=0)


def levels(models: Mapping[str, Sequence[Node]]) -> dict[str, dict[str, int]]:
    """FLOP of every part of the network, for each model."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(models, 0))
    for name, nodes in models.items():
        for node in nodes:
            found[node.level][name] += node.flop
    return {level: flop for level, flop in found.items() if any(flop.values())}


def _bound(results: Roofline, nodes: Sequence[Node], flop_per_s: float, bytes_per_s: float) -> None:
    """Note the rates, and the times that they allow."""
    edges = results["n"] * SIZE**2 * (3 + 1 + 4)  # bytes of inputs and outputs: RGB and SISM in bytes, map in FP32
    results["matrix_product_flop_per_s"], results["copy_bytes_per_s"] = flop_per_s, bytes_per_s
    results["bound_s"] = max(results["flop"] / flop_per_s, (results["weight_bytes"] + edges) / bytes_per_s)
    results["bound_by_node_s"] = bound(nodes, flop_per_s, bytes_per_s)


def measure(
    results: Roofline, path: Path, nodes: Sequence[Node], rounds: int, folder: Path, step: Callable[[], None]
) -> None:
    """Time the model among matrix products and copies, then each of its nodes, on the CPU.

    ONNX Runtime's profile is written to `folder`; `step` is called after every round.

    Raises:
        ModelError: the file does not run.
        KeyboardInterrupt: after Ctrl-C; the results of all whole rounds are there.
    """
    tensors, threads = inputs(results["n"]), results["machine"]["threads"]
    works = {"matrix product": matrix_product("cpu", threads), "copy": copy("cpu", threads)}
    times: Times = {}
    with Predictor(path, threads=threads) as predictor:
        calls: dict[str, Callable[[], object]] = {name: work.run for name, work in works.items()}
        calls["model"] = partial(predictor.predict_tensors, *tensors)
        for call in calls.values():
            warm_up(call)
        try:
            for _ in interleaved(calls, times, rounds):
                step()
        finally:
            if times:
                rates = {name: work.amount / min(times[name]) for name, work in works.items()}  # best: they are limits
                _bound(results, nodes, rates["matrix product"], rates["copy"])
                results["median_s"] = float(np.median(times["model"]))
                results["share_of_bound"] = results["bound_s"] / results["median_s"]
    results["nodes"] = _costs(path, nodes, profile(path, tensors, rounds, threads, folder))


def profile(
    path: Path, tensors: tuple[Any, Any], rounds: int, threads: int, folder: Path
) -> dict[tuple[str, str], float]:
    """Seconds of every kernel, by name and operator: the median of several calls.

    Raises:
        ModelError: ONNX Runtime can't run the file.
    """
    session = cpu_session(path, threads=threads, profile=folder / "profile")
    try:
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


def _costs(path: Path, nodes: Sequence[Node], kernels: dict[tuple[str, str], float]) -> list[NodeRow]:
    """A row per kernel, the costliest first, with the operations of the file's node that it computes.

    ONNX Runtime names a kernel after the node; one that it has fused, after the node or the tensor that comes out.
    """
    by_name = {node.name: node for node in nodes}
    graph = load_model(path, weights=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    rows: list[NodeRow] = []
    for (kernel, op), took in kernels.items():
        name = re.sub(r"_token_\d+$", "", kernel.partition("/")[0])
        found = by_name.get(name)
        if found is None:
            producer = producers.get(name.removesuffix("_nchwc"))
            while producer and not op.endswith(producer.op_type) and producer.input:  # Conv, Add, Relu → Conv
                producer = producers.get(producer.input[0])
            found = by_name.get(producer.name) if producer else None
        module, flop, moved = (found.module, found.flop, found.bytes) if found else (INSERTED, 0, 0)
        rows.append({"module": module, "op": op, "seconds": took, "flop": flop, "bytes": moved})
    return sorted(rows, key=lambda row: -row["seconds"])
