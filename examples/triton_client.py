"""A group of photographs to a Triton server that runs what `icnet triton` wrote, over HTTP or gRPC.

    python examples/triton_client.py PHOTOS SISMS OUTPUT
    python examples/triton_client.py PHOTOS SISMS OUTPUT --grpc --server 127.0.0.1:8001

The client resizes, so that a request has 200 KB per photograph, whatever its size. It needs the extra triton.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.groups import find_groups
from runtime.preprocess import GroupPixels, reads, restores, save_map, stack


def ask(server: str, model: str, pixels: GroupPixels, grpc: bool = False) -> NDArray[np.float32]:
    """The maps of one group, float32 [N, 224, 224].

    Raises:
        InferenceServerException: the server can't be reached or refuses the request. Code 503, or
            StatusCode.UNAVAILABLE: its queue is full; try again later.
    """
    client: Any = importlib.import_module(f"tritonclient.{'grpc' if grpc else 'http'}")
    rgbs = np.concatenate([pixels.images, pixels.sisms[..., None]], -1)[None]  # [1, N, 224, 224, 4]
    tensor = client.InferInput("rgbs", list(rgbs.shape), "UINT8")
    tensor.set_data_from_numpy(rgbs)
    with client.InferenceServerClient(server) as connection:
        maps: NDArray[np.float32] = connection.infer(model, [tensor]).as_numpy("maps")
    return maps[0]


def main(photos: Path, sisms: Path, output: Path, server: str, model: str = "icnet", grpc: bool = False) -> None:
    """Write a map NAME.png, of the photograph's size, for every photograph in a folder."""
    (group,) = find_groups(photos, sisms)
    pixels = stack([read() for read in reads(group.images, group.sisms)])
    maps = ask(server, model, pixels, grpc)
    output.mkdir(parents=True, exist_ok=True)
    for image, restore in zip(group.images, restores(pixels, maps), strict=True):
        save_map(restore(), output / f"{image.stem}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photographs")
    parser.add_argument("sisms", type=Path, help="a folder with a SISM NAME.png per photograph")
    parser.add_argument("output", type=Path, help="a folder for the maps")
    parser.add_argument("--grpc", action="store_true", help="gRPC instead of HTTP")
    parser.add_argument("--server", help="HOST:PORT (default 127.0.0.1:8000, with --grpc 127.0.0.1:8001)")
    parser.add_argument("--model", default="icnet")
    args = parser.parse_args()
    address = args.server or f"127.0.0.1:{8001 if args.grpc else 8000}"
    main(args.photos, args.sisms, args.output, address, args.model, args.grpc)
