"""A group from JPEG files and SISM files to PNG maps: the time of the whole, and of each stage."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.records import FilesRow
from benchmarks.runners import picture
from benchmarks.timing import Times, interleaved, percentiles, warm_up
from runtime import ICNetError, Predictor
from runtime.preprocess import GroupPixels, resized, restore_map, restores, rgb_image, save_map, sism_tensor
from runtime.stream import Task

T = TypeVar("T")
SIZE = (640, 480)  # of the photographs, pixels: the usual in COCO
STAGES = ("decode", "resize", "SISMs", "network", "resize back", "write")


def write_group(folder: Path, n: int) -> tuple[list[Path], list[Path]]:
    """Write n JPEG files of 640×480 and their SISMs as PNG files of the same size."""
    images, sisms = [folder / f"{i}.jpg" for i in range(n)], [folder / f"{i}_sism.png" for i in range(n)]
    photograph = Image.fromarray(picture(np.random.default_rng(0), *SIZE))
    sism = photograph.convert("L").resize((12, 9)).resize(SIZE, Image.Resampling.BICUBIC)
    for image, sism_path in zip(images, sisms, strict=True):
        photograph.save(image, quality=90)
        sism.save(sism_path)
    return images, sisms


def measure(label: str, predictor: Predictor, n: int, rounds: int, limit: float | None = None) -> FilesRow:
    """Time a group of n from files to files, through the Predictor and stage by stage, interleaved.

    Args:
        label: what the row calls it.
        predictor: runs the network, and reads, resizes and writes in its threads.
        n: images in the group.
        rounds: how often.
        limit: as for `timing.interleaved`.

    Returns:
        Percentiles of the whole; the median of each stage when one is done after the other, in seconds; and
        `network_share`, the network's stage in the median of the whole.
    """
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    pipeline, in_threads = predictor.pipeline, predictor.pipeline.workers.run

    def stage(name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        stages[name].append(time.perf_counter() - start)
        return result

    def by_stages() -> None:
        read = stage("decode", lambda: in_threads([partial(rgb_image, path) for path in images]))
        x = stage("resize", lambda: np.stack(in_threads([partial(resized, image) for image in read])))
        s = stage("SISMs", lambda: np.stack(in_threads([partial(sism_tensor, path) for path in sisms])))
        pixels = GroupPixels(x, s, tuple(image.size for image in read))
        maps = stage("network", lambda: predictor.predict_tensors(x, s))
        large = stage("resize back", lambda: in_threads(restores(pixels, maps)))
        stage("write", lambda: in_threads([partial(save_map, *pair) for pair in zip(large, outputs, strict=True)]))

    def write(tensor: NDArray[np.float32], size: tuple[int, int], output: Path) -> None:
        save_map(restore_map(tensor, size), output)

    def writes(pixels: GroupPixels, maps: NDArray[np.float32]) -> list[Callable[[], None]]:
        return [partial(write, *one) for one in zip(maps, pixels.sizes, outputs, strict=True)]

    def whole() -> None:
        (outcome,) = pipeline.stream([Task(pipeline.reads(images, sisms), writes)])
        if isinstance(outcome, ICNetError):
            raise outcome

    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        images, sisms = write_group(Path(folder), n)
        outputs = [Path(folder, f"{i}.png") for i in range(n)]
        warm_up(whole)
        for _ in interleaved({"whole": whole, "stages": by_stages}, times, rounds, limit):
            pass
    medians = {stage: float(np.median(took)) for stage, took in stages.items()}
    found = percentiles(times["whole"])
    return {
        **found,
        "runner": label,
        "n": n,
        "image": list(SIZE),
        "stages_s": medians,
        "network_share": medians["network"] / found["median_s"],
    }
