"""`icnet triton`: a model repository for NVIDIA's Triton Inference Server.

A request is one or more groups of one size, uint8 [b, n, 224, 224, 4]: RGB, and the SISM as the fourth channel. Triton
joins requests. A ragged export, which Triton runs itself, gets their bytes and shapes; with the Python back end a
`Predictor` gets their groups. So no request can reach another one's images.

With a detector a request has image files as they are, bytes [b, n]: a detector sees images at a size of its own, so
what a client resizes for ICNet won't do.
"""

import argparse
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from runtime import __version__
from runtime.backends.engine_file import read_engine
from runtime.backends.onnx_session import tensors
from runtime.backends.opening import ENGINE_SUFFIXES, MNN_SUFFIX, OPENVINO_SUFFIX
from runtime.commands.detector import add_detector_arguments
from runtime.commands.device import add_device_argument, place
from runtime.commands.options import number, positive
from runtime.commands.predict import model_files
from runtime.contract import FILES, OUTPUTS, RGBS, SHAPES, SIZE, ExportKind, check_contract, foreign
from runtime.detector import Detector
from runtime.errors import DependencyError, InputError, ModelError, OutputError, how_to_install, one_line
from runtime.files import bundled, check_outputs, check_seal, encoded, replacing_folder, write_bytes
from runtime.predictor import Predictor

BACKENDS = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}  # and the file of a version
OURS = "# Written by icnet triton"
CONFIG = "config.pbtxt"

JOINED = f"""
# The graph gets the bytes of all requests as {RGBS.name}, and the shape of each group as {SHAPES.name}.
batch_input [ {{
  kind: BATCH_ITEM_SHAPE target_name: "{SHAPES.name}" data_type: TYPE_INT32 source_input: "{RGBS.name}"
}} ]
batch_output [ {{
  kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "{OUTPUTS[0].name}" source_input: "{RGBS.name}"
}} ]
"""
WARMUP = """
# The model counts as loaded only if it has computed a group.
model_warmup [ {
  name: "a group"
  batch_size: 1
  inputs { key: "%s" value { %s } }
} ]
"""
RANDOM = f"data_type: TYPE_UINT8 dims: [ %d, {SIZE}, {SIZE}, 4 ] random_data: true"
PICTURES = "pictures"  # the file with those of the warm-up
STORED = f'data_type: TYPE_STRING dims: [ %d ] input_data_file: "{PICTURES}"'
MODEL = '''"""Written by icnet triton. The settings are in config.pbtxt."""

import sys

sys.path[:0] = {sites!r}

from runtime.triton_model import TritonPythonModel  # noqa: E402, F401
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet triton`."""
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, help="a ragged export, or an engine of one; or any other model, as "
        "for icnet predict, with --backend python")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="REPO", help="the model repository: REPO/NAME is written")
    add("--name", default="icnet", help="what requests call the model (default icnet)")
    add("--backend", choices=BACKENDS, help="python: a Predictor; the others: Triton's own (default: by the model)")
    add("--max-groups", type=number(), default=8, metavar="N", help="groups in one execution (default 8)")
    add("--max-images", type=number(), default=64, metavar="N", help="python: refuse larger groups (default 64)")
    add("--delay", type=number(0), default=5, metavar="MS", help="longest wait for more groups, ms (default 5)")
    add("--queue", type=number(), default=64, metavar="N", help="refuse requests when so many wait (default 64)")
    add("--timeout", type=positive, default=10, metavar="S", help="refuse a request that waited so long (default 10)")
    add("--instances", type=number(), default=1, metavar="N", help="copies of the model, on each GPU (default 1)")
    add("--gpu", type=number(0), action="append", metavar="N", help="a GPU to run on; repeat it (default 0)")
    add("-t", "--threads", type=number(), help="CPU threads of an instance (default: one per core)")
    add("--site", type=Path, action="append", default=[], metavar="DIR", help="python: a folder of packages for the "
        "server's Python, as it is called there; repeat it (default: this package is installed there)")  # fmt: skip
    add("--files", action="store_true", help="python: requests are image files, and a detector makes their "
        "SISMs: that of --sism-model, or the one that comes with this package")  # fmt: skip
    add_detector_arguments(add)
    add_device_argument(add)


def run(args: argparse.Namespace) -> int:
    """Write REPO/NAME.

    Raises:
        InputError: options that exclude each other.
        ModelError: the model can't be served so.
        OutputError: REPO/NAME can't be written, or is not ours.
        DependencyError: Triton's protobuf is not installed.
    """
    if not re.fullmatch(r"\w[\w.-]*", args.name, re.ASCII):
        raise InputError(f"--name {args.name}: expected letters, digits, '_', '-' and '.'")
    on_gpu = args.model.suffix.lower() in ENGINE_SUFFIXES or args.device not in (None, "cpu")
    if args.gpu and not on_gpu:
        raise InputError("--gpu: the model runs on the CPU; give --device cuda, or an engine")
    place(args.device, args.model)  # refuses what does not run there
    if args.model.suffix.lower() == OPENVINO_SUFFIX:
        raise ModelError(f"{args.model}: an OpenVINO file; icnet triton takes ONNX files, MNN files and engines")
    detector = _detector(args)
    target: Path = args.output / args.name
    kind, smallest, record = _look(args.model)
    backend = args.backend or _default_backend(args.model, kind)
    if backend == "python":
        files = _files_for_python(args, kind, detector)
        names = {role: f"icnet{'' if role == 'model' else f'.{role}'}{file.suffix}" for role, file in files.items()}
        if detector is not None:
            files["detector"], names["detector"] = detector, f"detector.{detector.name}"  # its name tells its family
    else:
        _check_for_triton(args, backend, kind, record)
        files, names = {"model": args.model}, {"model": BACKENDS[backend]}
    check_outputs([target / "1" / name for name in names.values()], files.values())
    _check_target(args.output, target)
    config = _config(args, backend, names, on_gpu, smallest, detector is not None)
    _parse(config)
    with replacing_folder(target, args.output.absolute().parent) as folder:  # Triton would load what it finds in REPO
        (folder / "1").mkdir()
        for role, file in files.items():
            write_bytes(folder / "1" / names[role], file.read_bytes())
        if backend == "python":
            sites = [str(site) for site in args.site]
            write_bytes(folder / "1" / BACKENDS["python"], MODEL.format(sites=sites).encode())
        if detector is not None:
            (folder / "warmup").mkdir()
            picture = encoded(partial(Image.linear_gradient("L").convert("RGB").save, format="png"))
            write_bytes(folder / "warmup" / PICTURES, (len(picture).to_bytes(4, "little") + picture) * smallest)
        write_bytes(folder / CONFIG, config.encode())
    print(f"{target}: {backend} back end, up to {args.max_groups} groups in one execution")
    if record:
        print(f"built by {record['tensorrt']} {record['tensorrt_version']}: the server needs the same version")
    return 0


def _detector(args: argparse.Namespace) -> Path | None:
    """The file of the detector, if there is to be one."""
    if not (args.files or args.sism_model):
        if args.sism_normalise is not None or args.sism_minmax is not None:
            raise InputError("--sism-normalise and --sism-minmax: are for a detector; name one with --sism-model")
        return None
    if args.backend != "python":
        raise InputError("--files and --sism-model: a detector takes --backend python")
    detector = args.sism_model or bundled("detector.onnx")
    if detector is None:
        raise InputError("--files: no detector comes with this package; name one with --sism-model FILE")
    if Path(detector).suffix.lower() in (*ENGINE_SUFFIXES, OPENVINO_SUFFIX):  # these need a GPU here, or a second file
        raise ModelError(f"{detector}: icnet triton takes a detector's ONNX or MNN file")
    return Path(detector)


def _look(model: Path) -> tuple[ExportKind | None, int, dict[str, Any]]:
    """Which export a model is, as far as it can be told without a GPU; its smallest group; and an engine's sidecar."""
    suffix = model.suffix.lower()
    if suffix in ENGINE_SUFFIXES:
        read_engine(model)
        sidecar = model.with_name(f"{model.name}.json")
        record = json.loads(sidecar.read_bytes()) if sidecar.is_file() else {}
        smallest = min((profile["min"] for profile in record.get("profiles", [])), default=1)
        kind = ExportKind(record["kind"]) if "kind" in record else None
        if kind is ExportKind.DETECTOR:
            raise ModelError(f"{model}: a detector, and icnet triton is for ICNet's files")
        return kind, smallest, record
    if suffix == MNN_SUFFIX or (not model.exists() and "banked" in model_files(model, False)):
        return None, 1, {}
    check_seal(model)
    specs = tensors(model)
    if (kind := foreign(*specs)) is not None:
        return kind, 1, {}
    interface = check_contract(model, *specs)
    return interface.kind, interface.size or 1, {}


def _default_backend(model: Path, kind: ExportKind | None) -> str:
    if kind is ExportKind.RAGGED:
        return "tensorrt" if model.suffix.lower() in ENGINE_SUFFIXES else "onnxruntime"
    what = "not a ragged export, or no sidecar of icnet build says so" if kind is None else f"a {kind} export"
    raise ModelError(
        f"{model}: {what}: Triton would join groups of several requests into one. Export it with --ragged, or let a "
        "Predictor run it: --backend python"
    )


def _files_for_python(args: argparse.Namespace, kind: ExportKind | None, detector: Path | None) -> dict[str, Path]:
    """The model's files, by their roles, once they and the detector were opened, if that can be done on any machine."""
    if kind is ExportKind.RAGGED:
        raise ModelError(f"{args.model}: a ragged export, which Triton runs itself: leave out --backend python")
    files = model_files(args.model, False)
    if args.model.suffix.lower() not in ENGINE_SUFFIXES:
        banks = (files["intra"], files["banked"]) if "banked" in files else None
        Predictor(files.get("model"), bank_export=banks, threads=1).close()
    if detector is not None:
        Detector(detector, 1, normalise=args.sism_normalise, minmax=args.sism_minmax).close()
    return files


def _check_for_triton(
    args: argparse.Namespace, backend: str, kind: ExportKind | None, record: Mapping[str, Any]
) -> None:
    """Raise unless a back end of Triton's can run the model."""
    engine = args.model.suffix.lower() in ENGINE_SUFFIXES
    if kind is not ExportKind.RAGGED:
        _default_backend(args.model, kind)
    if engine != (backend == "tensorrt"):
        fits = "an engine runs with --backend tensorrt" if engine else "an ONNX file runs with --backend onnxruntime"
        raise InputError(f"{args.model}: --backend {backend}: {fits}")
    if args.site:
        raise InputError("--site: is for --backend python")
    if args.device == "tensorrt":
        raise InputError("--device tensorrt: build an engine of the ragged export and give it as --model")
    if engine and record["tensorrt"] != "tensorrt":
        raise ModelError(f"{args.model}: built by TensorRT-RTX, which Triton does not run; build it with TensorRT")
    if engine and len(record["profiles"]) != 1:
        raise ModelError(f"{args.model}: has several profiles, and Triton uses one: build it with --min 1 --max N")


def _check_target(repository: Path, target: Path) -> None:
    """Raise OutputError if `target` is there and not ours, or would come among what is no model."""
    try:
        others = [f for f in repository.iterdir() if not f.name.startswith(".")] if repository.exists() else []
    except OSError as error:
        raise OutputError(f"{repository}: can't be written: {error.strerror or error}") from error
    config = target / CONFIG
    if target.exists() and not (config.is_file() and config.read_bytes().startswith(OURS.encode())):
        raise OutputError(f"{target}: is there, and icnet triton did not write it; choose another --name or --output")
    if foreigners := [f for f in others if f != target and not (f / CONFIG).is_file()]:
        raise OutputError(f"{repository}: no model repository, since {foreigners[0].name} is no model; choose another")


def _config(
    args: argparse.Namespace, backend: str, names: Mapping[str, str], on_gpu: bool, smallest: int, detects: bool
) -> str:
    """The text of config.pbtxt."""
    if backend == "python":
        given = {"device": args.device, "threads": args.threads, "max_images": args.max_images}
        given |= {"sism_normalise": args.sism_normalise, "sism_minmax": args.sism_minmax}
        settings = dict(names) | {key: str(value) for key, value in given.items() if value is not None}
    else:
        settings = {"intra_op_thread_count": str(args.threads)} if args.threads and not on_gpu else {}
    parameters = "".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}\n"
        for key, value in settings.items()
    )
    asked, warmup = f'name: "{RGBS.name}" data_type: TYPE_UINT8 dims: [ -1, {SIZE}, {SIZE}, 4 ]', RANDOM
    if detects:
        asked, warmup = f'name: "{FILES}" data_type: TYPE_STRING dims: [ -1 ]', STORED
    warmup = WARMUP % (FILES if detects else RGBS.name, warmup % smallest)
    place = f"kind: KIND_GPU gpus: {args.gpu or [0]}" if on_gpu else "kind: KIND_CPU"
    return f"""{OURS} (icnet-deploy {__version__})
name: "{args.name}"
backend: "{backend}"
max_batch_size: {args.max_groups}  # groups; requests of all sizes share an execution
input [ {{ {asked} allow_ragged_batch: true }} ]
output [ {{ name: "{OUTPUTS[0].name}" data_type: TYPE_FP32 dims: [ -1, {SIZE}, {SIZE} ] }} ]
{warmup if backend == "python" else JOINED}
dynamic_batching {{
  max_queue_delay_microseconds: {args.delay * 1000}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {round(args.timeout * 1e6)}
    max_queue_size: {args.queue}
  }}
}}
instance_group [ {{ count: {args.instances} {place} }} ]
{parameters}"""


def _parse(config: str) -> None:
    """Read a config.pbtxt as Triton does.

    Raises:
        DependencyError: Triton's protobuf is not installed.
        InputError: Triton would not take it.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError as error:
        raise DependencyError(f"tritonclient is not installed: {how_to_install('triton')}") from error
    try:
        text_format.Parse(config, ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{CONFIG}: Triton would not take these options: {one_line(error)}") from error
