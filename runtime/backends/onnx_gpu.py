"""ONNX Runtime's providers for NVIDIA GPUs: their options, chosen for a model before its session is made.

Options that the caller gives are kept.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.contract import BANK, Interface, TensorSpec
from runtime.files import digest
from runtime.tensorrt_library import load

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
IMAGES = (1, 5, 64)  # of the TensorRT provider's profile: the smallest, the best and the largest number
SIVS = (1, 20, 1024)  # likewise, of a bank
PROFILE = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
Provider = str | tuple[str, dict[str, Any]]


def name_of(provider: Provider) -> str:
    """A provider's name."""
    return provider if isinstance(provider, str) else provider[0]


def with_options(
    path: Path, interface: Interface | None, notes: Mapping[str, str], providers: Sequence[Provider]
) -> list[Provider]:
    """The providers, with the options that this package chooses.

    CUDA: without TF32 for FP32 models, because TF32 swaps pixels in RSCF's order. For FP16 and INT8 models the option
    must stay as it is: without it ONNX Runtime takes the tensor cores from FP16 convolutions too (1.20 to 1.31,
    `CreateCudnnFeExecutionPlan`). And plans by heuristics: ONNX Runtime plans every convolution again when the number
    of images differs from the last call's, and the exhaustive search, its default, takes hundreds of times longer.

    TensorRT: one profile instead of a new engine for every size beyond the last; engines and timings are kept in a
    folder beside the model, one per content of the file, since ONNX Runtime knows engines by the graph without its
    weights. What TensorRT leaves is for CUDA.

    Args:
        path: the model's file.
        interface: its tensors; None for another network than ICNet, whose engines are built as its sizes come.
        notes: its metadata; without "precision" it is taken for FP32.
        providers: as for `OnnxBackend`.

    Raises:
        DependencyError: the package `tensorrt` is broken.
    """
    narrow = notes.get("precision", "fp32") != "fp32"
    of_cuda: dict[str, Any] = {"cudnn_conv_algo_search": "HEURISTIC"} | ({} if narrow else {"use_tf32": 0})
    found: list[Provider] = []
    for provider in providers:
        name, given = (provider, {}) if isinstance(provider, str) else provider
        if name == CUDA:
            found.append((name, of_cuda | given))
        elif name == TENSORRT:
            load("tensorrt")  # its package has the libraries that ONNX Runtime looks for
            found.append((name, _of_tensorrt(path, interface, given) | given))
            if CUDA not in map(name_of, providers):
                device = {"device_id": given["device_id"]} if "device_id" in given else {}
                found.append((CUDA, of_cuda | device))
        else:
            found.append(provider)
    return found


def largest(providers: Sequence[Provider]) -> int | None:
    """The largest group that providers from `with_options` take; None for any, or as the caller's options say."""
    for provider in providers:
        if name_of(provider) == TENSORRT and isinstance(provider, tuple):
            images = provider[1].get(PROFILE[2], "").split(",")[0].rpartition(":")[2].split("x")[0]
            return int(images) if images.isdecimal() else None
    return None


def _of_tensorrt(path: Path, interface: Interface | None, given: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if interface is not None and interface.size is None and not any(option in given for option in PROFILE):
        for i, option in enumerate(PROFILE):
            options[option] = ",".join(_shape(spec, i) for spec in interface.inputs)
    folder = path.with_name(path.name + ".tensorrt") / digest(path)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing can be kept there; then it is built in every process
        return options
    caches = {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}
    return options | {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True} | caches


def _shape(spec: TensorSpec, which: int) -> str:
    length = (SIVS if spec.name == BANK.name else IMAGES)[which]
    return f"{spec.name}:{'x'.join(map(str, (length, *spec.sizes)))}"
