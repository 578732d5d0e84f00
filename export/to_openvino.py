"""An exported model to files for OpenVINO (.xml, and .bin: the weights), compared with ONNX Runtime before they appear.

In BF16, what leads to the order of the pixels stays in FP32, as in an FP16 export (see `export.icnet`): norms, SIVs,
correlation maps, softmax and min–max. OpenVINO keeps a node in FP32 if the .xml says `DisablePrecisionConversion` of
it; the attribute has no Python API, so it is written into the .xml.
"""

import hashlib
import importlib.util
import json
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from export.cpu_proof import Call, Outputs, check_dynamic, prove, run_onnx, sample_calls
from export.noise import DIRECT, with_bf16, with_noise, without_rounding
from export.onnx_file import load_model, metadata, read_bytes, tensors
from runtime import __version__
from runtime.contract import XML_DIGEST
from runtime.detector_contract import check_any
from runtime.errors import DependencyError, ModelError, how_to_install
from runtime.files import UNSEALED, check_outputs, digest, replacing, seal, write_bytes
from runtime.openvino_library import BIN_DIGEST, CPU, NOTES, PRECISION, compiled, has_bf16, reason

KEEP = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}  # BF16 is asked by FP16's name
UNMARKED = ("Const", "Parameter", "ShapeOf", "Result")


def build_openvino(
    onnx_path: Path, output: Path, precision: str = "fp32", progress: Progress | None = None
) -> dict[str, Any]:
    """Convert an exported model for OpenVINO; the files appear only if they compute the same.

    Args:
        onnx_path: an export of any kind with uint8 inputs and dynamic axes, in FP32, or calibrated from such; or any
            detector (see `runtime.detector_contract`).
        output: the .xml file to write; the weights go to the .bin file beside it.
        precision: "fp32" or "bf16", for all that is not INT8. A CPU without BF16 runs either in FP32.
        progress: shows the steps; None for silence.

    Returns:
        The notes in the file: versions, precision, the ONNX file's SHA-256 and that of the .bin; and `kind` (see
        `ExportKind`), `proved`, the precision in which the comparison was computed, and `max` and `mean` of |Δ| between
        its outputs and ONNX Runtime's: of an INT8 file, of the same file without the rounding of activations.

    Raises:
        ModelError: the file is not an exported ICNet or a detector, OpenVINO can't convert or run it, or computes
            something else.
        OutputError: a file can't be written.
        DependencyError: OpenVINO, onnx or onnxruntime is not installed.
    """
    if missing := [name for name in ("openvino", "onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise DependencyError(f"{', '.join(missing)}: not installed: {how_to_install('cpu,openvino')}")
    import openvino

    if output.suffix.lower() != ".xml":
        raise ModelError(f"{output}: OpenVINO's files are called NAME.xml, with the weights in NAME.bin")
    weights = output.with_suffix(".bin")
    check_outputs([output, weights], [onnx_path])
    data = read_bytes(onnx_path)
    model = load_model(onnx_path, data)
    interface = check_any(onnx_path, *tensors(model))
    check_dynamic(onnx_path, interface)
    int8 = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    of_onnx = metadata(model)
    if "fp16" in (of_onnx.get("precision"), of_onnx.get("rest")):
        raise ModelError(
            f"{onnx_path}: in FP16, for GPUs; export it with --precision fp32 (and build with --precision bf16)"
        )
    notes = {
        "producer": f"icnet-deploy {__version__}",
        "openvino": openvino.__version__.partition("-")[0],
        "onnx": onnx_path.name,
        "onnx_sha256": hashlib.sha256(data).hexdigest(),
        PRECISION: precision,
    }
    progress = progress or Progress(disable=True)
    bar = progress.add_task("converting", total=3)
    calls, name = sample_calls(interface), interface.output.name
    core = openvino.Core()
    with replacing(output) as xml_file, replacing(weights) as bin_file:
        try:
            convert(model, xml_file, bin_file, notes, mixed=precision == "bf16")
        except RuntimeError as error:
            raise ModelError(f"{onnx_path}: OpenVINO can't convert it: {reason(error)}") from error
        progress.update(bar, advance=1, description="comparing")
        proved = precision if precision == "fp32" or has_bf16(core) else "fp32"
        found = _run(core, xml_file, bin_file, proved, calls, name, onnx_path)
        progress.advance(bar)
        expected = run_onnx(onnx_path, without_rounding(model) if int8 else data, calls, name)
        if int8:
            noisy = run_onnx(onnx_path, data, calls, name, optimised=False)
        elif proved == "bf16":
            noisy = run_onnx(onnx_path, with_bf16(model), calls, name, optimised=False)
        else:
            noisy = run_onnx(onnx_path, with_noise(model, DIRECT), calls, name)
        progress.advance(bar)
        floor = "int8" if int8 else "direct" if proved == "fp32" else proved
        difference = prove(output, "OpenVINO", interface, floor, found, expected, noisy)
        notes[BIN_DIGEST] = digest(bin_file)
    return notes | {"kind": interface.kind, "proved": proved, **difference}


def convert(
    model: Any, xml_file: Path, bin_file: Path, notes: Mapping[str, str] | None = None, mixed: bool = False
) -> None:
    """Write the files for OpenVINO, unchecked, with the notes and the files' digests in the .xml.

    Args:
        model: an ONNX model.
        xml_file: to write.
        bin_file: to write.
        notes: what the .xml says of itself.
        mixed: mark what stays in FP32 where the rest is BF16.

    Raises:
        RuntimeError: from OpenVINO, which can't convert the model.
        OSError: a file can't be written.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:  # OpenVINO may not tell when the disk is full
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        openvino.serialize(openvino.Core().read_model(model.SerializeToString()), str(xml), str(weights))
        root = ElementTree.parse(xml).getroot()
        write_bytes(bin_file, weights.read_bytes())
    notes = {**(notes or {}), BIN_DIGEST: digest(bin_file)}
    if mixed:
        _keep_fp32(root)
    of_file = root.find("rt_info")
    if of_file is None:
        of_file = ElementTree.SubElement(root, "rt_info")
    block = ElementTree.SubElement(of_file, NOTES[0])
    ElementTree.SubElement(block, NOTES[1], value=json.dumps(notes))
    ElementTree.SubElement(of_file, XML_DIGEST, value=UNSEALED)
    write_bytes(xml_file, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    seal(xml_file)


def _keep_fp32(root: ElementTree.Element) -> None:
    """Mark the nodes on the way from the convolutions to a sort, or to SIVs, to be computed in FP32."""
    layers = {layer.attrib["id"]: layer for layer in root.iterfind("layers/layer")}
    sources: dict[str, list[str]] = {}
    for edge in root.iterfind("edges/edge"):
        sources.setdefault(edge.attrib["to-layer"], []).append(edge.attrib["from-layer"])
    types = {key: layer.attrib["type"] for key, layer in layers.items()}
    sivs = any(name == "sivs" for name in _output_names(layers.values()))
    waiting = [key for key, kind in types.items() if kind == "TopK" or (sivs and kind == "Result")]
    seen: set[str] = set()
    while waiting:
        key = waiting.pop()
        before = sources.get(key, [])
        of_convolution = any(types[other] == "Convolution" for other in before)  # a bias: part of the convolution
        if key in seen or types[key] == "Convolution" or (types[key] == "Add" and of_convolution):
            continue
        seen.add(key)
        waiting += before
        if types[key] not in UNMARKED:
            layer = layers[key]
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            ElementTree.SubElement(info, "attribute", KEEP)


def _output_names(layers: Any) -> list[str]:
    return [layer.attrib.get("output_names", "") for layer in layers if layer.attrib["type"] == "Result"]


def _run(
    core: Any, xml_file: Path, bin_file: Path, precision: str, calls: Sequence[Call], output: str, onnx_path: Path
) -> Outputs:
    """The outputs of the written files, as a Predictor computes them."""
    model = core.read_model(str(xml_file), str(bin_file))
    request = compiled(core, model, precision, None, CPU, onnx_path).create_infer_request()
    outputs = []
    for call in calls:
        try:
            request.infer(call)
        except Exception as error:
            raise ModelError(f"{onnx_path}: OpenVINO can't run it: {reason(error)}") from error
        outputs.append(request.get_tensor(output).data.copy())
    return outputs
