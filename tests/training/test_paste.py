import io
import json
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

import training.groups
from runtime import InputError
from training.cutouts import families, held_out, read_set, related
from training.paste import CutPaste, Group, corrupted_sism


@pytest.fixture(scope="module")
def maker(material):
    return CutPaste(*material)


def same(one: Group, other: Group, *parts: str) -> bool:
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_groups_follow_from_the_seed(maker, material):
    group = maker.group([3, 4], 4)
    assert same(group, CutPaste(*material).group([3, 4], 4), "images", "masks", "sisms")
    assert not same(group, maker.group([3, 5], 4), "images")
    assert group.images.shape == (4, 224, 224, 3)
    assert set(np.unique(group.masks)) == {0, 255}
    assert {a.dtype for a in (group.images, group.masks, group.sisms)} == {np.dtype(np.uint8)}


def test_the_ground_truth_is_the_common_class_and_the_sism_marks_distractors_too(maker):
    bright, dark, on_common, on_dark = [], [], [], []
    for seed in range(6):
        group = maker.group([seed], 4, name="white", distractors=(2, 3), corrupted=0)
        grey = group.images.mean(3)
        common = group.masks > 0
        bright.append(grey[common])
        dark.append((grey[~common] < 40).mean())  # the black distractors are outside of it
        on_common.append(group.sisms[common])
        on_dark.append(group.sisms[~common & (grey < 40)])
    assert np.median(np.concatenate(bright)) > 170
    assert np.mean(dark) > 0.03
    assert np.concatenate(on_common).mean() > 90
    assert np.concatenate(on_dark).mean() > 90


def test_every_image_shows_its_object(maker):
    for seed in range(10):
        assert (maker.group([seed], 5, distractors=(3, 3)).masks > 0).mean((1, 2)).min() > 0.005


def test_corrupted_sisms_change_nothing_else_and_add_up(maker):
    clean, some, more = (maker.group([9], 10, corrupted=share) for share in (0, 0.2, 0.6))
    assert same(clean, more, "images", "masks")
    changed = [[not np.array_equal(a, b) for a, b in zip(clean.sisms, g.sisms, strict=True)] for g in (some, more)]
    assert (sum(changed[0]), sum(changed[1])) == (2, 6)
    assert all(m for s, m in zip(*changed, strict=True) if s)


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (0.2, 2), (0.6, 6), (1, 10)])
def test_so_many_sisms_are_plainly_wrong(maker, monkeypatch, share, expected):
    made = []

    def counted(rng, objects):
        made.append(corrupted_sism(rng, objects))
        return made[-1]

    monkeypatch.setattr("training.paste.corrupted_sism", counted)
    group = maker.group([9], 10, corrupted=share)
    assert len(made) == expected
    assert all(any(np.array_equal(one, sism) for sism in group.sisms) for one in made)


def test_classes_that_share_a_word_are_related():
    assert related("cat", "black-cat")
    assert related("police-car", "comparing-car")
    assert not related("black-cat", "black-nib")  # a colour says nothing
    assert list(families(["ant", "black-cat", "cat", "cat-face", "cow"])) == [
        ["ant"],
        ["black-cat", "cat", "cat-face"],
        ["cow"],
    ]


def test_families_are_held_out_whole():
    classes = [f"{adjective}-{noun}" for noun in map(str, range(200)) for adjective in ("red", "blue")]
    test = held_out(classes)
    assert 0.15 < len(test) / len(classes) < 0.35
    assert all((f"red-{i}" in test) == (f"blue-{i}" in test) for i in range(200))
    assert held_out(classes[::-1]) == test


def package(path, prefix, names, category="Objects"):
    body = '<circle cx="8" cy="8" r="4" fill="#f00"/>'
    files = {
        "package": {"version": "1.2.3"},
        "info": {"license": {"spdx": "MIT"}, "author": {"name": "Someone"}},
        "metadata": {"categories": {category: names}},
        "icons": {
            "prefix": prefix,
            "width": 16,
            "height": 16,
            "icons": {name: {"body": body} for name in names[1:]},
            "aliases": {names[0]: {"parent": names[1]}},
        },
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


NAMES = ["otter", "key", "lamp", "wolf", "two-oclock", "harp", "rose", "kite", "drum"]


def test_cutouts_are_sorted_by_class_and_split(icnet, tmp_path):
    packages = [package(tmp_path / f"{i}.tgz", f"set{i}", NAMES if i else NAMES[:-1]) for i in range(4)]
    code, out, err = icnet("data", "cutouts", *packages, "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    classes = {p.name: p.parent.name for p in (tmp_path / "out").glob("*/*")}
    assert set(classes) == {"otter", "key", "lamp", "wolf", "harp", "rose", "kite"}  # no clocks; 3 sets have no drum
    assert {"train", "test"} == set(classes.values())
    cutout = Image.open(tmp_path / "out" / classes["otter"] / "otter" / "set2.png")
    assert (cutout.mode, cutout.size) == ("RGBA", (128, 128))
    assert cutout.getpixel((64, 64)) == (255, 0, 0, 255)
    assert "| set0 | 1.2.3 | Someone | MIT |" in (tmp_path / "out" / "SOURCES.md").read_text()
    assert f"{list(classes.values()).count('train')} classes for training" in out


def test_too_few_sets(icnet, tmp_path):
    packages = [package(tmp_path / f"{i}.tgz", f"set{i}", NAMES) for i in range(2)]
    code, _, err = icnet("data", "cutouts", *packages, "--output", tmp_path / "out")
    assert (code, "give more sets" in err) == (2, True)


def test_a_package_that_is_none(tmp_path):
    path = tmp_path / "x.tgz"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"x\.tgz: not a package that `npm pack"):
        read_set(path)


def test_a_data_set_is_written_as_the_paper_lays_it_out(icnet, tmp_path, material):
    options = ["--cutouts", material[0], "--backgrounds", material[1], "--groups", 7, "--images", 3]
    for name in ("a", "b"):
        code, _, err = icnet("data", "paste", *options, "--output", tmp_path / name)
        assert (code, err) == (0, "")
    groups = sorted(p.name for p in (tmp_path / "a" / "img").iterdir())
    assert len(groups) == 7  # six classes: one comes twice
    for kind, suffix in {"img": "jpg", "gt": "png", "sism": "png"}.items():
        files = sorted((tmp_path / "a" / kind).rglob("*.*"))
        assert [f"{f.parent.name}/{f.name}" for f in files] == [
            f"{group}/{i:03}.{suffix}" for group in groups for i in (1, 2, 3)
        ]
        for file in files:
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    code, _, err = icnet("data", "paste", *options, "--output", tmp_path / "a")
    assert (code, "is there already" in err) == (2, True)


def test_a_data_set_is_whole_or_absent(icnet, tmp_path, material, monkeypatch):
    options = ["data", "paste", "--cutouts", material[0], "--backgrounds", material[1], "--groups", 2, "--images", 2]
    write, outputs = training.groups._write, tmp_path / "outputs"

    def stopped(group, folder, name):
        write(group, folder, name)
        code, _, err = icnet(*options, "--output", outputs / "data")
        assert (code, err) == (2, f"icnet data paste: error: {outputs}/data: another run is writing it\n")
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training.groups, "_write", stopped)
        assert icnet(*options, "--output", outputs / "data")[0] == 130
    assert list(outputs.iterdir()) == []
    killed = outputs / ".data.unfinished" / "img" / "zebra"  # as SIGKILL leaves it
    killed.mkdir(parents=True)
    assert icnet(*options, "--output", outputs / "data")[0] == 0
    assert list(outputs.iterdir()) == [outputs / "data"]
    assert len(list((outputs / "data/img").iterdir())) == 2
    assert not (outputs / "data/img/zebra").exists()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda c, b: [p.unlink() for p in (c / "ant").glob("[12].png")], "ant: a class needs at least 2 cut-outs"),
        (lambda c, b: Image.new("RGB", (9, 9)).save(c / "ant" / "0.png"), "0.png: a cut-out is an 8-bit RGBA picture"),
        (lambda c, b: Image.new("RGBA", (9, 9)).save(c / "ant" / "0.png"), "something that is not transparent"),
        (lambda c, b: (c / "ant" / "0.png").write_bytes(b"x"), "0.png: not a picture that can be read"),
        (lambda c, b: [p.unlink() for p in c.rglob("*.png")], "no cut-outs; expected CLASS/NAME.png"),
        (
            lambda c, b: [p.unlink() for n in c.iterdir() if n.name != "ant" for p in n.iterdir()],
            "of an unrelated class",
        ),
        (lambda c, b: [p.unlink() for p in b.rglob("*.jpg")], "no pictures for backgrounds"),
        (lambda c, b: (b / "deep" / "0.jpg").write_bytes(b"x"), "0.jpg: not an image"),
    ],
)
def test_bad_material_is_named(corrupt, message, material, tmp_path, icnet):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in material]
    corrupt(*copies)
    code, _, err = icnet(
        "data", "paste", "--cutouts", copies[0], "--backgrounds", copies[1], "--output", tmp_path / "out"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "out").exists()
