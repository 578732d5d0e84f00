"""What C++ code prints, kept off standard output or standard error."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2
_silencing = threading.Lock()  # one at a time: a second call would save the first call's /dev/null as the stream


@contextmanager
def silenced(number: int) -> Iterator[None]:
    """Keep what C++ code prints in the block off standard output (`STDOUT`) or standard error (`STDERR`).

    What other threads write there meanwhile is lost too, so this is for moments only.
    """
    with _silencing:
        try:
            (sys.stdout if number == STDOUT else sys.stderr).flush()
            saved = os.dup(number)
        except (OSError, ValueError, AttributeError):  # there is no such stream
            yield
            return
        libc = ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt
        libc.fflush(None)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        try:
            yield
        finally:
            libc.fflush(None)
            os.dup2(saved, number)
            os.close(saved)
