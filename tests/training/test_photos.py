"""Material for photographs: read out of packages, pasted as in photographs, paired, and chosen by."""

import hashlib
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from export.checkpoint import load_checkpoint, save_checkpoint
from export.icnet import VGG16
from tests.helpers import random_network
from training.distil import SIDE, Pictures, Student, retrieval
from training.paste import CutPaste, photos
from training.photographic import PhotographicPaste
from training.photos import read_resources
from training.pretrain import normalised

NONE = (0, 0)


def png(size, colour, box=None):
    image = Image.new("RGBA", size)
    image.paste(colour, box or (0, 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def resources(folder, files, version=3):
    """A Qt resource archive of `folder`/NAME for each file: name → (content, whether it is compressed)."""
    names, contents, nodes = bytearray(), bytearray(), []

    def name(text):
        names.extend(struct.pack(">HI", len(text), 0) + text.encode("utf-16-be"))
        return len(names) - 6 - 2 * len(text)

    times = struct.pack(">Q", 0) if version >= 2 else b""
    nodes.append(struct.pack(">IHII", 0, 2, 1, 1) + times)
    nodes.append(struct.pack(">IHII", name(folder), 2, len(files), 2) + times)
    for file, (content, compressed) in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        nodes.append(struct.pack(">IHHHI", name(file), int(compressed), 0, 0, len(contents)) + times)
        contents.extend(struct.pack(">I", len(stored)) + stored)
    tree, start = b"".join(nodes), 24
    offsets = (start, start + len(tree), start + len(tree) + len(contents))
    return struct.pack(">4s4II", b"qres", version, *offsets, 0) + tree + contents + names


@pytest.mark.parametrize("version", [1, 3])
def test_resource_archives_of_qt_are_read(version):
    files = {"é.txt": (b"plain", False), "b.txt": (b"packed" * 50, True)}
    found = dict(read_resources(resources("deep", files, version)))
    assert found == {"deep/é.txt": b"plain", "deep/b.txt": b"packed" * 50}


@pytest.fixture
def packages(tmp_path):
    """Two packages, the manifest of four files of theirs, and what is in them."""
    folder = tmp_path / "packages" / "stamps" / "usr"
    (folder / "birds").mkdir(parents=True)
    cut = png((40, 30), (255, 0, 0, 255), (10, 5, 30, 25))
    (folder / "birds" / "owl.png").write_bytes(cut)
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("icons/gull.png", cut)
    other = tmp_path / "packages" / "pictures"
    other.mkdir()
    photo = png((9, 9), (1, 2, 3, 255))
    (other / "fish.rcc").write_bytes(resources("deep", {"a.png": (photo, False), "b.png": (photo, True)}))
    digests = {"cut": hashlib.sha256(cut).hexdigest(), "photo": hashlib.sha256(photo).hexdigest()}
    manifest = {
        "packages": {"stamps": {"root": "usr"}, "pictures": {"root": ""}},
        "files": {
            "cutouts/train/bird": {
                "stamps/birds/owl.png": digests["cut"], "stamps/more.zip!icons/gull.png": digests["cut"]
            },
            "photographs/fish": {
                f"pictures/fish.rcc!deep/{name}.png": digests["photo"] for name in ("a", "b")
            },
        },
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, photo


def unpack(icnet, folder):
    return icnet("data", "photos", folder / "manifest.json", folder / "packages", "--output", folder / "out")


def test_a_manifest_says_what_goes_where(icnet, packages):
    folder, photo = packages
    assert unpack(icnet, folder)[::2] == (0, "")
    written = sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.png"))
    birds = [f"cutouts/train/bird/{name}.png" for name in ("birds-owl", "more.zip-icons-gull")]
    assert written == [*birds, "photographs/fish/a.png", "photographs/fish/b.png"]
    assert (folder / "out" / "photographs" / "fish" / "b.png").read_bytes() == photo
    assert {Image.open(folder / "out" / bird).size for bird in birds} == {(20, 20)}  # what is not transparent


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "packages/stamps/usr/birds/owl.png").write_bytes(b"x"), "owl.png: another file than the manif"),
        (lambda f: (f / "packages/stamps/usr/birds/owl.png").unlink(), "owl.png: can't be read"),
        (lambda f: (f / "packages/stamps/usr/more.zip").write_bytes(b"x"), "more.zip: can't be read"),
        (lambda f: (f / "packages/pictures/fish.rcc").write_bytes(b"qres"), "fish.rcc: not a resource archive of Qt"),
        (lambda f: (f / "packages/pictures/fish.rcc").write_bytes(resources("x", {})), "fish.rcc: has no deep/a.png"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: not a manifest with packages and files"),
    ],
)
def test_what_is_missing_or_different_is_named(icnet, packages, spoil, message):
    spoil(packages[0])
    code, _, err = unpack(icnet, packages[0])
    assert code == 2
    assert message in err


def test_photographic_groups_follow_from_the_seed_and_have_large_and_single_objects(material):
    maker, groups = PhotographicPaste(*material), []
    for seed in range(24):
        group = maker.group([seed], 3)
        groups.append(group)
        assert len(group.images) in (1, 3)
    again = PhotographicPaste(*material).group([5], 3)
    assert np.array_equal(again.images, groups[5].images)
    assert np.array_equal(again.sisms, groups[5].sisms)
    shares = np.concatenate([(group.masks > 0).mean((1, 2)) for group in groups])
    assert shares.max() > 0.25  # the drawings' objects stay below
    borders = [group.masks[:, [0, -1]].any() or group.masks[:, :, [0, -1]].any() for group in groups]
    assert any(borders)


def test_two_photographs_side_by_side_have_the_truth_on_one_and_the_sism_on_both(material, monkeypatch):
    monkeypatch.setattr("training.photographic.SIDE_BY_SIDE", 1)
    group = PhotographicPaste(*material).group([2], 12, name="white", distractors=(2, 2), corrupted=0)
    one_sided = both = 0
    for mask, sism in zip(group.masks > 0, group.sisms > 90, strict=True):
        halves = [(mask[:, :70], mask[:, -70:]), (mask[:70], mask[-70:])]
        one_sided += any(a.any() != b.any() for a, b in halves)
        both += (sism & ~mask).sum() > 300
    assert one_sided >= 10
    assert both >= 9
    assert group.images[group.masks > 0].mean() > group.images[(group.sisms > 128) & (group.masks == 0)].mean()


def test_pairs_show_two_photographs_of_which_one_is_common(icnet, tmp_path):
    for i, (name, level) in enumerate({"dark": 40, "light": 200, "grey": 120}.items()):
        for k in range(2):
            for kind in ("photos", "maps"):
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 30), (level,) * 3).save(tmp_path / "photos" / name / f"{k}.jpg")
            Image.new("L", (60, 30), 250 - i).save(tmp_path / "maps" / name / f"{k}.png")
    options = [tmp_path / "photos", tmp_path / "maps"]
    assert icnet("data", "pairs", *options, "--output", tmp_path / "out")[::2] == (0, "")
    for name, level in {"dark": 40, "light": 200, "grey": 120}.items():
        for k in (1, 2):
            image, gt, sism = (
                np.asarray(Image.open(tmp_path / "out" / kind / name / f"00{k}.{suffix}").convert("L")).astype(int)
                for kind, suffix in (("img", "jpg"), ("gt", "png"), ("sism", "png"))
            )
            assert image.shape == gt.shape == (320, 1280)
            assert sism.min() > 245
            assert set(np.unique(gt)) == {0, 255}
            assert np.abs(image[gt > 0] - level).max() < 6
            assert np.abs(image[gt == 0] - level).min() > 60
    assert icnet("data", "pairs", *options, "--alone", "--output", tmp_path / "alone")[::2] == (0, "")
    assert np.asarray(Image.open(tmp_path / "alone" / "gt" / "grey" / "002.png")).min() == 255
    (tmp_path / "maps" / "grey" / "1.png").unlink()
    code, _, err = icnet("data", "pairs", *options, "--output", tmp_path / "third")
    assert code == 2
    assert "1.jpg: no map for it" in err


def test_a_student_begins_as_its_network_and_gives_its_backbone(material):
    network = random_network(1 / 16)
    pictures = Pictures(CutPaste(*material), photos(material[1]), seed=0, steps=2, batch=4)
    images = pictures[0]
    assert images.shape == (4, SIDE, SIDE, 3)
    assert torch.equal(images, pictures[0])
    student = Student(network, images).train()
    frozen = [p.clone() for p in student.frozen.parameters()]
    with torch.no_grad():
        expected = network.vgg(normalised(images))[-1]
        found = student.last(student.middle(student.frozen(normalised(images))))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    targets = torch.randn(4, 112, 8, 8), torch.randn(4, 320, 4, 4)
    losses = []
    for _ in range(4):
        losses.append(student(images, targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, student.frozen.parameters(), strict=True))
    student.eval()
    with torch.no_grad():
        x = normalised(images)
        expected = student.last(student.middle(student.frozen(x)))
        backbone = student.backbone()
        torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-4)
    assert len(backbone) == len(VGG16(1 / 16).vgg)


def test_retrieval_on_numbers():
    vectors = np.array([[1, 0], [1, 0], [-1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    labels, members = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0, 1])
    top, precision = retrieval(vectors, labels, members)  # its own class comes last, its own cut-out doesn't count
    assert top == 0
    assert precision == pytest.approx((4 * (1 / 3 + 2 / 4) / 2 + 2 / 5) / 6)
    perfect = retrieval(np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2]], np.array([0, 0, 1, 1, 2, 2]), np.arange(6))
    assert perfect == (1, 1)


def test_the_weights_that_do_best_on_the_validation_set_are_kept(icnet, material, tmp_path, monkeypatch):
    options = ["--cutouts", material[0], "--backgrounds", material[1]]
    assert (
        icnet("data", "paste", *options, "--photographic", "--groups", 1, "--images", 2, "-o", tmp_path / "v")[0] == 0
    )
    save_checkpoint(tmp_path / "start.pth", random_network(1 / 16))
    kept = []

    def weights(path, network, *rest, **named):
        if path.name == "best.pth":
            kept.append(network.conv4_cmprs.weight.detach().float().sum().item())
        save_checkpoint(path, network, *rest, **named)

    monkeypatch.setattr("training.train.save_checkpoint", weights)
    code, out, _ = icnet(
        "train", *options, "--photographic", "--start", tmp_path / "start.pth", "--width", 1 / 16, "--images", 2,
        "--steps", 3, "--lr", 1e-3, "--save-every", 1, "--validation", tmp_path / "v",
        "--output", tmp_path / "last.pth", "--weights", tmp_path / "best.pth",
    )  # fmt: skip
    assert code == 0
    scores = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("validation")]
    assert len(scores) == 3
    rises = sum(score == max(scores[: i + 1]) for i, score in enumerate(scores))
    assert len(kept) == rises
    best = load_checkpoint(tmp_path / "best.pth").conv4_cmprs.weight.float().sum().item()
    assert best == pytest.approx(kept[-1], abs=1e-2)
    code, _, err = icnet(
        "train", *options, "--start", tmp_path / "start.pth", "--width", 0.125, "--steps", 1, "--output", tmp_path / "x"
    )
    assert code == 2
    assert "start.pth: is not of --width 0.125" in err
