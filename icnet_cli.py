"""The command `icnet`: it imports the one module that a command needs, and runs it."""

import _thread
import argparse
import importlib
import importlib.util
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NoReturn

PACKAGES = ("runtime", "export", "training", "evaluation", "calibration", "benchmarks")

# Module: has `add_arguments(parser)` and `run(args) -> exit code`. Extra: what to install if its imports fail. Text.
COMMANDS = {
    "predict": ("runtime.commands.predict", "cpu", "co-saliency maps and contact sheets for folders of images"),
    "batch": ("runtime.commands.batch", "cpu,ray", "what predict does, for a table of groups, in many processes: Ray"),
    "triton": ("runtime.commands.triton", "cpu,triton", "a model repository for NVIDIA's Triton Inference Server"),
    "bank": ("runtime.commands.bank", "cpu", "a bank of a group's images, to compare others with"),
    "web": ("runtime.commands.web", "cpu", "a static site that computes maps in the visitor's browser"),
    "export": ("export.to_onnx", "cpu,export", "a checkpoint to ONNX, proved to compute what the paper's network does"),
    "build": (
        "export.build_engine",
        "tensorrt",
        "an exported model to a TensorRT engine, or to a file for OpenVINO or MNN",
    ),
    "calibrate": ("calibration.calibrate", "cpu,calibrate", "an exported model to INT8, within a max_drop of accuracy"),
    "evaluate": (
        "evaluation.accuracy",
        "cpu,evaluate",
        "scores of models and maps; by wrong SISMs, by bank size",
    ),
    "train": ("training.train", "cpu,export,train", "the paper's training, on a data set or on cut-and-paste groups"),
    "bench latency": ("benchmarks.latency", "cpu,export", "latency and memory, beside the alternatives"),
    "bench throughput": ("benchmarks.throughput", "cpu", "groups per second from many threads, queue time, idle share"),
    "bench scaling": ("benchmarks.scaling", "cpu", "time and memory by group size, in chunks, and packed"),
    "bench roofline": ("benchmarks.roofline", "cpu,export", "operations, bytes, the machine's bound, costliest nodes"),
    "bench gpu-check": ("benchmarks.gpu_check", "export,calibrate,gpu", "whatever needs a GPU, compared with the CPU"),
    "bench report": ("benchmarks.report", "cpu,export,bench", "tables and plots of the documents from the results"),
    "data cutouts": ("training.cutouts", "train", "cut-outs sorted by class, from open emoji sets"),
    "data photos": ("training.photos", "train", "cut-outs, backgrounds and photographs out of packages, by a manifest"),
    "data pairs": ("training.pairs", "train", "photographs side by side, of which one is common, to evaluate on"),
    "data paste": ("training.groups", "train", "groups with ground truths, made by cut and paste"),
    "data targets": ("training.targets", "cpu,train", "views of photographs, and what another detector finds in them"),
    "data detector": (
        "training.detector",
        "cpu,export,train",
        "the demo's detector, which makes SISMs of single images",
    ),
    "data distil": ("training.distil", "cpu,export,train,distil", "a backbone that learns from a teacher's features"),
    "data pretrain": ("training.pretrain", "cpu,export,train", "a VGG16 of any width that knows the cut-outs' classes"),
}
FAMILIES = {"bench": "speed and memory on this machine", "data": "groups made by cut and paste, and what they need"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        from runtime.errors import printable

        self.exit(2, f"{self.prog}: error: {printable(message)} ('{self.prog} --help' lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `icnet`; returns its exit code.

    0, or what the command returned; 2 for bad options or an error of ours, which is printed as one line; 130 if
    interrupted by Ctrl-C, 143 by SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    prog = f"icnet {name}" if name else "icnet"
    with _signals() as received:
        try:
            code = _run(prog, name, words, received)
            return 128 + received[0] if received and code in (2, 128 + signal.SIGINT) else code  # what it had was kept
        except KeyboardInterrupt:
            pass
        except Exception:
            if not received:
                raise
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 128 + (received[0] if received else signal.SIGINT)


def _run(prog: str, name: str | None, words: list[str], received: list[int]) -> int:
    """Run a command, or without a name answer what has none; returns the exit code.

    Raises:
        KeyboardInterrupt: a signal was `received`, whatever error was made of it.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if problem := shadowed("runtime"):
        return _failed("icnet", problem)
    from runtime import ICNetError, __version__
    from runtime.preprocess import silence_libtiff

    if name is None:
        if words == ["--version"]:
            print(f"icnet-deploy {__version__}")
            return 0
        return _without_command(words)
    module_name, extra, text = COMMANDS[name]
    try:
        module = _load(module_name, extra)
        parser = Parser(prog=prog, description=text[0].upper() + text[1:] + ".")
        module.add_arguments(parser)
        options = parser.parse_args(words[len(name.split()) :])
        warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error of ours
        silence_libtiff()
        return int(module.run(options))
    except (ICNetError, OSError, MemoryError) as error:  # the system's errors carry what they are about
        if received:  # an extension module whose import it ended says that it can't be imported
            raise KeyboardInterrupt from error
        return _failed(prog, str(error) or "out of memory")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on SIGTERM as on Ctrl-C, so that temporary files are deleted; yields the signals so far.

    A signal that is ignored, or that the caller of `main` handles, stays so. Where Python drops exceptions (finalizers,
    callbacks of weak references) the signal is raised again, behind them.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield received
        return

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if received and issubclass(what.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(raise_again, ())
        else:
            hook(what)

    def raise_again() -> None:
        time.sleep(0.1)  # in `dropped` it would be dropped too
        if sys.unraisablehook is dropped:  # the command has not ended meanwhile
            _thread.interrupt_main(signal.Signals(received[-1]))

    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: handler for number, handler in defaults.items() if signal.getsignal(number) == handler}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def shadowed(*packages: str) -> str | None:
    """One line on the first of these packages that Python finds elsewhere than beside this file; None if there is none.

    Names like `runtime` are common: a module or folder in the working directory, or another distribution, can have one.
    """
    root = Path(__file__).parent
    for name in packages:
        spec = importlib.util.find_spec(name)
        found = [*(spec.submodule_search_locations or [spec.origin or ""])] if spec else []
        if found and not any(os.path.realpath(path) == os.path.realpath(root / name) for path in found):
            return f"{found[0]} hides the package {name!r} of icnet-deploy in {root}; rename it, or start elsewhere"
    return None


def _load(module: str, extra: str) -> ModuleType:
    """Import a command's module.

    Raises:
        DependencyError: a package is not installed or can't be loaded, or one of ours is hidden by another.
    """
    from runtime.errors import DependencyError, how_to_install

    try:
        return importlib.import_module(module)
    except Exception as error:
        if problem := shadowed(*PACKAGES):
            raise DependencyError(problem) from error
        if isinstance(error, ModuleNotFoundError):
            raise DependencyError(f"{error.name} is not installed: {how_to_install(extra)}") from error
        if isinstance(error, ImportError | OSError):
            raise DependencyError(f"an installed package can't be loaded: {error}") from error
        raise


def _without_command(words: list[str]) -> int:
    """Print the commands there are, or which one might have been meant."""
    family = words[0] if words and words[0] in FAMILIES else ""
    prog = f"icnet {family}".rstrip()
    rest = words[bool(family) :]
    names = {name.split()[-1]: name for name in COMMANDS if name.startswith(family)}
    if rest and rest[0] not in ("-h", "--help"):
        near = get_close_matches(rest[0], [*names, *([] if family else FAMILIES)], 1)
        meant = f"did you mean 'icnet {names.get(near[0], near[0])}'?" if near else f"'{prog} --help' lists them all"
        return _failed(prog, f"no command {rest[0]!r}; {meant}")
    commands = {name: text for name, (*_, text) in COMMANDS.items() if name in names.values()}
    print(f"usage: {prog} COMMAND ...   ('{prog} COMMAND --help' lists its options)\n")
    print(f"{FAMILIES[family]}:" if family else "ICNet co-saliency, from checkpoint to production.\n\ncommands:")
    for name, text in commands.items():
        print(f"  {name:17} {text}")
    if not family:
        print("\n  --version         print the version")
    return 0


def _failed(prog: str, reason: str) -> int:
    print(f"{prog}: error: {' '.join(reason.splitlines())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
