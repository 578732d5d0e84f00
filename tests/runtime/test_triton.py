"""A real Triton server with the Python back end, on what `icnet triton` wrote.

The server from PyPI has no back end for ONNX Runtime or TensorRT. What those get of requests is emulated in
tests/export/test_to_onnx.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icnet_cli import main
from runtime import Predictor
from runtime.files import bundled
from runtime.preprocess import restore_map
from tests.helpers import DATA
from tests.test_examples import load
from tests.triton_server import FINISHED, ROOT, Server, installed, raw

grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException
SERVED = "served"


@pytest.fixture(scope="module")
def site():
    return installed()


@pytest.fixture(scope="module")
def repository(site, exports, tmp_path_factory):
    """Models: "packed"; "plain", which runs one group at a time; "files", which has a detector; and "numpy2", in the
    tests' own environment.
    """
    folder = tmp_path_factory.mktemp("repository") / "models"
    packed = exports.with_suffix(".packed.onnx")

    def write(name, model, *options, packages=site):
        places = ("--site", packages, "--site", ROOT)
        arguments = ("triton", "-m", model, "-o", folder, "--backend", "python", "--name", name, "--threads", 1)
        assert main([*map(str, (*arguments, *places, *options))]) == 0

    write("packed", packed, "--delay", 200, "--timeout", 300)
    write("plain", exports, "--max-groups", 1, "--max-images", 200, "--queue", 4, "--timeout", 300)
    write("files", packed, "--files", "--max-images", 4, "--delay", 200, "--timeout", 300)
    write("numpy2", packed, packages=sysconfig.get_path("purelib"))
    return folder


@pytest.fixture(scope="module")
def server(site, repository, tmp_path_factory):
    with Server(site, tmp_path_factory.mktemp("server"), repository, "packed", "plain", "files") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with grpc.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def packed(exports):
    with Predictor(exports.with_suffix(".packed.onnx"), threads=1) as predictor:
        yield predictor


def request_of(n, seed=0, b=1):
    return np.random.default_rng((n, seed, b)).integers(0, 256, (b, n, 224, 224, 4), np.uint8)


def ask(client, rgbs, model="packed", dtype="UINT8"):
    """The maps; or the status of the refusal and what it says."""
    tensor = grpc.InferInput("rgbs", list(rgbs.shape), dtype)
    tensor.set_data_from_numpy(rgbs)
    try:
        return client.infer(model, [tensor]).as_numpy("maps")
    except InferenceServerException as error:
        return error.status().removeprefix("StatusCode."), error.message()


def check(found, rgbs, predictor):
    assert found.shape == rgbs.shape[:4]
    for maps, group in zip(found, rgbs, strict=True):
        expected = predictor.predict_tensors(group[..., :3], group[..., 3])
        assert abs(maps - expected).max() < 2e-2  # as in test_packing.py
        assert abs(maps - expected).mean() < 1e-4


def counts(server, model):
    """Executions, and groups, so far."""
    found = server.statistics(model)
    return np.array([int(found["execution_count"]), int(found["inference_count"])])


def gained(server, model, before, groups):
    """Executions and groups since then, once there are so many groups: Triton counts after it has answered."""
    end = time.monotonic() + 10
    while (counts(server, model) - before)[1] < groups and time.monotonic() < end:
        time.sleep(0.02)
    return counts(server, model) - before


def test_groups_of_16_clients_share_executions_and_get_their_own_maps(server, packed):
    before = counts(server, "packed")

    def run(k):
        with grpc.InferenceServerClient(server.grpc) as client:
            return ask(client, request_of(1 + k % 8, seed=k))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(run, range(16)))
    for k, maps in enumerate(answers):
        check(maps, request_of(1 + k % 8, seed=k), packed)
    executions, groups = gained(server, "packed", before, 16)
    assert groups == 16
    assert executions <= 8
    assert max(int(one["batch_size"]) for one in server.statistics("packed")["batch_stats"]) > 1


def test_several_groups_in_a_request(client, packed):
    rgbs = request_of(2, b=3)
    check(ask(client, rgbs), rgbs, packed)


def test_a_bad_request_fails_alone(server, client, packed):
    """They reach the model in one execution, which takes three groups."""
    good = [request_of(3, seed=1), request_of(2, seed=2)]
    empty = np.zeros((1, 0, 224, 224, 4), np.uint8)
    before = counts(server, "packed")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda rgbs: ask(client, rgbs), [good[0], empty, good[1]]))
    assert list(gained(server, "packed", before, 3)) == [1, 3]
    assert answers[1] == ("INVALID_ARGUMENT", "no images: a group has at least one")
    check(answers[0], good[0], packed)
    check(answers[2], good[1], packed)


@pytest.mark.parametrize(
    ("rgbs", "dtype", "message"),
    [
        (np.zeros((1, 2, 224, 224, 3), np.uint8), "UINT8", r"unexpected shape .* got \[1,2,224,224,3\]"),
        (np.zeros((1, 2, 240, 320, 4), np.uint8), "UINT8", r"unexpected shape .* got \[1,2,240,320,4\]"),
        (np.zeros((2, 224, 224, 4), np.uint8), "UINT8", "unexpected shape"),
        (np.zeros((9, 1, 224, 224, 4), np.uint8), "UINT8", "batch-size must be <= 8"),
        (np.zeros((1, 1, 224, 224, 4), np.float32), "FP32", "expects 'UINT8'"),
        (np.zeros((1, 65, 224, 224, 4), np.uint8), "UINT8", "65 images in a group: this server takes at most 64"),
    ],
)
def test_requests_of_a_wrong_size_or_type(client, rgbs, dtype, message):
    status, said = ask(client, rgbs, dtype=dtype)
    assert status == "INVALID_ARGUMENT"
    assert re.search(message, said)


@pytest.fixture(scope="module")
def photographs(exports):
    """Photographs, and their maps of the network's size, with the SISMs of the detector that comes with the package."""
    images = sorted((DATA / "pasted/img/owl").iterdir())[:4]
    with Predictor(exports.with_suffix(".packed.onnx"), sism_model=bundled("detector.onnx"), threads=1) as predictor:
        pixels = [predictor.pipeline.read(images[:n], None) for n in (4, 3)]
        return images, {len(one.images): predictor.predict_tensors(one.images, one.sisms) for one in pixels}


def ask_files(server, files):
    with grpc.InferenceServerClient(server.grpc) as client:
        tensor = grpc.InferInput("files", [1, len(files)], "BYTES")
        tensor.set_data_from_numpy(np.array([files], object))
        try:
            return client.infer("files", [tensor]).as_numpy("maps")[0]
        except InferenceServerException as error:
            return error.message()


def test_files_whose_sisms_the_server_makes(server, photographs):
    """In one execution, with a request that has a damaged file, and one with too many."""
    images, expected = photographs
    files = [image.read_bytes() for image in images]
    before = counts(server, "files")
    with ThreadPoolExecutor(4) as pool:
        requests = [files, files[:3], [files[0], files[1][:300]], [*files, files[0]]]
        *answers, damaged, large = pool.map(lambda one: ask_files(server, one), requests)
    executions, groups = gained(server, "files", before, 4)
    assert groups == 4
    assert executions < 4
    for maps in answers:
        assert abs(maps - expected[len(maps)]).max() < 2e-2
        assert abs(maps - expected[len(maps)]).mean() < 1e-4
    assert damaged.startswith("images[1]: ")
    assert large == "5 images in a group: this server takes at most 4"


def test_the_probe_of_the_documents_for_files(server, repository):
    if shutil.which("curl") is None:
        pytest.skip("the probe needs curl")
    text = (ROOT / "docs" / "serving.md").read_text()
    (probe,) = re.findall(r"^P=/models/icnet/.*\n.*curl .*$", text, re.MULTILINE)
    command = probe.replace("127.0.0.1:8000", server.http).replace("/models/icnet/infer", "/models/files/infer")
    command = command.replace("/models/icnet/", f"{repository}/files/")

    def run(command):
        return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=30).returncode

    before = counts(server, "files")
    assert run(command) == 0
    assert list(gained(server, "files", before, 1)) == [1, 1]
    assert run(command.replace("[1,1]", "[1,2]")) != 0


def test_bytes_that_are_no_request(server):
    for body, header in ((b"{}", "2"), (b"no JSON", "7"), (b"{}", "99"), (bytes(1000), "0"), (b"", "0")):
        assert raw(server.http, "packed", body, header)[0] in (400, 500)
    assert raw(server.http, "packed", bytes(224 * 224 * 4))[0] == 200


def test_a_request_of_200_images(client, exports):
    """The server has the bank export beside the plain one, so it computes them in chunks."""
    rgbs = request_of(200)
    with Predictor(exports, threads=1) as predictor:
        check(ask(client, rgbs, "plain"), rgbs, predictor)


def test_two_models_at_once_and_a_queue_that_is_full(server, client, packed):
    """Of 30 requests at once, those that find the queue of four full are refused, and no other is."""
    rgbs, other = request_of(4), request_of(3, seed=9)
    with ThreadPoolExecutor(31) as pool:
        beside = pool.submit(ask, client, other)
        answers = list(pool.map(lambda _: ask(client, rgbs, "plain"), range(30)))
        check(beside.result(), other, packed)
    outcomes = Counter(SERVED if isinstance(answer, np.ndarray) else answer[0] for answer in answers)
    assert set(outcomes) == {SERVED, "UNAVAILABLE"}
    assert outcomes[SERVED] >= 5
    for maps in [answer for answer in answers if isinstance(answer, np.ndarray)]:
        check(maps, rgbs, packed)
    for _, said in [answer for answer in answers if not isinstance(answer, np.ndarray)]:
        assert "Exceeds maximum queue size" in said


def test_the_probe_of_the_documents_notices_a_killed_stub_and_what_they_say_recovers_it(server, client, packed):
    if shutil.which("curl") is None:
        pytest.skip("the probe needs curl")
    text = (ROOT / "docs" / "serving.md").read_text()
    (probe,) = re.findall(r"^ *(head -c 200704 .*curl .*)$", text, re.MULTILINE)
    (recover,) = re.findall(r"^ *(curl .*/load)$", text, re.MULTILINE)

    def run(command, **more):
        command = command.replace("127.0.0.1:8000", server.http).replace("models/icnet/", "models/plain/")
        assert server.http in command
        assert "models/plain/" in command
        return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=30).returncode

    assert run(probe) == 0
    (stub,) = [pid for pid in server.processes()[1:] if b"plain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(stub, signal.SIGKILL)
    assert run(probe) != 0
    assert server.ready()  # which is why the probe infers
    assert client.is_model_ready("plain")
    assert run(recover) == 0
    assert run(probe) == 0
    rgbs = request_of(2)
    check(ask(client, rgbs, "plain"), rgbs, packed)
    check(ask(client, rgbs), rgbs, packed)


def test_nothing_listens_elsewhere_and_nothing_connects_elsewhere(server):
    local = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as IPv6 writes it
    nowhere = {"00000000", "0" * 32}  # of a socket that listens
    found = server.sockets()
    assert {one for one, _ in found} <= local
    assert {other for _, other in found} <= local | nowhere
    assert any(other in nowhere for _, other in found)


def test_nothing_is_written_beside_the_log(server, repository):
    assert [path.name for path in server.log.parent.rglob("*")] == ["server.log"]
    assert sorted(path.name for path in repository.iterdir()) == ["files", "numpy2", "packed", "plain"]


@pytest.mark.skipif(int(np.__version__.partition(".")[0]) < 2, reason="the tests run with NumPy 1")
def test_a_numpy_that_the_back_end_can_not_read_is_named(client):
    with pytest.raises(InferenceServerException, match=r"numpy 2\.\S+ does not fit this Triton's Python back end"):
        client.load_model("numpy2")


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_example(server, exports, tmp_path, way):
    images, sisms = DATA / "pasted/img/owl", DATA / "pasted/sism/owl"
    load("triton_client").main(images, sisms, tmp_path / "maps", getattr(server, way), "packed", way == "grpc")
    with Predictor(exports.with_suffix(".packed.onnx"), threads=1) as predictor:
        expected = predictor(sorted(images.iterdir()), sorted(sisms.iterdir()))
    for image, maps in zip(sorted(images.iterdir()), expected, strict=True):
        with Image.open(tmp_path / "maps" / f"{image.stem}.png") as written:
            assert abs(np.asarray(written) - 255 * maps).mean() < 0.5


def test_the_example_without_sisms(server, photographs, tmp_path):
    images, expected = photographs
    (tmp_path / "photos").mkdir()
    for image in images:
        shutil.copy(image, tmp_path / "photos")
    load("triton_client").main(tmp_path / "photos", None, tmp_path / "maps", server.http, "files")
    for image, maps in zip(images, expected[4], strict=True):
        with Image.open(tmp_path / "maps" / f"{image.stem}.png") as written, Image.open(image) as photograph:
            assert abs(np.asarray(written) - 255 * restore_map(maps, photograph.size)).mean() < 0.5


def test_sigterm_lets_what_was_sent_finish_and_refuses_the_rest(site, repository, packed, tmp_path):
    rgbs = request_of(16)
    with Server(site, tmp_path, repository, "packed") as server, grpc.InferenceServerClient(server.grpc) as client:
        with ThreadPoolExecutor(5) as pool:
            sent = [pool.submit(ask, client, rgbs) for _ in range(5)]
            time.sleep(0.6)  # they are in the queue, or in work
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert isinstance(ask(client, request_of(1)), tuple)
            answers = [one.result() for one in sent]
        assert server.process.wait(timeout=FINISHED) == 0
    expected = packed.predict_tensors(rgbs[0, ..., :3], rgbs[0, ..., 3])
    for maps in answers:
        assert abs(maps[0] - expected).mean() < 1e-4
