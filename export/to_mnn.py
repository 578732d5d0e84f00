"""An exported model to a file for MNN, compared with ONNX Runtime before it appears.

MNN's converter reports success whatever happened, and computes some operators wrong without an error. So those are
spelled out in others first, and the result is run beside the ONNX file. The two may differ by four noise floors, which
are measured on the same inputs: ONNX Runtime against itself, with Winograd's noise (see `export.noise`). Of maps,
differences that no 8-bit map can show pass in any case; SIVs are computed before the order of the pixels, and their
floor is never nearly zero.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from export.cpu_proof import Call, Outputs, check_dynamic, prove, run_onnx, sample_calls
from export.noise import WINOGRAD, with_noise
from export.onnx_file import load_model, metadata, read_bytes, tensors
from runtime import __version__
from runtime.contract import FILE_DIGEST, OUTPUTS, Interface
from runtime.detector_contract import check_any
from runtime.errors import DependencyError, ModelError, how_to_install, one_line
from runtime.files import UNSEALED, check_outputs, replacing, seal, write_bytes

WORKER = Path(__file__).with_name("mnn_worker.py")


def build_mnn(onnx_path: Path, output: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Convert an exported model for MNN; the file appears only if it computes the same.

    Args:
        onnx_path: an export of any kind with uint8 inputs and dynamic axes, in FP32; or any detector (see
            `runtime.detector_contract`).
        output: the .mnn file to write.
        progress: shows the steps; None for silence.

    Returns:
        The notes in the file (MNN's `bizCode`): its digest, the versions, the ONNX file's SHA-256 and its metadata;
        and the file's `kind` (see `ExportKind`), and `max` and `mean` of |Δ| between its outputs and ONNX Runtime's.

    Raises:
        ModelError: the file is not an exported ICNet or a detector, MNN can't convert or run it, or computes something
            else.
        OutputError: the file can't be written.
        DependencyError: MNN, onnx or onnxruntime is not installed.
    """
    if missing := [name for name in ("MNN", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise DependencyError(f"{', '.join(missing)}: not installed: {how_to_install('cpu,mnn')}")
    check_outputs([output], [onnx_path])
    data = read_bytes(onnx_path)
    model = load_model(onnx_path, data)
    interface = check_any(onnx_path, *tensors(model))
    _check(onnx_path, model, interface)
    notes = {
        "producer": f"icnet-deploy {__version__}",
        "mnn": importlib.metadata.version("MNN"),
        "onnx": onnx_path.name,
        "onnx_sha256": hashlib.sha256(data).hexdigest(),
        "graph": model.graph.name,
        "batch": interface.size,
        "onnx_metadata": metadata(model),
        FILE_DIGEST: UNSEALED,
    }
    progress = progress or Progress(disable=True)
    calls, name = sample_calls(interface), interface.output.name
    with replacing(output) as temporary:
        bar = progress.add_task("converting", total=3)
        found = convert(onnx_path, model, temporary, json.dumps(notes), calls, name)
        progress.update(bar, advance=1, description="comparing")
        expected = run_onnx(onnx_path, data, calls, name)
        progress.advance(bar)
        noisy = run_onnx(onnx_path, with_noise(model, WINOGRAD), calls, name)
        progress.advance(bar)
        difference = prove(output, "MNN", interface, "winograd", found, expected, noisy)
        notes[FILE_DIGEST] = seal(temporary)
    return notes | {"kind": interface.kind, **difference}


def _check(path: Path, model: Any, interface: Interface) -> None:
    """Raise ModelError for a model that MNN would not run as it is written."""
    from onnx import TensorProto

    check_dynamic(path, interface)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ModelError(
            f"{path}: in INT8, which MNN's converter does not take in this form; run it with ONNX Runtime, or build "
            "from the FP32 export"
        )
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise ModelError(f"{path}: in FP16, which MNN would run in FP32; export it with --precision fp32")


def spell_out(model: Any) -> Any:
    """A copy of the model in operators that MNN 3.6 computes right; its tensors keep their names.

    MNN ignores the axes of a ReduceL2 where they are an input (opset 18), and loses a batch axis where both operands of
    a MatMul are broadcast.
    """
    from onnx import helper, shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}
    model = type(model).FromString(model.SerializeToString())
    nodes = []
    for node in model.graph.node:
        if node.op_type == "ReduceL2":
            (x, *axes), (y,) = node.input, node.output
            total = helper.make_node("ReduceSum", [f"{y}.squares", *axes], [f"{y}.sum"])
            total.attribute.extend(node.attribute)
            nodes += [
                helper.make_node("Mul", [x, x], [f"{y}.squares"]),
                total,
                helper.make_node("Sqrt", [f"{y}.sum"], [y]),
            ]
            continue
        a, b = (shapes.get(name, []) for name in node.input) if node.op_type == "MatMul" else ([], [])
        if min(len(a), len(b)) > 2 and a[:-2] != b[:-2]:
            names = list(node.input)
            for i, (name, other, shape) in enumerate(zip(names, reversed(names), (b, a), strict=True)):
                prefix = f"{node.output[0]}.{i}"
                nodes += [
                    helper.make_node("Shape", [other], [f"{prefix}.batch"], start=0, end=len(shape) - 2),
                    helper.make_node("Constant", [], [f"{prefix}.matrix"], value_ints=[1, 1]),
                    helper.make_node("Concat", [f"{prefix}.batch", f"{prefix}.matrix"], [f"{prefix}.shape"], axis=0),
                    helper.make_node("Expand", [name, f"{prefix}.shape"], [f"{prefix}.expanded"]),
                ]
                node.input[i] = f"{prefix}.expanded"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def convert(
    onnx_path: Path, model: Any, output: Path, notes: str, calls: Sequence[Call], name: str = OUTPUTS[0].name
) -> Outputs:
    """Write an .mnn file, unchecked; returns what its output `name` is for the calls.

    Raises:
        ModelError: MNN can't convert the model, or can't run it; the message names `onnx_path`.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(spell_out(model), Path(folder, "model.onnx"))
        Path(folder, "notes.json").write_text(notes, encoding="utf-8")
        arrays = {f"{i}/{name}": array for i, call in enumerate(calls) for name, array in call.items()}
        np.savez(Path(folder, "calls.npz"), **arrays)  # type: ignore[arg-type]
        # -P: MNN's converter is the top-level module _tools; no folder may shadow it.
        # It writes to the folder: MNN does not tell when the disk is full.
        command = [sys.executable, "-P", str(WORKER), folder, name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
            reason = f"exit code {done.returncode}" + (f", last words: {one_line(lines[-1])}" if lines else "")
            raise ModelError(f"{onnx_path}: MNN can't convert or run it ({reason})")
        write_bytes(output, Path(folder, "model.mnn").read_bytes())
        with np.load(Path(folder, "outputs.npz")) as outputs:
            return [outputs[str(i)] for i in range(len(calls))]
