"""The records in the JSON files of the benchmarks. Names in `_s` are times in seconds, names in `_bytes` are bytes."""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from runtime import InputError

SCHEMA = 1  # goes up when a change makes older files unreadable

Kind = Literal["latency", "throughput", "scaling", "roofline", "gpu-check"]


class Gpu(TypedDict, total=False):
    """The GPU, where one was used, and its software."""

    gpu: str
    compute_capability: str
    driver: str | None
    gpu_memory_bytes: int
    cuda: str | None
    cudnn: int | None


class Machine(Gpu):
    """The hardware and software of a measurement."""

    cpu: str
    cores: int | None
    threads: int
    date: str
    versions: dict[str, str]


class Record(TypedDict):
    """The head of every file."""

    schema: int
    kind: Kind
    machine: Machine
    interrupted: bool


class Percentiles(TypedDict):
    """Of a call's times."""

    median_s: float
    p90_s: float
    p99_s: float


class Ratio(TypedDict):
    """How many times as fast, with its 95 % interval."""

    ratio: float
    ratio_low: float
    ratio_high: float


class Alone(TypedDict):
    """Time and memory of a process that runs one runner and nothing else."""

    first_map_s: float
    times_s: list[float]
    peak_memory_bytes: int
    peak_gpu_memory_bytes: NotRequired[int]


class RunnerRow(Percentiles):
    """One runner at one size; the differences are means of |Δ| of the maps.

    The ratio is missing if the first runner failed, what a process takes alone if that was not measured.
    """

    images_per_s: float
    share_of_matrix_product: float | None
    mean_difference: float | None
    agrees: bool | None
    ratio: NotRequired[float]
    ratio_low: NotRequired[float]
    ratio_high: NotRequired[float]
    mean_difference_from_cpu: NotRequired[float]
    first_map_s: NotRequired[float]
    peak_memory_bytes: NotRequired[int]
    peak_gpu_memory_bytes: NotRequired[int]


class Group(TypedDict):
    """The comparison at one size."""

    n: int
    rounds: int
    matrix_product_flop_per_s: float
    flop: int | None
    runners: dict[str, RunnerRow]


class FilesRow(Percentiles):
    """A group from JPEG files to PNG maps; `image` is the photographs' [width, height]."""

    runner: str
    n: int
    image: list[int]
    stages_s: dict[str, float]
    network_share: float


class ModelFile(TypedDict):
    """A model file that was compared."""

    sha256: str
    bytes: int


class Latency(Record):
    """`icnet bench latency`: `first` is what the others are compared with, `bounds` those of the mean |Δ|."""

    first: str
    models: dict[str, ModelFile]
    not_run: dict[str, str]
    bounds: dict[str, float]
    groups: list[Group]
    end_to_end: list[FilesRow]


class SizeRow(Alone):
    """One group size."""

    n: int
    median_s: float


class PackRow(Ratio):
    """Several groups in one call, against the same one by one."""

    groups: int
    images: int
    one_by_one_s: float
    packed_s: float
    mean_difference: float
    peak_memory_bytes: NotRequired[int]


class ScaledModel(TypedDict):
    """One model; the straight lines are there from three sizes on."""

    name: str
    sha256: str | list[str]
    sizes: list[SizeRow]
    not_run: dict[str, str]
    packs: NotRequired[list[PackRow]]
    time_offset_s: NotRequired[float]
    time_per_image_s: NotRequired[float]
    memory_offset_bytes: NotRequired[float]
    memory_per_image_bytes: NotRequired[float]


class Scaling(Record):
    """`icnet bench scaling`."""

    calls: int
    models: list[ScaledModel]


class StreamRow(TypedDict):
    """One stream of groups; the idle share is None where nvidia-smi does not say.

    Latency is counted from a group's arrival to its maps, queue time to the thread that takes it: "median", "p99" and,
    of the latency, "p90".
    """

    groups: int
    images: int
    groups_per_s: float
    images_per_s: float
    latency_s: dict[str, float]
    queue_s: dict[str, float]
    idle_share: float | None


class ServedModel(TypedDict):
    """One model, with the streams "capacity" and "arriving"."""

    name: str
    sha256: str
    streams: dict[str, StreamRow]


class Throughput(Record):
    """`icnet bench throughput`; the histogram's keys are group sizes."""

    histogram: dict[int, int] | dict[str, int]
    groups: int
    callers: int
    load: float
    models: list[ServedModel]


class NodeRow(TypedDict):
    """One kernel; `module` is the part of the network, or "layout" for what ONNX Runtime put in itself."""

    module: str
    op: str
    seconds: float
    flop: int
    bytes: int


class NamedFile(TypedDict):
    """A model file."""

    name: str
    sha256: str


class Roofline(Record):
    """`icnet bench roofline`, of a model that was run or of a card.

    Attributes:
        bytes: that are moved if every node reads and writes memory.
        bound_s: the time that the rates allow; `bound_by_node_s` if every node reads and writes memory.
        levels: FLOP of every part of the network, by model.
    """

    model: NamedFile
    n: int
    flop: int
    bytes: int
    weight_bytes: int
    levels: dict[str, dict[str, int]]
    matrix_product_flop_per_s: float
    copy_bytes_per_s: float
    bound_s: float
    bound_by_node_s: float
    nodes: list[NodeRow]
    card: NotRequired[str]  # these four of a card, or else the next two of a model that was run
    precision: NotRequired[str]
    least_memory_bytes: NotRequired[int]
    card_memory_bytes: NotRequired[float]
    median_s: NotRequired[float]
    share_of_bound: NotRequired[float]


class CheckRow(TypedDict):
    """One check; the figures' names end in `_s` and `_bytes` where they are seconds and bytes."""

    name: str
    outcome: Literal["passed", "failed", "could not"]
    seconds: float
    figures: dict[str, float]
    why: NotRequired[str]


class GpuCheck(Record):
    """`icnet bench gpu-check`: `engines` are those that were asked for."""

    model: NamedFile
    engines: list[str]
    checks: list[CheckRow]


def load(path: Path) -> Any:
    """The record in a file; its "kind" says which one it is.

    Raises:
        InputError: it can't be read, or is not such a record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read as results: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: can't be read as results: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path}: not results of schema {SCHEMA}; measure again with this version")
    if found.get("kind") not in get_args(Kind):
        raise InputError(f"{path}: no such kind of results; there are {', '.join(get_args(Kind))}")
    return found
