"""The file contract: the inputs and outputs by which any exported model explains itself.

Nothing else is needed to run a model, whoever built it: no sidecar, no naming convention for files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.errors import ModelError

SIZE = 224  # side of the network's input and output, pixels

Dim = int | str | None  # a fixed size, or a named or anonymous dynamic one


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype and shape of a tensor; the first axis is the group's N images.

    Its text form, for messages, reads `images uint8 [N, 224, 224, 3]`.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fixed axes after the first."""
        return tuple(d for d in self.shape[1:] if isinstance(d, int))

    def accepts(self, other: "TensorSpec") -> bool:
        """Whether `other`, read from a model, is this tensor; its first axis may be fixed or dynamic."""
        return (self.name, self.dtype, self.shape[1:]) == (other.name, other.dtype, other.shape[1:])


INPUTS = (
    TensorSpec("images", "uint8", ("N", SIZE, SIZE, 3)),  # RGB
    TensorSpec("sisms", "uint8", ("N", SIZE, SIZE)),
)
OUTPUTS = (TensorSpec("maps", "float32", ("N", SIZE, SIZE)),)

# The authors' interface (normalised floats in, maps with a channel axis out), for callers with their own preprocessing.
FLOAT_INPUTS = (
    TensorSpec("images", "float32", ("N", 3, SIZE, SIZE)),
    TensorSpec("sisms", "float32", ("N", 1, SIZE, SIZE)),
)
FLOAT_OUTPUTS = (TensorSpec("maps", "float32", ("N", 1, SIZE, SIZE)),)


def check_contract(path: object, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int | None:
    """Check that a model's tensors are those of the contract.

    Args:
        path: the model's file, for the message.
        inputs: the model's inputs, in any order.
        outputs: its outputs.

    Returns:
        The number of images that the model was built for, or None if any group size will do.

    Raises:
        ModelError: the tensors are another model's; the message names what was expected and found.
    """
    if _match(FLOAT_INPUTS, inputs) and _match(FLOAT_OUTPUTS, outputs):
        raise ModelError(
            f"{path}: exported with float32 inputs (--io float32), for callers with their own preprocessing; "
            "export it with --io uint8 to run it here"
        )
    if not (_match(INPUTS, inputs) and _match(OUTPUTS, outputs)):
        raise ModelError(
            f"{path}: not an ICNet export: expected inputs {_list(INPUTS)} and output {_list(OUTPUTS)}, "
            f"found inputs {_list(inputs) or 'none'} and outputs {_list(outputs) or 'none'}"
        )
    sizes = {spec.shape[0] for spec in (*inputs, *outputs) if isinstance(spec.shape[0], int)}
    return sizes.pop() if sizes else None


def _match(expected: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> bool:
    by_name: Mapping[str, TensorSpec] = {spec.name: spec for spec in found}
    return len(found) == len(expected) and all(s.name in by_name and s.accepts(by_name[s.name]) for s in expected)


def _list(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs))
