"""Tracing PyTorch modules to ONNX models with dynamic axes, and the notes that an exported file carries."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.checkpoint import weights_digest
from export.onnx_file import pack_weights, save_model
from runtime import __version__
from runtime.contract import WEIGHTS, TensorSpec
from runtime.files import digest

OPSET = 18
STACK_TRACE = "pkg.torch.onnx.stack_trace"  # a note that the exporter leaves with each node


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    dynamic: Sequence[int],
    path: Path,
    provenance: dict[str, str],
    compact: bool = False,
) -> onnx.ModelProto:
    """Trace a module and write it as one ONNX file, weights inside.

    Args:
        module: what is traced.
        example: a tensor per input; no dynamic axis may be 1 long.
        inputs: their names, and the names of their axes.
        outputs: the outputs' names.
        dynamic: the axes of every input that are dynamic; axes of one name have one length, 1 or more. With a name
            like "4*N", the length is a multiple of 4.
        path: the file to write.
        provenance: notes for the model's `metadata_props`; the file's digest comes beside them.
        compact: whether weights that FP16 holds exactly are stored in it, for the same maps from half the file.

    Returns:
        The model that was written.
    """
    names = {str(spec.shape[i]) for spec in inputs for i in dynamic}
    axes = {name: _axis(name) for name in names}
    with warnings.catch_warnings(action="ignore"):  # the exporter uses deprecated functions
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple({i: axes[str(spec.shape[i])] for i in dynamic} for spec in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the old exporter returns None
    model = program.model_proto
    for node in model.graph.node:  # where the sources lie is nobody's business, and would make equal files differ
        kept = [prop for prop in node.metadata_props if prop.key != STACK_TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value, spec in zip((*model.graph.input, *model.graph.output), (*inputs, *outputs), strict=True):
        for dimension, name in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if dimension.dim_param:  # the exporter makes up names for multiples, and for what depends on them
                dimension.dim_param = str(name)
    if compact:
        pack_weights(model)
    onnx.helper.set_model_props(model, provenance)
    save_model(model, path)
    return model


def _axis(name: str) -> Any:
    factor, _, base = name.rpartition("*")
    # SymPy, which parses the name of what is multiplied, takes N for a function.
    return int(factor) * torch.export.Dim(f"{base}_", min=1) if factor else torch.export.Dim(name, min=1)


def provenance_of(checkpoint: Path, module: nn.Module, width: float, precision: str, **more: str) -> dict[str, str]:
    """The notes of an exported file: what it was made from, and with what."""
    return {
        "producer": f"icnet-deploy {__version__}",
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": digest(checkpoint),
        WEIGHTS: weights_digest(module),
        "width": f"{width:g}",
        "precision": precision,
        **more,
        "opset": str(OPSET),
        "torch": torch.__version__,
    }
