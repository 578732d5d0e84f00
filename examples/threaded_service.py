"""A service in one process: every request is a thread, all threads share one Predictor.

python examples/threaded_service.py icnet.packed.onnx 8000

A request posts one group as a NumPy archive, `np.savez(body, images=..., sisms=...)`: uint8 [N, height, width, 3] and
[N, height, width]. The answer is such an archive with `maps`, float32 [N, height, width]. With a packed export, groups
that arrive within `max_delay_ms` of each other share one call of the engine; their maps are the same.
"""

import io
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from runtime import InputError, Predictor

MAX_BYTES = 256 << 20  # of a request


def make_server(predictor: Predictor, port: int = 0) -> ThreadingHTTPServer:
    """An HTTP server on this machine; port 0 for any free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if length > MAX_BYTES:
                self.answer(413, f"more than {MAX_BYTES} bytes".encode())
                return
            try:
                with np.load(io.BytesIO(self.rfile.read(length)), allow_pickle=False) as group:
                    maps = predictor(group["images"], group["sisms"])
            except InputError as error:
                self.answer(400, str(error).encode())
            except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
                self.answer(400, b"expected a NumPy archive with the arrays images and sisms")
            else:
                body = io.BytesIO()
                np.savez(body, maps=np.stack(maps))
                self.answer(200, body.getvalue())

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of requests that went well."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(model: Path, port: int) -> None:
    """Serve until Ctrl-C."""
    with Predictor(model, max_delay_ms=5) as predictor, make_server(predictor, port) as server:
        print(f"http://127.0.0.1:{server.server_port}")
        server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
