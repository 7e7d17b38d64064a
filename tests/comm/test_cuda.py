"""On a GPU: CuPy's memory is torch's, streams are in order by events, bfloat16 goes as bytes, rows come whole."""

import threading

import numpy as np
import pytest
import torch

from hpcmoe.comm.device import open_device

pytestmark = pytest.mark.gpu
ROW_BYTES = 32


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return open_device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_is_one_memory_for_cupy_and_torch(device, dtype):
    buffer = device.make_buffer(5, ROW_BYTES)
    assert buffer.tensor.data_ptr() == buffer.array.data.ptr and buffer.tensor.device == device.torch_device
    assert not buffer.tensor.any() and device.pool.used_bytes() >= 5 * ROW_BYTES
    rows = torch.randn(5, ROW_BYTES // dtype.itemsize, device=device.torch_device).to(dtype)
    buffer.tensor.view(dtype).copy_(rows)
    device.synchronize()
    assert np.array_equal(buffer.array.get(), rows.view(torch.uint8).cpu().numpy())
    buffer.array[2] = 0
    device.synchronize()
    assert not buffer.tensor[2].any()


def test_a_device_tells_its_memory_and_name(device):
    name, free = device.read_memory()
    assert name and 0 < free <= torch.cuda.get_device_properties(device.torch_device).total_memory
    assert open_device("cuda", 0).read_memory()[0] == name


def test_streams_follow_each_other_by_events(device):
    """A long product, a copy out on the send stream, a copy in on the receive stream: each waits for the one before."""
    side = 4096
    x = torch.full((side, side), 1 / side, device=device.torch_device)
    buffer, pinned = device.make_buffer(side, 4 * side), device.make_pinned(side, 4 * side)
    for _ in range(20):
        x = x @ x * side
    buffer.tensor.view(torch.float32).copy_(x + 1)
    ready = device.compute_stream.record_event()
    device.send_stream.wait_event(ready)
    with device.use(device.send_stream):
        pinned.copy_(buffer.tensor, non_blocking=True)
        out = device.send_stream.record_event()
    device.recv_stream.wait_event(out)
    with device.use(device.recv_stream):
        back = device.make_buffer(side, 4 * side)
        back.tensor.copy_(pinned, non_blocking=True)
        device.compute_stream.wait_event(device.recv_stream.record_event())
    assert torch.equal(back.tensor.view(torch.float32), x + 1)


def test_what_is_fetched_is_there_with_its_event(device):
    counts = torch.arange(7, device=device.torch_device)
    fetched, event = device.copy_to_host(counts * 3)
    event.synchronize()
    assert fetched.device.type == "cpu" and fetched.tolist() == [0, 3, 6, 9, 12, 15, 18]


def test_what_is_brought_is_there_for_what_follows(device):
    array = np.random.default_rng(0).integers(0, 9, (2, 20_000))
    warm = device.copy_from_host(array)  # pinned memory is there from now on, and no allocation waits
    side = torch.full((4096, 4096), 1 / 4096, device=device.torch_device)
    for _ in range(50):  # work before it, for which the host does not wait
        side = side @ side
    busy = device.compute_stream.record_event()
    del warm
    brought = device.copy_from_host(array)
    assert not busy.query()
    assert brought.device == device.torch_device and brought.tolist() == array.tolist()


def test_a_thread_has_the_gpu_once_it_has_entered(device):
    found = []

    def look():
        found.append(device.cupy.cuda.driver.ctxGetCurrent())
        device.bind_thread()
        found.append(device.cupy.cuda.driver.ctxGetCurrent())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [0, device.cupy.cuda.driver.ctxGetCurrent()] and found[1]
