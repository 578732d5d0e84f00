"""A service of several replicas on Ray Serve; each has a Predictor and joins the groups of several requests.

    python examples/ray_serve.py icnet.packed.onnx --replicas 2 --port 8000

A request posts one group as a NumPy archive, as for threaded_service.py. A batch is full by images, not by requests. Of
each replica ONGOING requests are in work, QUEUED more wait, and others get 503. A replica is healthy if it can infer;
Ray replaces one that is not. It needs the extra ray-serve. Of Ray 2.60 each replica has a port for other deployments,
open on all addresses, whatever is asked for; all other ports are of 127.0.0.1.
"""

import argparse
import asyncio
import io
import os
import secrets
import signal
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # listen on 127.0.0.1 only
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_AUTH_MODE", "token")

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from runtime import ICNetError, InputError, Predictor

IMAGES = 32  # in a batch
ONGOING, QUEUED = 8, 8  # requests of a replica, and requests that wait for one
MAX_BYTES = 64 << 20  # of a request


def images_of(groups: list[tuple[Any, Any]]) -> int:
    """The images in a batch."""
    return sum(len(images) for images, _ in groups)


class Service:
    """One replica."""

    def __init__(self, model: str, threads: int) -> None:
        self.predictor = Predictor(model, threads=threads)

    async def check_health(self) -> None:
        """Ray calls this; an error, or no answer in time, ends the replica."""
        black = np.zeros((1, 224, 224, 3), np.uint8)
        await asyncio.to_thread(self.predictor.predict_tensors, black, black[..., 0])

    @serve.batch(max_batch_size=IMAGES, batch_wait_timeout_s=0.005, batch_size_fn=images_of)
    async def maps(self, groups: list[tuple[Any, Any]]) -> list[Any]:
        """The maps of each group, or its error."""
        return await asyncio.to_thread(lambda: [*self.predictor.predict_groups(groups, on_error="return")])

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        if int(request.headers.get("content-length", MAX_BYTES + 1)) > MAX_BYTES:
            return Response(f"more than {MAX_BYTES} bytes, or of unknown length", 413)
        try:
            with np.load(io.BytesIO(await request.body()), allow_pickle=False) as archive:
                images, sisms = archive["images"], archive["sisms"]
            if images.ndim != 4 or not 1 <= len(images) <= IMAGES:
                return Response(f"expected 1 to {IMAGES} images", 400)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
            return Response("expected a NumPy archive with the arrays images and sisms", 400)
        found = await self.maps((images, sisms))
        if isinstance(found, ICNetError):
            return Response(str(found), 400 if isinstance(found, InputError) else 500)
        body = io.BytesIO()
        np.savez(body, maps=np.stack(found))
        return Response(body.getvalue())


def main(model: Path, replicas: int, threads: int, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="icnet-serve-") as folder:
        size = replicas * threads + 1
        ray.init(num_cpus=size, include_dashboard=False, _temp_dir=folder, object_store_memory=200 << 20)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options: dict[str, Any] = {
            "num_replicas": replicas,
            "ray_actor_options": {"num_cpus": threads},
            "max_ongoing_requests": ONGOING,
            "max_queued_requests": QUEUED,
            "health_check_period_s": 5,
            "health_check_timeout_s": 20,
            "graceful_shutdown_timeout_s": 20,
        }
        try:
            serve.run(serve.deployment(**options)(Service).bind(str(model.absolute()), threads))
            print(f"http://127.0.0.1:{port}", flush=True)
            stopped = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopped.set())
            stopped.wait()
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed export, or another model, which runs group after group")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a replica")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    main(args.model, args.replicas, args.threads, args.port)
