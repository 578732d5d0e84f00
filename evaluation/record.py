"""What the records of measurements have in common: versions, the names of models, and how a record is written."""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress

from runtime import __version__
from runtime.files import check_outputs, replacing, write_json

SISMS = "SISMs"  # the baseline's name in the results


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python, of this project, and of those packages that are installed."""
    found = {"python": platform.python_version(), "icnet-deploy": __version__}
    for package in packages:
        try:
            found[package.lower()] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def labels(models: Sequence[Path]) -> list[str]:
    """What the results call the models: their file names, or their paths where names are not unique."""
    names = [model.name or str(model) for model in models]
    unique = len({*names, SISMS}) == len(names) + 1
    return names if unique else [str(model) for model in models]


@contextmanager
def recording(
    results: Mapping[str, Any],
    output: Path | None,
    *,
    inputs: Iterable[Path | None] = (),
    others: Mapping[Path, Callable[[Path], object]] | None = None,
    keep: Callable[[], object] | None = None,
    console: Console | None = None,
) -> Iterator[Progress]:
    """Claim output files before a measurement begins, and write them once it is done.

    Args:
        results: what the block fills in; its "interrupted" is set if Ctrl-C ends the block and there is `keep`.
        output: where they are written to as JSON; None for nowhere.
        inputs: files and folders that are read, which no output may replace (see `check_outputs`).
        others: more files, such as plots, each with the function that writes it to the (temporary) path it is given.
        keep: whether there is something to keep after Ctrl-C; without it, or if not, nothing is written.
        console: where progress is shown, if it is a terminal.

    Yields:
        The progress bars, to add tasks to.

    Raises:
        OutputError: an output is one of the inputs, is named twice, or can't be written.
        KeyboardInterrupt: there was nothing to keep.
    """
    writers = dict(others or {})
    check_outputs([*writers, output], inputs)
    if output:
        writers[output] = lambda path: write_json(path, results)
    console = console or Console()
    with ExitStack() as stack:
        temporary = {path: stack.enter_context(replacing(path)) for path in writers}
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            try:
                yield progress
            except KeyboardInterrupt:
                if not keep or not keep():
                    raise
                cast("dict[str, Any]", results)["interrupted"] = True
        for path, write in writers.items():
            write(temporary[path])
    for path in writers:
        print(f"{path}: written")
