"""TensorRT engines from exported models.

TensorRT (10 or 11) is used if it is installed, else TensorRT-RTX, which builds without a GPU. The network is always
strongly typed: FP16 and INT8 are written in the graph, by casts and Q/DQ, and no option changes them.
"""

import hashlib
import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from export import tensorrt_api as api
from export.onnx_file import load_model, metadata, read_bytes, tensors
from runtime import __version__
from runtime.contract import (
    BANK,
    CALIBRATED_FOR,
    ENGINE_NAME,
    IMAGE_BYTES,
    INPUTS,
    RGBS,
    SHAPES,
    WEIGHTS,
    ExportKind,
    TensorSpec,
    foreign,
)
from runtime.detector_contract import check_any
from runtime.errors import DependencyError, InputError, ModelError
from runtime.files import check_outputs, remove, replacing, write_bytes
from runtime.tensorrt_library import load_first, log_of


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


SIDES = Profile(32, 320, 640)  # the last is the largest that `runtime.detector` asks for


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        workspace: most scratch memory that a layer may use, MiB; None for all of the GPU's.
        timing_cache: file with the kernel timings of earlier builds, read if it exists and written after the build.
        version_compatible: an engine that later TensorRTs of the same major version load too.
        hardware_compatible: an engine for every GPU from Ampere on, not only for this one.
        compute_capabilities: "8.6" and the like, the GPUs to build for; empty for TensorRT's default. RTX only.
        inspect: keep the description of the layers in the engine, and list them.
        tf32: let the convolutions and products of an FP32 model round their inputs to 11 bits, as tensor cores do. Off,
            it costs FP16 and INT8 models nothing, and keeps what leads to RSCF's order in FP32.
        level: the builder's optimisation level, 0 to 5: how long it searches; None for TensorRT's own, 3.
        bank: the bank sizes that the engine of a bank export takes, in every profile.
        sides: the heights and widths that the engine of a detector takes, in pixels, where its file leaves them open;
            None for `SIDES`.
    """

    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    inspect: bool = False
    tf32: bool = False
    level: int | None = None
    bank: Profile | None = None
    sides: Profile | None = None


def default_profiles(largest: int) -> list[Profile]:
    """The profiles for groups of 1 to `largest` images.

    Kernels are tuned for a profile's best size, and those for 5 images are slow for 1 and for 64. A profile costs time
    to build, but no second copy of the weights.

    Raises:
        InputError: `largest` is not positive.
    """
    if largest < 1:
        raise InputError(f"--max {largest}: expected 1 or more")
    sizes = ((1, 1, 1), (2, 5, 8), (9, 32, largest))
    return [Profile(low, min(best, largest), min(high, largest)) for low, best, high in sizes if low <= largest]


def gaps(profiles: Sequence[Profile]) -> list[str]:
    """The group sizes between the smallest and the largest that are in no profile, "7" or "7 to 9"."""
    found: list[str] = []
    covered = min(profile.min for profile in profiles) - 1
    for profile in sorted(profiles, key=lambda profile: profile.min):
        if profile.min > covered + 1:
            low, high = covered + 1, profile.min - 1
            found.append(str(low) if low == high else f"{low} to {high}")
        covered = max(covered, profile.max)
    return found


def build_engine(
    onnx_path: Path,
    output: Path,
    profiles: Sequence[Profile],
    options: Options = Options(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build an engine, and beside it `output`.json: its provenance, which is not needed to run it.

    Args:
        onnx_path: an exported model of any kind and precision, or any detector (see `runtime.detector_contract`).
        output: the engine to write.
        profiles: at least one.
        options: how to build.
        progress: shows TensorRT's phases; None for silence. Ctrl-C stops the build at its next step.

    Returns:
        The content of `output`.json.

    Raises:
        InputError: no profile, or an option that this TensorRT does not have.
        ModelError: the file is not an exported ICNet or a detector, TensorRT refuses it, or it can't be built.
        OutputError: a file can't be written.
        DependencyError: TensorRT is not installed, or does not start.
        KeyboardInterrupt: the build was stopped. Nothing is written then, nor after any error.
    """
    trt = load_first()
    data = read_bytes(onnx_path)
    if not profiles:
        raise InputError("no profile: an engine needs at least one range of group sizes")
    sidecar = output.with_name(output.name + ".json")
    check_outputs([output, sidecar, options.timing_cache], [onnx_path])
    _check_options(trt, options)
    cached = read_bytes(options.timing_cache) if options.timing_cache and options.timing_cache.exists() else b""

    log = log_of(trt)
    with log.listening() as heard:
        try:
            builder, network, _parser = api.parse(trt, log.logger, heard, onnx_path, data)
        except ModelError as error:
            made_for = (_notes(onnx_path, data) or {}).get(CALIBRATED_FOR, "tensorrt")
            if made_for == "tensorrt":
                raise
            raise ModelError(
                f"{onnx_path}: calibrated for {made_for}, with uint8 numbers that TensorRT does not take; calibrate it "
                "with --engine tensorrt"
            ) from error
        inputs, outputs = api.tensors(network)
        kind, size = _kind_and_size(onnx_path, inputs, outputs)
        _check_profiles(onnx_path, size, profiles)
        _check_axes(onnx_path, inputs, options)
        if options.tf32 and (narrow := api.narrow_types(network)):
            raise InputError(
                f"--tf32: {onnx_path} is not an FP32 model ({', '.join(sorted(narrow))}): what it keeps in FP32 leads "
                "to the order of pixels, which TF32 would change; leave out --tf32"
            )
        config = _configure(trt, builder, network, profiles, options)
        notes = _notes(onnx_path, data)
        if notes and WEIGHTS in notes:
            network.name = ENGINE_NAME + notes[WEIGHTS]  # an engine carries this, and nothing else of ours
        elif kind is ExportKind.DETECTOR:
            network.name = onnx_path.stem  # by which its family is known

        with ExitStack() as files:
            cache_file = files.enter_context(replacing(options.timing_cache)) if options.timing_cache else None
            sidecar_file = files.enter_context(replacing(sidecar))
            engine_file = files.enter_context(replacing(output))

            cache_state, cache = api.use_timing_cache(config, heard, cached)
            monitor = config.progress_monitor = api.make_monitor(trt, progress or Progress(disable=True))
            with api.cancelled_by_signals(monitor):
                plan = builder.build_serialized_network(network, config)
            if monitor.cancelled:
                raise KeyboardInterrupt
            if plan is None:
                raise ModelError(f"{onnx_path}: TensorRT could not build it: {heard.last_error}")

            record = {
                "producer": f"icnet-deploy {__version__}",
                "engine": output.name,
                "engine_sha256": hashlib.sha256(plan).hexdigest(),
                "onnx": onnx_path.name,
                "onnx_sha256": hashlib.sha256(data).hexdigest(),
                "onnx_metadata": notes,
                "kind": kind,
                "tensorrt": trt.__name__,
                "tensorrt_version": trt.__version__,
                "gpu": api.gpu(),
                "profiles": [asdict(p) for p in profiles],
                "options": asdict(options),
                "timing_cache": cache_state if cache_file else None,
                "warnings": list(dict.fromkeys(heard.warnings)),
                "layers": api.list_layers(trt, log.logger, plan, network) if options.inspect else None,
            }
            write_bytes(engine_file, plan)
            write_bytes(sidecar_file, (json.dumps(record, indent=2, default=str) + "\n").encode())
            if cache_file:
                with api.no_deprecations():
                    write_bytes(cache_file, bytes(cache.serialize()))
            # Now the files get their names, the last opened first. A crash between any two steps leaves an engine
            # without a sidecar, never beside that of another: the old sidecar goes first, the new one comes last.
            remove(sidecar)
        return record


def trtexec_commands(
    onnx_path: Path, output: Path, profiles: Sequence[Profile], options: Options = Options()
) -> dict[int, str]:
    """The command lines of NVIDIA's `trtexec` that build the same engine, by TensorRT's major version.

    TensorRT is not needed. Without the package `onnx` the model is not read, and has a plain export's inputs.

    Raises:
        InputError: trtexec has no such option, or profiles and options do not fit the model.
        ModelError: the file is not an exported ICNet.
    """
    inputs, size = _onnx_inputs(onnx_path)
    _check_profiles(onnx_path, size, profiles)
    _check_axes(onnx_path, inputs, options)
    _check_level(options)
    if options.compute_capabilities:
        raise InputError("--compute-capability: trtexec has no such option, it belongs to TensorRT-RTX")
    arguments = ["trtexec", f"--onnx={onnx_path}", f"--saveEngine={output}", "--skipInference"]
    if not all(spec.is_fixed for spec in inputs):  # trtexec takes no shapes for a model with fixed ones
        for i, profile in enumerate(profiles):
            if len(profiles) > 1:
                arguments.append(f"--profile={i}")
            shapes = {spec.name: _shapes(spec, profile, options) for spec in inputs}
            for k, name in enumerate(asdict(profile)):
                texts = (f"{tensor}:{'x'.join(map(str, of_tensor[k]))}" for tensor, of_tensor in shapes.items())
                arguments.append(f"--{name}Shapes={','.join(texts)}")
    flags = {
        f"--memPoolSize=workspace:{options.workspace}": options.workspace,
        f"--timingCacheFile={options.timing_cache}": options.timing_cache,
        "--versionCompatible": options.version_compatible,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
        "--profilingVerbosity=detailed": options.inspect,
        "--dumpLayerInfo": options.inspect,
        "--noTF32": not options.tf32,
        f"--builderOptimizationLevel={options.level}": options.level is not None,
    }
    arguments += [flag for flag, wanted in flags.items() if wanted]
    return {10: shlex.join([*arguments, "--stronglyTyped"]), 11: shlex.join(arguments)}


def _check_options(trt: Any, options: Options) -> None:
    if options.workspace is not None and options.workspace < 1:
        raise InputError(f"--workspace {options.workspace}: must be at least 1 MiB")
    _check_level(options)
    foreign = {"hardware-compatible": options.hardware_compatible, "version-compatible": options.version_compatible}
    hint = "TensorRT-RTX does not have it; name the GPUs to build for with --compute-capability"
    if trt.__name__ == "tensorrt":
        foreign = {"compute-capability": bool(options.compute_capabilities)}
        hint = "only TensorRT-RTX has it; TensorRT builds for the GPU that it runs on"
    for option, asked in foreign.items():
        if asked:
            raise InputError(f"--{option}: {hint}")


def _check_level(options: Options) -> None:
    if options.level is not None and not 0 <= options.level <= 5:
        raise InputError(f"--level {options.level}: TensorRT's optimisation levels are 0 to 5")


def _kind_and_size(
    path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[ExportKind, int | None]:
    """The kind of an exported model, and its fixed group size or None. Raises ModelError for other models."""
    kind = foreign(inputs, outputs)
    if kind is None:
        interface = check_any(path, inputs, outputs)
        return interface.kind, interface.size
    n = outputs[0].shape[0]
    return kind, n if isinstance(n, int) else None


def _lengths(name: str, profile: Profile, options: Options) -> list[int]:
    """The smallest, best and largest length of an input's first axis."""
    sizes = list(asdict(options.bank if name == BANK.name and options.bank else profile).values())
    if name == RGBS.name:
        return [n * IMAGE_BYTES for n in sizes]
    return [1, 1, sizes[-1]] if name == SHAPES.name else sizes  # groups: from one of all images to one per image


def _shapes(spec: TensorSpec, profile: Profile, options: Options) -> list[tuple[int, ...]]:
    """The smallest, best and largest shape of an input."""
    sides = asdict(options.sides or SIDES).values()
    lengths = zip(_lengths(spec.name, profile, options), sides, strict=True)
    return [(n, *(d if isinstance(d, int) else side for d in spec.shape[1:])) for n, side in lengths]


def _notes(onnx_path: Path, data: bytes) -> dict[str, str] | None:
    try:
        return metadata(load_model(onnx_path, data, weights=False))
    except (DependencyError, ModelError):  # without onnx; or not an ONNX model, as TensorRT has said
        return None


def _check_profiles(path: Path, size: int | None, profiles: Sequence[Profile]) -> None:
    for profile in profiles:
        if size is not None and profile != Profile(size, size, size):
            raise ModelError(
                f"{path}: exported for groups of exactly {size}, so profile {profile} can't be built: use "
                f"{size}:{size}:{size}, or export it with a dynamic group axis"
            )


def _check_axes(path: Path, inputs: Sequence[TensorSpec], options: Options) -> None:
    """Raise InputError for sizes of a bank or of images that are missing, or that the model does not take."""
    takes_bank = any(spec.name == BANK.name for spec in inputs)
    if takes_bank and options.bank is None:
        raise InputError(f"{path}: takes a bank, whose sizes are missing: give --max-bank")
    if options.bank is not None and not takes_bank:
        raise InputError(f"--max-bank: {path} takes no bank; the file for it is NAME.banked.onnx of a bank export")
    if options.sides is not None and all(spec.is_sized for spec in inputs):
        raise InputError(f"--sides: {path} takes images of one size; leave it out")


def _configure(trt: Any, builder: Any, network: Any, profiles: Sequence[Profile], options: Options) -> Any:
    config = builder.create_builder_config()
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for spec in api.tensors(network)[0]:
            shapes.set_shape(spec.name, *_shapes(spec, profile, options))
        config.add_optimization_profile(shapes)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if not options.tf32:  # TensorRT's own choice is to allow it
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.level is not None:
        config.builder_optimization_level = options.level
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


def _onnx_inputs(path: Path) -> tuple[Sequence[TensorSpec], int | None]:
    """The inputs of an exported model and its fixed group size, read by `onnx`; a plain export's without it."""
    try:
        inputs, outputs = tensors(load_model(path, weights=False))
    except DependencyError:
        return INPUTS, None
    return inputs, _kind_and_size(path, inputs, outputs)[1]
