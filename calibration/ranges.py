"""The ranges of a model's activations over calibration groups, and where to cut them off.

Two passes over the groups: the first finds each tensor's largest absolute value, the second counts values in bins of
equal width up to it. All groups have the same bins, so their order does not change the result. One group is in memory
at a time; ONNX Runtime's own calibrators keep the activations of all.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.groups import Feeds
from export.onnx_file import cpu_session
from runtime.errors import ModelError, one_line
from runtime.files import replacing, write_json

METHODS = ("minmax", "percentile", "entropy")
BINS = 2048
PERCENTILE = 99.99
LEVELS = 128  # of symmetric int8, on one side

Ranges = dict[str, float]
Counts = NDArray[np.int64]


def collect(
    path: Path,
    model: onnx.ModelProto,
    tensors: Sequence[str],
    passes: Callable[[str], Iterable[Feeds]],
    method: str,
    percentile: float = PERCENTILE,
    threads: int | None = None,
) -> Ranges:
    """The limit L of each tensor: int8 will stand for [-L, L].

    Args:
        path: the model's file, for messages.
        model: an exported model; not changed.
        tensors: names of activations in it.
        passes: returns all groups, each time it is called; its argument says what the pass is for.
        method: "minmax", the largest value; "percentile", the value below which that share lies; "entropy", the
            limit whose quantised histogram differs least from the true one (Kullback–Leibler).
        percentile: in (0, 100].
        threads: of ONNX Runtime; None for one per core.

    Raises:
        ModelError: the model fails, or its activations are not finite.
    """
    session = _session(path, model, tensors, threads)
    limits = dict.fromkeys(tensors, 0.0)
    for feeds in passes("ranges"):
        for name, x in zip(tensors, _run(path, session, tensors, feeds), strict=True):
            limits[name] = max(limits[name], float(x.max()), -float(x.min()))
            if not np.isfinite([x.max(), x.min()]).all():
                raise ModelError(f"{path}: tensor {name} holds NaN or infinity; the model's weights may be damaged")
    if method == "minmax":
        return limits
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for feeds in passes("histograms"):
        for name, x in zip(tensors, _run(path, session, tensors, feeds), strict=True):
            counts[name] += histogram(x, limits[name])
    if method == "percentile":
        return {name: _percentile_limit(counts[name], limits[name], percentile) for name in tensors}
    return {name: _entropy_limit(counts[name], limits[name]) for name in tensors}


def histogram(x: NDArray[Any], limit: float) -> Counts:
    """The number of |x| in each of BINS equal bins of [0, limit]."""
    counts = np.zeros(BINS, np.int64)
    if limit > 0:
        for image in x:  # one at a time: the indices take eight bytes each
            bins = np.abs(image.astype(np.float32, copy=False)) * np.float32(BINS / limit)
            counts += np.bincount(np.minimum(bins, BINS - 1).astype(np.intp).ravel(), minlength=BINS)
    return counts


def _percentile_limit(counts: Counts, limit: float, percentile: float) -> float:
    needed = np.ceil(counts.sum() * (percentile / 100))
    return limit * (int(np.searchsorted(counts.cumsum(), needed)) + 1) / BINS if limit else 0.0


def _entropy_limit(counts: Counts, limit: float) -> float:
    """The limit at which int8 keeps most of the information (Migacz, "8-bit inference with TensorRT", 2017).

    For each limit two histograms are compared by the Kullback–Leibler divergence: the true one, with the counts beyond
    the limit added to its last bin, and the same flattened to int8's 128 levels.
    """
    shape = counts.astype(np.float64)
    shape[0] = shape[1]  # mostly the zeros that ReLU makes, which any scale keeps exactly
    beyond = shape.sum() - shape.cumsum()
    best, chosen = np.inf, BINS
    for bins in range(LEVELS, BINS + 1):
        starts = np.arange(LEVELS) * bins // LEVELS
        inside, filled = shape[:bins], shape[:bins] > 0
        sums, sizes = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.int64), starts)
        flat = np.repeat(sums / np.maximum(sizes, 1), np.diff(starts, append=bins)) * filled
        true = inside.copy()
        true[-1] += beyond[bins - 1]
        if not flat.any():
            continue
        p, q = true / true.sum(), np.maximum(flat / flat.sum(), 1e-12)
        divergence = float((p * np.log(np.maximum(p, 1e-300) / q)).sum())
        if divergence < best:
            best, chosen = divergence, bins
    return limit * chosen / BINS


def _session(path: Path, model: onnx.ModelProto, tensors: Sequence[str], threads: int | None) -> Any:
    """A session of the model with the tensors among its outputs."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return cpu_session(path, watched.SerializeToString(), threads)


def _run(path: Path, session: Any, tensors: Sequence[str], feeds: Feeds) -> list[NDArray[np.floating]]:
    try:
        outputs: list[NDArray[np.floating]] = session.run([*tensors], feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise ModelError(f"{path}: failed on a group of {len(feeds['images'])}: {one_line(error)}") from error
    return outputs


def read_cache(path: Path, key: dict[str, str]) -> tuple[Ranges | None, str]:
    """Ranges of an earlier run with the same model, data and method; or None and the reason why there are none."""
    if not path.exists():
        return None, "there is none yet"
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("not a regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        found, ranges = content["key"], {str(name): float(limit) for name, limit in content["ranges"].items()}
        if not all(0 <= limit < math.inf for limit in ranges.values()):
            raise ValueError("limits that are none")
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
        return None, "it is not a calibration cache"
    changed = [what for what in key if found.get(what) != key[what]]
    return (None, f"of another {' and '.join(changed)}") if changed else (ranges, "")


def write_cache(path: Path, key: dict[str, str], ranges: Ranges) -> None:
    """Keep ranges for runs with the same key.

    Raises:
        OutputError: the file can't be written.
    """
    with replacing(path) as temporary:
        write_json(temporary, {"key": key, "ranges": ranges})
