"""TensorRT's Python module, `tensorrt` or `tensorrt_rtx`: whether it is installed, and what it says."""

import importlib
import logging
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import DependencyError, how_to_install, one_line

logger = logging.getLogger(__name__)

NAMES = ("tensorrt", "tensorrt_rtx")  # in the order of preference
OLDEST = {"tensorrt": (10, 1)}  # the first with `device_memory_size_v2` and `set_device_memory`


def load(name: str) -> Any | None:
    """One of `NAMES`; None if it is not installed.

    Raises:
        DependencyError: it is installed but broken, or too old.
    """
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        raise DependencyError(f"{name} is installed but can't be loaded: {one_line(error)}") from error
    numbers = re.match(r"(\d+)\.(\d+)", trt.__version__)
    oldest = OLDEST.get(name)
    if oldest and numbers and tuple(map(int, numbers.groups())) < oldest:
        raise DependencyError(f"{name} {trt.__version__} is too old: {'.'.join(map(str, oldest))} or newer is needed")
    return trt


def load_first() -> Any:
    """The module `tensorrt`, or else `tensorrt_rtx`.

    Raises:
        DependencyError: neither is installed, or the first that is is broken or too old.
    """
    for name in NAMES:
        if (trt := load(name)) is not None:
            return trt
    raise not_installed()


def not_installed() -> DependencyError:
    """The error for neither of `NAMES`."""
    return DependencyError(
        f"TensorRT is not installed: {how_to_install('tensorrt')}, or [tensorrt-rtx] for GeForce and RTX GPUs"
    )


@dataclass
class Heard:
    """Messages of TensorRT, each without line breaks."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def last_error(self) -> str:
        """The last error."""
        return self.errors[-1] if self.errors else "it gave no reason"


class Log:
    """The logger of one TensorRT module; from `log_of`, and for the life of the process.

    TensorRT keeps the first logger that it is given, whatever is given to later builders and runtimes, and calls it
    from threads of its own.

    Attributes:
        logger: what TensorRT's constructors take. It prints nothing.
    """

    def __init__(self, trt: Any) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Heard] = []
        severity, hear = trt.ILogger.Severity, self._hear

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            """Passes errors and warnings on."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity_of: Any, message: str) -> None:
                if severity_of in (severity.ERROR, severity.INTERNAL_ERROR):
                    hear("errors", message)
                elif severity_of == severity.WARNING:
                    hear("warnings", message)

        self.logger: Any = Logger()

    def _hear(self, kind: str, message: str) -> None:
        with self._lock:
            for heard in self._listeners:
                getattr(heard, kind).append(one_line(message))
        logger.debug("TensorRT: %s", message)

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """Collect what is said while the block runs, in whichever thread."""
        heard = Heard()
        with self._lock:
            self._listeners.append(heard)
        try:
            yield heard
        finally:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not heard]


_logs: "weakref.WeakKeyDictionary[Any, Log]" = weakref.WeakKeyDictionary()
_making = threading.Lock()


def log_of(trt: Any) -> Log:
    """The one logger of a TensorRT module."""
    with _making:
        if trt not in _logs:
            _logs[trt] = Log(trt)
        return _logs[trt]
