"""The command `icnet`: thin subcommands over the functions that the scripts use."""

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence

from runtime.errors import DependencyError, ICNetError, how_to_install

# Each module has `add_arguments(parser)` and `run(args) -> exit code`. Only the one asked for is imported, so that
# `icnet predict` needs no torch. The extra is what to install when a module's imports fail.
COMMANDS = {
    "predict": ("runtime.commands.predict", "cpu", "co-saliency maps and contact sheets for folders of images"),
    "bank": ("runtime.commands.bank", "cpu", "a bank of a group's images, to compare others with"),
    "export": ("export.to_onnx", "cpu,export", "a checkpoint to ONNX, proved to compute what the paper's network does"),
    "calibrate": ("calibration.calibrate", "cpu,calibrate", "an exported model to INT8, within a max_drop of accuracy"),
    "build": ("export.build_engine", "tensorrt", "an exported model to a TensorRT engine, or to a file for MNN"),
    "evaluate": ("evaluation.accuracy", "cpu,evaluate", "scores of models and ready maps on data sets"),
    "robustness": ("evaluation.corrupted_sisms", "cpu,train", "scores against the share of SISMs that are wrong"),
    "bank-curve": ("evaluation.bank_sizes", "cpu,train", "scores of images against banks of growing size"),
    "cutouts": ("training.cutouts", "train", "cut-outs sorted by class, from open emoji sets"),
    "paste": ("training.paste", "train", "groups with ground truths, made by cut and paste"),
    "pretrain": ("training.pretrain", "cpu,export,train", "a VGG16 of any width that knows the classes of cut-outs"),
    "train": ("training.train", "cpu,export,train", "the paper's training, on a data set or on cut-and-paste groups"),
    "bench": ("benchmarks.latency", "cpu,export", "latency and memory on this machine, beside the alternatives"),
    "throughput": ("benchmarks.throughput", "cpu", "groups per second from many threads, queue time and idle share"),
    "scaling": (
        "benchmarks.scaling",
        "cpu",
        "time and memory against the group's size, in chunks, and against packed groups",
    ),
    "roofline": ("benchmarks.roofline", "cpu,export", "operations, bytes, the machine's bound, the costliest nodes"),
    "report": (
        "benchmarks.report",
        "cpu,export,bench",
        "README's tables and plots from the results, or whether they differ",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `icnet`; returns its exit code.

    0, or what the command returned; 2 for bad options or an error of ours, which is printed as one line; 130 if
    interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="icnet",
        description="ICNet co-saliency, from checkpoint to production.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, (*_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, help="see below; 'icnet COMMAND --help' for its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    module_name, extra, text = COMMANDS[args.command]
    prog = f"icnet {args.command}"
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise DependencyError(f"{error.name} is not installed: {how_to_install(extra)}") from error
        except (ImportError, OSError) as error:
            raise DependencyError(f"an installed package can't be loaded: {error}") from error
        parser = argparse.ArgumentParser(prog=prog, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(parser)
        options = parser.parse_args(args.options)
        warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error of ours
        return int(module.run(options))
    except (ICNetError, OSError, MemoryError) as error:  # the system's errors carry what they are about
        reason = str(error) or "out of memory"
        print(f"{prog}: error: {' '.join(reason.splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
