"""Banks: groups in chunks, images against a kept bank, and what a bank must not be used for."""

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export.checkpoint import weights_digest
from export.onnx_file import save_model
from export.to_onnx import write_onnx
from runtime import Bank, InputError, ModelError, OutputError, Predictor
from runtime.backends.onnx import OnnxBackend
from runtime.contract import BANK, WEIGHTS, TensorSpec
from runtime.files import bank_files
from tests.helpers import random_network, write_exports
from tests.runtime.test_packing import close, tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain(exports):
    with Predictor(exports, threads=1) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def banks(exports):
    """The two files of the bank export alone, 16 images at once."""
    with Predictor(bank_export=bank_files(exports), max_images=16, threads=1) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The exports of another network of the same width."""
    return write_exports(tmp_path_factory.mktemp("other"), random_network(1 / 32, seed=1))


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 40), chunk=st.integers(1, 40))
def test_chunks_are_the_whole(exports, plain, n, chunk):
    group = tensors(n)
    with Predictor(exports, bank_export=bank_files(exports), max_images=chunk, threads=1) as predictor:
        close(predictor.predict_tensors(*group), plain.predict_tensors(*group))


@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 40), data=st.data())
def test_a_bank_in_any_order_and_images_one_by_one(plain, banks, n, data):
    images, sisms = tensors(n)
    order = data.draw(st.permutations(range(n)))
    bank = banks.bank(images, sisms)[order]
    assert (len(bank), bank.sivs.shape) == (n, (n, 1280 / 32))
    expected = plain.predict_tensors(images, sisms)
    close(np.stack(banks.against(bank, images, sisms)), expected)
    close(banks.predict_tensors(images[-1:], sisms[-1:], bank), expected[-1:])


def test_a_new_image_against_a_bank_is_the_new_image_in_a_group_of_the_same_sivs(plain, banks):
    """With its own SIVs in the bank, it is a member of the group."""
    images, sisms = tensors(6)
    bank = banks.bank(images[:5], sisms[:5]) + banks.bank(images[5:], sisms[5:])
    (found,) = banks.against(bank, images[5:], sisms[5:])
    close(found, plain.predict_tensors(images, sisms)[5])
    (without,) = banks.against(bank[:5], images[5:], sisms[5:])
    assert np.abs(without - found).max() > 1e-4  # and without them it is not


def test_maps_have_the_sizes_of_their_images(banks):
    images = [np.zeros((30, 50, 3), np.uint8), np.zeros((224, 10, 3), np.uint8)]
    sisms = [np.zeros((8, 8), np.uint8)] * 2
    assert [m.shape for m in banks.against(banks.bank(images, sisms), images, sisms)] == [(30, 50), (224, 10)]
    assert [m.shape for m in banks(images, sisms)] == [(30, 50), (224, 10)]


def test_streams_of_groups_take_chunks_where_they_must(exports, plain):
    groups = [tensors(n) for n in (2, 9, 3, 20)]
    with Predictor(exports, bank_export=bank_files(exports), max_images=4) as predictor:
        for maps, group in zip(predictor.predict_groups(groups), groups, strict=True):
            close(np.stack(maps), plain.predict_tensors(*group))
    with Predictor(exports.with_name("icnet.packed.onnx"), bank_export=bank_files(exports), max_images=4) as predictor:
        for maps, group in zip(predictor.predict_groups(groups), groups, strict=True):
            close(np.stack(maps), plain.predict_tensors(*group))
        close(predictor.predict_tensors(*groups[1]), plain.predict_tensors(*groups[1]))


def test_a_group_that_fills_a_call_takes_no_chunks(exports, monkeypatch):
    calls = []
    submit = OnnxBackend.submit

    def noted(self, *arrays, **options):
        calls.append((Path(self.path).name, len(arrays[0])))
        return submit(self, *arrays, **options)

    monkeypatch.setattr(OnnxBackend, "submit", noted)
    with Predictor(exports, bank_export=bank_files(exports), max_images=4, threads=1) as predictor:
        predictor.predict_tensors(*tensors(4))
        assert calls == [("icnet.onnx", 4)]
        predictor.predict_tensors(*tensors(5))
    chunks = [("icnet.intra.onnx", 2), ("icnet.intra.onnx", 3), ("icnet.banked.onnx", 2), ("icnet.banked.onnx", 3)]
    assert calls[1:] == chunks  # of nearly equal size: not 4 and 1


def test_a_packed_model_with_a_bank_export_compares_with_the_bank(exports, banks):
    images, sisms = tensors(4)
    bank = banks.bank(images[:3], sisms[:3])
    packed = exports.with_name("icnet.packed.onnx")
    with Predictor(packed, bank_export=bank_files(exports), max_images=16, threads=1) as predictor:
        found = predictor.predict_tensors(images[3:], sisms[3:], bank)
    close(found, banks.predict_tensors(images[3:], sisms[3:], bank))


def test_rows_out_and_in(banks):
    a, b = (banks.bank(*tensors(n)) for n in (4, 3))
    joined = a[1:] + b
    np.testing.assert_array_equal(joined.sivs, np.concatenate([a.sivs[1:], b.sivs]))
    np.testing.assert_array_equal(a[[2, 0]].sivs, a.sivs[[2, 0]])
    np.testing.assert_array_equal(a[np.array([True, False, False, True])].sivs, a.sivs[[0, 3]])
    assert len(a[1]) == 1


def test_saving_and_loading(banks, tmp_path):
    images, sisms = tensors(3)
    bank = banks.bank(images, sisms)
    bank.save(tmp_path / "new" / "a.npz")
    bank.save(tmp_path / "new" / "without suffix")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.npz", "without suffix"]
    loaded = Bank.load(tmp_path / "new" / "a.npz")
    np.testing.assert_array_equal(loaded.sivs, bank.sivs)
    assert loaded.model == bank.model == weights_digest(random_network(1 / 32))
    np.testing.assert_array_equal(
        banks.against(loaded, images, sisms), banks.against(Bank.load(tmp_path / "new/without suffix"), images, sisms)
    )
    with pytest.raises(OutputError, match="it is a folder"):
        bank.save(tmp_path)


def archive(path, **changes):
    arrays = {"sivs": np.zeros((2, 40), np.float32), "model": np.array("m"), "version": np.array(1)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "can't be read: No such file"),
        (lambda p: p.mkdir(), "can't be read: Is a directory"),
        (lambda p: p.write_bytes(b""), "not a bank"),
        (lambda p: p.write_bytes(b"PK no archive"), "not a bank"),
        (lambda p: archive(p, sivs=None), "not a bank"),
        (lambda p: archive(p, version=None), "not a bank"),
        (lambda p: archive(p, sivs=np.array([{}])), "not a bank"),
        (lambda p: archive(p, version=np.array(2)), "a bank of layout 2, expected 1"),
        (lambda p: archive(p, version=np.array(0)), "a bank of layout 0, expected 1"),
        (lambda p: archive(p, sivs=np.zeros((2, 40))), "SIVs must be an array float32"),
        (lambda p: archive(p, sivs=np.zeros(40, np.float32)), "SIVs must be an array float32"),
        (lambda p: archive(p, sivs=np.full((2, 40), np.nan, np.float32)), "holds NaN"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "not a bank"),
    ],
)
def test_files_that_are_no_bank(tmp_path, write, message):
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(InputError, match=rf"x\.npz: .*{message}"):
        Bank.load(path)


def test_banks_that_do_not_belong(banks, other):
    images, sisms = tensors(2)
    bank = banks.bank(images, sisms)
    with Predictor(bank_export=bank_files(other)) as predictor:
        foreign = predictor.bank(images, sisms)
        for call in (
            lambda: predictor.against(bank, images, sisms),
            lambda: predictor.predict_tensors(images, sisms, bank),
        ):
            with pytest.raises(InputError, match=r"the bank: of another model \(.{12}…\) than .*icnet\.banked\.onnx"):
                call()
    with pytest.raises(InputError, match="of different models and can't be joined"):
        bank + foreign
    for wrong, message in [
        (bank[:0], "the bank: empty; a bank needs the SIVs of one image at least"),
        (Bank(np.zeros((3, 80), np.float32), bank.model), "80 numbers per image where .* has 40"),
        (bank.sivs, "bank: expected a Bank, got ndarray"),
    ]:
        with pytest.raises(InputError, match=message):
            banks.against(wrong, images, sisms)
    with pytest.raises(InputError, match="no images"):
        banks.bank([], [])


def test_banks_are_the_same_models_in_every_precision(banks, exports, tmp_path):
    from export.fp16 import half_precision

    network = random_network(1 / 32)
    files = tmp_path / "intra.onnx", tmp_path / "banked.onnx"
    for file, interface in zip(files, ("intra", "banked"), strict=True):
        write_onnx(half_precision(network), file, interface, {WEIGHTS: weights_digest(network)})
    images, sisms = tensors(3)
    with Predictor(bank_export=files) as half:
        found = np.stack(half.against(banks.bank(images, sisms), images, sisms))
    assert np.abs(found - banks.predict_tensors(images, sisms)).mean() < 5e-3


@pytest.mark.parametrize(
    "silent", [{"icnet.intra.onnx"}, {"icnet.banked.onnx"}, {"icnet.intra.onnx", "icnet.banked.onnx"}]
)
def test_files_that_do_not_say_what_they_are_know_their_own_banks_only(exports, tmp_path, silent):
    files = []
    for path in bank_files(exports):
        model = onnx.load(path)
        files.append(tmp_path / path.name)
        if path.name not in silent:
            files[-1].write_bytes(path.read_bytes())
            continue
        del model.metadata_props[:]
        onnx.save(model, files[-1])
    images, sisms = tensors(2)
    with Predictor(bank_export=tuple(files)) as predictor, Predictor(bank_export=bank_files(exports)) as known:
        bank = predictor.bank(images, sisms)
        assert bank.model == sha256("".join(sha256(f.read_bytes()).hexdigest() for f in files).encode()).hexdigest()
        assert len(predictor.against(bank, images, sisms)) == 2
        for one, by in ((known, bank), (predictor, known.bank(images, sisms))):
            with pytest.raises(InputError, match="of another model"):
                one.against(by, images, sisms)


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        (("M", 40), True),
        ((None, 1280), True),
        ((20, 40), True),
        (("M", "S"), False),
        (("M", None), False),
        ((20,), False),
    ],
)
def test_a_bank_has_any_number_of_rows_of_a_fixed_length(shape, accepted):
    assert BANK.accepts(TensorSpec("bank", "float32", shape)) == accepted


def test_files_that_are_no_bank_export_or_of_two(exports, other):
    intra, banked = bank_files(exports)
    for files, message in [
        ((banked, intra), r"icnet\.banked\.onnx: a banked export, where NAME\.intra of a bank export is expected"),
        ((intra, exports), r"icnet\.onnx: a plain export, where NAME\.banked .* \(icnet export --banked writes both"),
        ((intra, bank_files(other)[1]), "not of the same bank export as"),
        ((intra, intra.with_name("none.onnx")), "no such model file"),
    ]:
        with pytest.raises(ModelError, match=message):
            Predictor(bank_export=files)
    with pytest.raises(ModelError, match=r"icnet\.banked\.onnx: of another network than .*icnet\.onnx"):
        Predictor(exports, bank_export=bank_files(other))
    with pytest.raises(ModelError, match=r"icnet\.intra\.onnx: one of the two files of a bank export; give both"):
        Predictor(intra)
    for files in ("icnet.intra.onnx", (intra,), (intra, banked, banked), Bank(np.zeros((2, 40), np.float32), "x")):
        with pytest.raises(InputError, match="bank_export: expected two paths"):
            Predictor(bank_export=files)
    with pytest.raises(InputError, match="expected a path, got int"):
        Predictor(bank_export=(intra, 3))


def test_a_plain_model_says_what_banks_take(plain, banks):
    for call in (lambda: plain.bank(*tensors(2)), lambda: plain.against(banks.bank(*tensors(2)), *tensors(2))):
        with pytest.raises(ModelError, match=r"banks take the two files of a bank export: icnet export --banked"):
            call()


def test_a_bank_of_a_fixed_size(exports, tmp_path):
    intra, banked = bank_files(exports)
    model = onnx.load(banked)
    model.graph.input[2].type.tensor_type.shape.dim[0].dim_value = 3
    save_model(model, tmp_path / "icnet.banked.onnx")
    images, sisms = tensors(3)
    with Predictor(bank_export=(intra, tmp_path / "icnet.banked.onnx")) as predictor:
        assert len(predictor(images, sisms)) == 3
        with pytest.raises(ModelError, match="built for banks of exactly 3 images, got 2"):
            predictor(images[:2], sisms[:2])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_group(tmp_path):
    """Each image more costs its own tensors, map and SIVs, and none of the megabytes of its activations."""
    exports = write_exports(tmp_path, random_network(1 / 8))
    code = """
import sys
import numpy as np
from benchmarks.machine import peak_memory
from runtime import Predictor
from runtime.files import bank_files
from pathlib import Path
n, path, chunks = int(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
files = {"bank_export": bank_files(path)} if chunks else {"model": path}
with Predictor(**files, max_images=4, threads=1) as p:
    p.predict_tensors(np.zeros((n, 224, 224, 3), np.uint8), np.zeros((n, 224, 224), np.uint8))
print(peak_memory())
"""

    def peak(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    own = 224 * 224 * (3 + 1 + 4 + 4)  # image, SISM, map, and what the check of the map takes for a moment
    # From a dozen chunks on: the allocator takes a while to settle.
    in_chunks = (peak(208, exports, "chunks") - peak(48, exports, "chunks")) / 160
    at_once = (peak(44, exports) - peak(4, exports)) / 40
    assert in_chunks < own + 0.5e6
    assert at_once > 3 * in_chunks  # or there was nothing to save


# --- the command line


@pytest.fixture
def folders(image_folder):
    image_folder("mugs", "a.png", "b.png", "c.png")
    image_folder("mugs_sisms", "a.png", "b.png", "c.png", mode="L")
    image_folder("new", "x.png", size=(30, 20))
    return image_folder("new_sisms", "x.png", mode="L").parent


def test_icnet_bank_and_predict(icnet, exports, folders, banks, tmp_path):
    sisms = ("--sisms", folders / "mugs_sisms")
    code, out, _ = icnet("bank", folders / "mugs", "--model", exports, *sisms, "--output", tmp_path / "mugs.npz")
    assert (code, out) == (0, f"{tmp_path / 'mugs.npz'}: 3 images, for icnet predict --bank\n")
    bank = Bank.load(tmp_path / "mugs.npz")
    expected = banks.bank([folders / f"mugs/{n}.png" for n in "abc"], [folders / f"mugs_sisms/{n}.png" for n in "abc"])
    np.testing.assert_allclose(bank.sivs, expected.sivs, atol=1e-5)

    arguments = [folders / "new", "--model", exports, "--sisms", folders / "new_sisms", "--output", tmp_path / "out"]
    assert icnet("predict", *arguments, "--bank", tmp_path / "mugs.npz")[0] == 0
    (map_,) = banks.against(bank, [folders / "new/x.png"], [folders / "new_sisms/x.png"])
    found = np.asarray(Image.open(tmp_path / "out/new/x.png"))
    assert found.shape == (20, 30)
    assert np.abs(found / 255 - map_).max() < 2 / 255

    again = icnet("predict", *arguments, "--bank", tmp_path / "mugs.npz", "--resume")[1]
    assert "1 of 1 groups were finished already" in again
    bank[:2].save(tmp_path / "mugs.npz")  # another bank, so other maps
    assert "finished already" not in icnet("predict", *arguments, "--bank", tmp_path / "mugs.npz", "--resume")[1]


def test_icnet_predict_takes_the_bank_export_for_large_groups(icnet, folders, tmp_path, exports, plain):
    """Also where it is all that there is of that name."""
    for path in bank_files(exports):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    arguments = (folders / "mugs", "--sisms", folders / "mugs_sisms", "--output", tmp_path / "out")
    assert icnet("predict", *arguments, "--model", tmp_path / "model" / "icnet.onnx")[0] == 0
    expected = plain([folders / f"mugs/{n}.png" for n in "abc"], [folders / f"mugs_sisms/{n}.png" for n in "abc"])
    for name, map_ in zip("abc", expected, strict=True):
        assert np.abs(np.asarray(Image.open(tmp_path / f"out/mugs/{name}.png")) / 255 - map_).mean() < 1 / 255


def test_bank_commands_that_can_not_be_done(icnet, exports, folders, other, tmp_path, image_folder):
    sisms = ("--sisms", folders / "mugs_sisms")
    bank = tmp_path / "b.npz"
    assert icnet("bank", folders / "mugs", "--model", exports, *sisms, "--output", bank)[0] == 0
    lone = tmp_path / "lone" / "icnet.onnx"
    lone.parent.mkdir()
    lone.write_bytes(exports.read_bytes())
    image_folder("data/img/g", "a.png")
    image_folder("data/sism/g", "a.png", mode="L")
    before = (folders / "mugs/a.png").read_bytes()
    for arguments, message in [
        (("bank", folders / "mugs", "--model", lone, *sisms, "--output", tmp_path / "x"), "--banked --output"),
        (("bank", tmp_path / "data", "--model", exports, "--output", tmp_path / "x"), "name the folder of one group"),
        (("bank", folders / "mugs", "--model", exports, *sisms, "--output", folders / "mugs/a.png"), "is an input"),
        (("bank", folders / "none", "--model", exports, *sisms, "--output", tmp_path / "x"), "no such folder"),
        (
            ("predict", folders / "mugs", "--model", lone, *sisms, "--output", tmp_path / "out", "--bank", bank),
            "icnet.intra.onnx: no such file; make it with icnet export --banked",
        ),
        (
            ("predict", folders / "mugs", "--model", other, *sisms, "--output", tmp_path / "out", "--bank", bank),
            "b.npz: of another model",
        ),
        (
            ("predict", folders / "mugs", "--model", exports, *sisms, "--output", tmp_path / "out", "--bank", exports),
            "icnet.onnx: not a bank",
        ),
    ]:
        code, _, err = icnet(*arguments)
        assert (code, message in err) == (2, True), err
        assert err.count("\n") == 1
    assert (folders / "mugs/a.png").read_bytes() == before
    assert not (tmp_path / "x").exists()
