"""Exports kept on disk: `torch.onnx.export` traces for seconds, and most tests export the same few networks.

An export is kept under a digest of all that it depends on: the modules' types and numbers, every weight, the example,
the exporter's options, the sources in export/, and the versions of the packages that export. Where the digest can't see
what is traced (a function or method of the network was replaced, a hook is set, a module is a test's own), nothing is
kept. The processes of one test run, and the runs after it, share the folder.
"""

import hashlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import onnx
import torch
from torch import nn

from export import icnet, ragged, reference

try:
    import fcntl
except ImportError:  # Windows: two processes may trace the same; the file that is renamed last stays
    fcntl = None  # type: ignore[assignment]

FOLDER = Path(__file__).parents[1] / "build" / "test-cache"
MAX_BYTES = 1_000_000_000
TRACED = (icnet, ragged, reference)
PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir")
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, str, type(None))


class Kept(NamedTuple):
    """What is used of the `torch.onnx.ONNXProgram` that an export returns."""

    model_proto: onnx.ModelProto


class ExportCache:
    """Call it like `trace`, which is `torch.onnx.export`."""

    def __init__(self, trace: Callable[..., Any], folder: Path = FOLDER, max_bytes: int = MAX_BYTES) -> None:
        self.trace, self.folder, self.max_bytes = trace, folder, max_bytes
        self.definitions = definitions()
        self.sources = hashlib.sha256()
        for path in sorted(Path(icnet.__file__).parent.glob("*.py")):
            self.sources.update(path.read_bytes())
        for package in PACKAGES:
            with suppress(importlib.metadata.PackageNotFoundError):
                self.sources.update(f"{package} {importlib.metadata.version(package)}\n".encode())

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], **options: Any) -> Any:
        key = self.key(module, args, options)
        if key is None:
            return self.trace(module, args, **options)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.onnx"
        with locked(self.folder / f"{key[:2]}.lock"):
            with suppress(FileNotFoundError):
                os.utime(path)
                return Kept(onnx.load(path))
            model = self.trace(module, args, **options).model_proto
            temporary = path.with_suffix(f".{os.getpid()}")
            onnx.save(model, temporary)
            temporary.replace(path)
        self.shrink()
        return Kept(model)

    def key(self, module: nn.Module, args: tuple[torch.Tensor, ...], options: dict[str, Any]) -> str | None:
        """A digest of what the export depends on; None if that can't be told."""
        if definitions() != self.definitions:
            return None
        found = self.sources.copy()
        for name, part in module.named_modules():
            settings = {k: v for k, v in vars(part).items() if k not in OF_EVERY_MODULE}
            foreign = type(part).__module__.partition(".")[0] not in ("export", "torch")
            hooked = part._forward_hooks or part._forward_pre_hooks
            if foreign or hooked or not all(map(is_plain, settings.values())):
                return None
            found.update(f"{name} {type(part).__qualname__} {sorted(settings.items())}\n".encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        found.update(repr([(t.dtype, tuple(t.shape)) for t in args]).encode())
        found.update(repr(sorted(options.items())).encode())
        return found.hexdigest()

    def shrink(self) -> None:
        """Remove what was not used for longest, until the folder is within its limit."""
        total = 0
        with suppress(FileNotFoundError):  # another process removes too
            for path in sorted(self.folder.glob("*.onnx"), key=lambda path: path.stat().st_mtime, reverse=True):
                total += path.stat().st_size
                if total > self.max_bytes:
                    path.unlink()


def is_plain(value: object) -> bool:
    """Whether its `repr` tells all of it."""
    return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def definitions() -> dict[str, int]:
    """Whatever the modules that are traced, and their classes, are made of, by identity: a replaced one shows."""
    found: dict[str, int] = {}
    for module in TRACED:
        owners: list[ModuleType | type] = [module]
        owners += [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for owner in owners:
            names = {k: id(v) for k, v in vars(owner).items() if not k.startswith("__")}
            found |= {f"{owner.__name__} {k}": number for k, number in names.items()}
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock against other processes. Its file stays: whoever waits for it must wait for the same file."""
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
