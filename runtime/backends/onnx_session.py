"""Sessions of ONNX Runtime on any ONNX file, with any of its execution providers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends import onnx_gpu
from runtime.backends.cuda_driver import unfit
from runtime.backends.onnx_gpu import Provider
from runtime.contract import Interface, TensorSpec
from runtime.errors import DependencyError, InputError, ModelError, how_to_install, one_line
from runtime.files import check_model_file, utf8_name
from runtime.threads import native_calls

CPU = "CPUExecutionProvider"
CUDA = (onnx_gpu.CUDA, onnx_gpu.TENSORRT)  # those that compute on an NVIDIA GPU
NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


def library() -> Any:
    """The module onnxruntime.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime is not installed: {how_to_install('cpu')} (or onnxruntime-gpu; not both)"
        ) from error
    return ort


@dataclass(frozen=True)
class Started:
    """A session, the module that runs it, and its execution providers with all options."""

    ort: Any
    session: Any
    providers: list[Provider]


def start_session(
    path: Path,
    threads: int | None,
    providers: Sequence[Provider],
    interface_of: Callable[[Path, Any], Interface] | None = None,
) -> Started:
    """A session on any ONNX file.

    Args:
        path: the file.
        threads: as for `OnnxBackend`.
        providers: likewise.
        interface_of: checks a session on an exported ICNet and tells its tensors; None for another network.

    Raises:
        ICNetError: as for `OnnxBackend`.
    """
    ort = library()
    check_model_file(path)
    wanted = [provider_of(p)[0] for p in _checked(providers)]
    if absent := [name for name in wanted if name not in ort.get_available_providers()]:
        raise DependencyError(
            f"{', '.join(absent)}: not in this onnxruntime, which has {', '.join(ort.get_available_providers())}; "
            "for NVIDIA GPUs replace onnxruntime by onnxruntime-gpu (never both)"
        )
    if any(name in CUDA for name in wanted):
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, where the loader does not look
        providers = onnx_gpu.with_options(path, *_look(ort, path, interface_of), providers)
        # ONNX Runtime may come without CUDA, which `with_options` puts behind TensorRT.
        providers = [p for p in providers if provider_of(p)[0] in ort.get_available_providers()]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # With memory patterns ONNX Runtime allocates one block for all tensors of a size that it has seen: no faster,
    # and in addition to the memory of the first call.
    options.enable_mem_pattern = False
    # Threads that wait for work keep their cores busy. Within a call that saves time; after it, it takes the cores
    # from the threads that resize and write the maps.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # nothing on standard error: errors reach the caller as exceptions
    session = _session(ort, path, options, providers)
    # ONNX Runtime only warns of a provider whose libraries or device are missing, and goes on with the next.
    if unused := [name for name in wanted if name not in session.get_providers()]:
        raise ModelError(
            f"{path}: {', '.join(unused)} was asked for but could not be started; are its libraries (CUDA, "
            "cuDNN, TensorRT) and a GPU there? Leave it out of providers to do without"
        )
    return Started(ort, session, [*providers])


def _session(ort: Any, path: Path, options: Any, providers: Sequence[Provider]) -> Any:
    # ONNX Runtime takes names of files that are UTF-8 only.
    model: Path | bytes = path if utf8_name(path) else path.read_bytes()
    with native_calls:
        try:
            # Its fallback would print to standard output, hide the reason, and leave the work to the CPU.
            return ort.InferenceSession(model, options, providers=[*providers], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but Exception
            others = [name for name, _ in map(provider_of, providers) if name != CPU]
            if others and (driver := unfit(error)) is not None:
                raise driver from error
            what = (
                f"can't be run with {', '.join(others)}" if others else "not an ONNX model that ONNX Runtime can load"
            )
            raise ModelError(f"{path}: {what}: {reason(error)}") from error


def tensors(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of any ONNX file, as ONNX Runtime reads them without a GPU.

    Raises:
        ModelError: it can't be loaded.
        DependencyError: ONNX Runtime is not installed.
    """
    ort = library()
    check_model_file(path)
    return session_tensors(_unprepared(ort, path))


def _look(
    ort: Any, path: Path, interface_of: Callable[[Path, Any], Interface] | None
) -> tuple[Interface | None, dict[str, str]]:
    """A model's tensors, if it is ours, and its metadata, as ONNX Runtime reads them without a GPU."""
    session = _unprepared(ort, path)
    interface = None if interface_of is None else interface_of(path, session)
    return interface, session.get_modelmeta().custom_metadata_map


def _unprepared(ort: Any, path: Path) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 4
    return _session(ort, path, options, [CPU])


def session_tensors(session: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of a session."""
    return [_spec(t) for t in session.get_inputs()], [_spec(t) for t in session.get_outputs()]


def _spec(tensor: Any) -> TensorSpec:
    dtype = NUMPY_TYPES.get(tensor.type, tensor.type.removeprefix("tensor(").removesuffix(")"))
    return TensorSpec(tensor.name, dtype, tuple(tensor.shape))


def _checked(providers: object) -> list[Provider]:
    """The execution providers, if they are that at all."""
    listed: list[Any] = [] if isinstance(providers, str) or not isinstance(providers, Sequence) else [*providers]
    for provider in listed:
        match provider:
            case str() | (str(), dict()):
                name, options = provider_of(provider)
            case _:
                listed = []
                break
        if name == CPU and (unknown := [option for option in options if option != "device_id"]):
            raise InputError(f"providers: {CPU} has no option {unknown[0]!r}")  # ONNX Runtime passes over it
        if not str(options.get("device_id", 0)).isdecimal():
            raise InputError(f"providers: device_id={options['device_id']!r}: expected a device's number")
    if not listed:
        raise InputError(
            f"providers={providers!r}: expected a list of execution providers, each a name or (name, options), e.g. "
            f'["{CPU}"]'
        )
    return listed


def provider_of(provider: Provider) -> tuple[str, dict[str, Any]]:
    """An execution provider's name and options."""
    return (provider, {}) if isinstance(provider, str) else provider


def reason(error: Exception) -> str:
    """What ONNX Runtime says, for a message."""
    return one_line(error) or type(error).__name__
