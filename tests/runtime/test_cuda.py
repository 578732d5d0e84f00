"""The GPU on the real PyCUDA and cuda-bindings, over the fake driver; each test in a process of its own."""

import subprocess
import sys
import textwrap

import pytest

from tests import fake_cuda

START = """
import gc, threading
import numpy as np
from runtime import DependencyError, ICNetError
from runtime.backends.cuda import Cuda
from runtime.backends.cuda_driver import PageLocked
from tests.fake_cuda.control import *

def work(cuda):
    stream, event, memory = cuda.stream(), cuda.event(), cuda.allocate(64)
    here, there = cuda.pinned((64,), np.uint8), cuda.pinned((64,), np.uint8)
    here[:] = np.arange(64)
    cuda.copy_in(memory, here, stream)
    cuda.copy_out(there, memory, stream)
    event.record(stream)
    event.synchronize()
    assert there.tolist() == list(range(64))
    return stream, event, memory, here, there
"""


@pytest.fixture(scope="module")
def environment():
    return fake_cuda.environment()


@pytest.fixture
def run(environment):
    def run(program, start=START):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", start + textwrap.dedent(program)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def test_the_context_stack_is_as_before_after_close(run):
    run("""
        for _ in range(3):
            Cuda().close()
            check_clean()
        outer = Cuda()
        with outer:
            Cuda().close()
            assert driver.fake_depth() == 1
            work(outer)
        outer.close()
        check_clean()
    """)


def test_a_thousand_times_from_eight_threads(run):
    run("""
        def many():
            for _ in range(125):
                cuda = Cuda()
                with cuda:
                    kept = work(cuda)
                    kept[2].free()
                    cuda.free_pinned(kept[3])
                cuda.close()
                cuda.close()
        errors = []
        def guarded():
            try:
                in_thread(many)
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=guarded) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        assert made("stream") == 1000
        check_clean()
    """)


@pytest.mark.parametrize(
    ("opened", "closed"), [("in_thread(Cuda)", "cuda.close()"), ("Cuda()", "in_thread(cuda.close)")]
)
def test_another_thread_may_close(run, opened, closed):
    run(f"""
        cuda = {opened}
        with cuda:
            kept = work(cuda)
        {closed}
        check_clean()
    """)


def test_closed_while_another_thread_is_inside(run):
    run("""
        cuda = Cuda()
        with cuda:
            kept = work(cuda)
            in_thread(cuda.close)
            assert kept[4].tolist() == list(range(64))
            kept[0].synchronize()
        check_clean()
        try:
            cuda.__enter__()
        except ICNetError as error:
            assert "closed" in str(error)
        else:
            raise AssertionError
    """)


def test_objects_are_freed_in_any_thread(run):
    run("""
        cuda = Cuda()
        with cuda:
            stream, event, memory, here, there = work(cuda)
            with (capture := cuda.capture(stream)):
                cuda.copy_in(memory, here, stream)
        def free():
            memory.free()
            cuda.free_pinned(here)
            stream.free()
            capture.free()
        in_thread(free)
        assert alive() == {"event": 1, "host memory": 1}, alive()
        dropped = [event]
        del event
        in_thread(dropped.clear)
        assert alive() == {"host memory": 1}, alive()
        cuda.close()
        check_clean()
    """)


def test_the_garbage_collector_may_come_in_any_thread(run):
    run("""
        gc.disable()
        class Holder: pass
        def open():
            holder = Holder()
            holder.itself, holder.cuda, holder.memory = holder, Cuda(), PageLocked()
            holder.memory.allocate((64,), np.uint8)
            with holder.cuda:
                holder.kept = work(holder.cuda)
        open()
        assert alive() and driver.fake_references() == 2
        in_thread(gc.collect)
        check_clean()
    """)


def test_the_garbage_collector_may_come_during_a_capture(run):
    run("""
        gc.disable()
        class Holder: pass
        holder = Holder()
        holder.itself, holder.cuda = holder, Cuda()
        with holder.cuda:
            holder.kept = work(holder.cuda)
        del holder
        cuda = Cuda()
        with cuda:
            stream, event, memory, here, there = work(cuda)
            with (capture := cuda.capture(stream)):
                cuda.copy_in(memory, here, stream)
                gc.collect()
                assert driver.fake_references() == 1
                cuda.copy_out(there, memory, stream)
            here[:] = 7
            capture.launch()
            stream.synchronize()
            assert there.tolist() == [7] * 64
        cuda.close()
        check_clean()
    """)


def test_a_capture_beside_a_copy_on_the_legacy_stream(run):
    run("""
        import pycuda.driver
        cuda = Cuda()
        with cuda:
            stream, event, memory, here, there = work(cuda)
            def legacy():
                with cuda:
                    pycuda.driver.memcpy_htod(int(memory), np.zeros(64, np.uint8))
            with (capture := cuda.capture(stream)):
                cuda.copy_in(memory, here, stream)
                in_thread(legacy)
                cuda.copy_out(there, memory, stream)
            for value in (1, 2):
                here[:] = value
                capture.launch()
                stream.synchronize()
                assert there.tolist() == [value] * 64
        cuda.close()
        check_clean()
    """)


def test_an_error_within_a_capture_leaves_no_graph(run):
    run("""
        cuda = Cuda()
        with cuda:
            stream, event, memory, here, there = work(cuda)
            try:
                with cuda.capture(stream):
                    cuda.copy_in(memory, here, stream)
                    raise KeyError("ours")
            except KeyError:
                pass
            fail("cuGraphInstantiateWithFlags", 2)
            try:
                with cuda.capture(stream):
                    cuda.copy_in(memory, here, stream)
            except ICNetError as error:
                assert "cuGraphInstantiate" in str(error), error
            else:
                raise AssertionError
            stream.synchronize()
            assert "graph" not in alive() and "executable" not in alive()
        cuda.close()
        check_clean()
    """)


@pytest.mark.parametrize(
    "opened",
    [
        "cuda = Cuda()",
        "cuda = in_thread(Cuda)",
        "class Holder: pass\nholder = Holder()\nholder.itself = holder\nholder.cuda = cuda = Cuda()",
    ],
)
def test_exit_without_close(run, opened):
    checked = "import atexit\natexit.register(lambda: (check_clean(), print('clean')))\n"  # after what comes later
    program = f"{opened}\nwith cuda:\n    kept = work(cuda)\nmemory = PageLocked()\nmemory.allocate((8,), np.uint8)\n"
    assert run(START + checked + program, start="") == "clean\n"


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize"])
def test_an_error_in_the_middle_of_a_call(run, function):
    run(f"""
        cuda = Cuda()
        fail("{function}", 999)
        try:
            with cuda:
                work(cuda)
        except ICNetError as error:
            assert "{function[:12]}" in str(error), error
        else:
            raise AssertionError
        with cuda:
            work(cuda)
        cuda.close()
        check_clean()
    """)


def test_memory_that_is_refused(run):
    run("""
        limits(device=2**20, host=2**20)
        cuda, memory = Cuda(), PageLocked()
        with cuda:
            for ask, expected in (
                (lambda: cuda.pinned((2**21,), np.uint8), "out of page-locked host memory: 2 MiB"),
                (lambda: memory.allocate((2**21,), np.uint8), "out of page-locked host memory: 2 MiB"),
                (lambda: cuda.allocate(2**21), "out of device memory: 2 MiB"),
            ):
                try:
                    ask()
                except ICNetError as error:
                    assert expected in str(error) and "\\n" not in str(error), error
                    assert ("ulimit -l" in str(error)) == ("host" in expected)
                else:
                    raise AssertionError
            work(cuda)
        cuda.close()
        memory.close()
        check_clean()
    """)


def test_after_a_sticky_error_everything_is_refused(run):
    run("""
        from runtime.errors import DeviceLostError
        def refused(function, *args):
            try:
                function(*args)
            except DeviceLostError as error:
                assert "restart the process" in str(error) and "\\n" not in str(error), error
                return True
        cuda, other, memory = Cuda(), Cuda(), PageLocked()
        with cuda:
            stream, event, device, here, there = work(cuda)
            with (capture := cuda.capture(stream)):
                cuda.copy_in(device, here, stream)
            fail("cuEventSynchronize", 719)
            assert refused(event.synchronize)
            assert refused(stream.synchronize) and refused(capture.launch) and refused(cuda.check)
            device.free()
        assert refused(cuda.__enter__) and refused(other.check) and refused(Cuda)
        assert refused(memory.allocate, (8,), np.uint8)
        cuda.close(), memory.close(), in_thread(other.close)
        assert driver.fake_references() == driver.fake_depth() == driver.fake_too_many() == 0 and not alive()
    """)


def test_a_sticky_error_that_another_library_met(run):
    run("""
        from runtime.errors import DeviceLostError
        cuda = Cuda()
        with cuda:
            kept = work(cuda)
            fail("cuCtxSynchronize", 700)
            assert driver.cuCtxSynchronize() == 700
        try:
            cuda.check()
        except DeviceLostError as error:
            assert "700" in str(error)
        else:
            raise AssertionError
        cuda.close()
        assert driver.fake_references() == driver.fake_depth() == 0 and not alive()
    """)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (34, "is a stub to link with: "),
        (803, "does not fit the kernel's part of it: restart the machine"),
        (804, r"comes from a compatibility package (cuda-compat)"),
    ],
)
@pytest.mark.parametrize("opened", ["Cuda", "PageLocked"])
def test_a_driver_that_does_not_fit_the_machine(run, opened, code, remedy):
    run(f"""
        driver.fake_version(12020)
        fail("cuInit", {code})
        try:
            {opened}()
        except DependencyError as error:
            assert str(error).startswith("the NVIDIA driver (it runs CUDA up to 12.2) {remedy}"), error
            assert "cuInit failed" in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError
    """)


def test_a_driver_older_than_pycuda_was_compiled_for(run, tmp_path):
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    said = "_driver.cpython-311-x86_64-linux-gnu.so: undefined symbol: cuMemHostGetDevicePointer_v2"
    (tmp_path / "pycuda/driver.py").write_text(f"raise ImportError({said!r})")
    run(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        driver.fake_version(11040)
        try:
            Cuda()
        except DependencyError as error:
            assert "(it runs CUDA up to 11.4) is too old for the installed packages: update it" in str(error), error
            assert "cuMemHostGetDevicePointer_v2" in str(error), error
        else:
            raise AssertionError
    """)


def test_a_driver_older_than_tensorrt_needs(run, tmp_path):
    """The real TensorRT-RTX, whose CUDA runtime asks the fake driver for its version."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "x.engine").write_bytes(bytes(1000))
    run(f"""
        from runtime import Predictor
        driver.fake_version(11040)
        try:
            Predictor({str(tmp_path / "x.engine")!r})
        except DependencyError as error:
            assert "(it runs CUDA up to 11.4) is too old for the installed packages: update it" in str(error), error
            assert "35" in str(error) and "\\n" not in str(error), error
        else:
            raise AssertionError
        check_clean()
    """)


@pytest.mark.parametrize("blocking", [False, True])
def test_an_event_spins_or_sleeps(run, blocking):
    run(f"""
        cuda = Cuda()
        with cuda:
            stream, event = cuda.stream(), cuda.event(blocking={blocking})
            event.record(stream)
            event.synchronize()
            assert driver.fake_wait_flags() == {2 | blocking}
        cuda.close()
        check_clean()
    """)
