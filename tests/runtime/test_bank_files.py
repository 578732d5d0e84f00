"""Bank files that are damaged, or made to do harm: one error of ours, and no more memory than the file is worth."""

import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from runtime import Bank, InputError, OutputError

SIVS = np.random.default_rng(0).random((3, 40), np.float32)
MODEL = "0123456789abcdef"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.npz"
    Bank(SIVS, MODEL).save(path)
    return path


def load(path):
    """The bank, or None if an InputError that names the file was raised."""
    try:
        return Bank.load(path)
    except InputError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return None


def test_flipped_bits_are_an_error_or_harmless(saved):
    content = saved.read_bytes()
    harmless = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        saved.write_bytes(damaged)
        bank = load(saved)
        if bank is not None:
            harmless += 1
            np.testing.assert_array_equal(bank.sivs, SIVS)
            assert bank.model == MODEL
    assert harmless < len(content) / 4  # dates and the like


def test_truncated_files_are_an_error(saved):
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        saved.write_bytes(content[:length])
        assert load(saved) is None


def members(path, sivs, method=zipfile.ZIP_STORED):
    """An archive with this content in place of the SIVs."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in (("model", np.array("m")), ("version", np.array(1))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        archive.writestr("sivs.npy", sivs)


def npy(shape, content=b"", version=(1, 0), header=None):
    text = (header or f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}").encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + content


@pytest.mark.parametrize(
    "shape", ["(1000000000, 40)", "(20000000, 40)", "(-3, 40)", "(3, -40)", "(10**9, 40)", "(3,)*70", "(3.0, 40)"]
)
def test_what_a_header_claims_takes_no_memory(tmp_path, shape):
    members(tmp_path / "x.npz", npy(shape, SIVS.tobytes()))
    assert peak(tmp_path / "x.npz") < 1e6


def test_archives_that_decompress_to_much_more_than_they_are(tmp_path):
    zeros = bytes(64 << 20)
    for number, (content, method) in enumerate(
        [
            (npy("(409600, 40)", zeros), zipfile.ZIP_DEFLATED),
            (npy("(3, 40)", zeros), zipfile.ZIP_DEFLATED),
            (npy("(3, 40)", zeros), zipfile.ZIP_BZIP2),
            (npy("(3, 40)", version=(2, 0), header=" " * (64 << 20)), zipfile.ZIP_DEFLATED),
        ]
    ):
        path = tmp_path / f"{number}.npz"
        members(path, content, method)
        assert path.stat().st_size < 1e6
        assert peak(path) < 8e6


def peak(path):
    """Bytes that loading a file that is no bank takes."""
    tracemalloc.start()
    try:
        assert load(path) is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bank_that_somebody_has_compressed_is_a_bank(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", sivs=SIVS, model=np.array(MODEL), version=np.array(1))
    np.testing.assert_array_equal(Bank.load(tmp_path / "x.npz").sivs, SIVS)
    alike = np.tile(SIVS[:1], (30, 1))  # of images that are all the same: smaller by half and more
    np.savez_compressed(tmp_path / "y.npz", sivs=alike, model=np.array(MODEL), version=np.array(1))
    assert (tmp_path / "y.npz").stat().st_size < alike.nbytes / 2
    np.testing.assert_array_equal(Bank.load(tmp_path / "y.npz").sivs, alike)


def test_an_empty_bank_is_kept_as_one(tmp_path):
    Bank(SIVS[:0], MODEL).save(tmp_path / "x.npz")
    assert Bank.load(tmp_path / "x.npz").sivs.shape == (0, 40)


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 99), (8, 12), (8, 14)])
def test_members_that_python_can_not_read(saved, offset, value):
    """Encrypted, and of methods of compression that are unknown, or other than they say."""
    content = bytearray(saved.read_bytes())
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        start = content.find(signature)
        while start >= 0:
            struct.pack_into("<H", content, start + shift + offset, value)
            start = content.find(signature, start + 1)
    saved.write_bytes(content)
    assert load(saved) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_bank(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"x\.npz: not a regular file"):
        Bank.load(tmp_path / "x.npz")


@pytest.mark.parametrize("path", [None, 5, b"x.npz"])
def test_what_is_no_path(path):
    with pytest.raises(InputError, match="expected a path"):
        Bank.load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bank(SIVS, None), "model=None: expected the digest"),
        (lambda: Bank(SIVS, ""), "model='': expected"),
        (lambda: Bank(SIVS * np.float32(3e38), MODEL), r"the bank: holds 3e\+38|the bank: holds 2\.\d+e\+38"),
        (lambda: Bank(-2 * SIVS - 1, MODEL), r"the bank: holds \d.*, where SIVs are in \[-1, 1\]; it may be damaged"),
        (lambda: Bank(np.full((1, 40), 1.1, np.float32), MODEL), "the bank: holds 1.1, where SIVs are in"),
        (lambda: Bank(SIVS, MODEL) + None, "only a Bank can be joined to it, got NoneType"),
        (lambda: Bank(SIVS, MODEL) + SIVS, "only a Bank can be joined to it, got ndarray"),
    ],
)
def test_what_is_no_bank(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OutputError, match=r"can't be written: File name too long"):
        Bank(SIVS, MODEL).save(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match=r"can't be read: File name too long"):
        Bank.load(tmp_path / ("x" * 300))
