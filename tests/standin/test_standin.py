"""The stand-in for the driver has the functions of the real module, and it finds the mistakes that it is for."""

from __future__ import annotations

import ctypes
import inspect
import threading
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver

from svd_trt.engine.driver import Driver, list_gpus
from tests.standin.cuda import StandInCuda
from tests.standin.devices import CONTEXT_BYTES
from tests.standin.helpers import NON_BLOCKING, SIZE, THREAD_LOCAL, ok, status, with_context

FUNCTIONS = [name for name, _ in inspect.getmembers(StandInCuda, inspect.isfunction) if name.startswith("cu")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_parameters_of_the_driver(name: str) -> None:
    signature = getattr(driver, name).__doc__.splitlines()[0]
    inside = signature.partition("(")[2].rpartition(")")[0]
    expected = [part.partition(":")[0].split()[-1] for part in inside.split(",") if part.strip()]
    assert list(inspect.signature(getattr(StandInCuda(), name)).parameters) == expected


def test_functions_that_are_not_modelled_raise_attribute_errors() -> None:
    assert len(FUNCTIONS) == 41
    assert StandInCuda().CUresult is driver.CUresult
    with pytest.raises(AttributeError, match="cuMemAllocAsync"):
        StandInCuda().cuMemAllocAsync  # noqa: B018


# Devices and contexts.


def test_init_fails_without_a_device() -> None:
    assert status(StandInCuda(devices=0).cuInit(0)) == "CUDA_ERROR_NO_DEVICE"


def test_calls_before_init_or_without_a_context_fail() -> None:
    cuda = StandInCuda()
    assert status(cuda.cuDeviceGetCount()) == "CUDA_ERROR_NOT_INITIALIZED"
    ok(cuda.cuInit(0))
    assert cuda.cuMemAlloc(1) == (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
    assert ok(cuda.cuDeviceGetName(32, 0)) == b"Stand-in GPU 0".ljust(32, b"\0")


def test_a_context_is_current_in_one_thread_and_ends_with_its_last_reference(cuda: StandInCuda) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(status(cuda.cuMemAlloc(1))))
    thread.start()
    thread.join()
    assert found == ["CUDA_ERROR_INVALID_CONTEXT"]
    ok(cuda.cuDevicePrimaryCtxRelease(0))
    assert status(cuda.cuMemAlloc(1)) == "CUDA_ERROR_CONTEXT_IS_DESTROYED"
    cuda.assert_clean()


def test_handles_belong_to_their_context() -> None:
    cuda = with_context(devices=2)
    stream = ok(cuda.cuStreamCreate(NON_BLOCKING))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(1))))
    with pytest.raises(AssertionError, match="not current"):
        cuda.cuStreamSynchronize(stream)


def test_list_gpus_works_on_the_stand_in() -> None:
    gpu = list_gpus(Driver(with_context(total_bytes=6 << 30)))[0]
    assert (gpu.name, gpu.sm, gpu.total_bytes, gpu.driver_version) == ("Stand-in GPU 0", "sm89", 6 << 30, 13000)


# Memory.


def test_allocations_fail_if_the_device_is_full() -> None:
    cuda = with_context(total_bytes=1 << 30)
    free, total = ok(cuda.cuMemGetInfo())
    assert (free, total) == ((1 << 30) - CONTEXT_BYTES, 1 << 30)
    address = ok(cuda.cuMemAlloc(free))
    assert status(cuda.cuMemAlloc(1)) == "CUDA_ERROR_OUT_OF_MEMORY"
    ok(cuda.cuMemFree(address))
    assert (cuda.bytes_in_use, cuda.peak_bytes) == (0, free)


def test_double_free_is_refused(cuda: StandInCuda, block: int) -> None:
    ok(cuda.cuMemFree(block))
    assert status(cuda.cuMemFree(block)) == "CUDA_ERROR_INVALID_VALUE"
    assert len(cuda.violations) == 1


def test_leaks_are_listed(cuda: StandInCuda, block: int, pinned: int, stream: int) -> None:
    ok(cuda.cuEventCreate(0))
    with pytest.raises(AssertionError) as caught:
        cuda.assert_clean()
    for leak in ("1 allocations", "1 pinned", "1 streams", "1 events", "1 contexts", f"{block:#x} ({SIZE} bytes"):
        assert leak in str(caught.value)


def test_copies_work_and_new_memory_is_poison(cuda: StandInCuda, stream: int, block: int, pinned: int) -> None:
    assert (cuda.view(block, (SIZE,), np.uint8) == 0xCD).all()
    cuda.view(pinned, (SIZE // 4,), np.float32)[...] = np.arange(SIZE // 4)
    second = ok(cuda.cuMemAlloc(SIZE))
    ok(cuda.cuMemcpyHtoDAsync(block, pinned, SIZE, stream))
    ok(cuda.cuMemcpyDtoDAsync(second, block, SIZE, stream))
    ok(cuda.cuMemsetD8Async(block, 7, 4, stream))
    assert cuda.ran == []
    ok(cuda.cuStreamSynchronize(stream))
    assert (cuda.view(int(second), (SIZE // 4,), np.float32) == np.arange(SIZE // 4)).all()
    assert cuda.view(block, (5,), np.uint8).tolist() == [7, 7, 7, 7, 0]


def test_reading_before_waiting_gives_poison(cuda: StandInCuda, stream: int, block: int, pinned: int) -> None:
    host = (ctypes.c_ubyte * SIZE).from_address(pinned)
    for value in (1, 2):
        ok(cuda.cuMemsetD8Async(block, value, SIZE, stream))
        ok(cuda.cuMemcpyDtoHAsync(pinned, block, SIZE, stream))
        assert set(host) == {0xCD}
        ok(cuda.cuStreamSynchronize(stream))
        assert set(host) == {value}


def test_pageable_memory_is_refused(cuda: StandInCuda, stream: int, block: int) -> None:
    array = np.zeros(SIZE, np.uint8)
    with pytest.raises(AssertionError, match="pageable memory"):
        cuda.cuMemcpyHtoDAsync(block, array.ctypes.data, SIZE, stream)
    with pytest.raises(AssertionError, match="pageable memory"):
        cuda.cuMemcpyDtoHAsync(array.ctypes.data, block, SIZE, stream)


def test_a_copy_past_the_end_is_refused(cuda: StandInCuda, stream: int, block: int, pinned: int) -> None:
    with pytest.raises(AssertionError, match="not inside live device memory"):
        cuda.cuMemcpyHtoDAsync(block + 1, pinned, SIZE, stream)


def test_pinned_memory_in_use_is_not_freed(cuda: StandInCuda, stream: int, block: int, pinned: int) -> None:
    ok(cuda.cuMemcpyHtoDAsync(block, pinned, SIZE, stream))
    with pytest.raises(AssertionError, match="may be using it"):
        cuda.cuMemFreeHost(pinned)


# Streams and events.


@pytest.mark.parametrize("default", [0, None, 2])
def test_the_default_stream_is_refused(cuda: StandInCuda, block: int, default: int | None) -> None:
    with pytest.raises(AssertionError, match="hidden default stream"):
        cuda.cuMemsetD8Async(block, 0, 1, default)
    with pytest.raises(AssertionError, match="hidden default stream"):
        cuda.cuStreamCreate(0)


def test_copy_out_without_waiting_for_the_event_is_a_race(
    cuda: StandInCuda, stream: int, other: int, block: int, pinned: int
) -> None:
    event = ok(cuda.cuEventCreate(0))
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))
    ok(cuda.cuEventRecord(event, stream))
    with pytest.raises(AssertionError, match=r"race: memset .*writing .*DtoH copy .*reading"):
        cuda.cuMemcpyDtoHAsync(pinned, block, SIZE, other)


def test_waiting_for_the_event_is_enough(cuda: StandInCuda, stream: int, other: int, block: int, pinned: int) -> None:
    event = ok(cuda.cuEventCreate(0))
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuMemsetD8Async(ok(cuda.cuMemAlloc(SIZE)), 1, SIZE, stream))  # the copy below does not need this
    ok(cuda.cuStreamWaitEvent(other, event, 0))
    ok(cuda.cuMemcpyDtoHAsync(pinned, block, SIZE, other))
    ok(cuda.cuStreamSynchronize(other))
    assert (cuda.view(pinned, (SIZE,), np.uint8) == 1).all()
    assert len(cuda.ran) == 3  # memset, event, copy


def test_overwriting_memory_that_another_stream_reads_is_a_race(
    cuda: StandInCuda, stream: int, other: int, block: int, pinned: int
) -> None:
    done = ok(cuda.cuEventCreate(0))
    ok(cuda.cuMemcpyDtoHAsync(pinned, block, SIZE, other))
    ok(cuda.cuEventRecord(done, other))
    with pytest.raises(AssertionError, match="race"):
        cuda.cuMemsetD8Async(block, 1, SIZE, stream)
    ok(cuda.cuStreamWaitEvent(stream, done, 0))
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))


def test_host_waits_order_streams(cuda: StandInCuda, stream: int, other: int, block: int) -> None:
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))
    ok(cuda.cuStreamSynchronize(stream))
    ok(cuda.cuMemsetD8Async(block, 2, SIZE, other))
    assert not cuda.violations


def test_an_event_completes_when_polled_and_has_a_time(cuda: StandInCuda, stream: int, block: int) -> None:
    first, second = ok(cuda.cuEventCreate(0)), ok(cuda.cuEventCreate(0))
    assert status(cuda.cuEventElapsedTime(first, second)) == "CUDA_ERROR_INVALID_HANDLE"
    ok(cuda.cuEventRecord(first, stream))
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))
    ok(cuda.cuEventRecord(second, stream))
    assert status(cuda.cuEventElapsedTime(first, second)) == "CUDA_ERROR_NOT_READY"
    polls = [status(cuda.cuEventQuery(second)) for _ in range(3)]
    assert polls == ["CUDA_ERROR_NOT_READY", "CUDA_ERROR_NOT_READY", "CUDA_SUCCESS"]
    assert ok(cuda.cuEventElapsedTime(first, second)) >= 0


def test_destroying_pending_objects_is_recorded(cuda: StandInCuda, stream: int, block: int) -> None:
    event = ok(cuda.cuEventCreate(0))
    ok(cuda.cuMemsetD8Async(block, 1, SIZE, stream))
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuEventDestroy(event))
    ok(cuda.cuStreamDestroy(stream))
    assert len(cuda.violations) == 2
    with pytest.raises(AssertionError, match="no live Stream"):
        cuda.cuStreamSynchronize(stream)


def test_calls_are_recorded_and_fail_on_request(cuda: StandInCuda) -> None:
    cuda.fail("cuMemAlloc", driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, on=2)
    answers = [status(cuda.cuMemAlloc(SIZE)) for _ in range(3)]
    assert answers == ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_SUCCESS"]
    assert (cuda.count("cuMemAlloc"), cuda.live.allocations) == (3, 2)
    assert cuda.calls[-1].arguments == (SIZE,)
    assert cuda.calls[-1].thread == threading.current_thread().name


# Graphs.


def captured(cuda: StandInCuda, stream: int, block: int, value: int = 3) -> Any:
    ok(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    ok(cuda.cuMemsetD8Async(block, value, SIZE, stream))
    return ok(cuda.cuGraphInstantiate(ok(cuda.cuStreamEndCapture(stream)), 0))


def test_a_graph_repeats_the_captured_operations(cuda: StandInCuda, stream: int, block: int) -> None:
    graph = captured(cuda, stream, block)
    ok(cuda.cuStreamSynchronize(stream))
    assert cuda.view(block, (1,), np.uint8)[0] == 0xCD
    for _ in range(2):
        ok(cuda.cuMemsetD8Async(block, 0, SIZE, stream))
        ok(cuda.cuGraphLaunch(graph, stream))
        ok(cuda.cuStreamSynchronize(stream))
        assert (cuda.view(block, (SIZE,), np.uint8) == 3).all()


def test_a_graph_races_like_its_operations(cuda: StandInCuda, stream: int, other: int, block: int) -> None:
    graph = captured(cuda, stream, block)
    ok(cuda.cuMemsetD8Async(block, 0, SIZE, other))
    with pytest.raises(AssertionError, match="of a graph"):
        cuda.cuGraphLaunch(graph, stream)


def test_allocation_invalidates_a_capture(cuda: StandInCuda, stream: int, block: int) -> None:
    ok(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    assert status(cuda.cuMemAlloc(SIZE)) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert status(cuda.cuMemsetD8Async(block, 0, 1, stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    assert cuda.cuStreamEndCapture(stream) == (driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None)
    ok(cuda.cuMemAlloc(SIZE))


def test_launching_a_graph_that_uses_freed_memory_is_refused(cuda: StandInCuda, stream: int, block: int) -> None:
    graph = captured(cuda, stream, block)
    ok(cuda.cuMemFree(block))
    with pytest.raises(AssertionError, match="which was freed"):
        cuda.cuGraphLaunch(graph, stream)


def test_capture_can_be_refused(cuda: StandInCuda, stream: int) -> None:
    cuda.refuse_capture = True
    assert status(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL)) == "CUDA_ERROR_NOT_SUPPORTED"
