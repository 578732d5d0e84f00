"""The page of each kind of results: tables, lines and a plot, which `render.py` shows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cards import REALISTIC
from benchmarks.records import GpuCheck, Latency, Record, Roofline, RunnerRow, ScaledModel, Scaling, Throughput
from benchmarks.render import NOTHING, Page, Plot, Table, brief
from benchmarks.timing import interval, line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTLIEST = 10  # nodes of a roofline
INTERRUPTED = "interrupted: this is what was measured until then"


def _page(results: Record, parts: Sequence[Table | str], plot: Plot | None = None, more: str = "") -> Page:
    """A page that begins with the machine, the versions, the date and `more`, in one line."""
    machine = results["machine"]
    name = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"
    versions = [f"{k} {v}" for k, v in machine["versions"].items() if k not in ("python", "icnet-deploy")]
    python = f"Python {machine['versions']['python']}"
    about = f"{name}; {machine['date']}; {', '.join((python, *versions))}.{more}"
    return Page(about, [*parts, *([INTERRUPTED] if results["interrupted"] else [])], plot)


def _cell(row: Mapping[str, Any], key: str, factor: float, form: str) -> str:
    value = row.get(key)
    return NOTHING if value is None else f"{value * factor:{form}}"


def latency(results: Latency) -> Page:
    """The comparison of all runners, and the times from files to files."""
    digits = ".2f" if "gpu" in results["machine"] else ".0f"
    columns = {  # heading: (key, factor, format)
        "ms": ("median_s", 1e3, digits),
        "p90": ("p90_s", 1e3, digits),
        "p99": ("p99_s", 1e3, digits),
        "images/s": ("images_per_s", 1, ".1f"),
        "MB": ("peak_memory_bytes", 1e-6, ".0f"),
        "GPU MB": ("peak_gpu_memory_bytes", 1e-6, ".0f"),
        "start, s": ("first_map_s", 1, ".1f"),
        "of peak": ("share_of_matrix_product", 1, ".0%"),
        "|Δ|": ("mean_difference", 1, ".0e"),
        "|Δ| CPU": ("mean_difference_from_cpu", 1, ".0e"),
    }
    rows = [(group["n"], label, row) for group in results["groups"] for label, row in group["runners"].items()]
    cells = []
    for n, label, row in rows:
        mark = " (disagrees)" if row["agrees"] is False else ""
        ratio = (interval(row) if "ratio" in row else NOTHING) + mark
        cells.append([str(n), label, ratio, *(_cell(row, *column) for column in columns.values())])
    parts: list[Table | str] = []
    if cells:
        notes = (
            f"ratio: times as fast as {results['first']}, with its 95 % interval",
            "p99: the slowest if the rounds are few",
            "MB: peak memory of a process that runs this runner alone",
            "start: from the start of that process to the first map",
            "of peak: convolutions and products per second, as a share of a large matrix product's rate",
            "|Δ|: mean difference of the maps",
        )
        heading = ["N", "runner", "ratio", *columns]
        parts.append(Table("Time of a whole group", heading, cells, texts=2, grouped=True, note="; ".join(notes)))
    if results["end_to_end"]:
        parts.append(_files(results))
    parts += [f"not run: {label}: {brief(why)}" for label, why in results["not_run"].items()]
    for label in dict.fromkeys(label for _, label, row in rows if row["agrees"] is False):
        parts.append(f"disagrees: {label}: its maps differ from the reference by more than rounding explains")
    if len({label for _, label, _ in rows}) > 1 and all(row["agrees"] is None for *_, row in rows):
        parts.append("not judged: whether the maps agree; that takes the --checkpoint of the models")
    plot = Plot("Images per second by group size", (8, 3.8), partial(_draw_latency, rows))
    return _page(results, parts, plot)


def _draw_latency(rows: Sequence[tuple[int, str, RunnerRow]], figure: "Figure") -> None:
    """Images per second of every runner."""
    axes = figure.subplots()
    for label in dict.fromkeys(label for _, label, _ in rows):
        points = {n: row["images_per_s"] for n, other, row in rows if other == label}
        axes.plot([*points], [*points.values()], "o--" if label.startswith("paper") else "o-", label=label)
    axes.set(xlabel="images in the group", ylabel="images per second", xscale="log", ylim=(0, None))
    sizes = sorted({n for n, *_ in rows})
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _files(results: Latency) -> Table:
    rows = results["end_to_end"]
    stages, (width, height) = [*rows[0]["stages_s"]], rows[0]["image"]
    cells = []
    for row in rows:
        times = [f"{took * 1e3:.0f}" for took in (row["median_s"], *(row["stages_s"][stage] for stage in stages))]
        cells.append([str(row["n"]), row["runner"], *times, f"{max(0.0, 1 - row['network_share']):.1%}"])
    return Table(
        f"From JPEG files of {width}×{height} to PNG maps, ms",
        ["N", "runner", "whole", *stages, "not the network"],
        cells,
        texts=2,
        note="stages: one after the other; not the network: the rest of the whole time",
    )


def summary(results: Latency) -> Page:
    """The times and ratios of a comparison in one small table, for README."""
    sizes = results["groups"]
    rows = []
    for label in dict.fromkeys(label for group in sizes for label in group["runners"]):
        cells = []
        for row in (group["runners"].get(label) for group in sizes):
            ratio = f" ({row['ratio']:.2f}×)" if row and "ratio" in row else ""
            wrong = " disagrees" if row and row["agrees"] is False else ""
            cells.append(f"{row['median_s'] * 1e3:.0f}{ratio}{wrong}" if row else NOTHING)
        rows.append([label, *cells])
    title = f"Median time of a group of N images, ms; in brackets, how many times as fast as {results['first']}"
    table = Table(title, ["runner", *(f"N = {group['n']}" for group in sizes)], rows)
    return _page(results, [table])


def scaling(results: Scaling) -> Page:
    """Time and memory by group size, and of groups that share a call."""
    cells = []
    for found in results["models"]:
        for row in found["sizes"]:
            per_image = row["median_s"] / row["n"]
            times = [f"{row['first_map_s']:.2f} s", f"{row['median_s'] * 1e3:.0f} ms", f"{per_image * 1e3:.1f} ms"]
            cells.append([found["name"], str(row["n"]), *times, f"{row['peak_memory_bytes'] / 1e6:.0f} MB"])
    heading = ["model", "N", "start to first map", "median after that", "per image", "peak memory"]
    parts: list[Table | str] = [Table("Each size in a process of its own", heading, cells, grouped=True)]
    for found in results["models"]:
        name = found["name"]
        if "time_per_image_s" in found:
            ms = [found["time_offset_s"] * 1e3, found["time_per_image_s"] * 1e3]
            mb = [found["memory_offset_bytes"] / 1e6, found["memory_per_image_bytes"] / 1e6]
            text = f"{ms[0]:.0f} ms + {ms[1]:.1f} ms per image; {mb[0]:.0f} MB + {mb[1]:.1f} MB per image"
            parts.append(f"{name}: {text}")
        parts += [f"not run: {name}, group of {n}: {brief(why)}" for n, why in found["not_run"].items()]
    parts += [_packs(found) for found in results["models"] if found.get("packs")]
    packed = next((found for found in results["models"] if found.get("packs")), None)
    draw = partial(_draw_scaling, results["models"], packed)
    plot = Plot("Time and memory against the group's size", (13 if packed else 9, 3.6), draw)
    return _page(results, parts, plot)


def _packs(found: ScaledModel) -> Table:
    rows = []
    for row in found["packs"]:
        times = [f"{row['packed_s'] * 1e3:.0f} ms", f"{row['one_by_one_s'] * 1e3:.0f} ms", interval(row)]
        memory = _cell(row, "peak_memory_bytes", 1e-6, ".0f") + (" MB" if "peak_memory_bytes" in row else "")
        rows.append([str(row["groups"]), *times, memory, f"{row['mean_difference']:.0e}"])
    size = found["packs"][0]["images"] // found["packs"][0]["groups"]
    return Table(
        f"{found['name']}, groups of {size} in one call of its packed export, and one by one",
        ["groups", "packed", "one by one", "times as fast", "peak memory, packed", "mean difference"],
        rows,
    )


def _draw_scaling(models: Sequence[ScaledModel], packed: ScaledModel | None, figure: "Figure") -> None:
    """Time and memory of every model by group size; of one that is packed, time by the number of groups in a call."""
    time, memory, *rest = figure.subplots(1, 3 if packed else 2)
    for found in models:
        sizes = [row["n"] for row in found["sizes"]]
        _fit(time, sizes, [row["median_s"] for row in found["sizes"]], found["name"])
        _fit(memory, sizes, [row["peak_memory_bytes"] / 1e9 for row in found["sizes"]], found["name"])
    time.set(xlabel="images in the group", ylabel="time, s")
    memory.set(xlabel="images in the group", ylabel="memory, GB")
    if packed:
        rows, (axes,) = packed["packs"], rest
        groups = [row["groups"] for row in rows]
        _fit(axes, groups, [row["packed_s"] for row in rows], f"{packed['name']}, packed")
        _fit(axes, groups, [row["one_by_one_s"] for row in rows], f"{packed['name']}, one by one")
        axes.set(xlabel=f"groups of {rows[0]['images'] // rows[0]['groups']} in a call", ylabel="time, s")
    for axes in (time, memory, *rest):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize="small")


def _fit(axes: "Axes", x: Sequence[float], y: Sequence[float], label: str) -> None:
    """Points, and the straight line through three or more of them."""
    (points,) = axes.plot(x, y, "o", label=label)
    if len(x) >= 3:
        offset, slope = line(x, y)
        axes.plot(x, offset + slope * np.asarray(x), "-", color=points.get_color(), linewidth=1)


def throughput(results: Throughput) -> Page:
    """Every stream of every model."""
    sizes = sorted(int(n) for n in results["histogram"])
    spread = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    names = {
        "capacity": "all at once",
        "arriving": f"{results['load']:.0%} of the first one's capacity, at random times",
    }
    cells = []
    for found in results["models"]:
        for key, row in found["streams"].items():
            latency, queue = row["latency_s"], row["queue_s"]
            times = (latency["median"], latency["p90"], latency["p99"], queue["median"], queue["p99"])
            rates = [f"{row['groups_per_s']:.2f}", f"{row['images_per_s']:.1f}"]
            idle = _cell({"idle": row["idle_share"]}, "idle", 1, ".0%")
            cells.append([found["name"], names[key], *rates, *(f"{took * 1e3:.0f}" for took in times), idle])
    headings = ["latency p50, ms", "p90", "p99", "queue p50, ms", "p99", "idle"]
    table = Table("Groups in a stream", ["model", "stream", "groups/s", "images/s", *headings], cells, texts=2)
    callers = f" {results['callers']} callers, groups of {spread}, {results['groups']} in a stream."
    return _page(results, [table], more=callers)


def roofline(results: Roofline) -> Page:
    """The bound, the costliest nodes, and the operations of every part of the network."""
    peak, rate = results["matrix_product_flop_per_s"], results["copy_bytes_per_s"]
    where = f"{results['card']}, {results['precision']}" if "card" in results else "measured"
    work = f"{results['flop'] / 1e9:.1f} GFLOP, {results['bytes'] / 1e9:.2f} GB if every node reads and writes memory"
    bounds = f"{results['bound_s'] * 1e3:.3g} ms"
    if "card" not in results:
        bounds += f" ({results['bound_by_node_s'] * 1e3:.3g} ms node by node)"
    parts: list[Table | str] = [
        f"{where}: {peak / 1e9:.0f} GFLOP/s (matrix product), {rate / 1e9:.0f} GB/s (copy)",
        f"group of {results['n']}: {work}; bound {bounds}",
    ]
    if "card" in results:
        most = results["n"] / results["bound_s"]
        low, high = REALISTIC
        held, size = results["least_memory_bytes"] / 1e6, results["card_memory_bytes"] / 1e9
        parts[1:] = [
            f"group of {results['n']}: {work}",
            f"at most {most:.0f} images/s: at least {bounds}",
            f"realistic, {low:.0%} to {high:.0%} of that: {low * most:.0f} to {high * most:.0f} images/s",
            f"memory: at least {held:.0f} MB of {size:.0f} GB: weights, and inputs and outputs of the largest product",
        ]
    if "median_s" in results:
        took, share = results["median_s"], results["share_of_bound"]
        reached = f"{results['flop'] / took / 1e9:.0f} GFLOP/s, {share:.0%} of the bound"
        parts.append(f"took {took * 1e3:.0f} ms: {reached}")
    if results["nodes"]:
        parts.append(_nodes(results))
    parts.append(_levels(results["levels"], results["n"]))
    return _page(results, parts, Plot("Roofline", (7, 4.2), partial(_draw_roofline, results)))


def _nodes(results: Roofline) -> Table:
    total = sum(row["seconds"] for row in results["nodes"])
    rows = []
    for row in results["nodes"][:COSTLIEST]:
        took = row["seconds"]
        compute, move = row["flop"] / results["matrix_product_flop_per_s"], row["bytes"] / results["copy_bytes_per_s"]
        cells = [f"{took * 1e3:.1f}", f"{took / total:.1%}", f"{row['flop'] / took / 1e9:.0f}"]
        cells += [f"{row['bytes'] / took / 1e9:.1f}", "products" if compute > move else "memory"]
        rows.append([row["module"] or NOTHING, row["op"], *cells, f"{max(compute, move) / took:.0%}"])
    return Table(
        f"The costliest nodes of {results['model']['name']}, group of {results['n']}",
        ["node", "operator", "ms", "of all", "GFLOP/s", "GB/s", "bound by", "of bound"],
        rows,
        texts=2,
        note="of bound: the node's bound (operations or bytes, whichever takes longer) over its time",
    )


def _levels(levels: dict[str, dict[str, int]], n: int) -> Table:
    names = [*next(iter(levels.values()))]
    everything = {name: sum(flop[name] for flop in levels.values()) for name in names}
    rows = levels | {"all": everything}
    cells = [[part, *(f"{flop[name] / 1e9:.3f}" for name in names)] for part, flop in rows.items()]
    return Table(f"GFLOP of convolutions and products by part of the network, group of {n}", ["part", *names], cells)


def _draw_roofline(results: Roofline, figure: "Figure") -> None:
    """Rate against intensity, a dot per node with products, its area the time; no dots if none ran."""
    peak, rate = results["matrix_product_flop_per_s"] / 1e9, results["copy_bytes_per_s"] / 1e9
    total = sum(row["seconds"] for row in results["nodes"])
    rows = [row for row in results["nodes"] if row["flop"] and row["bytes"]]
    reached = [row["flop"] / row["bytes"] for row in rows]
    x = np.geomspace(min([*reached, peak / rate / 10]) / 2, max([*reached, peak / rate * 10]) * 2, 200)
    axes = figure.subplots()
    axes.plot(x, np.minimum(peak, x * rate), "-", color="0.3")
    for op in sorted({row["op"] for row in rows}):
        of_op = [row for row in rows if row["op"] == op]
        intensity = [row["flop"] / row["bytes"] for row in of_op]
        speed = [row["flop"] / row["seconds"] / 1e9 for row in of_op]
        areas = [10 + 3000 * row["seconds"] / total for row in of_op]
        axes.scatter(intensity, speed, s=areas, alpha=0.6, label=op)
    axes.set(xlabel="FLOP per byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    axes.set_title(f"{results['model']['name']}, group of {results['n']}; area: time", parse_math=False)
    if rows:
        handles: Sequence[Any] = axes.legend(fontsize="small").legend_handles
        for handle in handles:
            handle.set_sizes([40])


def gpu_check(results: GpuCheck) -> Page:
    """Every check, what is missing, and the verdict."""
    rows = []
    for row in results["checks"]:
        figures = row["figures"]
        cells = [_cell(figures, "mean_difference", 1, ".0e"), _cell(figures, "bound", 1, ".0e")]
        cells += [_cell(figures, "median_s", 1e3, ".2f"), f"{row['seconds']:.1f}"]
        rows.append([row["name"], row["outcome"], *cells])
    heading = ["check", "outcome", "|Δ| CPU", "allowed", "ms, N = 5", "took, s"]
    parts: list[Table | str] = [Table(f"Checks with {results['model']['name']}", heading, rows, texts=2)]
    by_reason: dict[str, list[str]] = {}
    for row in results["checks"]:
        if "why" in row:
            by_reason.setdefault(f"{row['outcome']}: {row['why']}", []).append(row["name"])
    parts += [
        f"{why} ({len(names)} checks)" if len(names) > 1 else f"{names[0]} {why}" for why, names in by_reason.items()
    ]
    passed = sum(row["outcome"] == "passed" for row in results["checks"])
    verdict = "green" if passed == len(rows) and rows and not results["interrupted"] else "red"
    parts.append(f"{verdict}: {passed} of {len(rows)} checks passed, of {' and '.join(results['engines'])}")
    return _page(results, parts)


PAGES: dict[str, Callable[[Any], Page]] = {
    "latency": latency,
    "throughput": throughput,
    "scaling": scaling,
    "roofline": roofline,
    "gpu-check": gpu_check,
}
