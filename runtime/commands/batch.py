"""`icnet batch`: what `icnet predict` does, for a table of groups, in many processes or on many machines by Ray Data.

The driver groups the table and hands some groups at a time to a pool of actors. An actor has a `Predictor` and writes
the results itself, each file by a rename. The groups' records make a run resumable, as they do for `icnet predict`.
Of the outcomes the driver writes one table.
"""

import argparse
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from runtime.backends.opening import ENGINE_SUFFIXES
from runtime.commands import outputs
from runtime.commands.detector import BUILTIN, default_detector, sism_source, speaking
from runtime.commands.options import number, positive
from runtime.commands.predict import add_model_arguments, model_files, model_of
from runtime.errors import DependencyError, ICNetError, InputError, ModelError, how_to_install, one_line, printable
from runtime.files import check_model_file, locked, output_errors, remove
from runtime.silence import STDERR, silenced
from runtime.threads import cores

if TYPE_CHECKING:
    from runtime.commands.batch_table import Row

PACKAGES = ("ray", "pyarrow", "fsspec")  # of the extra ray; imported once they are needed
CALL = 16  # groups that an actor gets at once, at most; after a kill, as many are looked at again
CALLS = 4  # for each actor, at least, so that they end at about the same time
OBJECTS = 200 << 20  # bytes for Ray's objects, which are rows of paths
FOLDER = "icnet-ray-"  # names of Ray's temporary folders
LONGEST = 40  # characters of such a folder's path: the names of Ray's sockets have at most 107
LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's own switch to the loopback address, for desktop systems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet batch`."""
    parser.add_argument(
        "path",
        metavar="GROUPS",
        help="a Parquet table with a row per image (columns group, image, and sism unless a detector makes them): a "
        "path, or an URL that fsspec opens, as the images may be; or a folder, as for icnet predict",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="folder for what icnet predict writes, and for status.parquet: group, status, error, seconds, engine",
    )
    outputs.add_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="keep finished groups, as icnet predict --resume does")
    parser.add_argument("--pack", action="store_true", help="several groups in one call, as icnet predict --pack")
    parser.add_argument("--actors", type=number(), default=1, metavar="N", help="processes, each with the model (1)")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="GPUs of an actor; 0.5: two share one (default: 1 if it needs one)"
    )
    parser.add_argument(
        "--address",
        help="a Ray cluster that is there, HOST:PORT or auto; this package, the model, OUTPUT and local images must be "
        "in the same places on all its machines (default: Ray is started here, and listens on 127.0.0.1 only)",
    )
    parser.set_defaults(bank=None, keep_sisms=False)


def run(args: argparse.Namespace) -> int:
    """Predict every group; a group that fails is reported and does not stop the others.

    Returns:
        0, or 2 if any group failed.

    Raises:
        ICNetError: nothing could be started.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise DependencyError(f"{name} is not installed: {how_to_install('cpu,ray')}")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with speaking(console, "icnet batch"):
        return _run(args, console)


def _run(args: argparse.Namespace, console: Console) -> int:
    from runtime.commands.batch_table import STATUS, check_status, is_url, write_status

    outputs.chosen(args)  # refuses options that exclude each other
    if is_url(args.output):
        raise InputError(f"--output {args.output}: results are renamed into place, in a folder; name one, or a mount")
    if args.address not in (None, "auto"):
        _check_address(args.address)
    if args.address and args.threads is None:
        raise InputError("--address: say with --threads how many CPUs of its machine an actor has")
    args.model, args.output = model_of(args).absolute(), Path(args.output).absolute()
    args.threads = args.threads or max(cores() // args.actors, 1)
    on_gpu = args.model.suffix.lower() in ENGINE_SUFFIXES or args.device in ("cuda", "tensorrt")
    args.gpus = args.gpus or float(on_gpu)
    for file in model_files(args.model, banks_only=False).values():
        check_model_file(file)
    rows, detector = _groups(args)
    status = args.output / STATUS
    with output_errors(status):
        args.output.mkdir(parents=True, exist_ok=True)
        check_status(status)
    remove(status)  # it tells of an earlier run

    found: dict[str, dict[str, Any]] = {}
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, _ray(args) as scratch:
        bar = progress.add_task("", total=len(rows))
        for outcome in _outcomes(args, rows, detector, scratch):
            if outcome["status"] == "unusable":
                raise ModelError(outcome["error"])
            found[outcome["group"]] = outcome
            if outcome["error"]:
                console.print(f"icnet batch: error: {printable(outcome['error'])}", style="red", markup=False)
            progress.advance(bar)
    write_status(status, [found[row["group"]] for row in rows])
    failed = sum(outcome["status"] != "ok" for outcome in found.values())
    kept = sum(outcome["status"] == "ok" and outcome["seconds"] is None for outcome in found.values())
    if failed:
        console.print(f"{failed} of {len(rows)} groups failed; mend them and go on with --resume")
    counts = f"{len(rows) - failed - kept} groups, and {kept} were finished already" if kept else f"{len(rows)} groups"
    print(printable(f"{counts}: {args.output / 'GROUP'}"))
    print(printable(f"status: {status}"))
    return 2 if failed else 0


def _check_address(address: str) -> None:
    """Raise InputError if nothing listens there, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--address {address}: expected HOST:PORT of a Ray cluster, or auto: {error}") from error


def _groups(args: argparse.Namespace) -> "tuple[list[Row], str | Path | None]":
    """The groups, and what makes the SISMs of those that have none."""
    from runtime.commands.batch_table import is_table, of_folder, of_table

    if not is_table(args.path):
        folder, detector = sism_source(Path(args.path), args.sisms, args.sism_model)
        rows = of_folder(Path(args.path), folder)
    else:
        if args.sisms not in (None, BUILTIN):
            raise InputError(f"--sisms {args.sisms}: a table names its SISMs itself, in the column sism")
        if args.sisms and args.sism_model:
            raise InputError("--sisms and --sism-model: give one")
        rows, detector = of_table(args.path), args.sism_model or args.sisms
        if detector:
            rows = [row | {"sisms": [], "problem": ""} for row in rows]  # type: ignore[misc]
        elif not all(row["sisms"] for row in rows):
            detector = default_detector(args.path)
    return rows, detector if detector in (None, BUILTIN) else Path(detector).absolute()


def _outcomes(
    args: argparse.Namespace, rows: "Sequence[Row]", detector: str | Path | None, scratch: str | None
) -> Iterator[dict[str, Any]]:
    """A row of the status table for each group, as they come.

    Raises:
        InputError: there are fewer GPUs than asked for.
        ICNetError: Ray fails.
    """
    import ray
    import ray.data

    from runtime.commands.batch_actor import GroupActor, Tally

    if args.address is None and (there := ray.cluster_resources().get("GPU", 0)) < args.actors * args.gpus:
        raise InputError(f"--actors {args.actors} with {args.gpus:g} GPUs each: there are {there:g} GPUs")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # of groups that fail, rows tell
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    tally = ray.remote(num_cpus=0)(Tally).remote()
    # Blocks of few rows: a table read by Ray Data would be one task, which a kill would undo as a whole.
    blocks = min(max(-(-len(rows) // CALL), CALLS * args.actors), len(rows))
    calls = ray.data.from_items([*rows], override_num_blocks=blocks).map_batches(
        GroupActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=args.actors, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(args, detector, tally, scratch),
        num_cpus=args.threads,
        num_gpus=args.gpus,
    )
    try:
        for batch in calls.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as error:
        raise ICNetError(f"Ray stopped: {one_line(error)}") from error


@contextmanager
def _ray(args: argparse.Namespace) -> Iterator[str | None]:
    """Ray, started here or joined at --address. Yields a folder for temporary files, if it was started here.

    Raises:
        InputError: it can't be joined.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    with ExitStack() as stack:
        folder = None
        if args.address is None:
            folder = stack.enter_context(_temporary_folder())
            os.environ.update(LOCAL)
            if "RAY_AUTH_MODE" not in os.environ:  # other users of this machine could run code in it
                os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        import ray  # reads the environment

        place: dict[str, Any] = {"address": args.address}
        if folder:
            size = args.actors * args.threads + 1
            place = {"num_cpus": size, "_temp_dir": folder, "object_store_memory": OBJECTS, "include_dashboard": False}
        handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
        warnings.filterwarnings("ignore", module="ray")
        stack.callback(ray.shutdown)
        try:
            with silenced(STDERR):  # Ray's C++ code tells the level of its log
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **place)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = f"--address {args.address}: can't be joined" if args.address else "Ray does not start"
            raise InputError(f"{where}: {one_line(error)}") from error
        finally:
            for one, handler in handlers.items():  # Ray's would end the process before temporary files are deleted
                signal.signal(one, handler)
        yield folder


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder for Ray's files, locked while this process lives; those of killed ones are deleted."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER))
    try:
        if len(str(folder)) > LONGEST:
            raise InputError(f"{folder}: too long a path for Ray's sockets; set TMPDIR to a shorter one")
        with locked(folder, wait=False):
            yield str(folder)
    finally:
        for dead in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):  # this one too
            with suppress(OSError), locked(dead, wait=False):
                shutil.rmtree(dead)
