"""What the records of measurements have in common: the versions that they hang on, and what models are called."""

import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from runtime import __version__

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
