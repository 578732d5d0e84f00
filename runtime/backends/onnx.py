"""ONNX Runtime, on the CPU or through any of its execution providers.

On an NVIDIA GPU every call has a *binding* to itself: page-locked host buffers, device memory for the inputs and the
I/O binding that joins them to the session. So a group is copied by the GPU's copy engines, straight from and to these
buffers, while other calls compute; bindings are reused from call to call.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import onnx_gpu, warn_of_other_engine
from runtime.backends.cuda_driver import PageLocked
from runtime.backends.onnx_gpu import Provider
from runtime.backends.onnx_session import CPU, CUDA, provider_of, reason, session_tensors, start_session
from runtime.contract import (
    CALIBRATED_FOR,
    GROUPS,
    WEIGHTS,
    ExportKind,
    Interface,
    card_of,
    check_contract,
)
from runtime.errors import ICNetError, ModelError
from runtime.threads import native_calls

DEVICE = "cuda"  # ONNX Runtime's name for that GPU's memory
MAX_BINDINGS = 4  # calls at once; more would only wait inside the GPU
KEPT_IMAGES = 64  # buffers for larger groups are freed after the call
BUCKET = 8  # packed calls of more images are padded to a multiple of this, the others to a power of two


@dataclass(frozen=True)
class Finished:
    """A call that has been computed: ONNX Runtime returns when it is done."""

    output: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        """The model's output."""
        return self.output


class OnnxBackend:
    """A session of ONNX Runtime on an exported model.

    Args:
        path: an .onnx file that follows the contract.
        threads: CPU threads for one call; None for one per physical core.
        providers: execution providers in order of preference, each a name or (name, options), as ONNX Runtime takes
            them. The CPU comes last in any case, for what the others can't compute. With those of NVIDIA GPUs, calls
            go through I/O bindings, and options that are not given are chosen by `onnx_gpu.with_options`.

    Raises:
        InputError: `providers` is not that.
        ModelError: not an ONNX file, or not an exported ICNet; or a provider that was asked for is not used.
        DependencyError: ONNX Runtime is not installed, or not with these providers; or there is no NVIDIA driver.
    """

    slots = 1  # groups at once that one caller can have in work

    def __init__(self, path: Path, threads: int | None = None, providers: Sequence[Provider] = (CPU,)) -> None:
        self.path = path
        started = start_session(path, threads, providers, _interface)
        ort, providers = started.ort, started.providers
        self._session: Any = started.session  # None: closed
        self.interface = _interface(path, self._session)
        self.largest = self.interface.size or onnx_gpu.largest(providers)
        meta = self._session.get_modelmeta()
        self.name = str(meta.graph_name)
        notes: dict[str, str] = meta.custom_metadata_map
        self.weights_digest: str | None = notes.get(WEIGHTS)
        self.card = card_of(notes)
        engine = "tensorrt" if onnx_gpu.TENSORRT in map(onnx_gpu.name_of, providers) else "onnxruntime"
        warn_of_other_engine(path, notes.get(CALIBRATED_FOR), engine)
        self._bindings: _Bindings | None = None
        self._last = ort.RunOptions()  # frees the memory of the call; allocating it again takes time
        self._last.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        if on_gpu := [p for p in map(provider_of, providers) if p[0] in CUDA]:
            device = int(on_gpu[0][1].get("device_id", 0))
            self._bindings = _Bindings(ort, self._session, self.interface, device)
            self._finalizer = weakref.finalize(self, self._bindings.close)

    def check_group(self, images: int, bank_size: int = 1) -> None:
        """Raise ModelError if the model was built for groups, or banks, of another size."""
        if self.interface.size not in (None, images):
            raise ModelError(
                f"{self.path}: built for groups of exactly {self.interface.size} images, got {images}; "
                "export it with a dynamic group axis (icnet export does)"
            )
        if images > (self.largest or images):
            raise ModelError(
                f"{self.path}: the TensorRT provider has a profile for groups of up to {self.largest} images, got "
                f"{images}; give it {', '.join(onnx_gpu.PROFILE)}"
            )
        rows = self.interface.inputs[-1].shape[0]
        if self.interface.kind is ExportKind.BANKED and isinstance(rows, int) and rows != bank_size:
            raise ModelError(
                f"{self.path}: built for banks of exactly {rows} images, got {bank_size}; "
                "export it with dynamic axes (icnet export --banked does)"
            )

    def submit(self, *tensors: NDArray[Any], last: bool = False) -> Finished:
        """Run a call: a tensor for each of the interface's inputs; after the `last` the CPU's memory is given back."""
        images = tensors[0]
        bindings, session = self._bindings, self._session  # in this order: `close` takes them in the other
        if session is None:
            raise ICNetError(f"{self.path}: this Predictor is closed")
        try:
            output: NDArray[np.float32]
            with native_calls:
                if bindings is None:
                    names = [spec.name for spec in self.interface.inputs]
                    feeds = dict(zip(names, tensors, strict=True))
                    output = session.run([self.interface.output.name], feeds, self._last if last else None)[0]
                else:
                    output = bindings.run(*tensors)
        except ICNetError:
            raise
        except Exception as error:
            if "allocate memory" in str(error) or isinstance(error, MemoryError):
                raise ModelError(f"{self.path}: out of memory for a group of {len(images)}; split the group") from error
            raise ModelError(f"{self.path}: failed on a group of {len(images)}: {reason(error)}") from error
        return Finished(output)

    def close(self) -> None:
        """Give the session's memory back, once calls in work are finished; on a GPU, wait for them."""
        self._session = None
        if self._bindings is not None:
            self._finalizer()
            self._bindings = None


class _Bindings:
    """The bindings: how many there are, and which are free.

    Args:
        ort: the module `onnxruntime`.
        session: the model's session.
        interface: the model's tensors.
        device: the GPU's number.

    Raises:
        DependencyError: there is no NVIDIA driver.
    """

    def __init__(self, ort: Any, session: Any, interface: Interface, device: int) -> None:
        self._ort, self._session, self._interface, self._device = ort, session, interface, device
        # ONNX Runtime's own allocator of such memory can be reached from Python in its newest releases only.
        self._memory = PageLocked(device)
        self._free: list[_Binding] = []
        self._made = 0
        self._changed = threading.Condition()
        self._closed = False

    def run(self, *tensors: NDArray[Any]) -> NDArray[np.float32]:
        """Run a call through a free binding: a new one if there is none, until there are MAX_BINDINGS."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or self._made < MAX_BINDINGS)
            if self._closed:
                raise ICNetError("this Predictor is closed")
            if not self._free:
                self._free.append(_Binding(self._ort, self._session, self._interface, self._memory, self._device))
                self._made += 1
            binding = self._free.pop()
        try:
            return binding.run(*tensors)
        finally:
            with self._changed:
                self._free.append(binding)
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new groups, wait for those in work, and free everything."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._made)
            while self._free:
                self._free.pop().free()
                self._made -= 1
        self._memory.close()


def padded(images: int) -> int:
    """The length that a packed call of so many images is padded to.

    ONNX Runtime plans every convolution again when the length differs from the last call's. The calls of a stream of
    groups are nearly full, and with this nearly all of one length.
    """
    return 1 << (images - 1).bit_length() if images <= BUCKET else -(-images // BUCKET) * BUCKET


class _Binding:
    """One call's way through the session, for any lengths; it holds no memory until its first call."""

    def __init__(self, ort: Any, session: Any, interface: Interface, memory: PageLocked, device: int) -> None:
        self._ort, self._session, self._memory, self._device = ort, session, memory, device
        self._inputs_of, self._output = interface.inputs, interface.output
        self._pads = interface.kind is ExportKind.PACKED and interface.size is None
        self._io = session.io_binding()
        self._host: dict[str, NDArray[Any]] = {}  # page-locked, [most, ...]
        self._inputs: dict[str, Any] = {}  # on the device, [length of the last call, ...]

    def run(self, *tensors: NDArray[Any]) -> NDArray[np.float32]:
        """Copy a call's tensors in, run it, and copy its output out: an array of the caller's own."""
        n = len(tensors[0])
        more = padded(n) - n if self._pads else 0
        try:
            self._fit([len(array) + more for array in tensors])
            for spec, array in zip(self._inputs_of, tensors, strict=True):
                host, value = self._host[spec.name][: len(array) + more], self._inputs[spec.name]
                np.copyto(host[: len(array)], array)
                if more:  # copies of a real image, since black ones might be NaN inside; a group of their own
                    host[n:] = _unused(array) if spec.name == GROUPS.name else array[0]
                value.update_inplace(host)
                # Anew each time: a node that is left to the CPU gets a copy, which is made when the input is bound.
                self._io.bind_ortvalue_input(spec.name, value)
            output = self._host[self._output.name][: n + more]
            self._io.bind_output(self._output.name, "cpu", 0, output.dtype, output.shape, output.ctypes.data)
            self._session.run_with_iobinding(self._io)
            output = output[:n].copy()
        except BaseException:
            self.free()
            raise
        if n > KEPT_IMAGES:
            self.free()
        return output

    def free(self) -> None:
        """Give its memory back; the next call takes new."""
        self._io.clear_binding_inputs()
        self._io.clear_binding_outputs()
        self._inputs.clear()
        while self._host:
            self._memory.free(self._host.popitem()[1])

    def _fit(self, lengths: Sequence[int]) -> None:
        """Have host buffers of these lengths at least, and device memory of exactly these."""
        wanted = [*zip(self._inputs_of, lengths, strict=True), (self._output, lengths[0])]
        if any(spec.name not in self._host or len(self._host[spec.name]) < length for spec, length in wanted):
            self.free()
            for spec, length in wanted:
                most = 1 << (length - 1).bit_length()  # groups that grow one by one need few allocations
                self._host[spec.name] = self._memory.allocate((most, *spec.sizes), spec.dtype)
        for spec, length in wanted[:-1]:
            shape = [length, *spec.sizes]
            if spec.name not in self._inputs or self._inputs[spec.name].shape() != shape:
                create = self._ort.OrtValue.ortvalue_from_shape_and_type
                self._inputs[spec.name] = create(shape, np.dtype(spec.dtype).type, DEVICE, self._device)


def _interface(path: Path, session: Any) -> Interface:
    return check_contract(path, *session_tensors(session))


def _unused(groups: NDArray[np.int32]) -> int:
    """A number that no group of a call has."""
    return int(np.setdiff1d(np.arange(len(groups) + 1), groups)[0])
