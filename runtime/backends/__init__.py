"""One module per engine, all with the same few names."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Pending(Protocol):
    """A group that was handed to an engine."""

    def result(self) -> NDArray[np.float32]:
        """Wait for it: float32 [N, 224, 224]."""
        ...


class Backend(Protocol):
    """An engine with a model that follows the contract. Safe from several threads."""

    path: Path
    slots: int  # groups that are worth having in work at once

    def check_group(self, images: int) -> None:
        """Raise ModelError if the model can't take a group of so many images."""
        ...

    def submit(self, images: NDArray[np.uint8], sisms: NDArray[np.uint8]) -> Pending:
        """Start on a group: uint8 [N, 224, 224, 3], uint8 [N, 224, 224]."""
        ...

    def close(self) -> None:
        """Free everything; groups in work are finished first."""
        ...
