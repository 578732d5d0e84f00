"""The command line in a process of its own, for cases that kill it: says "ready" once it is about to begin.

Exports come from the tests' cache, so that one takes seconds.
"""

import sys

import icnet_cli
import runtime  # noqa: F401  (until it is imported, Python itself answers to signals)

if sys.argv[1] == "export":
    import torch

    from tests.export_cache import ExportCache

    torch.onnx.export = ExportCache(torch.onnx.export)
print("ready", flush=True)
sys.exit(icnet_cli.main())
