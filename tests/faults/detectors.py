"""Kinds of cases around detectors: damaged and foreign files, NaN, and what changes between a run and its resuming."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from runtime.files import bank_files
from tests.faults.damage import damaged, picture, unusable
from tests.faults.lab import Case, Kind, Lab, captured, command, ended, part_of, same_tree, settle, start, tree
from tests.runtime.detectors import detector_file

SUFFIXES = (".onnx", ".xml", ".mnn")


def built(lab: Lab, suffix: str) -> Path:
    """The lab's detector for an engine, as `icnet build` makes it."""
    from export.to_mnn import build_mnn
    from export.to_openvino import build_openvino

    path = lab.detector.with_suffix(suffix)
    if not path.exists():
        with captured():
            (build_mnn if suffix == ".mnn" else build_openvino)(lab.detector, path)
    return path


def chain(lab: Lab, detector: Path, out: Path, *more: object) -> list[object]:
    """The command line that predicts the group "cow" from its images alone."""
    argv = ["predict", lab.data / "img/cow", "-m", lab.models["plain"], "--sism-model", detector, "-t", "1"]
    return [*argv, "--keep-sisms", "-o", out, *more]


def undisturbed(lab: Lab, name: str, detector: Path) -> Path:
    """What a detector gives, in a folder that is made once."""
    out = lab.folder / "expected" / name
    if not out.exists():
        assert settle(command(*chain(lab, detector, out)), lines=None)
    return out


def alike(found: Path, expected: Path) -> None:
    """Assert that two runs wrote the same maps and SISMs, but for their roundings."""
    names = [sorted(name for name in tree(folder) if name.endswith(".png")) for folder in (found, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = (np.asarray(Image.open(folder / name), int) for folder in (found, expected))
        assert np.abs(one - other).max() <= 1, f"{name}: wrong without a word"


def damaged_detectors(lab: Lab, case: Case) -> None:
    """A damaged detector is refused in one line, or gives the SISMs that it gave."""
    suffix = SUFFIXES[case.seed % 3]
    whole = built(lab, suffix)
    expected = undisturbed(lab, f"detector{suffix}", whole)
    for file in (whole, whole.with_suffix(".bin")):
        if file.exists():
            shutil.copy(file, case.folder / file.name)
    path = spoilt = case.folder / whole.name
    if suffix == ".xml" and case.rng.random() < 0.3:
        spoilt = path.with_suffix(".bin")
    spoilt.write_bytes(damaged(case, spoilt.read_bytes()))
    case.tried += f"of {spoilt.name}; "
    out = case.folder / "out"
    argv = chain(lab, path, out)
    # MNN can crash, which a process of its own shows
    if settle(ended(start(*argv)) if suffix == ".mnn" else command(*argv)):
        alike(out, expected)
    else:
        assert not out.exists(), "refused, but wrote something"


def foreign_detectors(lab: Lab, case: Case) -> None:
    """Other files in a detector's place, and detectors in the model's: one line, and nothing is written."""
    path = case.folder / case.one_of(["d.onnx", "d.mnn", "d.xml", "d.engine", "d.pth", "d", "u2net.ONNX"])

    def edited() -> None:
        model = onnx.load(lab.detector)
        onnx.helper.set_model_props(model, {})
        shape = model.graph.input[0].type.tensor_type.shape
        edits: list[Callable[[], Any]] = [
            model.graph.input.pop,
            model.graph.output.pop,
            model.graph.node.pop,
            lambda: model.graph.initializer.pop(0),
            lambda: model.graph.input.append(onnx.helper.make_tensor_value_info("b", 1, [1, 3, 8, 8])),
            lambda: setattr(shape.dim[3], "dim_value", 4),
            lambda: setattr(shape.dim[1], "dim_value", case.one_of([8193, 10**6, 2**40])),
            lambda: setattr(model.graph.node[-1], "op_type", case.one_of(["Sigmod", "", "ReduceL2"])),
            lambda: setattr(model.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.INT64),
            lambda: setattr(model.opset_import[0], "version", 10**6),
        ]
        which = int(case.rng.integers(len(edits)))
        edits[which]()
        case.tried += f"edit {which}; "
        path.write_bytes(model.SerializeToString())

    icnets = [lab.models["plain"], lab.models["packed"], *bank_files(lab.models["bank"])]
    makers: list[Callable[[], Any]] = [
        edited,
        edited,
        edited,
        lambda: shutil.copy(case.one_of(icnets), path),
        lambda: shutil.copy(case.one_of([lab.checkpoint, lab.bank, lab.data / "img/ant/00.png"]), path),
        *unusable(case, path),
    ]
    out = case.folder / "out"
    if case.rng.random() < 0.2:
        role = "model"
        path = built(lab, case.one_of(SUFFIXES))
        argv = ["predict", lab.data / "img/cow", "-m", path, "--sism-model", lab.detector, "-t", "1", "-o", out]
    else:
        role = "detector"
        which = int(case.rng.integers(len(makers)))
        makers[which]()
        case.tried += f"maker {which}; "
        argv = chain(lab, path, out)
    case.tried += f"{path.name} as {role}; "
    done = settle(command(*argv), lines=None)
    assert not done, "ran a file that is no such model"
    assert not out.exists(), "wrote something"


def changed_chains(lab: Lab, case: Case) -> None:
    """A detector's file, its settings or an image change before a run is resumed: then it is as if run anew."""
    detector = shutil.copy(lab.detector, case.folder / "d.onnx")
    data = shutil.copytree(lab.data / "img/cow", case.folder / "cow")
    out, anew = case.folder / "out", case.folder / "anew"
    argv = ["predict", data, "-m", lab.models["plain"], "--sism-model", detector, "-t", "1", "--keep-sisms"]
    assert settle(command(*argv, "-o", out), lines=None)
    change = case.one_of(["file", "settings", "image", "kept SISM", "nothing"])
    case.tried += f"{change}; "
    if change == "file":
        lab.make_detector(detector, bias=float(case.rng.uniform(-1, 1)))
    elif change == "settings":
        argv.append("--sism-minmax")
    elif change == "image":
        picture(case).save(data / "00.png")
    elif change == "kept SISM":
        kept = out / "cow/sisms/00.png"
        kept.write_bytes(damaged(case, kept.read_bytes()))
    assert settle(command(*argv, "-o", out, "--resume"), lines=None)
    assert settle(command(*argv, "-o", anew), lines=None)
    same_tree(out, anew)


def nan_chains(lab: Lab, case: Case) -> None:
    """A detector that computes NaN for some images: their groups fail by the images' names, the others are written."""
    detector = detector_file(
        case.folder / "modnet.onnx", tail="Sqrt", bias=0.0, weights=np.array([1, 1, -9.0]), size=(8, 8)
    )
    bad = [name for name in ("ant", "bee", "cow") if case.rng.random() < 0.5]
    source = case.folder / "data/img"
    for group in ("ant", "bee", "cow"):
        (source / group).mkdir(parents=True)
        Image.new("RGB", (30, 20), (200, 90, 0)).save(source / group / "a.png")
        Image.new("RGB", (30, 20), (0, 0, 250) if group in bad else (90, 200, 0)).save(source / group / "b.png")
    case.tried += f"{bad}; "
    argv = ["predict", source.parent, "-m", lab.models["plain"], "--sism-model", detector, "-t", "1"]
    argv += ["--sism-normalise", "unit", "--sism-minmax"]
    expected, out = case.folder / "expected/out", case.folder / "out"
    done = command(*argv, "-o", out)
    assert settle(done, lines=None) == (not bad), done
    for group in ("ant", "bee", "cow"):
        named = f"{source / group / 'b.png'}: the detector {detector} computed NaN" in done.err
        assert named == (group in bad), done
        left = [name for name in tree(out / group) if name != "icnet.json"]  # an unfinished group's claims nothing
        assert (left == []) == (group in bad), (group, left)
    for group in bad:
        Image.new("RGB", (30, 20), (90, 200, 0)).save(source / group / "b.png")
    part = shutil.copytree(out, case.folder / "part") if out.exists() else None
    assert settle(command(*argv, "-o", out, "--resume"), lines=None)
    assert settle(command(*argv, "-o", expected), lines=None)
    same_tree(out, expected)
    if part is not None:
        part_of(part, expected, hidden=False)


KINDS = (
    Kind("detectors", "damaged detectors: ONNX, OpenVINO and MNN files", damaged_detectors, 6, 180),
    Kind(
        "foreign-detectors",
        "other files in a detector's place, and the other way round",
        foreign_detectors,
        6,
        100,
    ),
    Kind("changed-chains", "photographs to maps, something changed, then resumed", changed_chains, 3, 60),
    Kind("nan-chains", "a detector that computes NaN for some images, then resumed with others", nan_chains, 2, 30),
)
