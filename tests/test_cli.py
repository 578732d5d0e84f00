"""The command `icnet` itself, and the module `icnet`: what they offer, and what they say when nothing can be run."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import icnet
import icnet_cli
import runtime
from runtime.errors import how_to_install

ROOT = Path(__file__).parents[1]
SHORT = {"--model": "-m", "--models": "-m", "--output": "-o", "--sisms": "-s", "--threads": "-t"}
# The optional packages, of all extras
HEAVY = ("torch", "onnx", "onnxruntime", "cv2", "matplotlib", "MNN", "openvino", "resvg_py", "tensorrt_rtx")


def python(code, *arguments, cwd=ROOT):
    """Run code in a process of its own, in which the repository comes last in the path."""
    start = (
        f"import sys; sys.path.insert(0, {str(cwd)!r}); sys.path.append({str(ROOT)!r})\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", start + code, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_alone_it_prints_its_commands(icnet, words):
    code, out, err = icnet(*words)
    assert (code, err) == (0, "")
    listed = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ") and "--" not in line]
    assert listed == [
        "predict", "batch", "triton", "bank", "web", "export", "build", "calibrate", "evaluate", "train",
        "bench latency", "bench throughput", "bench scaling", "bench roofline", "bench gpu-check", "bench report",
        "data cutouts", "data photos", "data pairs", "data paste", "data targets", "data detector", "data distil",
        "data pretrain",
    ]  # fmt: skip


def test_bench_and_data_alone_print_theirs(icnet):
    for words in (("data",), ("data", "--help")):
        code, out, err = icnet(*words)
        assert (code, err) == (0, "")
        assert "icnet data COMMAND" in out
        assert all(name in out for name in ("cutouts", "photos", "pairs", "paste", "distil", "pretrain"))
        assert not any(name in out for name in ("latency", "predict"))


def test_the_version(icnet):
    assert icnet("--version") == (0, f"icnet-deploy {runtime.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predcit", "x"], "icnet: error: no command 'predcit'; did you mean 'icnet predict'?"),
        (["latency"], "icnet: error: no command 'latency'; did you mean 'icnet bench latency'?"),
        (["bnech", "latency"], "icnet: error: no command 'bnech'; did you mean 'icnet bench'?"),
        (["bench", "latncy"], "icnet bench: error: no command 'latncy'; did you mean 'icnet bench latency'?"),
        (["data", "pate"], "icnet data: error: no command 'pate'; did you mean 'icnet data paste'?"),
        (["data", "latency"], "icnet data: error: no command 'latency'; 'icnet data --help' lists them all"),
        (["--gpu"], "icnet: error: no command '--gpu'; 'icnet --help' lists them all"),
    ],
)
def test_a_misspelt_command_gets_a_suggestion(icnet, words, message):
    assert icnet(*words) == (2, "", message + "\n")


def test_a_misspelt_option_takes_one_line(icnet, capsys):
    with pytest.raises(SystemExit) as stopped:
        icnet_cli.main(["predict", "x", "-m", "m.onnx", "-o", "out", "--thread-count", "2"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("icnet predict: error: unrecognized arguments: --thread-count 2 ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", icnet_cli.COMMANDS)
def test_every_command_has_help_and_the_same_short_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        icnet_cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: icnet {name} ")
    parser = icnet_cli.Parser()
    importlib.import_module(icnet_cli.COMMANDS[name][0]).add_arguments(parser)
    for action in parser._actions:
        for option in SHORT.keys() & set(action.option_strings):
            assert SHORT[option] in action.option_strings, option


@pytest.mark.parametrize(
    ("words", "allowed"),
    [([], set()), (["bench"], set()), (["predict", "--help"], set()), (["evaluate", "--help"], set()),
     (["data", "paste", "--help"], set()), (["export", "--help"], {"torch", "onnx", "onnxruntime"})],
)  # fmt: skip
def test_only_what_the_command_needs_is_imported(words, allowed):
    code = (
        "import icnet_cli\n"
        "try: icnet_cli.main(sys.argv[1:])\n"
        f"finally: print('HEAVY', *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = python(code, *words)
    assert done.stdout.startswith("usage: icnet"), done.stderr
    found = done.stdout.splitlines()[-1].split()
    assert found[0] == "HEAVY"
    assert set(found[1:]) <= allowed


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["export"], "torch", "cpu,export"),
        (["data", "cutouts"], "resvg_py", "train"),
        (["data", "paste", "--cutouts", "x", "--backgrounds", "x", "-o", "gone"], "cv2", "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(words, package, extra):
    done = python(f"sys.modules[{package!r}] = None; import icnet_cli; sys.exit(icnet_cli.main(sys.argv[1:]))", *words)
    assert done.returncode == 2
    prog = " ".join(["icnet", *(word for word in words[:2] if word.isalpha())])
    assert done.stderr == f"{prog}: error: {package} is not installed: {how_to_install(extra)}\n"


def test_extras_are_installed_from_the_clone_if_there_is_one(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert how_to_install("cpu,mnn") == "pip install --editable '.[cpu,mnn]'"
    monkeypatch.chdir(tmp_path)
    assert how_to_install("cpu,mnn") == f"pip install --editable '{ROOT}[cpu,mnn]'"
    monkeypatch.setattr("runtime.errors.__file__", str(tmp_path / "site-packages/runtime/errors.py"))
    assert how_to_install("cpu,mnn") == "pip install 'icnet-deploy[cpu,mnn]'"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "export/to_onnx.py",
            ["--checkpoint", "none.pth", "--output", "x.onnx"],
            "icnet export: error: none.pth: no such",
        ),
        (
            "export/build_engine.py",
            ["--onnx", "none.onnx", "-o", "x", "--max", "2"],
            "icnet build: error: none.onnx: no such",
        ),
        (
            "calibration/calibrate.py",
            ["--onnx", "none.onnx", "--groups", "x", "--output", "y"],
            "icnet calibrate: error: ",
        ),
        ("benchmarks/latency.py", ["none.onnx"], "icnet bench latency: error: none.onnx: no such"),
    ],
)
def test_a_script_is_its_command(script, arguments, message, tmp_path):
    """From anywhere, without the package being installed on the path."""
    done = subprocess.run(
        [sys.executable, "-I", str(ROOT / script), *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_the_facade_is_the_api_of_runtime():
    assert {*icnet.__all__} == {*runtime.__all__, "__version__"}
    assert all(getattr(icnet, name) is getattr(runtime, name) for name in icnet.__all__)


def plant(folder, name, content=""):
    """Another package, or another module, of that name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path.parent if path.name == "__init__.py" else path


@pytest.mark.parametrize("name", ["runtime.py", "runtime/__init__.py"])
def test_another_runtime_that_hides_ours_is_named(tmp_path, name):
    found = plant(tmp_path, name, "raise SystemExit('the other one was run')")
    reason = f"{found} hides the package 'runtime' of icnet-deploy in {ROOT}; rename it, or start elsewhere"
    done = python("from icnet import Predictor", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {reason}"
    for words in ([], ["predict", "x"]):
        done = python("import icnet_cli; sys.exit(icnet_cli.main(sys.argv[1:]))", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"icnet: error: {reason}\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluation.py", ["evaluate", "x"]),
        ("evaluation/__init__.py", ["evaluate", "x"]),
        ("training.py", ["evaluate", "x"]),  # one layer below
        ("export/__init__.py", ["export"]),
        ("benchmarks.py", ["bench", "latency"]),
    ],
)
def test_so_is_a_package_that_hides_the_command_s(tmp_path, name, words):
    found = plant(tmp_path, name)
    done = python("import icnet_cli; sys.exit(icnet_cli.main(sys.argv[1:]))", *words, cwd=tmp_path)
    prog = " ".join(["icnet", *(word for word in words if word != "x")])
    package = name.split("/")[0].removesuffix(".py")
    reason = f"{found} hides the package {package!r} of icnet-deploy in {ROOT}; rename it, or start elsewhere"
    assert (done.returncode, done.stderr) == (2, f"{prog}: error: {reason}\n")


def test_a_folder_of_that_name_that_hides_nothing_does_no_harm(tmp_path, model_file, image_folder):
    """`export` is not needed for `icnet predict`; a plain folder in the way of no import is never looked at."""
    plant(tmp_path, "export/__init__.py")
    folder = image_folder("cats", "a.jpg")
    words = ("predict", folder, "-m", model_file, "-s", "builtin", "-o", "out")
    done = python("import icnet_cli; sys.exit(icnet_cli.main(sys.argv[1:]))", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/cats/a.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("stalled", "words"),
    [
        ("numpy", ["predict"]),
        ("numpy", []),
        ("runtime.preprocess", ["--version"]),
        ("evaluation.accuracy", ["evaluate"]),
    ],
)
def test_stopped_while_it_imports(number, expected, stalled, words):
    """A signal may come before `runtime` is there, which takes longest on a cold disk."""
    code = f"""
import signal, sys, time
class Stalls:
    def find_spec(self, name, path=None, target=None):
        if name == {stalled!r}:
            signal.raise_signal({int(number)})
            time.sleep(60)
            raise ImportError("the signal was lost")
sys.meta_path.insert(0, Stalls())
import icnet_cli
sys.exit(icnet_cli.main(sys.argv[1:]))
"""
    done = python(code, *words)
    prog = " ".join(["icnet", *(word for word in words if not word.startswith("-"))])
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", f"\n{prog}: stopped\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_keeps_what_it_has_exits_with_the_signal_s_code(number, expected):
    code = f"""
import signal, sys, types
import icnet_cli
def run(args):
    try:
        signal.raise_signal({int(number)})
    except KeyboardInterrupt:
        return 130  # as the measurements do, once they have written their results
icnet_cli._load = lambda *_: types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
sys.exit(icnet_cli.main(["predict"]))
"""
    assert python(code).returncode == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_an_extension_module_is_imported(number, expected, model_file, image_folder, tmp_path):
    """Their imports turn every exception into an ImportError, as pybind11 and NumPy's C API do."""
    code = f"""
import signal, sys
class Extension:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            try:
                signal.raise_signal({int(number)})
            except KeyboardInterrupt as error:
                raise ImportError("initialization failed") from error
sys.meta_path.insert(0, Extension())
import icnet_cli
sys.exit(icnet_cli.main(sys.argv[1:]))
"""
    words = ("predict", image_folder("cats", "a.jpg"), "-m", model_file, "-s", "builtin", "-o", tmp_path / "out")
    done = python(code, *words)
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", "\nicnet predict: stopped\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_where_python_drops_exceptions(number, expected):
    code = f"""
import signal, sys, time, types
import icnet_cli
class Finalized:
    def __del__(self):
        signal.raise_signal({int(number)})
def run(args):
    Finalized()
    for _ in range(100):
        time.sleep(0.01)
    return 0
icnet_cli._load = lambda *_: types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
sys.exit(icnet_cli.main(["predict"]))
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", "\nicnet predict: stopped\n")
