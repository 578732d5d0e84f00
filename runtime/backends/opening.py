"""Which engine runs a model file: by its suffix."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from runtime.backends import Backend
from runtime.backends.mnn import MnnBackend
from runtime.backends.onnx import OnnxBackend
from runtime.backends.onnx_gpu import Provider, name_of
from runtime.backends.onnx_session import CPU
from runtime.backends.openvino import OpenVinoBackend
from runtime.backends.tensorrt import TensorRTBackend
from runtime.contract import Contract, check_contract
from runtime.errors import InputError, ModelError
from runtime.files import check_model_file, check_seal
from runtime.openvino_library import CPU as OPENVINO_CPU
from runtime.threads import beside

ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}
MNN_SUFFIX = ".mnn"
OPENVINO_SUFFIX = ".xml"
OTHER_SUFFIXES = {*ENGINE_SUFFIXES, MNN_SUFFIX, OPENVINO_SUFFIX}  # than ONNX files
CHECKPOINT_SUFFIXES = {".pth", ".pt", ".ckpt", ".safetensors"}


def open_backend(
    path: Path,
    *,
    threads: int | None = None,
    providers: Sequence[Provider] = (CPU,),
    device: int | str | None = None,
    slots: int = 2,
    allow_host_code: bool = False,
    verify: bool = True,
    contract: Contract = check_contract,
) -> Backend:
    """The engine with a model; the arguments are those of `Predictor`, and what its tensors must be.

    Raises:
        ModelError: as for `Predictor`.
        DependencyError: likewise.
        InputError: `device` is of another engine.
    """
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        check_model_file(path)
        onnx = path.with_suffix(".onnx").name
        raise ModelError(f"{path}: a checkpoint; export it first: icnet export --checkpoint {path} --output {onnx}")
    if isinstance(device, str) and suffix != OPENVINO_SUFFIX:
        raise InputError(f"device={device!r}: is for OpenVINO's files (.xml), which {path} is not")
    if verify and suffix in (MNN_SUFFIX, OPENVINO_SUFFIX):
        check_seal(path)  # before the file is used: MNN can crash on a damaged one
    if suffix in ENGINE_SUFFIXES:
        number = device if isinstance(device, int) else 0
        return TensorRTBackend(path, slots=slots, device=number, allow_host_code=allow_host_code, contract=contract)
    if suffix == OPENVINO_SUFFIX:
        if isinstance(device, int):
            raise InputError(f'device={device}: {path} takes OpenVINO\'s name of a device, as "CPU" or "GPU"')
        return OpenVinoBackend(path, threads, device or OPENVINO_CPU, verify, contract)
    if suffix == MNN_SUFFIX:
        return MnnBackend(path, threads, contract)
    with beside(partial(check_seal, path)) if verify else nullcontext():
        return OnnxBackend(path, threads, providers)


def place(path: Path, providers: Sequence[Provider], device: int | str | None) -> str:
    """Where a file is run, in words; the arguments are those of `Predictor`."""
    suffix = path.suffix.lower()
    if suffix == OPENVINO_SUFFIX:
        return f"OpenVINO's {device}" if isinstance(device, str) and device != OPENVINO_CPU else "the CPU"
    on_gpu = suffix in ENGINE_SUFFIXES or (suffix != MNN_SUFFIX and name_of(providers[0]) != CPU)
    return "the GPU" if on_gpu else "the CPU"
