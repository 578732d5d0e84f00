"""What this package raises. Every message is one line that names the file or tensor and says what to do."""

import re
from pathlib import Path

# Control characters, line and paragraph separators, lone surrogates (bytes of a name that are not UTF-8), and what
# turns the direction of text. Joiners, which names in some scripts need, are not among them.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Any text as it may be written to a terminal: a line break in a file's name reads `\n`, an escape `\x1b`."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def one_line(text: object) -> str:
    """Any text without line breaks, for a message."""
    return " ".join(str(text).split())


def how_to_install(extras: str) -> str:
    """The command that installs this package with some of its extras, e.g. "cpu,export".

    A clone is installed by its path, and stays a clone: it need not be the release that an index has.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'icnet-deploy[{extras}]'"
    return f"pip install --editable '{'.' if root == Path.cwd().resolve() else root}[{extras}]'"


class ICNetError(Exception):
    """Base of all errors of this package; the command line prints it and exits with code 2.

    Its text is always `printable`, for a library's caller too: names of files and tensors may come from anybody.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class InputError(ICNetError):
    """Images, SISMs or groups that can't be used: unreadable, of the wrong kind, or not matching each other."""


class ModelError(ICNetError):
    """A model file that can't be read, is not an exported ICNet, or can't run what it was given."""


class DeviceLostError(ModelError):
    """The GPU stopped at an error after which the driver refuses every call until the process ends."""


class CheckpointError(ICNetError):
    """A checkpoint that is not ICNet's, or not whole."""


class OutputError(ICNetError):
    """Results that can't be written."""


class DependencyError(ICNetError):
    """A package of an extra is not installed, or there is no GPU, or no driver that fits."""
