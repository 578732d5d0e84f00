"""icnet bench roofline: how far is a model from what the machine could do, and which nodes cost most?

Operations and bytes come from the file (`export/onnx_file.py`), the machine's rates from a large matrix product and a
large copy that run among the model's calls, and the time of each node from ONNX Runtime's profiler on the same file.
The *bound* is what the roofline model (Williams, Waterman & Patterson, 2009) allows: node by node the larger of
operations over the matrix-product rate and bytes over the copy rate, where every node reads and writes memory; and for
the whole file, where only its inputs, weights and outputs do. An engine that needs fewer multiplications (Winograd) can
be faster than either.

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
from benchmarks.machine import copy, header, matrix_product
from benchmarks.records import Bounds, NodeRow, Roofline, Timed, Totals
from benchmarks.render import Page, Plot, to_png, to_terminal, wide_console
from benchmarks.runners import OURS_ONNX, REFERENCE_ONNX, inputs
from benchmarks.timing import Times, interleaved, warm_up
from evaluation.record import recording
from export.onnx_file import Node, count, cpu_session, load_model
from runtime import InputError, ModelError, Predictor
from runtime.contract import SIZE
from runtime.errors import one_line
from runtime.files import digest
from runtime.predictor import MAX_THREADS
from runtime.threads import cores

INSERTED = "layout"  # what the table calls nodes that ONNX Runtime puts in itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet bench roofline`."""
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL.onnx", help="default: ours and the paper's, both exported here")
    add("--checkpoint", type=Path, help="without MODEL: what to export (default: random weights of width 1)")
    add("--size", type=int, default=5, metavar="N", help="images in the group (default 5)")
    add("--rounds", type=int, default=7, help="timed calls (default 7)")
    add("-t", "--threads", type=int, default=cores(), help="CPU threads (default: all)")
    add("--card", choices=CARDS, help="only the bound, for this card")
    add(
        "--precision", choices=["fp32", "fp16", "int8"], help="with --card: of its products (default: as the file says)"
    )
    add("-o", "--output", type=Path, help="write the results as JSON")
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
    console = wide_console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    results: dict[str, Any] = {}

    def page() -> Page:
        return describe.roofline(cast(Roofline, results))

    plots = {args.plot: lambda path: to_png(cast(Plot, page().plot), path)} if args.plot else {}
    read = args.model, args.checkpoint
    with (
        tempfile.TemporaryDirectory() as folder,
        recording(results, args.output, inputs=read, others=plots, console=console) as progress,
    ):
        results.update(_results(args, Path(folder), progress))
    to_terminal(page(), console)
    return 130 if results["interrupted"] else 0


def _results(args: argparse.Namespace, folder: Path, progress: Progress) -> Roofline:
    bar = progress.add_task("exporting" if args.model is None else "counting", total=args.rounds + 1)
    model, reference = args.model, None
    if model is None:
        prepare(folder, args.checkpoint)
        model, reference = folder / OURS_ONNX, folder / REFERENCE_ONNX
    nodes = count(model, args.size)
    totals, counted = _totals(model, nodes), {"ours" if reference else model.name: nodes}
    if reference:
        counted["paper"] = count(reference, args.size)
    found: Bounds
    precision = args.precision or _precision(model)
    if args.card:
        card = CARDS[args.card]
        if precision not in card.rates:
            known = " and ".join(card.rates)
            raise InputError(f"--card {args.card}: its {precision} rate is not known; give --precision {known}")
        found = _bounds(nodes, totals, args.size, card.rates[precision], card.bytes_per_s)
    else:
        timed = args.size, args.rounds, args.threads, folder
        found = measure(model, nodes, totals, *timed, lambda: progress.advance(bar))
    results: dict[str, Any] = {
        **header("roofline", args.threads),
        "model": {"name": model.name, "sha256": digest(model)},
        "n": args.size,
        **totals,
        "levels": levels(counted),
        "nodes": [],
        **found,
    }
    if args.card:
        memory = {"least_memory_bytes": least_memory(model, nodes), "card_memory_bytes": card.memory_bytes}
        results |= {"card": args.card, "precision": precision, **memory}
    return cast(Roofline, results)


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


def _totals(path: Path, nodes: Sequence[Node]) -> Totals:
    model = load_model(path)
    weights = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    flop, moved = sum(node.flop for node in nodes), sum(node.bytes for node in nodes)
    return {"flop": flop, "bytes": moved, "weight_bytes": weights}


def _bounds(nodes: Sequence[Node], totals: Totals, n: int, flop_per_s: float, bytes_per_s: float) -> Bounds:
    edges = n * SIZE**2 * (3 + 1 + 4)  # bytes of inputs and outputs: RGB and SISM in bytes, map in FP32
    least = max(totals["flop"] / flop_per_s, (totals["weight_bytes"] + edges) / bytes_per_s)
    return {
        "matrix_product_flop_per_s": flop_per_s,
        "copy_bytes_per_s": bytes_per_s,
        "bound_s": least,
        "bound_by_node_s": bound(nodes, flop_per_s, bytes_per_s),
    }


def _precision(path: Path) -> str:
    """Of a file's weights: FP16 if most are."""
    kinds = [tensor.data_type for tensor in load_model(path).graph.initializer]
    return "fp16" if kinds.count(onnx.TensorProto.FLOAT16) > kinds.count(onnx.TensorProto.FLOAT) else "fp32"


def measure(
    path: Path,
    nodes: Sequence[Node],
    totals: Totals,
    n: int,
    rounds: int,
    threads: int,
    folder: Path,
    step: Callable[[], None],
) -> Timed:
    """Time the model among matrix products and copies, then each of its nodes, on the CPU.

    ONNX Runtime's profile is written to `folder`; `step` is called after every round.

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
    with Predictor(path, threads=threads) as predictor:
        calls: dict[str, Callable[[], object]] = {name: work.run for name, work in works.items()}
        calls["model"] = partial(predictor.predict_tensors, *tensors)
        for call in calls.values():
            warm_up(call)
        try:
            for _ in interleaved(calls, times, rounds):
                step()
            kernels = profile(path, tensors, rounds, threads, folder)
        except KeyboardInterrupt:
            if not times:
                raise
            interrupted = True
    median = float(np.median(times["model"]))
    rates = {name: work.amount / min(times[name]) for name, work in works.items()}  # the best: they are limits
    found = _bounds(nodes, totals, n, rates["matrix product"], rates["copy"])
    return {
        **found,
        "interrupted": interrupted,
        "median_s": median,
        "share_of_bound": found["bound_s"] / median,
        "nodes": _costs(path, nodes, kernels),
    }


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
            while (
                producer is not None and not op.endswith(producer.op_type) and producer.input
            ):  # Conv, Add, Relu → Conv
                producer = producers.get(producer.input[0])
            found = by_name.get(producer.name) if producer is not None else None
        module, flop, moved = (found.module, found.flop, found.bytes) if found else (INSERTED, 0, 0)
        rows.append({"module": module, "op": op, "seconds": took, "flop": flop, "bytes": moved})
    return sorted(rows, key=lambda row: -row["seconds"])
