"""Is anything hollowed out? Median IoU at 0.5 of each model's maps with right SISMs: `kept.py DATA OUTPUT MODEL...`."""

import sys
from pathlib import Path

import numpy as np

from evaluation.dataset import find_dataset
from runtime import Predictor
from runtime.files import replacing, write_json


def main(data: Path, output: Path, models: list[Path]) -> None:
    """Measure the models, print the medians, and write them."""
    dataset = find_dataset(data, data / "sism")
    sisms = [sism for group in dataset.read(group.sisms or () for group in dataset.groups) for sism in group]
    found = {}
    for model in models:
        with Predictor(model) as predictor:
            maps = [map_ for group in predictor.predict_groups(dataset.inputs()) for map_ in group]
        ious = []
        for map_, sism in zip(maps, sisms, strict=True):
            kept, marked = map_ >= 0.5, sism >= 128
            ious.append((kept & marked).sum() / max((kept | marked).sum(), 1))
        found[model.name] = {"median_iou": round(float(np.median(ious)), 3), "lowest": round(float(min(ious)), 3)}
        print(model.name, found[model.name])
    with replacing(output) as temporary:
        write_json(temporary, {"images": len(sisms), "models": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
