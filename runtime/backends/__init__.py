"""One module per engine, all with the same few names."""

import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.contract import ExportKind, Interface
from runtime.errors import ModelError

logger = logging.getLogger(__name__)


class Pending(Protocol):
    """A call that was handed to an engine."""

    def result(self) -> NDArray[np.float32]:
        """Wait for it: the model's output, maps float32 [N, 224, 224] or SIVs float32 [N, S]."""
        ...


class Backend(Protocol):
    """An engine with a model that follows the contract. Safe from several threads."""

    path: Path
    name: str  # what the file says that it, or the file that it was made from, is called
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


def check_sizes(path: Path, interface: Interface, images: int, bank_size: int, remedy: str) -> None:
    """Raise ModelError for groups, or banks, of another size than a model was built for.

    Args:
        path: the model's file, for the message.
        interface: its tensors.
        images: in the group.
        bank_size: SIVs in the bank.
        remedy: the command that makes files for any number.
    """
    rows = interface.inputs[-1].shape[0] if interface.kind is ExportKind.BANKED else None
    for what, size, found in (("groups", interface.size, images), ("banks", rows, bank_size)):
        if isinstance(size, int) and size != found:
            raise ModelError(
                f"{path}: built for {what} of exactly {size} images, got {found}; {remedy} makes files for any number"
            )


def warn_of_other_engine(path: Path, made_for: str | None, engine: str) -> None:
    """Log a warning for an INT8 file whose ranges and rounding are another engine's; it runs all the same."""
    if made_for not in (None, engine):
        logger.warning(
            "%s: calibrated for %s, and run by %s: its accuracy was not measured there (icnet calibrate --engine %s)",
            path, made_for, engine, engine,
        )  # fmt: skip
