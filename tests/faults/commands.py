"""Kinds of cases around command lines: records in the output, names, options, inputs in an output's place, resuming."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.files import bank_files
from tests.faults.damage import HOSTILE_TEXTS, damaged, hostile_json, hostile_name, hostile_text, picture
from tests.faults.lab import EVERYTHING, GROUPS, Case, Kind, Lab, command, same_tree, settle, tree, without_privileges

RECORD = "icnet.json"
PRECIOUS = b"precious"


def one_group(lab: Lab, case: Case, out: Path, *more: object) -> tuple[list[object], Path]:
    """The command line that predicts the group "cow" alone, and the undisturbed results."""
    argv = ["predict", lab.data / "img/cow", "-s", lab.data / "sism/cow", "-m", lab.models["plain"], "-t", "1"]
    expected = lab.folder / "expected/one"
    if not expected.exists():
        assert settle(command(*argv, "-o", expected))
    return [*argv, "-o", out, *more], expected


def records(lab: Lab, case: Case) -> None:
    """A damaged or planted record costs no file of others, and is not believed."""
    victims = [case.folder / "precious.txt", case.folder / "out/precious.txt", case.folder / "out/cow/mine.txt"]
    argv, expected = one_group(lab, case, case.folder / "out")
    shutil.copytree(expected, case.folder / "out")
    for victim in victims:
        victim.write_bytes(PRECIOUS)
    record = case.folder / "out/cow" / RECORD
    whole = record.read_bytes()

    def names() -> bytes:
        content = json.loads(whole)
        odd = [
            *HOSTILE_TEXTS,
            "../precious.txt",
            "../../precious.txt",
            *map(str, victims),
            "mine.txt",
            "../cow/mine.txt",
        ]
        odd += ["mine.txt", "a\0b", "\ud800", "..", ".", "", "/", "~", "x" * 5000, "icnet.json"]
        for _ in range(int(case.rng.integers(1, 4))):
            content["files"][case.one_of(odd)] = case.one_of([None, "00" * 32, 5, "", hostile_json(case)])
        case.tried += f"{sorted(content['files'])!r:.200}; "
        return json.dumps(content).encode()

    def types() -> bytes:
        content = json.loads(whole)
        content[case.one_of(sorted(content))] = hostile_json(case)
        return json.dumps(content).encode()

    def special() -> None:
        record.unlink()
        way = case.one_of(["fifo", "link", "folder", "loop", "device"])
        case.tried += f"{way}; "
        if way == "fifo":
            os.mkfifo(record)
        elif way == "folder":
            record.mkdir()
        else:
            record.symlink_to({"link": victims[0], "loop": record, "device": "/dev/zero"}[way])

    makers: list[Callable[[], bytes | None]] = [
        lambda: damaged(case, whole),
        lambda: hostile_text(case),
        types,
        names,
        names,
        special,
    ]
    content = case.one_of(makers)()
    if content is not None:
        record.write_bytes(content)
    resume = ["--resume"] * int(case.rng.integers(2))
    image = case.folder / "out/cow/00.png"
    if case.rng.random() < 0.5:  # what the record may vouch for is not what belongs there
        image.write_bytes(PRECIOUS)
    before = image.read_bytes()
    finished = settle(command(*argv, *resume))
    for victim in victims:
        assert victim.read_bytes() == PRECIOUS, f"{victim.name} was overwritten"
    if finished:
        for victim in victims[1:]:
            victim.unlink()
        same_tree(case.folder / "out", expected)
    else:
        assert image.read_bytes() == before, "refused, but overwritten"


def names(lab: Lab, case: Case) -> None:
    """Odd names of images, groups, folders, models and banks: the right result under that name, or one clean line."""
    role = case.one_of(["image", "group", "output", "model", "sisms", "bank", "missing", "damaged", "command"])
    case.tried += f"{role}; "
    name = hostile_name(case)
    source, out = case.folder / "data", case.folder / "out"
    model, more = lab.models["plain"], []
    group = name if role == "group" else "g"
    image = name if role in ("image", "damaged") else "a"
    if role == "output":
        out = case.folder / name
    for kind in ("img", "sism"):
        (source / kind / group).mkdir(parents=True)
        picture(case).convert("RGB" if kind == "img" else "L").save(source / kind / group / "b.png")
        content = (source / kind / group / "b.png").read_bytes()
        if role == "damaged" and kind == "img":
            content = content[:-30]
        (source / kind / group / f"{image}.png").write_bytes(content)
    if role == "model":
        model = case.folder / f"{name}{case.one_of(['.onnx', '', '.mnn', '.pth'])}"
        shutil.copy(lab.models["plain"], model)
    if role == "missing":
        model = case.folder / name
    if role == "sisms":
        more = ["-s", case.folder / name]
    if role == "bank":
        model = lab.models["bank"]
        more = ["--bank", case.folder / f"{name}.npz"]
        if case.rng.random() < 0.5:
            shutil.copy(lab.bank, more[1])
    argv = ["predict", source, "-m", model, "-o", out, "-t", "1", *more]
    if role == "command":
        argv.insert(int(case.rng.integers(len(argv) + 1)), name)
        done = command(*argv)
        if done.code == 0 and ("-h" in name or name == ""):
            return
        settle(done, lines=None)
        return
    hidden = role in ("image", "group") and name.startswith(".")
    if settle(command(*argv)):
        shown = [] if hidden and role == "group" else ["b.png", RECORD, "contact_sheet.jpg"]
        wanted = {f"{group}/{n}" for n in (*shown, *([] if hidden else [f"{image}.png"]))}
        assert set(tree(out)) == wanted, f"{sorted(tree(out))} for {sorted(wanted)}"
    else:
        assert role not in ("image", "group", "output") or hidden, "refused a name that the system takes"


def arguments(lab: Lab, case: Case) -> None:
    """Random command lines: each does what it says, or ends with one line."""
    names = [
        "predict",
        "bank",
        "export",
        "build",
        "calibrate",
        "evaluate",
        "train",
        "data paste",
        "nonsense",
    ]
    words = case.one_of(names).split()
    fifo, folder = case.folder / "fifo", case.folder / "folder"
    os.mkfifo(fifo)
    folder.mkdir()
    values = ["", ".", "/", "-1", "0", "1e9", "nan", "x", "/dev/null", "/no/such", "/proc/self/mem", "a\udcffb"]
    values += [fifo, folder]
    values += [lab.models["plain"], lab.data / "img/cow", lab.data / "img/cow/00.png", *HOSTILE_TEXTS[:6]]
    options = "-m --model -o --output -s --sisms -t --threads --resume --pack --bank --onnx --checkpoint --max --groups"
    options = [*options.split(), *["--models", "--plot", "--cache", "--backend", "--network", "--io", "--no"]]
    if words[0] in ("predict", "bank") and case.rng.random() < 0.7:  # almost right
        mode = "bank" if words[0] == "bank" else "plain"
        words += [case.one_of([lab.data / "img/cow", case.one_of(values)]), "-s", lab.data / "sism/cow"]
        words += ["-m", case.one_of([lab.models[mode], case.one_of(values)])]
        words += [
            "-o",
            case.one_of([folder / "out", case.one_of([fifo, folder, "/dev/null", "", "/no/such/../..", "/proc/x"])]),
        ]
    for _ in range(int(case.rng.integers(0, 4))):
        words += [case.one_of(options), case.one_of(values)][: int(case.rng.integers(1, 3))]
    if any(str(word) in ("-o", "--output", "--plot", "--cache") for word in words[-1:]):
        words.pop()
    case.tried += " ".join(repr(str(word)) for word in words)
    here = Path.cwd()
    os.chdir(folder)
    before = tree(lab.data)
    try:
        settle(command(*words), lines=None)
    finally:
        os.chdir(here)
    assert tree(lab.data) == before, "changed its inputs"


def overwrites(lab: Lab, case: Case) -> None:
    """Nothing that a run reads is written by it, whatever its role and however its name is spelt."""
    data = case.folder / "data"
    shutil.copytree(lab.data, data)
    shutil.copytree(data / "sism", data / "gt")
    models = case.folder / "models"
    shutil.copytree(lab.models["plain"].parent, models)
    for file in bank_files(lab.models["bank"]):
        shutil.copy(file, models / file.name)
    bank = models / "bank.npz"
    shutil.copy(lab.bank, bank)
    model, intra, banked = models / "icnet.onnx", *bank_files(models / "icnet.onnx")
    sism, image, truth = (data / kind / "cow/00.png" for kind in ("sism", "img", "gt"))
    (data / "img/contact_sheet").mkdir()
    one = ["-s", data / "sism/cow", "-t", "1"]
    evaluate = ["evaluate", data, "--models", model]
    runs: list[tuple[list[object], str, Path]] = [
        *((["bank", data / "img/cow", *one, "-m", model], "-o", file) for file in (model, intra, banked, sism, image)),
        *((evaluate, option, file) for option in ("-o", "--plot") for file in (model, sism, image, truth)),
        *((["predict", data / "img/cow", *one, "-m", model], "-o", folder) for folder in (data / "img", data / "sism")),
        (["predict", data / "img/cow", *one, "-m", model, "--bank", bank], "-o", data / "img"),
    ]
    shutil.rmtree(data / "img/contact_sheet")
    argv, option, file = runs[case.seed % len(runs)]
    way = case.one_of(
        ["as it is", "link", "dots", "relative", "hard link"] if file.is_file() else ["as it is", "link", "dots"]
    )
    case.tried += f"{argv[0]} {option} {file.relative_to(case.folder)}, {way}; "
    target: Path = file
    if way in ("link", "hard link"):
        target = case.folder / f"other{file.suffix}"
        target.hardlink_to(file) if way == "hard link" else target.symlink_to(file)
    elif way == "dots":
        target = file.parent / ".." / file.parent.name / file.name
    elif way == "relative":
        target = Path(os.path.relpath(file))
    before = tree(data) | tree(models)
    done = settle(command(*argv, option, target))
    assert tree(data) | tree(models) == before, "an input was overwritten"
    assert not done or way == "hard link", "an input was accepted as the output"


def resume(lab: Lab, case: Case) -> None:
    """Whatever changes between two runs, --resume gives what a new run gives; and nothing is computed twice."""
    mode = case.one_of(["plain", "packed", "chunked", "bank", "plain with banks"])
    data, models = case.folder / "data", case.folder / "models"
    for kind in ("img", "sism"):
        for group in ("bee", "cow"):
            shutil.copytree(lab.data / kind / group, data / kind / group)
    models.mkdir()
    for file in lab.exports.parent.glob("*.onnx"):
        if mode == "plain with banks" or file.name in {f.name for f in lab.models[_mode(mode)].parent.iterdir()}:
            shutil.copy(file, models / file.name)
    bank = case.folder / "bank.npz"
    shutil.copy(lab.bank, bank)
    argv = ["predict", data, "-m", models / lab.models[_mode(mode)].name, "-t", "1"]
    argv += ["--pack"] * (mode == "packed") + (["--bank", bank] if mode == "bank" else [])
    everything = case.rng.random() < 0.5
    argv += ["--write", EVERYTHING] * everything
    out, fresh = case.folder / "out", case.folder / "fresh"
    assert settle(command(*argv, "-o", out))
    image = data / "img/cow/00.png"
    used = {"bank": ["icnet.banked.onnx"], "chunked": ["icnet.intra.onnx", "icnet.banked.onnx"]}
    files = used.get(mode, [lab.models[_mode(mode)].name])

    def other_models() -> None:
        for file in models.iterdir():
            shutil.copy(lab.other().with_name(file.name), file)
        if mode == "bank":  # and its bank with it
            settle(command("bank", data / "img/bee", "-s", data / "sism/bee", "-m", models / "icnet.onnx", "-o", bank))

    def swapped(kind: str) -> None:
        (data / kind / "cow/00.png").write_bytes((lab.data / kind / "elk/00.png").read_bytes())

    changes: dict[str, Callable[[], Any]] = {
        "image": lambda: swapped("img"),
        "SISM": lambda: swapped("sism"),
        "models": other_models,
        "image removed": lambda: (image.unlink(), (data / "sism/cow/00.png").unlink()),
        "map damaged": lambda: (out / "cow/00.png").write_bytes(damaged(case, (out / "cow/00.png").read_bytes())),
        "map removed": lambda: (out / "bee/01.png").unlink(),
        "sheet truncated": lambda: os.truncate(out / "bee/contact_sheet.jpg", 2048),
        "record removed": lambda: shutil.rmtree(out / "bee"),
        "model rewritten": lambda: [shutil.copy(models / f, models / f"{f}.tmp").replace(models / f) for f in files],
        "nothing": lambda: None,
    }
    if everything:
        changes |= {
            "cut-out truncated": lambda: os.truncate(out / "cow/cutouts/00.png", 100),
            "mask removed": lambda: (out / "bee/masks/01.png").unlink(),
            "boxes edited": lambda: (out / "bee/boxes.json").write_text("{}"),
            "masks not asked for": lambda: argv.__setitem__(argv.index(EVERYTHING), "maps,cutouts"),
        }
    what = case.one_of(changes)
    case.tried += f"{mode}{', everything' * everything}: {what}; "
    changes[what]()
    times = {name: (out / name).stat().st_mtime_ns for name in tree(out)}
    done = command(*argv, "-o", out, "--resume")
    assert settle(done, lines=None), done
    assert settle(command(*argv, "-o", fresh))
    same_tree(out, fresh)
    if what in ("nothing", "model rewritten"):
        assert times == {name: (out / name).stat().st_mtime_ns for name in tree(out)}, "computed again"


def _mode(mode: str) -> str:
    return "plain" if mode == "plain with banks" else mode


def groups(lab: Lab, case: Case) -> None:
    """Groups that fail, in any way, do not stop the others, and cost no file of the user's."""
    data, out = case.folder / "data", case.folder / "out"
    shutil.copytree(lab.data, data)
    mine: dict[Path, bytes] = {}
    ways = ["unreadable", "locked output", "damaged", "no SISM", "user's file", "file", "two names"]
    bad = {group: case.one_of(ways) for group in sorted(GROUPS) if case.rng.random() < 0.4}
    case.tried += f"{bad}; "
    for group, kind in bad.items():
        folder, first = data / "img" / group, data / "img" / group / "00.png"
        if kind == "damaged":
            first.write_bytes(first.read_bytes()[:60])
        elif kind == "no SISM":
            (data / "sism" / group / "00.png").unlink()
        elif kind in ("user's file", "locked output"):
            (out / group).mkdir(parents=True)
        elif kind == "file":
            out.mkdir(exist_ok=True)
            (out / group).write_bytes(PRECIOUS)
            mine[out / group] = PRECIOUS
        elif kind == "two names":
            shutil.copy(first, folder / "00.bmp")
        if kind == "user's file":
            mine[out / group / "00.png"] = PRECIOUS
            (out / group / "00.png").write_bytes(PRECIOUS)
    expected = lab.expected("plain")  # and all is imported, which nobody may not be allowed to
    Image.init()
    with without_privileges(case.folder):
        for group, kind in bad.items():
            if kind in ("unreadable", "locked output"):
                (data / "img" / group if kind == "unreadable" else out / group).chmod(0)
        try:
            argv = ["predict", data, "-m", lab.models["plain"], "-t", "1", "-o", out]
            for again in range(2):  # the second run meets what the first left
                done = command(*argv, *["--resume"] * again)
                assert settle(done, lines=None) == (not bad), done
                errors = sum(": error: " in line for line in done.lines)
                assert errors == len(bad), f"{errors} errors for {len(bad)} bad groups: {done.err}"
        finally:
            for group, kind in bad.items():
                if kind in ("unreadable", "locked output"):
                    (data / "img" / group if kind == "unreadable" else out / group).chmod(0o755)
    for path, content in mine.items():
        assert path.read_bytes() == content, f"the user's {path.name} was overwritten"
    for group in sorted({*GROUPS} - {*bad}):
        same_tree(out / group, expected / group)


def mended(lab: Lab, case: Case) -> None:
    """A group fails; its files appear from elsewhere; the next run must not take them for its own (or lose any)."""
    data, out = case.folder / "data", case.folder / "out"
    for kind in ("img", "sism"):
        shutil.copytree(lab.data / kind / "cow", data / kind / "cow")
    first = data / "img/cow" / case.one_of(["00.png", "01.jpg"])
    whole = first.read_bytes()
    first.write_bytes(whole[:60])
    argv = ["predict", data, "-m", lab.models["plain"], "-t", "1", "-o", out]
    assert not settle(command(*argv), lines=None)
    mine = out / "cow" / case.one_of(["00.png", "01.png", "contact_sheet.jpg"])
    mine.parent.mkdir(parents=True, exist_ok=True)
    case.tried += f"{first.name} damaged, {mine.name} planted; "
    mine.write_bytes(PRECIOUS)
    first.write_bytes(whole)
    settle(command(*argv, *["--resume"] * int(case.rng.integers(2))), 2, lines=None)
    assert mine.read_bytes() == PRECIOUS, "the user's file was overwritten"
    mine.unlink()
    assert settle(command(*argv, "--resume"))
    same_tree(out / "cow", lab.expected("plain") / "cow")


KINDS = (
    Kind("records", "damaged and planted records in the output folder", records, 40, 600),
    Kind("names", "odd names of images, groups, folders, models and banks", names, 30, 500),
    Kind("arguments", "random command lines", arguments, 30, 500),
    Kind("overwrites", "inputs in an output's place", overwrites, 16, 160),
    Kind("resume", "a change between two runs, then --resume", resume, 4, 150),
    Kind("groups", "data sets with groups that fail", groups, 4, 100),
    Kind("mended", "a group that failed and a user's file in its place", mended, 2, 30),
)
