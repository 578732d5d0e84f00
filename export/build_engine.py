"""python export/build_engine.py: an exported model to a TensorRT engine, or to a file for OpenVINO or MNN."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: the same as `icnet build`
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from icnet_cli import main

    sys.exit(main(["build", *sys.argv[1:]]))

import argparse
import importlib.util
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from export.onnx_file import TAKES
from export.tensorrt_api import layer_table
from export.tensorrt_engine import SIDES, Options, Profile, build_engine, default_profiles, gaps, trtexec_commands
from runtime.errors import InputError

CPU_BACKENDS = {"openvino": "OpenVINO", "mnn": "MNN"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet build`."""
    add = parser.add_argument
    add("--onnx", type=Path, required=True, help="an exported model, or any detector")
    add("-o", "--output", type=Path, required=True, help="the engine to write; OUTPUT.json describes it")
    add("--backend", choices=("tensorrt", *CPU_BACKENDS), default="tensorrt", help="openvino and mnn: for CPUs")
    add("--precision", choices=("fp32", "bf16"), help="openvino: of all that is not INT8 (default fp32)")
    add("--max", type=int, help="largest group; alone, profiles tuned for 1, 5 and 32 images, up to this size")
    add("--min", type=int, help="one profile only: smallest group (default 1)")
    add("--opt", type=int, help="one profile only: group size to tune for (default 5)")
    add("--max-bank", type=int, help="largest bank, of a bank export's NAME.banked.onnx")
    add("--min-bank", type=int, help="smallest bank (default 1)")
    add("--opt-bank", type=int, help="bank size to tune for (default 20)")
    add("--profile", action="append", metavar="MIN:OPT:MAX", help="instead of these three; repeat it for more ranges")
    add(
        "--sides", metavar="MIN:OPT:MAX", help=f"detectors for images of any size: heights and widths (default {SIDES})"
    )
    add("--timing-cache", type=Path, metavar="FILE", help="timings of earlier builds, read and updated (idle in RTX)")
    add("--workspace", type=int, metavar="MIB", help="most scratch memory; default: all of the GPU's")
    add("--version-compatible", action="store_true", help="load in later TensorRTs of the same major version too")
    add("--hardware-compatible", action="store_true", help="run on every GPU from Ampere on")
    add("--compute-capability", action="append", default=[], metavar="X.Y", help="RTX: a GPU to build for; repeat it")
    add("--tf32", action="store_true", help="FP32 models: allow TF32 on tensor cores; faster, and less precise")
    add("--level", type=int, metavar="0-5", help="how long to search for fast kernels (default: TensorRT's, 3)")
    add("--inspect", action="store_true", help="list the layers with their types and precisions")
    add("--trtexec", action="store_true", help="only print the trtexec commands that build the same")


def run(args: argparse.Namespace) -> int:
    """Build `args.output` from `args.onnx`, or print how trtexec would.

    Raises:
        InputError: options that exclude each other; and what `build_engine`, `build_mnn` and `trtexec_commands` raise.
    """
    if args.backend in CPU_BACKENDS:
        return _build_for_cpu(args)
    if args.precision:
        raise InputError("--precision: is for OpenVINO; a TensorRT engine has the precision of its ONNX file")
    profiles = _profiles(args)
    options = Options(
        workspace=args.workspace,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        compute_capabilities=tuple(dict.fromkeys(args.compute_capability)),
        inspect=args.inspect,
        tf32=args.tf32,
        level=args.level,
        bank=_bank(args),
        sides=_profile("--sides", args.sides) if args.sides else None,
    )
    if args.trtexec:
        commands = trtexec_commands(args.onnx, args.output, profiles, options)
        if importlib.util.find_spec("onnx") is None:
            print("# assuming uint8 inputs: onnx is not installed, so the model was not read")
        for note in _notes(profiles):
            print(f"# {note}")
        for version, command in commands.items():
            print(f"# TensorRT {version}\n{command}")
        return 0
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        record = build_engine(args.onnx, args.output, profiles, options, progress)
    if record["layers"]:
        console.print(layer_table(record["layers"]))
    if record["timing_cache"] == "refused":
        print(f"{args.timing_cache}: not a timing cache of this TensorRT and GPU; replaced by a fresh one")
    for note in _notes(profiles):
        print(note)
    size = args.output.stat().st_size / 1e6
    sizes = ", ".join(map(str, profiles)) + (f", banks of {options.bank}" if options.bank else "")
    print(f"{args.output}: {size:.1f} MB, {record['tensorrt']} {record['tensorrt_version']}, groups of {sizes}")
    return 0


def _build_for_cpu(args: argparse.Namespace) -> int:
    name = CPU_BACKENDS[args.backend]
    given = [option for option, value in vars(args).items() if value not in (None, False, [])]
    own = ("backend", "onnx", "output", *(["precision"] if args.backend == "openvino" else []))
    if foreign := [option for option in given if option not in own]:
        whose = "OpenVINO" if foreign[0] == "precision" else "TensorRT"
        raise InputError(
            f"--{foreign[0].replace('_', '-')}: is for {whose}; leave it out, an {name} file takes any group size"
        )
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        if args.backend == "mnn":
            from export.to_mnn import build_mnn

            record = build_mnn(args.onnx, args.output, progress)
        else:
            from export.to_openvino import build_openvino

            record = build_openvino(args.onnx, args.output, args.precision or "fp32", progress)
    files = [args.output, *([args.output.with_suffix(".bin")] if args.backend == "openvino" else [])]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(
        f"{args.output}: {size:.1f} MB, {name} {record[args.backend]}, {TAKES[record['kind']]}; "
        f"|Δ| to ONNX Runtime: {record['max']:.1e} at most, {record['mean']:.1e} on average"
        + (", in FP32, as this CPU has no BF16" if args.precision == "bf16" and record["proved"] == "fp32" else "")
    )
    return 0


def _notes(profiles: list[Profile]) -> list[str]:
    """What is to be said of profiles that are not one after the other."""
    notes = [f"note: groups of {gap} are in no profile, so the engine refuses them" for gap in gaps(profiles)]
    pairs = combinations(profiles, 2)
    if overlaps := [f"{a} and {b}" for a, b in pairs if max(a.min, b.min) <= min(a.max, b.max)]:
        notes.append(f"note: profiles {', '.join(overlaps)} overlap; of several, the one with the smallest MAX is used")
    return notes


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
        if (args.min, args.opt) == (None, None):
            return default_profiles(args.max)
        return [_range(args.min, args.opt, args.max, 5)]
    if (args.min, args.opt, args.max) != (None, None, None):
        raise InputError("--profile takes the place of --min, --opt and --max: give one or the other")
    return [_profile("--profile", text) for text in args.profile]


def _profile(option: str, text: str) -> Profile:
    sizes = text.split(":")
    if len(sizes) != 3 or not all(n.isdecimal() for n in sizes):
        what = "group sizes" if option == "--profile" else "numbers of pixels"
        raise InputError(f"{option} {text}: expected three {what}, MIN:OPT:MAX")
    return Profile(*map(int, sizes))
