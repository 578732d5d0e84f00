"""What tests ask of the fake driver in a process that runs on it."""

import ctypes
import gc
import threading

driver = ctypes.CDLL("libcuda.so.1")
KINDS = ("stream", "event", "graph", "executable", "device memory", "host memory")
driver.fake_limits.argtypes = (ctypes.c_size_t, ctypes.c_size_t)


def fail(function, code, after=0):
    """Let one call of a function fail, after so many that don't; a sticky code stays."""
    driver.fake_fail(function.encode(), code, after)


def limits(device=2**40, host=2**40):
    driver.fake_limits(device, host)


def alive():
    """Objects that there are, by their kinds."""
    return {kind: n for i, kind in enumerate(KINDS) if (n := driver.fake_alive(i))}


def made(kind):
    return driver.fake_made(KINDS.index(kind))


def in_thread(function):
    """Run a function in a thread of its own; its result. The thread's context stack must end empty."""
    found = []

    def run():
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))
        found.append(driver.fake_depth())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result, error), depth = found
    if error is not None:
        raise error
    assert depth == 0, f"{depth} contexts left on the thread's stack"
    return result


def check_clean():
    """Nothing may be left: on the stack, of references, or of objects; nor may the context have taken any along."""
    gc.collect()
    state = {
        "contexts on the stack": driver.fake_depth(),
        "references": driver.fake_references(),
        "released too often": driver.fake_too_many(),
        "alive": alive(),
        "abandoned": driver.fake_abandoned(),
    }
    assert not any(state.values()), state
