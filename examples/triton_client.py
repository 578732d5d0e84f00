"""A group of photographs to a Triton server that runs what `icnet triton` wrote, over HTTP or gRPC.

    python examples/triton_client.py PHOTOS SISMS OUTPUT
    python examples/triton_client.py PHOTOS SISMS OUTPUT --grpc --server 127.0.0.1:8001
    python examples/triton_client.py PHOTOS OUTPUT

With SISMs the client resizes, so that a request has 200 KB per photograph, whatever its size. Without, it sends the
files as they are, to a model with a detector (icnet triton --files). It needs the extra triton.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.groups import find_groups
from runtime.preprocess import reads, restore_map, save_map, stack, upright_size


def tensor_of(images: Sequence[Path], sisms: Sequence[Path] | None) -> tuple[str, str, NDArray[Any]]:
    """The name, the type and the value of the one input of a request, for one group."""
    if sisms is None:
        return "files", "BYTES", np.array([[image.read_bytes() for image in images]], object)  # [1, N]
    pixels = stack([read() for read in reads(images, sisms)])
    return "rgbs", "UINT8", np.concatenate([pixels.images, pixels.sisms[..., None]], -1)[None]  # [1, N, 224, 224, 4]


def ask(server: str, model: str, tensor: tuple[str, str, NDArray[Any]], grpc: bool = False) -> NDArray[np.float32]:
    """The maps of one group, float32 [N, 224, 224].

    Raises:
        InferenceServerException: the server can't be reached or refuses the request. Code 503, or
            StatusCode.UNAVAILABLE: its queue is full; try again later.
    """
    client: Any = importlib.import_module(f"tritonclient.{'grpc' if grpc else 'http'}")
    name, dtype, value = tensor
    request = client.InferInput(name, list(value.shape), dtype)
    request.set_data_from_numpy(value)
    with client.InferenceServerClient(server) as connection:
        maps: NDArray[np.float32] = connection.infer(model, [request]).as_numpy("maps")
    return maps[0]


def main(photos: Path, sisms: Path | None, output: Path, server: str, model: str = "icnet", grpc: bool = False) -> None:
    """Write a map NAME.png, of the photograph's size, for every photograph in a folder."""
    (group,) = find_groups(photos, sisms)
    maps = ask(server, model, tensor_of(group.images, group.sisms), grpc)
    output.mkdir(parents=True, exist_ok=True)
    for image, tensor in zip(group.images, maps, strict=True):
        save_map(restore_map(tensor, upright_size(image)), output / f"{image.stem}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photographs")
    parser.add_argument("sisms", type=Path, nargs="?", help="a folder with a SISM NAME.png per photograph")
    parser.add_argument("output", type=Path, help="a folder for the maps")
    parser.add_argument("--grpc", action="store_true", help="gRPC instead of HTTP")
    parser.add_argument("--server", help="HOST:PORT (default 127.0.0.1:8000, with --grpc 127.0.0.1:8001)")
    parser.add_argument("--model", default="icnet")
    args = parser.parse_args()
    address = args.server or f"127.0.0.1:{8001 if args.grpc else 8000}"
    main(args.photos, args.sisms, args.output, address, args.model, args.grpc)
