"""`icnet predict`: folders of images in, folders of co-saliency maps and contact sheets out."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.contact_sheet import contact_sheet
from runtime.errors import ICNetError, InputError, OutputError
from runtime.files import remove, replacing
from runtime.groups import Group, find_groups
from runtime.predictor import Predictor
from runtime.preprocess import image_tensor, restore_map, sism_tensor
from runtime.sisms import builtin_sism

BUILTIN = "builtin"
SETTINGS = "icnet.json"  # in the output folder: what its results were made with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `icnet predict`."""
    parser.add_argument("path", type=Path, help="a folder of images (one group), or a data set with img/GROUP/ folders")
    parser.add_argument("--model", type=Path, required=True, help="an exported model, e.g. icnet.onnx")
    parser.add_argument(
        "--sisms",
        metavar="DIR",
        help="folder with a SISM NAME.png per image (a data set: GROUP/NAME.png; default PATH/sism); "
        f"or '{BUILTIN}': OpenCV's static saliency, a weak stand-in",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for GROUP/NAME.png maps and GROUP.jpg sheets"
    )
    parser.add_argument("--resume", action="store_true", help="keep the groups that are finished there")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Predict every group at `args.path`; a group that fails is reported and does not stop the others.

    Returns:
        0, or 2 if any group failed.

    Raises:
        ICNetError: nothing could be started.
    """
    sisms = _sism_folder(args.path, args.sisms)
    groups = find_groups(args.path, sisms)
    _refuse_overwriting(groups, args.output)
    console = Console(stderr=True)
    failed = 0
    with Predictor(args.model, threads=args.threads) as predictor:
        settings = {
            "path": str(args.path.resolve()),
            "sisms": BUILTIN if sisms is None else str(sisms.resolve()),
            "model_sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        }
        if args.resume:
            _check_settings(args.output, settings)
        todo = [g for g in groups if not (args.resume and _finished(g, args.output))]
        for group in todo:  # a sheet says that its group is finished
            remove(_sheet_path(group, args.output))
        with replacing(args.output / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        if len(todo) < len(groups):
            console.print(f"{len(groups) - len(todo)} of {len(groups)} groups are finished already")
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        ) as progress:
            bar = progress.add_task("groups", total=len(todo))
            for group in todo:
                progress.update(bar, description=group.name)
                try:
                    predict_group(predictor, group, args.output)
                except ICNetError as error:
                    failed += 1
                    console.print(f"icnet: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
                progress.advance(bar)
    if failed and len(todo) > 1:
        console.print(f"{failed} of {len(todo)} groups failed; mend them and go on with --resume")
    if failed < len(todo):
        name = groups[0].name if len(groups) == 1 else "GROUP"
        print(f"maps: {args.output / name}/*.png, contact sheet: {args.output / name}.jpg")
    return 2 if failed else 0


def predict_group(predictor: Predictor, group: Group, output: Path) -> None:
    """Write `output`/GROUP/NAME.png for every image (8-bit grey, its own size), then the sheet `output`/GROUP.jpg.

    The sheet is written last: where it is, the group is finished.
    """
    images, sizes = zip(*map(image_tensor, group.images), strict=True)
    sisms = [builtin_sism(i) for i in images] if group.sisms is None else [sism_tensor(s) for s in group.sisms]
    maps = predictor.predict_tensors(np.stack(images), np.stack(sisms))
    for source, tensor, size in zip(group.images, maps, sizes, strict=True):
        grey = np.rint(restore_map(tensor, size) * 255).astype(np.uint8)
        with replacing(_map_path(group, source, output)) as temporary:
            Image.fromarray(grey).save(temporary)
    sheet = contact_sheet(np.stack(images), np.stack(sisms), maps, sizes, group.name)
    with replacing(_sheet_path(group, output)) as temporary:
        sheet.save(temporary, quality=90)


def _map_path(group: Group, image: Path, output: Path) -> Path:
    return output / group.name / f"{image.stem}.png"


def _sheet_path(group: Group, output: Path) -> Path:
    return output / f"{group.name}.jpg"


def _finished(group: Group, output: Path) -> bool:
    return _sheet_path(group, output).exists() and all(_map_path(group, i, output).exists() for i in group.images)


def _sism_folder(path: Path, sisms: str | None) -> Path | None:
    if sisms == BUILTIN:
        return None
    if sisms is not None:
        return Path(sisms)
    if (path / "img").is_dir() and (path / "sism").is_dir():
        return path / "sism"
    raise InputError(f"{path}: no SISMs: name their folder with --sisms DIR, or take --sisms {BUILTIN}")


def _refuse_overwriting(groups: list[Group], output: Path) -> None:
    """An output folder inside the data must not cost anybody an image."""
    inputs = {path.resolve() for group in groups for path in (*group.images, *(group.sisms or ()))}
    for group in groups:
        for path in (*(_map_path(group, image, output) for image in group.images), _sheet_path(group, output)):
            if path.resolve() in inputs:
                raise OutputError(f"{path}: the output would overwrite this input; choose another --output folder")


def _check_settings(output: Path, settings: dict[str, str]) -> None:
    """Refuse to resume what was made with anything else."""
    path = output / SETTINGS
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
        changed = [key for key, value in settings.items() if before.get(key) != value]
    except (OSError, ValueError, AttributeError):  # unreadable, not JSON, not an object
        changed = list(settings)
    if changed:
        raise OutputError(
            f"{path}: the results there were made with another {', '.join(changed)}; "
            "leave --resume out to make them anew, or choose another --output folder"
        )
