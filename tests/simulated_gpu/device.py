"""The device: what is allocated, queued and alive, and the rules that hold for all of it."""

import itertools
import threading
from collections import Counter

import numpy as np

FRESH, FREED = 0xCD, 0xDD  # what memory holds before it is written, and after it is freed


class Violation(BaseException):
    """The program did what a GPU may punish. Not a CUDA error: nothing may catch and survive it."""


def check(condition, message):
    if not condition:
        raise Violation(message)


class Gpu:
    """The device: memory, streams and a log of what was issued, as (operation, stream handle, detail)."""

    context_memory = 1 << 16  # of each execution context

    def __init__(self, memory=1 << 34, rtx=False, version="10.16.0", bindings=True):
        self.memory, self.rtx, self.version, self.bindings = memory, rtx, version, bindings
        self.lock = threading.RLock()
        self.thread = threading.local()
        self.allocations = {}  # address -> uint8 array
        self.pinned = {}  # address -> array
        self.freed = []  # page-locked memory that is no longer allocated
        self.streams = {}
        self.alive: Counter[str] = Counter()  # kind -> number now
        self.made: Counter[str] = Counter()  # kind -> number ever
        self.log = []
        self.handles = itertools.count(1)
        self.addresses = itertools.count(1 << 40, 1 << 33)
        self.fail_launch = False
        self.sticky = 0  # the code of an error after which every call fails with it
        self.refuse_shapes = False
        self.fail_contexts = False  # an exception of TensorRT's own
        self.first_logger = None  # a weak reference: TensorRT keeps no other

    def make(self, kind):
        with self.lock:
            self.alive[kind] += 1
            self.made[kind] += 1

    def drop(self, kind):
        with self.lock:
            self.alive[kind] -= 1

    def leaks(self):
        return {kind: number for kind, number in self.alive.items() if number}

    def note(self, operation, stream, detail=None):
        with self.lock:
            self.log.append((operation, stream, detail))

    def used(self):
        """Bytes of device memory that are taken."""
        return sum(block.size for block in self.allocations.values()) + self.contexts() * self.context_memory

    def contexts(self):
        return self.alive["execution context"]

    def need_context(self):
        check(getattr(self.thread, "depth", 0) > 0, "called without a current context on this thread")

    def device_view(self, address, size):
        for start, block in self.allocations.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise Violation(f"{size} bytes at {address:#x} are not inside one live device allocation")

    def pinned_bytes(self, array):
        address = array.__array_interface__["data"][0]
        check(array.flags.c_contiguous, "asynchronous copy of an array that is not contiguous")
        inside = any(
            start <= address and address + array.nbytes <= start + whole.nbytes for start, whole in self.pinned.items()
        )
        check(inside, "asynchronous copy of pageable memory")
        return array.reshape(-1).view(np.uint8)

    def queue(self, stream, operation, detail, work):
        stream.check_alive()
        self.note(operation, stream.handle, detail)
        (stream.queue if stream.capturing is None else stream.capturing).append(work)
