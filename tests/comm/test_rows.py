"""Rows are moved and summed as their definitions say: by torch, by our kernels on a GPU, and by these on the host."""

import pytest
import torch
from kernels import compiler_for_host

from hpcmoe.comm import rows
from hpcmoe.comm.device import open_device
from hpcmoe.comm.rows import (
    KernelRowOps,
    RowsOfAssignments,
    RowView,
    TorchRowOps,
    find_chunk,
    open_row_ops,
    shape_block,
)

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (5, 8, 20, 4096)


@pytest.fixture(scope="module")
def compile_on_host(tmp_path_factory):
    """Compile a kernel for the host as CuPy does for a GPU -> function(source, name, options)."""
    return compiler_for_host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Where rows lie."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return open_device(request.param, 0)


@pytest.fixture(params=["torch", "kernels"])
def row_ops(request, place):
    """Who moves rows, and the device on which they lie."""
    if request.param == "torch":
        return TorchRowOps(), place.torch_device
    if place.name == "host":
        return KernelRowOps(request.getfixturevalue("compile_on_host")), place.torch_device
    assert isinstance(place.row_ops, KernelRowOps), place.row_ops.name
    return place.row_ops, place.torch_device


def draw(*shape, dtype=torch.float32, device="cpu"):
    """Numbers of which most are rounded in bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def make_table(num_rows, width, dtype, device):
    """Message rows, all zero, with a number at the end of each -> (RowView, bytes [n, row_bytes])."""
    row_bytes = -(-(width * dtype.itemsize + 4) // 16) * 16
    message = torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=device)
    return RowView(values=message.view(dtype)[:, :width], gate_values=message.view(torch.float32)[:, -1]), message


def put_in(rows, order):
    """Mean only some rows, in an order."""
    return RowView(
        values=rows.values, gate_values=rows.gate_values, order=torch.tensor(order, device=rows.values.device).long()
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_spread_with_their_gates(row_ops, dtype, source, width):
    row_ops, device = row_ops
    tokens, gates = draw(5, width, dtype=source, device=device), draw(5, 2, device=device)
    table, message = make_table(7, width, dtype, device)
    order = torch.tensor([9, 3, 2, 8, 0], device=device)  # a token goes twice, one once, one nowhere
    entries = torch.full((10,), -1, device=device).scatter(0, order, torch.arange(5, device=device)).view(5, 2)
    row_ops.permute(tokens, gates, RowsOfAssignments(row_of_assignment=entries, assignment_of_row=order), table)
    assert torch.equal(table.values[:5], tokens[order // 2].to(dtype))
    assert torch.equal(table.gate_values[:5], gates.flatten()[order])
    assert not message[5:].any() and not message[:, width * dtype.itemsize : -4].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_taken_and_laid_down_where_they_were(row_ops, dtype, width):
    row_ops, device = row_ops
    table, message = make_table(6, width, dtype, device)
    table.values.copy_(draw(6, width, dtype=dtype))
    table.gate_values.copy_(draw(6))
    before, order = message.clone(), [4, 0, 5]
    taken = RowView(values=table.values.new_empty(3, width), gate_values=table.gate_values.new_empty(3))
    row_ops.move(put_in(table, order), taken)
    assert torch.equal(taken.values, table.values[order]) and torch.equal(taken.gate_values, table.gate_values[order])

    message.zero_()
    row_ops.move(taken, put_in(table, order))
    for row in range(6):
        assert torch.equal(message[row], before[row] if row in order else torch.zeros_like(before[row]))

    # Without numbers those of the table stay.
    row_ops.move(RowView(values=-taken.values, gate_values=None), put_in(table, order))
    assert torch.equal(table.values[order], -taken.values) and torch.equal(table.gate_values[order], taken.gate_values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_no_work(row_ops, dtype):
    row_ops, device = row_ops
    table, message = make_table(2, 8, dtype, device)
    nothing = RowView(values=table.values.new_empty(0, 8), gate_values=table.gate_values.new_empty(0))
    row_ops.move(put_in(table, []), nothing)
    row_ops.move(nothing, put_in(table, []))
    entries = torch.empty(0, 2, dtype=torch.int64, device=device)
    assignments = RowsOfAssignments(row_of_assignment=entries, assignment_of_row=entries.flatten())
    row_ops.permute(nothing.values, draw(0, 2, device=device), assignments, table)
    assert row_ops.sum(table.values, entries, draw(0, 2, device=device)).shape == (0, 8) and not message.any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_weighed_and_summed(row_ops, dtype, width):
    """Against float64: each term is rounded twice at most in float32, or in torch's bfloat16."""
    row_ops, device = row_ops
    table, _ = make_table(300, width, dtype, device)
    table.values.copy_(draw(300, width, dtype=dtype))
    table.values[-1] = 0  # which torch takes for none
    entries = torch.randint(300, (290, 3), generator=torch.Generator().manual_seed(1)).to(device)
    entries[::7, 1] = -1
    weights = draw(290, 3, device=device).to(dtype).float()
    sums = row_ops.sum(table.values, entries, weights)
    terms = table.values[entries].double() * weights[:, :, None]
    unit = torch.finfo(dtype if isinstance(row_ops, TorchRowOps) else torch.float32).eps
    assert sums.dtype == torch.float32 and sums.is_contiguous()
    assert ((sums - terms.sum(dim=1)).abs() <= 2 * unit * terms.abs().sum(dim=1)).all()


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("num_slots", [1, 7, 300])
@pytest.mark.parametrize(("num_tokens", "many_threads"), [(0, 64), (1, 64), (500, 64), (500, rows._MANY_THREADS)])
def test_copies_are_put_in_order_by_slot(monkeypatch, row_ops, num_tokens, many_threads, num_slots, drops):
    """As Python's sort has them, which keeps the order of equals; what is not kept has no row."""
    monkeypatch.setattr(rows, "_MANY_THREADS", many_threads)  # with few a thread looks at many assignments
    row_ops, device = row_ops
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randint(num_slots, (num_tokens, 2), generator=generator)
    kept = torch.rand(num_tokens, 2, generator=generator) < (0.8 if drops else 2)
    assignments, ends = row_ops.sort_by_slot(slots.to(device), kept.to(device) if drops else None, num_slots)
    order = sorted(
        kept.flatten().nonzero().flatten().tolist(), key=lambda assignment: slots.flatten()[assignment].item()
    )
    entries = assignments.row_of_assignment.flatten().cpu()
    assert entries[order].tolist() == list(range(len(order))) and (entries < 0).sum() == (~kept).sum()
    assert ends.tolist() == slots[kept].bincount(minlength=num_slots).cumsum(0).tolist()
    assert assignments.assignment_of_row is None or assignments.limit_to(len(order)).assignment_of_row.tolist() == order


def test_kernels_round_as_torch_does(row_ops):
    """To the nearest, of two as near the even one; what is not finite stays so."""
    row_ops, device = row_ops
    edges = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 3.4e38, float("inf"), float("-inf"), 1e-40, -0.0]
    numbers = torch.cat([torch.tensor(edges), draw(4096)]).to(device)[None]
    rounded = RowView(values=torch.empty_like(numbers, dtype=torch.bfloat16), gate_values=None)
    row_ops.move(RowView(values=numbers, gate_values=None), rounded)
    assert torch.equal(rounded.values.view(torch.int16), numbers.bfloat16().view(torch.int16))
    row_ops.move(RowView(values=torch.full_like(numbers, float("nan")), gate_values=None), rounded)
    assert rounded.values.isnan().all()


def test_rows_are_read_as_wide_as_they_are_aligned():
    memory = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    assert find_chunk(memory, memory) == find_chunk(memory, memory.float()) == 8
    assert find_chunk(memory.float(), memory.float()) == 4
    pitched = torch.zeros(4, 36, dtype=torch.bfloat16)[:, :24]
    for narrow, chunk in ((memory[:, 1:25], 1), (memory[:, 2:26], 2), (memory[:, :20], 4), (pitched, 4)):
        assert find_chunk(memory, narrow) == find_chunk(narrow, memory) == chunk


def test_what_kernels_would_misread_is_rejected(compile_on_host):
    row_ops, rows = KernelRowOps(compile_on_host), RowView(values=draw(4, 8), gate_values=draw(4))
    wrong = [
        RowView(values=draw(8, 4).T, gate_values=None),
        RowView(values=draw(4, 8), gate_values=draw(4).double()),
        RowView(values=draw(4, 8), gate_values=None, order=torch.arange(4, dtype=torch.int32)),
        RowView(values=draw(4, 8), gate_values=None, order=torch.arange(8)[::2]),
    ]
    for source in wrong:
        with pytest.raises(ValueError, match="side by side|where kernels read"):
            row_ops.move(source, rows)
    three, short = (
        RowView(values=draw(3, 8), gate_values=None, order=torch.arange(3)),
        RowView(values=draw(3, 8), gate_values=draw(3)),
    )
    wide = RowView(values=draw(4, 9), gate_values=None)
    for source, target in ((three, put_in(rows, [0, 1])), (rows, three), (rows, short), (wide, rows)):
        with pytest.raises(ValueError, match="as many rows|as wide on both sides"):
            row_ops.move(source, target)
    with pytest.raises(ValueError, match="int32 where kernels read torch.int64"):
        row_ops.sum(rows.values, torch.zeros(2, 2, dtype=torch.int32), draw(2, 2))


@pytest.mark.parametrize(("chunks", "block"), [(1, (1, 256)), (3, (4, 64)), (256, (256, 1)), (5000, (256, 1))])
def test_a_block_has_as_many_rows_as_its_threads_are_enough_for(chunks, block):
    assert shape_block(chunks) == block


def test_where_kernels_cannot_be_compiled_torch_moves_rows_and_says_why(compile_on_host):
    def reject(source, name, options):
        raise OSError("libnvrtc.so.13 is not there\nmore of it")

    row_ops = open_row_ops(reject)
    assert row_ops.name == "torch, for our kernels cannot be compiled: libnvrtc.so.13 is not there"
    rows = RowView(values=draw(3, 8), gate_values=None)
    moved = RowView(values=torch.zeros(3, 8), gate_values=None)
    row_ops.move(rows, moved)
    assert torch.equal(moved.values, rows.values)
    assert open_row_ops(compile_on_host).name == "kernels of our own"
