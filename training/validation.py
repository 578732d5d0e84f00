"""Which of a training's checkpoints is the best: by the maps of a data set that it does not learn from."""

from pathlib import Path

import torch

from export.icnet import Uint8Interface
from training.batches import Batch, DataSetBatches


class Validation:
    """A data set in the paper's layout, read once, and the scores so far.

    Args:
        data: its folder.
        images: most images of a group in one pass.
        scores: what an earlier run of the same training measured.

    Raises:
        ICNetError: as for `DataSetBatches`; or a file can't be read.
    """

    def __init__(self, data: Path, images: int, scores: list[float]) -> None:
        self.scores = scores
        self._batches: list[Batch] = []
        batches = DataSetBatches(data, 0, images, epochs=1)
        for batch in map(batches.__getitem__, range(len(batches))):
            if not isinstance(batch, Batch):
                raise batch
            self._batches.append(batch)

    @torch.no_grad()
    def is_best(self, interface: Uint8Interface, device: str) -> bool:
        """Measure the mean soft IoU of the maps, print it, and say whether it is the highest so far."""
        training = interface.network.training
        interface.eval()
        ious = []
        for batch in self._batches:
            maps, truth = interface(batch.images.to(device), batch.sisms.to(device)), batch.masks.to(device) / 255
            ious.append(torch.minimum(maps, truth).sum((1, 2)) / torch.maximum(maps, truth).sum((1, 2)).clamp_min(1e-6))
        interface.train(training)
        self.scores.append(torch.cat(ious).mean().item())
        print(f"validation: soft IoU {self.scores[-1]:.4f}", flush=True)
        return max(self.scores) == self.scores[-1]
