"""python export/build_engine.py: an exported model to a TensorRT engine.

TensorRT (10 or 11) is used if it is installed, else TensorRT-RTX, which builds without a GPU. The network is always
strongly typed: what is computed in FP16 or INT8 is written in the graph, by casts and Q/DQ, and no option changes it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet build`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["build", *sys.argv[1:]]))

import argparse
import hashlib
import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from export.tensorrt_api import (
    cancelled_by_ctrl_c,
    gpu,
    layer_table,
    list_layers,
    load_tensorrt,
    make_logger,
    make_monitor,
    no_deprecations,
    parse,
    tensors,
    use_timing_cache,
)
from runtime import __version__
from runtime.contract import (
    BANK,
    ENGINE_NAME,
    FLOAT_INPUTS,
    FLOAT_OUTPUTS,
    INPUTS,
    WEIGHTS,
    TensorSpec,
    check_contract,
)
from runtime.errors import InputError, ModelError, OutputError, one_line
from runtime.files import remove, replacing, same_file


@dataclass(frozen=True)
class Profile:
    """The group sizes that an engine takes, and the one that it is tuned for: 1 ≤ min ≤ opt ≤ max.

    Raises:
        InputError: they are not in that order.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"profile {self}: group sizes must be 1 ≤ MIN ≤ OPT ≤ MAX")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        workspace: most scratch memory that a layer may use, MiB; None for all of the GPU's.
        timing_cache: file with the kernel timings of earlier builds, read if it exists and written after the build.
        version_compatible: an engine that later TensorRTs of the same major version load too.
        hardware_compatible: an engine for every GPU from Ampere on, not only for this one.
        compute_capabilities: "8.6" and the like, the GPUs to build for; empty for TensorRT's default. RTX only.
        inspect: keep what the engine's layers are in the engine, and list them.
        bank: the sizes of bank that the engine of a bank export takes, in every profile.
    """

    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    inspect: bool = False
    bank: Profile | None = None


def build_engine(
    onnx_path: Path,
    output: Path,
    profiles: Sequence[Profile],
    options: Options = Options(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build an engine, and beside it `output`.json, which says what it was built from and is not needed to run it.

    Args:
        onnx_path: an exported model, of either interface and any precision.
        output: the engine to write.
        profiles: at least one.
        options: how to build.
        progress: shows TensorRT's phases; None for silence. Ctrl-C stops the build at its next step.

    Returns:
        What `output`.json says.

    Raises:
        InputError: no profile, or an option that this TensorRT does not have.
        ModelError: the file is not an exported ICNet, TensorRT refuses it, or it can't be built.
        OutputError: a file can't be written.
        DependencyError: TensorRT is not installed, or does not start.
        KeyboardInterrupt: the build was stopped. Nothing is written then, nor after any error.
    """
    trt = load_tensorrt()
    data = read(onnx_path)
    if not profiles:
        raise InputError("no profile: an engine needs at least one range of group sizes")
    if same_file(output, onnx_path):
        raise OutputError(f"{output}: is the model itself; give the engine another name")
    _check_options(trt, options)
    cached = read(options.timing_cache) if options.timing_cache and options.timing_cache.exists() else b""

    logger = make_logger(trt)
    builder, network, _parser = parse(trt, logger, onnx_path, data)
    _check_profiles(onnx_path, _group_size(onnx_path, *tensors(network)), profiles)
    _check_bank(onnx_path, tensors(network)[0], options)
    config = _configure(trt, builder, network, profiles, options)
    model = load_onnx(onnx_path, data)
    metadata = None if model is None else {p.key: p.value for p in model.metadata_props}
    if metadata and WEIGHTS in metadata:
        network.name = ENGINE_NAME + metadata[WEIGHTS]  # an engine carries this, and nothing else of ours

    sidecar = output.with_name(output.name + ".json")
    with ExitStack() as files:
        cache_file = files.enter_context(replacing(options.timing_cache)) if options.timing_cache else None
        sidecar_file = files.enter_context(replacing(sidecar))
        engine_file = files.enter_context(replacing(output))

        cache_state, cache = use_timing_cache(config, logger, cached)
        monitor = config.progress_monitor = make_monitor(trt, progress or Progress(disable=True))
        with cancelled_by_ctrl_c(monitor):
            plan = builder.build_serialized_network(network, config)
        if monitor.cancelled:
            raise KeyboardInterrupt
        if plan is None:
            raise ModelError(f"{onnx_path}: TensorRT could not build it: {logger.last_error}")

        record = {
            "producer": f"icnet-deploy {__version__}",
            "engine": output.name,
            "engine_sha256": hashlib.sha256(plan).hexdigest(),
            "onnx": onnx_path.name,
            "onnx_sha256": hashlib.sha256(data).hexdigest(),
            "onnx_metadata": metadata,
            "tensorrt": trt.__name__,
            "tensorrt_version": trt.__version__,
            "gpu": gpu(),
            "profiles": [asdict(p) for p in profiles],
            "options": asdict(options),
            "timing_cache": cache_state if cache_file else None,
            "warnings": list(dict.fromkeys(logger.warnings)),
            "layers": list_layers(trt, logger, plan, network) if options.inspect else None,
        }
        engine_file.write_bytes(plan)
        sidecar_file.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        if cache_file:
            with no_deprecations():
                cache_file.write_bytes(cache.serialize())
        # Now the files get their names, the last opened first. A crash between any two steps leaves an engine without
        # a sidecar, never one beside the sidecar of another: the old sidecar goes first, the new one comes last.
        remove(sidecar)
    return record


def trtexec_commands(
    onnx_path: Path, output: Path, profiles: Sequence[Profile], options: Options, inputs: Sequence[TensorSpec]
) -> dict[int, str]:
    """The command lines of NVIDIA's `trtexec` that build the same engine, by TensorRT's major version.

    Raises:
        InputError: it can't be said with trtexec.
    """
    if options.compute_capabilities:
        raise InputError("--compute-capability: trtexec has no such option, it belongs to TensorRT-RTX")
    arguments = ["trtexec", f"--onnx={onnx_path}", f"--saveEngine={output}", "--skipInference"]
    if not isinstance(inputs[0].shape[0], int):  # trtexec takes no shapes for a model that has fixed ones
        for i, profile in enumerate(profiles):
            if len(profiles) > 1:
                arguments.append(f"--profile={i}")
            for name, n in asdict(profile).items():
                lengths = [getattr(options.bank, name) if spec.name == BANK.name else n for spec in inputs]
                shapes = zip(inputs, lengths, strict=True)
                texts = (f"{spec.name}:{'x'.join(map(str, (length, *spec.sizes)))}" for spec, length in shapes)
                arguments.append(f"--{name}Shapes={','.join(texts)}")
    flags = {
        f"--memPoolSize=workspace:{options.workspace}": options.workspace,
        f"--timingCacheFile={options.timing_cache}": options.timing_cache,
        "--versionCompatible": options.version_compatible,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
        "--profilingVerbosity=detailed": options.inspect,
        "--dumpLayerInfo": options.inspect,
    }
    arguments += [flag for flag, wanted in flags.items() if wanted]
    return {10: shlex.join([*arguments, "--stronglyTyped"]), 11: shlex.join(arguments)}


def read(path: Path) -> bytes:
    """A file's bytes; raises ModelError if there are none to read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error


def _check_options(trt: Any, options: Options) -> None:
    if options.workspace is not None and options.workspace < 1:
        raise InputError(f"--workspace {options.workspace}: must be at least 1 MiB")
    foreign = {"hardware-compatible": options.hardware_compatible, "version-compatible": options.version_compatible}
    hint = "TensorRT-RTX does not have it; name the GPUs to build for with --compute-capability"
    if trt.__name__ == "tensorrt":
        foreign = {"compute-capability": bool(options.compute_capabilities)}
        hint = "only TensorRT-RTX has it; TensorRT builds for the GPU that it runs on"
    for option, asked in foreign.items():
        if asked:
            raise InputError(f"--{option}: {hint}")


def _group_size(path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int | None:
    """The fixed group size of an exported model of either interface, or None. Raises ModelError for other models."""
    expected, found = (*FLOAT_INPUTS, *FLOAT_OUTPUTS), (*inputs, *outputs)
    if len(found) != len(expected) or not all(any(e.accepts(f) for f in found) for e in expected):
        return check_contract(path, inputs, outputs).size
    n = inputs[0].shape[0]
    return n if isinstance(n, int) else None


def _check_profiles(path: Path, size: int | None, profiles: Sequence[Profile]) -> None:
    for profile in profiles:
        if size is not None and profile != Profile(size, size, size):
            raise ModelError(
                f"{path}: exported for groups of exactly {size}, so profile {profile} can't be built: use "
                f"{size}:{size}:{size}, or export it with a dynamic group axis"
            )


def _check_bank(path: Path, inputs: Sequence[TensorSpec], options: Options) -> None:
    takes_bank = any(spec.name == BANK.name for spec in inputs)
    if takes_bank and options.bank is None:
        raise InputError(f"{path}: takes a bank, whose sizes are missing: give --max-bank")
    if options.bank is not None and not takes_bank:
        raise InputError(f"--max-bank: {path} takes no bank; the file for it is NAME.banked.onnx of a bank export")


def _configure(trt: Any, builder: Any, network: Any, profiles: Sequence[Profile], options: Options) -> Any:
    config = builder.create_builder_config()
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            lengths = options.bank if tensor.name == BANK.name and options.bank else profile
            shapes.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in asdict(lengths).values()))
        config.add_optimization_profile(shapes)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        known = {f"{n[2:-1]}.{n[-1]}": c for n, c in trt.ComputeCapability.__members__.items() if n.startswith("SM")}
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, capability in enumerate(options.compute_capabilities):
            if capability not in known:
                raise InputError(f"--compute-capability {capability}: this TensorRT-RTX builds for {', '.join(known)}")
            config.set_compute_capability(known[capability], i)
    if options.inspect:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def load_onnx(path: Path, data: bytes) -> Any:
    """The model as the package `onnx` reads it, or None if that is not installed."""
    try:
        import onnx
    except ImportError:
        return None
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's; its module's name is not public
        raise ModelError(f"{path}: not an ONNX model: {one_line(error)}") from error


def _onnx_inputs(path: Path) -> tuple[Sequence[TensorSpec], int | None, bool]:
    """Inputs of an exported model and its fixed group size, read without TensorRT; and whether they could be."""
    model = load_onnx(path, read(path))
    if model is None:
        return INPUTS, None, False
    inputs, outputs = onnx_tensors(model)
    return inputs, _group_size(path, inputs, outputs), True


def onnx_tensors(model: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of a model as `load_onnx` gives it."""
    from onnx.helper import tensor_dtype_to_np_dtype

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dims = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        return TensorSpec(value.name, str(tensor_dtype_to_np_dtype(tensor.elem_type)), tuple(dims))

    return [spec(v) for v in model.graph.input], [spec(v) for v in model.graph.output]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet build`."""
    add = parser.add_argument
    add("--onnx", type=Path, required=True, help="an exported model")
    add("-o", "--output", type=Path, required=True, help="the engine to write; OUTPUT.json describes it")
    add("--backend", choices=("tensorrt", "mnn"), default="tensorrt", help="mnn: for CPUs; it has no more options")
    add("--min", type=int, help="smallest group (default 1)")
    add("--opt", type=int, help="group size to tune for (default 5)")
    add("--max", type=int, help="largest group")
    add("--max-bank", type=int, help="of a bank export's NAME.banked.onnx: most images in a bank")
    add("--min-bank", type=int, help="fewest (default 1)")
    add("--opt-bank", type=int, help="to tune for (default 20)")
    add("--profile", action="append", metavar="MIN:OPT:MAX", help="instead of these three; repeat it for more ranges")
    add("--timing-cache", type=Path, metavar="FILE", help="timings of earlier builds, read and updated (idle in RTX)")
    add("--workspace", type=int, metavar="MIB", help="most scratch memory; default: all of the GPU's")
    add("--version-compatible", action="store_true", help="load in later TensorRTs of the same major version too")
    add("--hardware-compatible", action="store_true", help="run on every GPU from Ampere on")
    add("--compute-capability", action="append", default=[], metavar="X.Y", help="RTX: a GPU to build for; repeat it")
    add("--inspect", action="store_true", help="list the layers with their types and precisions")
    add("--trtexec", action="store_true", help="only print the trtexec commands that build the same")


def run(args: argparse.Namespace) -> int:
    """Build `args.output` from `args.onnx`, or say how trtexec would; raises what `build_engine` does."""
    if args.backend == "mnn":
        given = [name for name, value in vars(args).items() if value not in (None, False, [])]
        if foreign := [name for name in given if name not in ("backend", "onnx", "output")]:
            raise InputError(f"--{foreign[0].replace('_', '-')}: belongs to TensorRT; an MNN file takes any group size")
        from export import to_mnn

        return to_mnn.run(args)
    profiles = _profiles(args)
    options = Options(
        workspace=args.workspace,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        compute_capabilities=tuple(dict.fromkeys(args.compute_capability)),
        inspect=args.inspect,
        bank=_bank(args),
    )
    if args.trtexec:
        inputs, size, known = _onnx_inputs(args.onnx)
        _check_profiles(args.onnx, size, profiles)
        _check_bank(args.onnx, inputs, options)
        if not known:
            print("# assuming uint8 inputs: onnx is not installed, so the model was not read")
        for version, command in trtexec_commands(args.onnx, args.output, profiles, options, inputs).items():
            print(f"# TensorRT {version}\n{command}")
        return 0
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        record = build_engine(args.onnx, args.output, profiles, options, progress)
    if record["layers"]:
        console.print(layer_table(record["layers"]))
    if record["timing_cache"] == "refused":
        print(f"{args.timing_cache}: not a timing cache of this TensorRT and GPU; replaced by a fresh one")
    size = args.output.stat().st_size / 1e6
    sizes = ", ".join(map(str, profiles)) + (f", banks of {options.bank}" if options.bank else "")
    print(f"{args.output}: {size:.1f} MB, {record['tensorrt']} {record['tensorrt_version']}, groups of {sizes}")
    return 0


def _range(low: int | None, best: int | None, high: int, default: int) -> Profile:
    low = 1 if low is None else low
    return Profile(low, max(low, min(default, high)) if best is None else best, high)


def _bank(args: argparse.Namespace) -> Profile | None:
    if args.max_bank is not None:
        return _range(args.min_bank, args.opt_bank, args.max_bank, 20)
    if (args.min_bank, args.opt_bank) != (None, None):
        raise InputError("sizes of the bank are missing: give --max-bank")
    return None


def _profiles(args: argparse.Namespace) -> list[Profile]:
    if not args.profile:
        if args.max is None:
            raise InputError("group sizes are missing: give --max, or --profile MIN:OPT:MAX")
        return [_range(args.min, args.opt, args.max, 5)]
    if (args.min, args.opt, args.max) != (None, None, None):
        raise InputError("--profile takes the place of --min, --opt and --max: give one or the other")
    texts = [text.split(":") for text in args.profile]
    for text in texts:
        if len(text) != 3 or not all(n.isdecimal() for n in text):
            raise InputError(f"--profile {':'.join(text)}: expected three group sizes, MIN:OPT:MAX")
    return [Profile(*map(int, text)) for text in texts]
