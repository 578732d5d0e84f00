"""A strict imitation of the parts of PyCUDA, cuda-bindings and TensorRT that the runtime calls, over host memory.

Work that is queued on a stream happens only when an event behind it is waited for, or the stream is synchronised; the
network is computed by ONNX Runtime at that moment, from what lies in the simulated device memory then. What real
hardware would let pass and punish later is an error here: pageable memory in an asynchronous copy, addresses outside a
live allocation, shapes outside the profile, calls without a current context, a changed context behind a captured graph.
Freed memory is poisoned, and everything alive is counted.

An "engine" is what `engine_file` writes: a JSON header and an ONNX model.
"""

from tests.simulated_gpu.device import FREED, Gpu, Violation
from tests.simulated_gpu.installation import install
from tests.simulated_gpu.tensorrt import engine_file

__all__ = ["FREED", "Gpu", "Violation", "engine_file", "install"]
