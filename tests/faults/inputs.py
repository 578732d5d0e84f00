"""Kinds of cases around what is read: images, arrays, models, checkpoints, banks, calibration caches, arguments."""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from runtime import Bank, ICNetError, InputError, ModelError, Predictor
from runtime.contract import SIZE
from runtime.files import bank_files
from runtime.preprocess import restore_map, upright_size
from tests.faults.damage import (
    HOSTILE_TEXTS,
    damaged,
    encoded,
    hostile_array,
    hostile_json,
    hostile_text,
    npy,
    npz,
    picture,
    unusable,
)
from tests.faults.lab import Case, Kind, Lab, attempt, captured, command, ended, message, part_of, settle, start

WHOLE = 8  # of so many image files one is whole
MOST_PIXELS = 2_000_000  # a damaged header can claim more; what follows takes time


def plainly(content: bytes) -> Image.Image:
    """An image as Pillow alone reads it, upright, RGB over white: what ours must agree with."""
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def expected_maps(lab: Lab, images: list[Image.Image], sisms: list[Image.Image]) -> list[NDArray[np.float32]]:
    """The maps of images that were decoded already."""
    resized = [
        [np.asarray(i.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for i in each] for each in (images, sisms)
    ]
    maps = lab.predictor.predict_tensors(np.stack(resized[0]), np.stack(resized[1]))
    return [restore_map(one, image.size) for one, image in zip(maps, images, strict=True)]


def images(lab: Lab, case: Case, in_memory: bool = False) -> None:
    """A damaged image is refused, or read as Pillow reads it."""
    Image.MAX_IMAGE_PIXELS, kept = MOST_PIXELS, Image.MAX_IMAGE_PIXELS
    try:
        suffix, content = encoded(case)
        whole = case.seed // 40 % WHOLE == 0
        content = content if whole else damaged(case, content)
        path = case.folder / f"a{suffix}"
        path.write_bytes(content)
        sism = picture(case).convert("L")
        source = case.one_of([content, io.BytesIO(content)]) if in_memory else path
        # libtiff writes to standard error by itself; the commands, whose process is their own, stop that
        found, error = attempt(lambda: lab.predictor([source], [sism]), quiet="TIFF" not in case.tried)
        if not in_memory and case.rng.random() < 0.1:
            sism.save(case.folder / "sism.png")
            argv = ["predict", path, "-s", case.folder / "sism.png", "-m", lab.models["plain"], "-t", "1"]
            done = settle(command(*argv, "-o", case.folder / "out"))
            assert done == (error is None), f"the command and the call differ: {error}"
        with captured():
            try:
                image = plainly(content)
                reason = None
            except Exception as pillows:
                image, reason = None, pillows
        if error is not None:
            assert ("images[0]" if in_memory else str(path)) in str(error), error
            assert not whole or "LAB" in case.tried or "SPIDER" in case.tried, error
            return
        exact = not any(f"{mode} ." in case.tried for mode in ("I;16", "F"))  # which Pillow alone cuts off at 255
        assert image is not None or not exact, f"was read, although Pillow refuses it: {reason}"
        if image is not None:
            assert found[0].shape == image.size[::-1]
            size = upright_size(path)
            assert size == image.size, f"upright_size is {size} of {image.size}"
            if exact and image.mode == "RGB":
                np.testing.assert_array_equal(found[0], expected_maps(lab, [image], [sism])[0])
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def images_in_memory(lab: Lab, case: Case) -> None:
    """The same from bytes and from a BytesIO."""
    images(lab, case, in_memory=True)


def sources(lab: Lab, case: Case) -> None:
    """Arrays, PIL images and anything else, as an image or a SISM: refused by name, or run."""

    def pil() -> Any:
        image = picture(case).convert(
            case.one_of(["RGB", "L", "P", "1", "RGBA", "LA", "I", "F", "CMYK", "HSV", "YCbCr"])
        )
        odd = [
            b"",
            b"\0" * 900,
            (1, 2),
            (1, 2, 3),
            (300, -1, 2),
            "red",
            -1,
            256,
            1.5,
            None,
            [1],
            float("nan"),
            object(),
        ]
        image.info["transparency"] = case.one_of(odd)
        image.info["exif"] = case.one_of([b"", b"Exif\0\0II*\0", b"no", case.rng.bytes(40), None, 7])
        case.tried += f"PIL {image.mode} {image.info}; "
        return image

    def closed() -> Any:
        file = io.BytesIO()
        picture(case).save(file, "PNG", pnginfo=PngInfo())
        image = Image.open(file)
        file.close()
        return case.one_of([image, file])

    anything = [
        None,
        5,
        "",
        ".",
        "/dev/null",
        b"",
        b"x",
        object(),
        [],
        {},
        "no\nsuch",
        Path("/"),
        int,
        io.StringIO("x"),
        "a\0b",
    ]
    make = case.one_of(
        [lambda: hostile_array(case), lambda: hostile_array(case), pil, closed, lambda: case.one_of(anything)]
    )
    source = make()
    case.tried += f"{type(source).__name__}; "
    good = picture(case)
    place = int(case.rng.integers(2))
    case.tried += f"as {('image', 'SISM')[place]}; "
    pair = [[good, good], [good, good]]
    pair[place][1] = source
    found, error = attempt(lambda: lab.predictor(*pair))
    if error is None:
        assert [one.dtype == np.float32 and 0 <= one.min() <= one.max() <= 1 for one in found] == [True, True]
        assert found[0].shape == good.size[::-1]
        if place == 0 and isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
            plain = Image.fromarray(np.ascontiguousarray(source))
            np.testing.assert_array_equal(found[1], expected_maps(lab, [good, plain], [good.convert("L")] * 2)[1])


def models(lab: Lab, case: Case) -> None:
    """A damaged ONNX file is refused, or computes what it computed."""
    role = case.one_of(["plain", "packed", "intra", "banked"])
    files = {"plain": lab.models["plain"], "packed": lab.models["packed"]}
    files |= dict(zip(("intra", "banked"), bank_files(lab.models["bank"]), strict=True))
    path = case.folder / files[role].name
    path.write_bytes(damaged(case, files[role].read_bytes()))
    case.tried += f"of {role}; "

    def run() -> Any:
        bank = tuple(path if file == files[role] else file for file in (files["intra"], files["banked"]))
        given = {"bank_export": bank} if role in ("intra", "banked") else {"model": path}
        with Predictor(**given, threads=1, verify=True) as predictor:
            return predictor(group, sisms)

    group, sisms = sorted((lab.data / "img/cow").iterdir()), lab.sisms("cow")
    found, error = attempt(run)
    if error is None:
        for one, expected in zip(found, lab.predictor(group, sisms), strict=True):
            assert np.abs(one - expected).max() < 1e-5, "wrong maps without a word"
    else:
        assert isinstance(error, ModelError), repr(error)
        assert str(path) in str(error), error


def foreign_models(lab: Lab, case: Case) -> None:
    """Other files in a model's place: the command says so in one line and writes nothing."""
    path = case.folder / case.one_of(["m.onnx", "m.mnn", "m.engine", "m.plan", "m.pth", "m", "m.ONNX"])

    def edited() -> None:
        model = onnx.load(lab.models["plain"])
        edits: list[Callable[[], Any]] = [
            lambda: model.graph.input.pop(),
            lambda: model.graph.output.pop(),
            lambda: model.graph.ClearField("node"),
            lambda: model.graph.node.pop(),
            lambda: model.graph.initializer.pop(),
            lambda: setattr(model.graph.input[0], "name", case.one_of(HOSTILE_TEXTS)),
            lambda: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 7),
            lambda: setattr(model.graph.output[0].type.tensor_type, "elem_type", onnx.TensorProto.INT64),
            lambda: setattr(model, "ir_version", 10**6),
            lambda: setattr(model.opset_import[0], "version", 10**6),
            lambda: setattr(model.graph.node[3], "op_type", case.one_of(HOSTILE_TEXTS)),
            lambda: model.graph.initializer[2].ClearField("raw_data"),
        ]
        case.one_of(edits)()
        path.write_bytes(model.SerializeToString())

    makers: list[Callable[[], Any]] = [
        edited,
        edited,
        edited,
        *unusable(case, path),
        lambda: shutil.copy(lab.data / "img/ant/00.png", path),
        lambda: shutil.copy(lab.bank, path),
        lambda: shutil.copy(bank_files(lab.models["bank"])[0], path),
    ]
    which = int(case.rng.integers(len(makers)))
    makers[which]()
    case.tried += f"{path.name}: maker {which}; "
    out = case.folder / "out"
    done = settle(command("predict", lab.data / "img/cow", "-s", lab.data / "sism/cow", "-m", path, "-o", out))
    assert not done or path.suffix == "", "ran a file that is no model"
    assert done or not out.exists(), "wrote something"


def mnn_models(lab: Lab, case: Case) -> None:
    """A damaged MNN file, in a process of its own, is refused, or computes what it computed."""
    path = case.folder / "icnet.mnn"
    whole = lab.mnn.read_bytes()
    path.write_bytes(damaged(case, whole))
    arguments = ["predict", lab.data / "img/cow", "-s", lab.data / "sism/cow", "-t", "1"]
    reference = lab.folder / "expected-mnn"
    if not reference.exists():
        assert settle(ended(start(*arguments, "-m", lab.mnn, "-o", reference)))
    if settle(ended(start(*arguments, "-m", path, "-o", case.folder / "out"))):
        for name in ("00.png", "01.png"):
            found, expected = (Image.open(f / "cow" / name) for f in (case.folder / "out", reference))
            assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1, "wrong maps without a word"
    else:
        part_of(case.folder / "out", reference, hidden=False)


def checkpoints(lab: Lab, case: Case) -> None:
    """A damaged or foreign checkpoint is refused, or has the weights that it had."""
    import torch

    from export.checkpoint import load_checkpoint

    path = case.folder / "icnet.pth"
    whole = torch.load(lab.checkpoint, weights_only=True)
    name = case.one_of(list(whole["state_dict"]))
    hostile: list[Callable[[], Any]] = [
        lambda: whole["state_dict"].pop(name),
        lambda: whole["state_dict"].update({name: whole["state_dict"][name].to(torch.complex64)}),
        lambda: whole["state_dict"].update({name: torch.zeros(0)}),
        lambda: whole["state_dict"].update({name: torch.zeros(1).expand(10**9)}),
        lambda: whole["state_dict"].update({name: whole["state_dict"][name] * float("nan")}),
        lambda: whole["state_dict"].update({case.one_of(HOSTILE_TEXTS): torch.zeros(2)}),
        lambda: whole["state_dict"].update({name: case.one_of([None, 1, "x", [], {}])}),
        lambda: whole.update(state_dict=case.one_of([None, 1, [], "x", {}, {1: 2}])),
        lambda: whole.update(state_dict=Path("code")),
    ]
    if case.rng.random() < 0.25:
        which = int(case.rng.integers(len(hostile)))
        hostile[which]()
        torch.save(whole, path)
        case.tried += f"{name}: edit {which}; "
        assert attempt(lambda: load_checkpoint(path))[1] is not None, "was loaded"
        return
    path.write_bytes(damaged(case, lab.checkpoint.read_bytes()))
    found, error = attempt(lambda: load_checkpoint(path).state_dict())
    if error is None:
        for key, tensor in whole["state_dict"].items():
            assert torch.equal(found[key], tensor), f"{key}: other weights without a word"
    else:
        assert str(path) in str(error)


def banks(lab: Lab, case: Case) -> None:
    """A damaged or lying bank is refused, at little cost, or is what it was."""
    path = case.folder / "bank.npz"
    bank = Bank.load(lab.bank)
    parts = {"sivs": bank.sivs, "model": np.array(bank.model), "version": np.array(1)}
    files = {f"{name}.npy": npy(array) for name, array in parts.items()}
    n, width = bank.sivs.shape
    claims = [
        (10**9, width),
        (n, 10**9),
        (2**62, 2),
        (-1, width),
        (n + 1, width),
        (n, width, 1),
        (),
        (0, 0),
        (2**70, 1),
    ]
    lies: list[Callable[[], dict[str, bytes]]] = [
        lambda: {"sivs.npy": npy(bank.sivs, case.one_of(claims))},
        lambda: {"sivs.npy": npy(bank.sivs.astype(case.one_of(["f2", "f8", "i4", "c8", ">f4", "U3"])))},
        lambda: {"sivs.npy": npy(np.array([object()]), allow_pickle=True)},
        lambda: {"sivs.npy": npy(np.full((n, width), case.one_of([np.nan, np.inf]), np.float32))},
        lambda: {"model.npy": npy(np.array(case.one_of([1, None, 2.5, [1, 2]])), allow_pickle=True)},
        lambda: {"version.npy": npy(np.array(case.one_of([2, -1, [1, 1], 2**63])))},
        lambda: {"sivs.npy": case.rng.bytes(100)},
        lambda: {"version.npy": b""},
    ]
    if case.rng.random() < 0.4:
        which = int(case.rng.integers(len(lies)))
        path.write_bytes(npz(files | lies[which](), case.one_of([0, 8, 12, 14])))
        case.tried += f"lie {which}; "
        loaded, error = attempt(lambda: Bank.load(path))
        if error is None:  # the byte order may be another; or the model's name, by which it is refused later
            assert which in (1, 4), "was loaded"
            np.testing.assert_array_equal(loaded.sivs, bank.sivs)
            group = [picture(case)], [picture(case)]
            assert which != 4 or attempt(lambda: lab.predictor.against(loaded, *group))[1] is not None, "was taken"
        return
    whole = npz(files, case.one_of([0, 8]))
    path.write_bytes(damaged(case, whole))
    loaded, error = attempt(lambda: Bank.load(path))
    if error is None:
        np.testing.assert_array_equal(loaded.sivs, bank.sivs)
        assert loaded.model == bank.model, "another model without a word"
    else:
        assert isinstance(error, InputError), repr(error)
        assert str(path) in str(error), error


def caches(lab: Lab, case: Case) -> None:
    """A damaged calibration cache is not used; a damaged precision plan is refused. (Their numbers have no digest.)"""
    from calibration.graph import ExportedModel
    from calibration.ranges import read_cache, write_cache
    from calibration.sensitivity import read_precision_plan

    model = ExportedModel(lab.models["plain"])
    path, key = case.folder / "c.json", {"model": "00" * 32, "groups": "11" * 32, "method": "minmax"}
    plan = case.rng.random() < 0.5
    names = [layer.name for layer in model.candidates]
    if plan:
        path.write_text(json.dumps({"float_layers": names[:5]}, indent=1))
    else:
        write_cache(path, key, {name: float(i) for i, name in enumerate(names)})
    content = damaged(case, path.read_bytes()) if case.rng.random() < 0.6 else hostile_text(case)
    if case.rng.random() < 0.3:
        what = "float_layers" if plan else "ranges"
        content = json.dumps({"key": key, what: hostile_json(case)}).encode()
        case.tried += f"{content[:80]!r}; "
    path.write_bytes(content)
    if plan:
        layers, error = attempt(lambda: read_precision_plan(path, model))
        assert error is not None or set(layers) <= set(names), layers
        return
    (ranges, reason), _ = attempt(lambda: read_cache(path, key))
    assert ranges is not None or reason
    bad = {k: v for k, v in (ranges or {}).items() if not (isinstance(v, float) and 0 <= v < float("inf"))}
    assert not bad, f"ranges that are none: {bad}"


def _calls(lab: Lab, case: Case) -> dict[str, Callable[[], Any]]:
    """Calls that make no sense, each of which must be refused by one of our errors."""
    image = Image.new("RGB", (9, 9))
    predictor, bank = lab.predictor, Bank.load(lab.bank)
    good = [image], [image]

    def groups(given: Any, **options: Any) -> Callable[[], Any]:
        return lambda: list(predictor.predict_groups(given, **options))

    def opened(*args: Any, **options: Any) -> Callable[[], Any]:
        return lambda: Predictor(*args, **options).close()

    calls: dict[str, Callable[[], Any]] = {
        f"groups {given!r}": groups(given)
        for given in (
            None,
            5,
            [None],
            [5],
            [[]],
            [()],
            [([image],)],
            [(*good, True)],
            [(*good, None, 1)],
            "ab",
            [good, 7],
        )
    }
    calls |= {f"ahead {n!r}": groups([good], ahead=n) for n in (None, "4", 1.5, float("nan"))}
    calls |= {f"on_error {v!r}": groups([good], on_error=v) for v in (None, "ignore", 1)}
    calls |= {
        f"model {v!r}": opened(v) for v in ("", ".", "/", None, 5, b"x", "a\0b", "\n", "/dev/null", [], "x" * 5000)
    }
    plain = lab.models["plain"]
    cpu = "CPUExecutionProvider"
    odd = (None, [5], [(cpu,)], cpu, 5, [None], ["No"], [(cpu, 5)], [(cpu, {"no": "x"})])
    calls |= {f"providers {v!r}": opened(plain, providers=v) for v in odd}
    numbers = (0, -1, 1.5, "2", float("nan"), 10**9)
    calls |= {f"threads {v!r}": opened(plain, threads=v) for v in (*numbers, [])}
    calls |= {f"max_images {v!r}": opened(plain, max_images=v) for v in numbers[:5]}
    calls |= {f"max_delay_ms {v!r}": opened(plain, max_delay_ms=v) for v in (-1, "2", float("nan"), float("inf"), None)}
    calls |= {f"slots {v!r}": opened(plain, slots=v) for v in (0, 1, "2", None)}
    no_files = ((), ("a",), 5, "ab", (None, None), (1, 2), ("a", "b", "c"))
    calls |= {f"bank_export {v!r}": opened(bank_export=v) for v in no_files}
    calls |= {f"Bank {v!r}": (lambda v=v: Bank(bank.sivs, v)) for v in (None, 5, b"x", [])}
    calls |= {f"sivs {v!r}": (lambda v=v: Bank(v, "m")) for v in (None, 5, [[1.0]], np.zeros(3), np.zeros((2, 2)))}
    calls |= {f"bank + {v!r}": (lambda v=v: bank + v) for v in (None, 5, [], bank.sivs, Bank(bank.sivs, "other"))}
    calls |= {f"bank[{v!r}]": (lambda v=v: bank[v]) for v in ([[0]], [[[0]]], None)}
    calls |= {
        f"save {len(str(v))} {str(v)[:9]!r}": (lambda v=v: bank.save(v)) for v in ("x" * 300, "", "/", "a\0b", None, 5)
    }
    calls |= {
        f"load {v!r}": (lambda v=v: Bank.load(v)) for v in ("", "/", "a\0b", None, 5, "no\nsuch", "/dev/null", "\udcff")
    }
    calls |= {f"against {v!r}": (lambda v=v: predictor.against(v, *good)) for v in (None, 5, bank.sivs, bank[:0])}
    calls["against another's"] = lambda: predictor.against(Bank(bank.sivs, "m"), *good)
    calls["a bank of 3e38"] = lambda: predictor.against(Bank(np.full_like(bank.sivs, 3e38), bank.model), *good)
    calls["no groups' iterator"] = groups(itertools.repeat(None, 3))
    for v in (None, 5, image, "ab", [], {}, {"a"}, np.zeros((9, 9, 3), np.uint8), iter([])):
        calls[f"call {type(v).__name__} {v!r:.20}"] = lambda v=v: predictor(v, [image])
    sisms = np.zeros((1, 224, 224), np.uint8)
    for v in (None, np.zeros((1, 224, 224, 3)), np.zeros((0, 224, 224, 3), np.uint8), [[1]]):
        calls[f"tensors {getattr(v, 'shape', v)}"] = lambda v=v: predictor.predict_tensors(v, sisms)
    return calls


def calls(lab: Lab, case: Case) -> None:
    """Arguments that make no sense are refused, and the message of one that the message speaks of says why."""
    table = _calls(lab, case)
    name = list(table)[case.seed % len(table)]
    case.tried += name
    _, error = attempt(table[name])
    assert error is not None, "was accepted"
    assert name != "a bank of 3e38" or "weights" not in str(error), f"blames the model's weights: {error}"


def streams(lab: Lab, case: Case) -> None:
    """A stream with bad groups and a source that fails: each group has its maps, or its own error, in its place."""
    good = picture(case)
    expected = lab.predictor([good], [good])[0]
    bad = case.rng.random(int(case.rng.integers(1, 9))) < 0.4
    fails = bool(case.rng.random() < 0.5)
    case.tried += f"bad {bad.tolist()}, source fails: {fails}; "
    wrong = [(["/no/such"], [good]), ([good], []), ([good, b"x"], [good, good]), None, 5, ([],), ([good], [good], True)]

    def source() -> Any:
        for is_bad in bad:
            yield case.one_of(wrong) if is_bad else ([good], [good])
        if fails:
            raise KeyError("the caller's own")

    found: list[Any] = []
    try:
        for outcome in lab.predictor.predict_groups(source(), ahead=int(case.rng.integers(1, 9)), on_error="return"):
            found.append(outcome)
        assert not fails, "the source's error is lost"
    except KeyError:
        assert fails
    assert len(found) == len(bad), f"{len(found)} of {len(bad)} groups came back"
    for is_bad, outcome in zip(bad, found, strict=True):
        assert isinstance(outcome, ICNetError) == is_bad, outcome
        if is_bad:
            message(outcome)
        else:
            np.testing.assert_array_equal(outcome[0], expected)


KINDS = (
    Kind("images", "damaged images of 40 encodings, as files", images, 40, 2000),
    Kind("images-in-memory", "the same as bytes and BytesIO", images_in_memory, 20, 400),
    Kind("sources", "hostile arrays, PIL images and other objects", sources, 40, 1000),
    Kind("models", "damaged ONNX files of all four kinds", models, 16, 400),
    Kind("foreign-models", "other files in a model's place", foreign_models, 8, 100),
    Kind("mnn-models", "damaged MNN files", mnn_models, 0, 60),
    Kind("checkpoints", "damaged and foreign checkpoints", checkpoints, 8, 300),
    Kind("banks", "damaged and lying banks", banks, 60, 1000),
    Kind("caches", "damaged calibration caches and precision plans", caches, 20, 300),
    Kind("calls", "arguments that make no sense", calls, 120, 120),
    Kind("streams", "streams of groups with bad ones, and sources that fail", streams, 10, 200),
)
