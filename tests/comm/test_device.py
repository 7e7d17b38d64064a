"""Rows get from a device into message rows and back unchanged, whatever their precision."""

import numpy as np
import pytest
import torch

from hpcmoe.comm.cuda import CudaDevice
from hpcmoe.comm.device import HostDevice, open_device
from hpcmoe.errors import ClusterError

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN = 6


@pytest.fixture
def device():
    return open_device("host", 0)


def draw_rows(count, dtype, device):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(device.torch_device, dtype)


def make_table(device, count, dtype):
    """Message rows on the host, seen as numbers [count, HIDDEN], all zero."""
    buffer = device.make_buffer(count, HIDDEN * dtype.itemsize).tensor
    assert buffer.dtype == torch.uint8 and buffer.shape == (count, HIDDEN * dtype.itemsize)
    assert buffer.device.type == "cpu" and not buffer.any()
    return buffer.view(dtype)


def test_the_host_has_no_memory_but_the_nodes(device):
    assert device.read_memory() is None


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_put_writes_all_rows_in_the_tables_precision(device, dtype, source):
    rows, table = draw_rows(5, source, device), make_table(device, 7, dtype)
    device.put(rows, table[1:6]).synchronize()
    assert torch.equal(table[1:6], rows.cpu().to(dtype))
    assert not table[[0, 6]].any()


def test_what_was_put_stays_as_it_was(device):
    """Rows that are written again after the event do not change the message."""
    rows, table = draw_rows(5, torch.float32, device), make_table(device, 5, torch.float32)
    before = rows.cpu().clone()
    device.put(rows, table).synchronize()
    rows.zero_()
    assert torch.equal(table, before)


@pytest.mark.parametrize("order", [[3, 3, 1], [1, 2, 3], []])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_gives_fresh_rows_in_order(device, dtype, order):
    table, sent = make_table(device, 5, dtype), draw_rows(5, dtype, HostDevice())
    table.copy_(sent)
    rows = device.gather(table, torch.tensor(order, dtype=torch.int64))
    table.zero_()
    assert rows.device.type == device.torch_device.type and rows.dtype == dtype
    assert torch.equal(rows.cpu(), sent[order])


@pytest.mark.parametrize("order", [[4, 0, 2], []])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_writes_only_the_named_rows(device, dtype, order):
    rows, table = draw_rows(len(order), dtype, device), make_table(device, 5, dtype)
    device.scatter(rows, table, np.array(order, np.int64))
    assert torch.equal(table[order], rows.cpu())
    assert not table[[row for row in range(5) if row not in order]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_by_token_with_their_weights(device, dtype):
    table = make_table(device, 5, dtype)
    table.copy_(torch.arange(5)[:, None].expand(-1, HIDDEN))
    rows, weights = torch.tensor([[1, 2], [4, 0], [3, 3]]), torch.tensor([[1.0, 0.5], [2.0, 9.0], [0.0, 1.0]])
    total = device.sum_rows(table, rows, weights)
    table.zero_()
    assert total.dtype == dtype and total.device.type == device.torch_device.type
    assert total[:, 0].tolist() == total[:, -1].tolist() == [2, 8, 3]
    assert device.sum_rows(table, rows[:0], weights[:0]).shape == (0, HIDDEN)


MISSING = {
    "no GPU": (0, True, r"torch finds no CUDA device here|this torch is built without CUDA"),
    "no CuPy": (2, None, r'cupy is missing: pip install "hpcmoe\[gpu\]"'),
}


@pytest.mark.parametrize("case", MISSING)
def test_cuda_where_something_is_missing_is_refused_in_one_line(monkeypatch, case):
    num_gpus, spec, text = MISSING[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(
        ClusterError, match=rf'^\[comm\] device = "cuda": ({text}).*; use "host", or "auto".*$'
    ) as rejected:
        open_device("cuda", 0)
    assert "\n" not in str(rejected.value)
    assert isinstance(open_device("auto", 0), HostDevice) and isinstance(open_device("host", 3), HostDevice)
    with pytest.raises(ValueError, match="tpu"):
        open_device("tpu", 0)


def test_ranks_of_a_node_are_dealt_over_its_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(CudaDevice, "__init__", lambda self, index: taken.append(index))
    for local_rank in range(3):
        assert isinstance(open_device("auto", local_rank), CudaDevice)
    assert isinstance(open_device("host", 0), HostDevice)
    assert taken == [0, 1, 0]
