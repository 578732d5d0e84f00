"""python benchmarks/report.py: README's tables and plots, made from the JSON files in `benchmarks/results/`.

In README a pair of comments holds what is made: `<!-- results: NAME -->` and `<!-- end of results -->`. NAME.json is
what `icnet bench`, `scaling`, `throughput` or `roofline` wrote with --output; the part of NAME before the first _ says
which. A plot notes the digest of the JSON file that it was drawn from.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet report`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["report", *sys.argv[1:]]))

import argparse
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks import roofline, scaling
from benchmarks.end_to_end import STAGES
from benchmarks.machine import PACKAGES, name_of
from benchmarks.scaling import grew
from benchmarks.throughput import spread, streams
from benchmarks.timing import interval
from runtime import InputError
from runtime.files import digest, replacing

RESULTS = Path("benchmarks/results")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet report`."""
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="the file to bring up to date")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything differs")


def run(args: argparse.Namespace) -> int:
    """Bring README's blocks and their plots up to date.

    Returns:
        0; 1 with --check if something differs.

    Raises:
        InputError: README, or results that it names, are not there or can't be read.
        OutputError: a file can't be written.
    """
    try:
        text = args.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{args.readme}: can't be read: {error.strerror}") from error
    folder = args.readme.parent / RESULTS
    new, stale = rendered(text, folder), stale_plots(text, folder)
    differing = [args.readme] * (new != text) + stale
    if args.check:
        for path in differing:
            print(f"{path}: differs from the results; run icnet report")
        return 1 if differing else 0
    for path in stale:
        source = path.with_suffix(".json")
        with replacing(path) as temporary:
            DRAW[_kind(source.stem)](_load(source), temporary, {"Source": digest(source)})
    if new != text:
        with replacing(args.readme) as temporary:
            temporary.write_text(new, encoding="utf-8")
    for path in differing:
        print(f"{path}: written")
    return 0


def rendered(text: str, folder: Path) -> str:
    """README's text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        lines = RENDER[_kind(name)](_load(folder / f"{name}.json"), name)
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return BLOCK.sub(block, text)


def stale_plots(text: str, folder: Path) -> list[Path]:
    """The plots of README's blocks that are missing, or were drawn from other results."""
    found = []
    for match in BLOCK.finditer(text):
        plot, source = folder / f"{match[2]}.png", folder / f"{match[2]}.json"
        if _kind(match[2]) in DRAW and _source(plot) != digest(source):
            found.append(plot)
    return found


def _source(plot: Path) -> str | None:
    if not plot.is_file():
        return None
    with Image.open(plot) as image:
        return image.info.get("Source")


def _kind(name: str) -> str:
    kind = name.partition("_")[0]
    if kind not in RENDER:
        raise InputError(f"<!-- results: {name} -->: no such kind of results; there are {', '.join(RENDER)}")
    return kind


def _load(path: Path) -> Results:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read as results: {error}") from error


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(heading: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    heading = [*heading]
    return ["", _row(*heading), "|" + "---|" * len(heading), *(_row(*cells) for cells in rows), ""]


def _about(results: Results) -> str:
    """Machine, versions and date, in a line."""
    machine = results["machine"]
    versions = [f"{package} {machine[package.lower()]}" for package in PACKAGES if package.lower() in machine]
    early = " Interrupted before its end." if results.get("interrupted") else ""
    return f"{name_of(machine)}; {machine['date']}; Python {machine['python']}, {', '.join(versions)}.{early}"


def _latency(results: Results, name: str) -> list[str]:
    groups, first = results["groups"], results["first"]
    found = list(dict.fromkeys(label for group in groups for label in group["runners"]))
    sizes = [f"N = {group['n']}" for group in groups]
    on_gpu = "gpu" in results["machine"]
    kind, digits = ("peak_gpu_memory_bytes", 2) if on_gpu else ("peak_memory_bytes", 0)

    def cells(cell: Callable[[Results], str]) -> Iterable[list[str]]:
        for label in found:
            rows = (group["runners"].get(label) for group in groups)
            yield [label, *("–" if row is None else cell(row) for row in rows)]

    def times_as_fast(row: Results) -> str:
        if "ratio" not in row:
            return "–"
        mark = " (disagrees)" if row["agrees"] is False else ""
        return interval(row) + mark

    def memory(row: Results) -> str:
        return f"{row[kind] / 1e6:.0f}" if kind in row else "–"

    def milliseconds(row: Results) -> str:
        return " / ".join(f"{row[key] * 1e3:.{digits}f}" for key in ("median_s", "p90_s"))

    def share(row: Results) -> str:
        return "–" if row["share_of_matrix_product"] is None else f"{row['share_of_matrix_product']:.0%}"

    lines = [_about(results), "", f"![Images per second by group size](benchmarks/results/{name}.png)", ""]
    lines += [
        f"Times as fast as {first}, with the 95 % interval:",
        *_table(["runner", *sizes], cells(times_as_fast)),
    ]
    lines += ["Median and 90th percentile of a group, ms:", *_table(["runner", *sizes], cells(milliseconds))]
    if any(row["share_of_matrix_product"] for group in groups for row in group["runners"].values()):
        lines += ["Products and convolutions, as a share of the rate of a large matrix product:"]
        lines += _table(["runner", *sizes], cells(share))
    if any(kind in row for group in groups for row in group["runners"].values()):
        where = "GPU memory" if on_gpu else "memory"
        lines += [f"Peak {where} of a process that runs one runner alone, MB:"]
        lines += _table(["runner", *sizes], cells(memory))
    if results["end_to_end"]:
        width, height = results["end_to_end"][0]["image"]
        heading = ["runner", "N", "whole", *STAGES, "not the network"]
        rows = []
        for row in results["end_to_end"]:
            stages = [f"{row['stages_s'][stage] * 1e3:.0f}" for stage in STAGES]
            rest = f"{max(0.0, 1 - row['network_share']):.1%}"
            rows.append([row["runner"], row["n"], f"{row['median_s'] * 1e3:.0f}", *stages, rest])
        lines += [f"From JPEG files of {width}×{height} to PNG maps, ms:", *_table(heading, rows)]
    lines += [f"- Not run: {label}: {why}" for label, why in results["not_run"].items()]
    return lines


def _scaling(results: Results, name: str) -> list[str]:
    lines = [_about(results), "", f"![Time and memory against the group's size](benchmarks/results/{name}.png)"]
    rows = []
    for found in results["models"]:
        for row in found["sizes"]:
            times = f"{row['first_map_s']:.2f} s", f"{row['median_s']:.2f} s"
            rows.append([found["name"], row["n"], *times, f"{row['peak_memory_bytes'] / 1e6:.0f} MB"])
    lines += _table(["model", "N", "start to first map", "median after that", "peak memory"], rows)
    for found in results["models"]:
        if "time_per_image_s" in found:
            time = f"{found['time_offset_s'] * 1e3:.0f} ms + {found['time_per_image_s'] * 1e3:.0f} ms per image"
            offset, slope = found["memory_offset_bytes"] / 1e6, found["memory_per_image_bytes"] / 1e6
            lines.append(f"- {found['name']}: {time}; {offset:.0f} MB + {slope:.1f} MB per image.")
        lines += [f"- {found['name']}, N = {n}: not run: {why}." for n, why in found["not_run"].items()]
        if records := found.get("stream", {}).get("records"):
            text = f"{records[-1]['memory_bytes'] / 1e6:.0f} MB resident after {records[-1]['groups']} groups"
            lines.append(f"- {found['name']}: {text}, {grew(found['stream']):.3f} times as much as half way.")
    for found in results["models"]:
        if rows := found.get("packs"):
            size = rows[0]["images"] // rows[0]["groups"]
            lines += ["", f"{found['name']}, groups of {size} in one call of its packed export, and one by one:"]
            heading = ["groups", "packed", "one by one", "times as fast", "peak memory, packed", "mean difference"]
            table = []
            for row in rows:
                cells = [f"{row['packed_s']:.2f} s", f"{row['one_by_one_s']:.2f} s", interval(row)]
                cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f} MB" if "peak_memory_bytes" in row else "–")
                table.append([row["groups"], *cells, f"{row['mean_difference']:.0e}"])
            lines += _table(heading, table)
    return lines


def _throughput(results: Results, name: str) -> list[str]:
    callers = f"{results['callers']} callers, {results['groups']} groups of {spread(results)}"
    heading = ["model", "stream", "groups/s", "images/s", "latency p50", "p99", "queue p50", "p99", "idle"]
    rows = []
    for found, key, row in streams(results):
        latency, queue = row["latency_s"], row["queue_s"]
        times = (latency["median"], latency["p99"], queue["median"], queue["p99"])
        idle = "–" if row["idle_share"] is None else f"{row['idle_share']:.0%}"
        rates = f"{row['groups_per_s']:.2f}", f"{row['images_per_s']:.1f}"
        rows.append([found["name"], key, *rates, *(f"{took:.2f} s" for took in times), idle])
    return [f"{_about(results)} {callers}.", *_table(heading, rows)]


def _roofline(results: Results, name: str) -> list[str]:
    lines = [_about(results), "", f"![Roofline](benchmarks/results/{name}.png)", ""]
    lines += [f"- {text}" for text in roofline.summary(results)]
    nodes = results.get("nodes", [])  # none of a card
    total = sum(row["seconds"] for row in nodes)
    peak = results["matrix_product_flop_per_s"]
    rows = []
    for row in nodes[: roofline.COSTLIEST]:
        rate = row["flop"] / row["seconds"]
        cells = (
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['seconds'] / total:.1%}",
            f"{rate / 1e9:.0f}",
            f"{rate / peak:.0%}",
        )
        rows.append([row["module"] or "–", row["op"], *cells])
    if rows:
        lines += _table(["node", "operator", "ms", "of all", "GFLOP/s", "of the matrix product's"], rows)
    names = [*next(iter(results["levels"].values()))]
    levels = [[k, *(f"{flop[name] / 1e9:.2f}" for name in names)] for k, flop in results["levels"].items()]
    totals = (sum(flop[name] for flop in results["levels"].values()) for name in names)
    levels.append(["all", *(f"{flop / 1e9:.2f}" for flop in totals)])
    return [*lines, "GFLOP by part of the network:", *_table(["part", *names], levels)]


def _draw_latency(results: Results, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Images per second against the group's size, a line per runner."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(label for group in results["groups"] for label in group["runners"]):
        rows = [(g["n"], g["runners"][label]) for g in results["groups"] if label in g["runners"]]
        style = "--" if label.startswith("paper") else "-"
        axes.plot([n for n, _ in rows], [row["images_per_s"] for _, row in rows], style, marker="o", label=label)
    axes.set(xscale="log", xlabel="images in the group", ylabel="images per second", ylim=(0, None))
    sizes = [group["n"] for group in results["groups"]]
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, metadata=metadata)


RENDER: dict[str, Callable[[Results, str], list[str]]] = {
    "latency": _latency,
    "gpu": _latency,
    "scaling": _scaling,
    "throughput": _throughput,
    "roofline": _roofline,
}
DRAW: dict[str, Callable[[Results, Path, dict[str, str] | None], None]] = {
    "latency": _draw_latency,
    "gpu": _draw_latency,
    "scaling": scaling.draw,
    "roofline": roofline.draw,
}
