"""One module per engine, all with the same few names."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.contract import Interface


class Pending(Protocol):
    """A call that was handed to an engine."""

    def result(self) -> NDArray[np.float32]:
        """Wait for it: the model's output, maps float32 [N, 224, 224] or SIVs float32 [N, S]."""
        ...


class Backend(Protocol):
    """An engine with a model that follows the contract. Safe from several threads."""

    path: Path
    interface: Interface
    slots: int  # calls that are worth having in work at once
    largest: int | None  # images that one call takes; None for any number
    weights_digest: str | None  # digest of the network's weights, if the file tells
    card: str | None  # what the checkpoint is for, if the file tells

    def check_group(self, images: int, bank_size: int = 1) -> None:
        """Raise ModelError if the model can't take so many images at once, or a bank of so many SIVs."""
        ...

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> Pending:
        """Start on a call: a tensor for each of the interface's inputs.

        `last`: no other follows soon, so memory that only calls need is given back if the engine can.
        """
        ...

    def close(self) -> None:
        """Free everything; groups in work are finished first."""
        ...
