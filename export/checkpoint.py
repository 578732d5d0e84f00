"""ICNet checkpoints in the authors' layout, read and written; and VGG16 backbones.

The layout is a dict with the network's tensors under `state_dict` and, in a training checkpoint, the optimiser's
state under `optimizer`. Ours have the digest of the weights beside them, which is checked, and may say in a line what
they are for. Everything is loaded with `weights_only=True`: a checkpoint can't run code.
"""

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from export.icnet import WIDTH_STEPS, ICNet
from runtime.contract import CARD, WEIGHTS, card_of
from runtime.errors import CheckpointError
from runtime.files import encoded, replacing, write_bytes

Network = TypeVar("Network", bound=torch.nn.Module)

MAX_WIDTH = 16  # the paper's is 1; a file that claims more than this is damaged
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FIRST_LAYERS = {  # by network, and how many output channels each has at width 1
    "ICNet": ("vgg.vgg.0.weight", 64),
    "EGNet": ("base.base.0.weight", 64),
    "detector": ("encoder.stem.0.weight", 32),
}


def load_checkpoint(path: str | os.PathLike[str]) -> ICNet:
    """Load the authors' `ICNet_vgg16.pth`, or a checkpoint of ours, of any width.

    Returns:
        The network, on the CPU, in FP32 and evaluation mode; its width is that of the tensors.

    Raises:
        CheckpointError: the file can't be read, needs pickled code, or has missing, extra, misshapen or non-finite
            tensors; the message names them. Or the tensors are not those that the file's digest is of.
    """
    return load_network(path, "ICNet", ICNet)


def load_network(path: str | os.PathLike[str], name: str, make: Callable[[float], Network]) -> Network:
    """Load a checkpoint that `save_checkpoint` may have written.

    Args:
        path: the file.
        name: which network it should be of, a key of `FIRST_LAYERS`.
        make: the network of a width.

    Returns:
        The network, as for `load_checkpoint`.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint["state_dict"]
    width = width_of(path, state, name)
    with torch.device("meta"):  # shapes first: a file that lies about its width must not fill the memory
        check_state(path, make(width), state)
    model = make(width)
    model.load_state_dict(state)
    if WEIGHTS in checkpoint and checkpoint[WEIGHTS] != weights_digest(model):
        raise CheckpointError(
            f"{path}: damaged, or edited: its tensors are not those that were saved, by the file's {WEIGHTS}; get a "
            f"whole copy (edited on purpose? Remove {WEIGHTS} from its dict, or save it with save_checkpoint)"
        )
    return model.eval()


def read_card(path: str | os.PathLike[str]) -> str | None:
    """What a checkpoint is for, if it tells.

    Raises:
        CheckpointError: as for `read_checkpoint`.
    """
    return card_of(read_checkpoint(path))


def weights_digest(network: torch.nn.Module) -> str:
    """SHA-256 of a network's weights in FP32, by which its exports of any kind and precision know each other."""
    found = hashlib.sha256()
    for name, stored in sorted(network.state_dict().items()):
        tensor = stored.float() if stored.is_floating_point() else stored
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def width_of(path: str | os.PathLike[str], state: Mapping[str, Tensor], network: str) -> float:
    """The width of the network that a state dict is of, from the output channels of its first convolution.

    Args:
        path: the file, for the message.
        state: the tensors.
        network: which network it should be, a key of `FIRST_LAYERS`.

    Raises:
        CheckpointError: they are another network's, or no width has this many channels.
    """
    first_layer, channels = FIRST_LAYERS[network]
    for other, (layer, _) in FIRST_LAYERS.items():
        if layer in state and first_layer not in state:
            raise CheckpointError(
                f"{path}: the checkpoint of {_a(other)}, not of {_a(network)}: icnet export --network {other.lower()} "
                "takes it"
            )
    first = state.get(first_layer)
    if first is None or first.ndim != 4:
        raise CheckpointError(
            f"{path}: not {_a(network)} checkpoint: it has no 4-D tensor {first_layer}{_examples(state)}"
        )
    width = first.shape[0] / channels
    if width * WIDTH_STEPS != int(width * WIDTH_STEPS) or not 0 < width <= MAX_WIDTH:
        raise CheckpointError(
            f"{path}: {first_layer} has {first.shape[0]} output channels; {_a(network)} has {channels} times its "
            f"width, which is a multiple of 1/{WIDTH_STEPS} up to {MAX_WIDTH}"
        )
    return width


def _a(network: str) -> str:
    """A network's name with its article."""
    return f"{'a' if network.islower() else 'an'} {network}"


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a bare state dict, or one under the key `state_dict`.

    Raises:
        CheckpointError: the file can't be read, needs pickled code, or has anything but tensors there.
    """
    checkpoint = _load(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: not a state dict but {type(state).__name__}")
    return _tensors(path, state)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint's dict: `state_dict`, a dict of tensors, and whatever else was saved beside it.

    Raises:
        CheckpointError: the file can't be read, needs pickled code, or is not of this layout.
    """
    checkpoint = _load(path)
    if isinstance(checkpoint, Mapping) and any(layer in checkpoint for layer, _ in FIRST_LAYERS.values()):  # bare
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        keys = f" (its keys: {', '.join(map(str, list(checkpoint)[:5]))} …)" if isinstance(checkpoint, Mapping) else ""
        raise CheckpointError(f"{path}: not an ICNet checkpoint: expected a dict with the key 'state_dict'{keys}")
    checkpoint["state_dict"] = _tensors(path, checkpoint["state_dict"])
    return checkpoint


def save_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    training: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a checkpoint in the authors' layout, so that their code reads ours. Whole or not at all.

    The digest of its weights goes under `WEIGHTS`, for `load_checkpoint` to check.

    Args:
        path: the file.
        model: the network.
        optimizer: written under `optimizer`, to go on training.
        training: written under `training`: the rest that resuming needs, in numbers, texts, lists and dicts.
        card: written under `CARD`: what the checkpoint is for, in one line; its exports carry it.

    Raises:
        OutputError: the file can't be written.
    """
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), WEIGHTS: weights_digest(model)}
    if optimizer is not None:
        checkpoint["optimizer"] = optimizer.state_dict()
    if training is not None:
        checkpoint["training"] = dict(training)
    if card:
        checkpoint[CARD] = card
    with replacing(path) as temporary:
        write_bytes(temporary, encoded(partial(torch.save, checkpoint)))


def load_backbone(model: ICNet, path: str | os.PathLike[str]) -> None:
    """Initialise the VGG16 of `model` (width 1), in place.

    Args:
        model: the network; its other layers are left as they are.
        path: the authors' `vgg16_feat.pth` (keys `0.weight` … `28.bias`) or torchvision's VGG16 (`features.0.weight` …;
            its classifier is passed over).

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    state = _load(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: not a VGG16 state dict but {type(state).__name__}")
    state = _tensors(path, state)
    if "features.0.weight" in state:
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
    check_state(path, model.vgg.vgg, state)
    model.vgg.vgg.load_state_dict(state)


def _load(path: str | os.PathLike[str]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged file can make the loader stumble in any way
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path}: needs pickled code to load, which could do anything; save only tensors: "
                "torch.save({'state_dict': model.state_dict()}, path)"
            ) from error
        raise CheckpointError(f"{path}: not a PyTorch checkpoint, or a damaged one; get a whole copy") from error


def _tensors(path: str | os.PathLike[str], state: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} of the state dict is {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise CheckpointError(
                f"{path}: tensor {name!r} is sparse, quantised or without data; save it as a plain one"
            )
    return dict(state)


def check_state(path: str | os.PathLike[str], module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Say which tensors are missing, extra, misshapen, of another kind or not finite, before any is loaded."""
    expected = module.state_dict()
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing {_some(missing)}")
    if extra := [name for name in state if name not in expected]:
        problems.append(f"unexpected {_some(extra)}")
    shared = [name for name in expected if name in state]
    if misshapen := [
        f"{name} {list(state[name].shape)} (expected {list(expected[name].shape)})"
        for name in shared
        if state[name].shape != expected[name].shape
    ]:
        problems.append(f"misshapen {_some(misshapen)}")
    if foreign := [
        f"{name} {state[name].dtype}"
        for name in shared
        if (state[name].dtype not in FLOATS if expected[name].is_floating_point() else state[name].dtype != torch.int64)
    ]:
        problems.append(f"of another type {_some(foreign)}")
    if problems:
        raise CheckpointError(f"{path}: does not fit the network: {'; '.join(problems)}")
    if broken := [name for name in shared if not state[name].to(expected[name].dtype).isfinite().all()]:
        raise CheckpointError(f"{path}: NaN or infinite values in {_some(broken)}; get another copy, or train again")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)}: {', '.join(names[:most])}{more}"


def _examples(state: Mapping[str, Tensor]) -> str:
    return f" (it has {_some(list(state), 3)})" if state else " (it is empty)"
