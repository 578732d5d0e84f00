"""The file contract: the inputs and outputs by which any exported model explains itself.

Nothing else is needed to run a model from any builder: no sidecar, no naming convention for files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from runtime.errors import ModelError, printable

SIZE = 224  # side of the network's input and output, pixels

# Not needed to run: the digest of the network's weights. Files of the same network have the same digest.
WEIGHTS = "weights_sha256"  # its key in an ONNX file's metadata
# Nor this: the engine that an INT8 file was calibrated for: "onnxruntime", "openvino" or "tensorrt".
CALIBRATED_FOR = "calibrated_for"  # its key in an ONNX file's metadata
# Nor this: the digest of the file, by which damage is noticed (see `runtime.files.seal`).
FILE_DIGEST = "icnet_file_sha256"  # its key in an ONNX file's metadata, and in the notes in an MNN file
XML_DIGEST = f"{FILE_DIGEST}_xml"  # and in an OpenVINO file, which may hold the ONNX file's beside it
# Nor this: what the checkpoint is for, in a line.
MAX_CARD = 200  # characters
CARD = "icnet_card"  # its key in a checkpoint, and in an ONNX file's metadata
ENGINE_NAME = "icnet "  # the digest follows this in the name of an engine from `icnet build`

Dim = int | str | None  # a fixed size, or a named or anonymous dynamic one


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype and shape of a tensor; the first axis is the N images, the M SIVs of a bank, or B groups.

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

    @property
    def is_fixed(self) -> bool:
        """Whether no axis is dynamic."""
        return self.is_sized and isinstance(self.shape[0], int)

    @property
    def is_sized(self) -> bool:
        """Whether no axis but the first is dynamic."""
        return all(isinstance(d, int) for d in self.shape[1:])

    def accepts(self, other: "TensorSpec") -> bool:
        """Whether `other`, read from a model, is this tensor.

        The first axis may be fixed or dynamic. Another axis that has a name here may be of any fixed size.
        """
        if (self.name, self.dtype, len(self.shape)) != (other.name, other.dtype, len(other.shape)):
            return False
        pairs = zip(self.shape[1:], other.shape[1:], strict=True)
        return all(isinstance(found, int) if isinstance(d, str) else d == found for d, found in pairs)


INPUTS = (
    TensorSpec("images", "uint8", ("N", SIZE, SIZE, 3)),  # RGB
    TensorSpec("sisms", "uint8", ("N", SIZE, SIZE)),
)
OUTPUTS = (TensorSpec("maps", "float32", ("N", SIZE, SIZE)),)
GROUPS = TensorSpec("groups", "int32", ("N",))  # images with the same number are one group
BANK = TensorSpec("bank", "float32", ("M", "S"))  # the SIVs of a group's images; S = 1280·width
SIVS = TensorSpec("sivs", "float32", ("N", "S"))  # those of these images

# The authors' interface (normalised floats in, maps with a channel axis out), for callers with their own preprocessing.
FLOAT_INPUTS = (
    TensorSpec("images", "float32", ("N", 3, SIZE, SIZE)),
    TensorSpec("sisms", "float32", ("N", 1, SIZE, SIZE)),
)
FLOAT_OUTPUTS = (TensorSpec("maps", "float32", ("N", 1, SIZE, SIZE)),)

# The interface for a server that joins requests: bytes of all groups, and the shape of each. An image and its SISM are
# one array of four channels, so that a request can't have more of one than of the other.
IMAGE_BYTES = SIZE * SIZE * 4
FILES = "files"  # for Triton's Python back end with a detector: image files, bytes [b, n]
RGBS = TensorSpec("rgbs", "uint8", (f"{IMAGE_BYTES}*N",))
SHAPES = TensorSpec("shapes", "int32", ("B", 4))  # (n, 224, 224, 4) per group; n may be 0
RAGGED_INPUTS = (RGBS, SHAPES)


class ExportKind(StrEnum):
    """What an export computes. The runtime runs all but `FLOAT32` and `RAGGED`."""

    PLAIN = "plain"  # a group to its maps
    PACKED = "packed"  # several groups to their maps
    INTRA = "intra"  # images to their SIVs
    BANKED = "banked"  # images and a bank of SIVs to maps
    FLOAT32 = "float32"  # a group to its maps, with the authors' interface
    RAGGED = "ragged"  # several groups, joined by a server, to their maps
    DETECTOR = "detector"  # no ICNet: single images to their SISMs (see `runtime.detector_contract`)


@dataclass(frozen=True)
class Interface:
    """Which of the exports a model is, and its tensors, in the order of the contract.

    Attributes:
        kind: what it computes.
        inputs: as the model has them.
        output: likewise.
        size: the number of images that the model was built for; None if any will do.
        others: further outputs, which only detectors have.
    """

    kind: ExportKind
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    size: int | None = None
    others: tuple[TensorSpec, ...] = ()


# Checks a model's inputs and outputs; the path is for messages. It raises ModelError.
Contract = Callable[[object, Sequence[TensorSpec], Sequence[TensorSpec]], Interface]


INTERFACES = (
    Interface(ExportKind.PLAIN, INPUTS, OUTPUTS[0]),
    Interface(ExportKind.PACKED, (*INPUTS, GROUPS), OUTPUTS[0]),
    Interface(ExportKind.INTRA, INPUTS, SIVS),
    Interface(ExportKind.BANKED, (*INPUTS, BANK), OUTPUTS[0]),
)


def card_of(notes: Mapping[str, object]) -> str | None:
    """What a model's checkpoint is for, from the notes in its file: one line of at most `MAX_CARD` characters."""
    card = notes.get(CARD)
    return (" ".join(printable(card).split())[:MAX_CARD] or None) if isinstance(card, str) else None


FOREIGN = {  # exports that are not for the runtime: inputs, outputs, and what they are for
    ExportKind.FLOAT32: (
        FLOAT_INPUTS,
        FLOAT_OUTPUTS,
        "exported with float32 inputs (--io float32), for callers with their own preprocessing; export it with --io "
        "uint8 to run it here",
    ),
    ExportKind.RAGGED: (
        RAGGED_INPUTS,
        OUTPUTS,
        "exported with --ragged, for a server that joins requests (icnet triton); export it without to run it here, "
        "with --packed for several groups in one call",
    ),
}


def foreign(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ExportKind | None:
    """Which export a model is, of those that the runtime does not run; None for any other model."""
    kinds = FOREIGN.items()
    return next((kind for kind, (takes, gives, _) in kinds if _match(takes, inputs) and _match(gives, outputs)), None)


def check_contract(path: object, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Interface:
    """Check that a model's tensors are those of the contract.

    Args:
        path: the model's file, for the message.
        inputs: the model's inputs, in any order.
        outputs: its outputs.

    Returns:
        Which export it is.

    Raises:
        ModelError: the tensors are another model's, or of an export that is not for the runtime; the message names
            what was expected and found, or what the export is for.
    """
    if (kind := foreign(inputs, outputs)) is not None:
        raise ModelError(f"{path}: {FOREIGN[kind][2]}")
    for interface in INTERFACES:
        if _match(interface.inputs, inputs) and _match((interface.output,), outputs):
            by_name = {spec.name: spec for spec in inputs}
            found = tuple(by_name[spec.name] for spec in interface.inputs)
            lengths = (found[0].shape[0], found[1].shape[0], outputs[0].shape[0])
            size = next((n for n in lengths if isinstance(n, int)), None)
            return Interface(interface.kind, found, outputs[0], size)
    if len(inputs) == 1 and len(inputs[0].shape) == 4:
        raise ModelError(
            f"{path}: not an ICNet export: it takes one image ({inputs[0]}) and no SISM; a detector goes in sism_model "
            "(--sism-model), beside ICNet"
        )
    raise ModelError(
        f"{path}: not an ICNet export: expected inputs {_list(INPUTS)} and output {_list(OUTPUTS)}, "
        f"found inputs {_list(inputs) or 'none'} and outputs {_list(outputs) or 'none'}; make one with icnet export"
    )


def _match(expected: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> bool:
    by_name: Mapping[str, TensorSpec] = {spec.name: spec for spec in found}
    return len(found) == len(expected) and all(s.name in by_name and s.accepts(by_name[s.name]) for s in expected)


def _list(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, specs))
