"""Rows get from a device into a message and back unchanged, whatever their precision."""

import pytest
import torch

from hpcmoe.comm.device import CudaDevice, HostDevice, as_rows, open_device
from hpcmoe.errors import ClusterError

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN = 6


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return open_device(request.param, 0)


def draw_rows(count, dtype, device):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(device.torch_device, dtype)


def make_buffer(device, count, dtype):
    buffer = device.make_buffer(count, HIDDEN * dtype.itemsize)
    assert buffer.dtype == torch.uint8 and buffer.shape == (count, HIDDEN * dtype.itemsize)
    assert buffer.device.type == "cpu" and not buffer.any()
    return buffer


def test_a_device_tells_its_own_memory_if_it_has_any(device):
    memory = device.read_memory()
    if device.name == "host":
        assert memory is None
    else:
        name, free = memory
        assert name and 0 < free <= torch.cuda.get_device_properties(device.torch_device).total_memory
        assert open_device("cuda", 0).read_memory()[0] == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_lays_the_ordered_rows_at_the_start(device, dtype):
    rows, buffer = draw_rows(5, dtype, device), make_buffer(device, 7, dtype)
    order = torch.tensor([4, 0, 0, 2])
    device.pack(rows, order, buffer).synchronize()
    assert torch.equal(as_rows(buffer, dtype)[:4], rows.cpu()[order])
    assert not buffer[4:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_without_an_order_lays_all_rows(device, dtype):
    rows, buffer = draw_rows(5, dtype, device), make_buffer(device, 7, dtype)
    device.pack(rows, None, buffer).synchronize()
    assert torch.equal(as_rows(buffer, dtype)[:5], rows.cpu())
    assert not buffer[5:].any()


@pytest.mark.parametrize("order", [[3, 3, 1], [1, 2, 3]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_gives_fresh_rows_in_order(device, dtype, order):
    buffer = make_buffer(device, 5, dtype)
    sent = draw_rows(5, dtype, HostDevice())
    as_rows(buffer, dtype).copy_(sent)
    rows = device.unpack(buffer, torch.tensor(order), dtype)
    device.record().synchronize()
    buffer.zero_()
    assert rows.device.type == device.torch_device.type and rows.dtype == dtype
    assert torch.equal(rows.cpu(), sent[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_writes_only_the_named_rows(device, dtype):
    rows, buffer = draw_rows(3, dtype, device), make_buffer(device, 5, dtype)
    device.scatter(rows, torch.tensor([4, 0, 2]), buffer)
    device.record().synchronize()
    assert torch.equal(as_rows(buffer, dtype)[[4, 0, 2]], rows.cpu())
    assert not buffer[[1, 3]].any()


def test_no_rows_are_fine(device):
    rows, buffer = draw_rows(0, torch.float32, device), make_buffer(device, 3, torch.float32)
    none = torch.tensor([], dtype=torch.int64)
    device.pack(rows, none, buffer).synchronize()
    device.scatter(rows, none, buffer)
    assert device.unpack(buffer, none, torch.float32).shape == (0, HIDDEN)
    assert not buffer.any()


def test_a_packed_message_keeps_what_it_took(device):
    """Rows that are written again after the event do not change the message."""
    rows, buffer = draw_rows(5, torch.float32, device), make_buffer(device, 5, torch.float32)
    before = rows.cpu().clone()
    device.pack(rows, None, buffer).synchronize()
    rows.zero_()
    device.record().synchronize()
    assert torch.equal(as_rows(buffer, torch.float32), before)


def test_rows_of_numbers_share_the_buffers_memory():
    buffer = HostDevice().make_buffer(2, HIDDEN * 2)
    as_rows(buffer, torch.bfloat16)[1] = 1.0
    assert buffer[1].any() and not buffer[0].any()


def test_cuda_where_there_is_none_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ClusterError, match=r'^\[comm\] device = "cuda": torch finds no CUDA device here.*$') as refused:
        open_device("cuda", 0)
    assert "\n" not in str(refused.value)
    assert isinstance(open_device("auto", 0), HostDevice) and isinstance(open_device("host", 3), HostDevice)
    with pytest.raises(ValueError, match="tpu"):
        open_device("tpu", 0)


def test_ranks_of_a_node_are_dealt_over_its_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(CudaDevice, "__init__", lambda self, index: taken.append(index))
    for local_rank in range(3):
        assert isinstance(open_device("auto", local_rank), CudaDevice)
    assert isinstance(open_device("host", 0), HostDevice)
    assert taken == [0, 1, 0]
