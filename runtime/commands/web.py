"""`icnet web`: a static site that computes co-saliency maps in the visitor's browser, with nothing sent anywhere.

The site is the files of `runtime/web`, the models, and onnxruntime-web's files. These come from its npm package, whose
version and digest are pinned here.
"""

import argparse
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import __version__
from runtime.backends.onnx_session import tensors
from runtime.commands.detector import has_sisms, sism_folder
from runtime.commands.predict import model_files, model_of
from runtime.contract import SIZE, TensorSpec
from runtime.detector_contract import INPUT, OUTPUT
from runtime.errors import DependencyError, InputError, ModelError, OutputError, printable
from runtime.files import bundled, check_outputs, check_seal, output_errors, replacing, replacing_folder, write_bytes
from runtime.groups import Group, find_groups
from runtime.predictor import Predictor

ORT = "onnxruntime-web@1.30.0"
ORT_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"  # of the package that npm downloads
ORT_FILES = (  # WebAssembly, and WebGPU for browsers that can suspend WebAssembly
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.jspi.min.mjs",
    "ort-wasm-simd-threaded.jspi.mjs",
    "ort-wasm-simd-threaded.jspi.wasm",
)
ASSETS = Path(__file__).parents[1] / "web"
CONFIG = "site.json"  # what the page reads; a folder that has it, made by this command, may be replaced
MADE_BY = "icnet web"
HEADERS = "_headers"  # as several hosts read it; `--serve` sends the same
SHOWN = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp"}  # what browsers decode
PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet web`."""
    parser.add_argument(
        "-m",
        "--model",
        type=Path,
        help="an .onnx file from icnet export (default: the one that comes with this package, if there is one); if "
        "NAME.intra.onnx and NAME.banked.onnx lie beside it, these are taken: maps appear one by one, and groups may "
        "be large",
    )
    parser.add_argument(
        "--sism-model",
        type=Path,
        help="a detector's .onnx file (default: as for --model); without it visitors bring SISMs",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the site")
    parser.add_argument(
        "--samples", type=Path, nargs="+", default=[], help="photographs to try: folders, or data sets with img/GROUP/"
    )
    parser.add_argument("-s", "--sisms", help="the samples' SISMs (a data set: default SAMPLES/sism)")
    parser.add_argument(
        "--ort", type=Path, metavar="TGZ", help=f"the npm package {ORT} as a file (default: npm downloads it, once)"
    )
    parser.add_argument(
        "--serve", type=int, nargs="?", const=PORT, metavar="PORT", help=f"then serve it on 127.0.0.1 (default {PORT})"
    )


def run(args: argparse.Namespace) -> int:
    """Build the site, and serve it if asked to.

    Raises:
        ICNetError: nothing was built.
    """
    detector = args.sism_model or bundled("detector.onnx")
    build(args.output, model_of(args), detector, _samples(args, detector is not None), args.ort)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(printable(f"{args.output}: {size / 1e6:.1f} MB; host it with the headers in {args.output / HEADERS}"))
    if args.serve is not None:
        with server(args.output, args.serve) as serving:
            print(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C stops it)", flush=True)
            serving.serve_forever()
    return 0


def build(
    output: Path, model: Path, detector: Path | None = None, samples: Sequence[Group] = (), ort: Path | None = None
) -> None:
    """Write a site: whole, or not at all.

    Args:
        output: its folder; one that is there is replaced if this command made it, or if it is empty.
        model: an .onnx file of ICNet; its bank export is taken instead if it lies beside it.
        detector: an .onnx file with input `images` uint8 [B, H, W, 3] and output `sisms` float32 [B, H, W] in [0, 1].
        samples: groups that visitors can try, with SISMs unless there is a detector.
        ort: onnxruntime-web's npm package, a .tgz file; None to have npm download it.

    Raises:
        ModelError: a model is not what it should be.
        InputError: a sample can't be shown by browsers.
        OutputError: the folder is another's, or can't be written.
        DependencyError: onnxruntime-web's package is missing, or not the pinned one.
    """
    models = _models(model)
    check = _check(models)
    if detector is not None:
        _check_detector(detector)
        models["detector"] = detector
    check_outputs((), [*models.values(), *(image for group in samples for image in group.images)], [output])
    _check_replaceable(output)
    config: dict[str, Any] = {
        "made_by": MADE_BY,
        "version": __version__,
        "models": {role: f"{role}.onnx" for role in models},
        "samples": [_sample(index, group, detector is not None) for index, group in enumerate(samples)],
    }
    files: dict[str, bytes | Path] = {f"ort/{name}": content for name, content in _ort_files(ort).items()}
    files |= {path.name: path for path in ASSETS.iterdir() if path.is_file()}
    files |= {"models/check.bin": check, CONFIG: json.dumps(config, indent=1).encode()}
    files |= {f"models/{role}.onnx": path for role, path in models.items()}
    for group, described in zip(samples, config["samples"], strict=True):
        for kind, paths in (("file", group.images), ("sism", group.sisms or ())):
            files |= {image[kind]: path for image, path in zip(described["images"], paths, strict=False)}
    with replacing_folder(output, output.absolute().parent) as site:
        for name, content in files.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(site / name, content.read_bytes() if isinstance(content, Path) else content)


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of a site on the loopback address, with the site's headers; port 0 for any free one.

    Raises:
        OutputError: the port is taken.
    """
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"--serve {port}: {reason}; choose another port") from error


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  (the base class has it so)
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Add those of the site."""
        for line in Path(self.directory, HEADERS).read_text(encoding="utf-8").splitlines()[1:]:
            self.send_header(*line.strip().split(": ", 1))
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _models(model: Path) -> dict[str, Path]:
    files = model_files(model, banks_only=False)
    chosen = {role: files[role] for role in ("intra", "banked")} if "banked" in files else files
    for path in chosen.values():
        if path.suffix.lower() != ".onnx":
            raise ModelError(f"{path}: a browser runs .onnx files only; give one from icnet export")
    return chosen


def _check(models: dict[str, Path]) -> bytes:
    """Grey levels of the maps of two images of noise, by which the page checks a browser's WebGPU.

    Raises:
        ModelError: not ICNet's, or for groups of one size only.
    """
    banks = (models["intra"], models["banked"]) if "banked" in models else None
    with Predictor(models.get("model"), bank_export=banks) as predictor:
        if predictor.packed:
            raise ModelError(f"{models['model']}: a packed export; a site takes a plain one, or a bank export")
        maps = predictor.predict_tensors(_noise(2, SIZE, SIZE, 3), _noise(2, SIZE, SIZE))
    return np.rint(maps * 255).astype(np.uint8).tobytes()


def _noise(*shape: int) -> NDArray[np.uint8]:
    """The same as in `runtime/web/engine.js`."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761)
    return ((numbers & np.uint64(0xFFFFFFFF)) >> np.uint64(13) & np.uint64(255)).astype(np.uint8).reshape(shape)


def _check_detector(path: Path) -> None:
    """Raise ModelError unless the file is a detector that the page can run."""
    check_seal(path)
    for expected, found in zip((INPUT, OUTPUT), tensors(path), strict=True):
        spec = found[0] if len(found) == 1 else TensorSpec("", "", ())
        fixed = spec.shape[3:] == expected.shape[3:] and len(spec.shape) == len(expected.shape)
        if (spec.name, spec.dtype) != (expected.name, expected.dtype) or not fixed:
            listed = ", ".join(map(str, found)) or "none"
            raise ModelError(f"{path}: not a detector for a site: expected {expected}, found {listed}")
        if isinstance(spec.shape[0], int) and spec.shape[0] != 1:
            raise ModelError(f"{path}: takes {spec.shape[0]} images at once; a site runs it on one image at a time")


def _samples(args: argparse.Namespace, detected: bool) -> list[Group]:
    groups: list[Group] = []
    for path in args.samples:
        without = detected and args.sisms is None and not has_sisms(path)
        groups += find_groups(path, None if without else sism_folder(path, args.sisms))
    return groups


def _sample(index: int, group: Group, detected: bool) -> dict[str, Any]:
    """What the page must know of a sample: its files have numbers for names, which any host takes."""
    if group.problem is not None:
        raise group.problem
    if group.sisms is None and not detected:
        raise InputError(f"{group.name}: a sample needs SISM files, or --sism-model; builtin can't be had in a browser")
    for path in (*group.images, *(group.sisms or ())):
        if path.suffix.lower() not in SHOWN:
            raise InputError(f"{path}: browsers don't show {path.suffix} files; save it as JPEG or PNG")

    def name(kind: str, i: int, path: Path) -> str:
        return f"samples/{index}/{kind}{i:03}{path.suffix.lower()}"

    images = [{"name": path.name, "file": name("", i, path)} for i, path in enumerate(group.images)]
    for i, path in enumerate(group.sisms or ()):
        images[i]["sism"] = name("sism", i, path)
    return {"name": group.name, "images": images}


def _check_replaceable(output: Path) -> None:
    """Raise OutputError if a folder is there that this command did not make."""
    with output_errors(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"{output}: not a folder; choose another --output")
        if not output.exists() or not any(output.iterdir()):
            return
        try:
            made_by = json.loads((output / CONFIG).read_text(encoding="utf-8"))["made_by"]
        except (OSError, ValueError, KeyError, TypeError):
            made_by = None
        if made_by != MADE_BY:
            raise OutputError(f"{output}: was not made by {MADE_BY} and would be replaced; choose another --output")


def _ort_files(package: Path | None) -> dict[str, bytes]:
    """The files of onnxruntime-web that a site has, by their names.

    Raises:
        DependencyError: the package can't be had, or is not the pinned one.
    """
    content = npm_package(ORT, ORT_SHA256, package)
    wanted = {f"package/dist/{name}": name for name in ORT_FILES}
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:  # in their order: going back would unpack all of it again
            if member.name in wanted and (file := archive.extractfile(member)) is not None:
                found[wanted[member.name]] = file.read()
    return found


def npm_package(name: str, sha256: str, given: Path | None = None) -> bytes:
    """The .tgz file of a package, NAME@VERSION, which npm downloads once: it is kept in the user's cache.

    Args:
        name: the package and its version.
        sha256: of the file.
        given: the file, if there is no npm to download it.

    Raises:
        DependencyError: it can't be had, or is another file.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = caches / "icnet-deploy" / f"{name.replace('@', '-')}.tgz"
    if given is None and kept.is_file() and hashlib.sha256(content := _read(kept)).hexdigest() == sha256:
        return content
    content = _read(given) if given is not None else _downloaded(name)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DependencyError(f"{given or 'npm'}: not the package {name} with SHA-256 {sha256}")
    if given is None:
        with suppress(OutputError), replacing(kept) as temporary:  # else it is downloaded again the next time
            write_bytes(temporary, content)
    return content


def _downloaded(name: str) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise DependencyError(f"{name}: npm is not installed, which downloads it; or give its .tgz file with --ort")
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
        archives = [*Path(folder).glob("*.tgz")]
        if packed.returncode or not archives:
            reason = (packed.stderr.strip().splitlines() or ["no file came"])[-1]
            raise DependencyError(f"{name}: npm pack failed: {reason}; or give its .tgz file with --ort")
        return _read(archives[0])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DependencyError(f"{path}: can't be read: {error.strerror or error}") from error
