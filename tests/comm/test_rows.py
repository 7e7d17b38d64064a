"""Rows are moved and summed as their definitions say: by torch, by our kernels on a GPU, and by these on the host."""

import pytest
import torch
from kernels import compiler_for_host

from hpcmoe.comm import rows
from hpcmoe.comm.device import open_device
from hpcmoe.comm.rows import Copies, KernelMover, Rows, TorchMover, find_chunk, open_mover, shape_block

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
def mover(request, place):
    """Who moves rows, and the device on which they lie."""
    if request.param == "torch":
        return TorchMover(), place.torch_device
    if place.name == "host":
        return KernelMover(request.getfixturevalue("compile_on_host")), place.torch_device
    assert isinstance(place.mover, KernelMover), place.mover.name
    return place.mover, place.torch_device


def draw(*shape, dtype=torch.float32, device="cpu"):
    """Numbers of which most are rounded in bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def make_table(num_rows, width, dtype, device):
    """Message rows, all zero, with a number at the end of each -> (Rows, bytes [n, row_bytes])."""
    row_bytes = -(-(width * dtype.itemsize + 4) // 16) * 16
    message = torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=device)
    return Rows(values=message.view(dtype)[:, :width], beside=message.view(torch.float32)[:, -1]), message


def put_in(rows, order):
    """Mean only some rows, in an order."""
    return Rows(values=rows.values, beside=rows.beside, order=torch.tensor(order, device=rows.values.device).long())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_spread_with_their_gates(mover, dtype, source, width):
    mover, device = mover
    tokens, gates = draw(5, width, dtype=source, device=device), draw(5, 2, device=device)
    table, message = make_table(7, width, dtype, device)
    order = torch.tensor([9, 3, 2, 8, 0], device=device)  # a token goes twice, one once, one nowhere
    entries = torch.full((10,), -1, device=device).scatter(0, order, torch.arange(5, device=device)).view(5, 2)
    mover.spread(tokens, gates, Copies(entries=entries, order=order), table)
    assert torch.equal(table.values[:5], tokens[order // 2].to(dtype))
    assert torch.equal(table.beside[:5], gates.flatten()[order])
    assert not message[5:].any() and not message[:, width * dtype.itemsize : -4].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_taken_and_laid_down_where_they_were(mover, dtype, width):
    mover, device = mover
    table, message = make_table(6, width, dtype, device)
    table.values.copy_(draw(6, width, dtype=dtype))
    table.beside.copy_(draw(6))
    before, order = message.clone(), [4, 0, 5]
    taken = Rows(values=table.values.new_empty(3, width), beside=table.beside.new_empty(3))
    mover.move(put_in(table, order), taken)
    assert torch.equal(taken.values, table.values[order]) and torch.equal(taken.beside, table.beside[order])

    message.zero_()
    mover.move(taken, put_in(table, order))
    for row in range(6):
        assert torch.equal(message[row], before[row] if row in order else torch.zeros_like(before[row]))

    # Without numbers those of the table stay.
    mover.move(Rows(values=-taken.values, beside=None), put_in(table, order))
    assert torch.equal(table.values[order], -taken.values) and torch.equal(table.beside[order], taken.beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_no_work(mover, dtype):
    mover, device = mover
    table, message = make_table(2, 8, dtype, device)
    nothing = Rows(values=table.values.new_empty(0, 8), beside=table.beside.new_empty(0))
    mover.move(put_in(table, []), nothing)
    mover.move(nothing, put_in(table, []))
    entries = torch.empty(0, 2, dtype=torch.int64, device=device)
    copies = Copies(entries=entries, order=entries.flatten())
    mover.spread(nothing.values, draw(0, 2, device=device), copies, table)
    assert mover.sum(table.values, entries, draw(0, 2, device=device)).shape == (0, 8) and not message.any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_weighed_and_summed(mover, dtype, width):
    """Against float64: each term is rounded twice at most in float32, or in torch's bfloat16."""
    mover, device = mover
    table, _ = make_table(300, width, dtype, device)
    table.values.copy_(draw(300, width, dtype=dtype))
    table.values[-1] = 0  # which torch takes for none
    entries = torch.randint(300, (290, 3), generator=torch.Generator().manual_seed(1)).to(device)
    entries[::7, 1] = -1
    weights = draw(290, 3, device=device).to(dtype).float()
    sums = mover.sum(table.values, entries, weights)
    terms = table.values[entries].double() * weights[:, :, None]
    unit = torch.finfo(dtype if isinstance(mover, TorchMover) else torch.float32).eps
    assert sums.dtype == torch.float32 and sums.is_contiguous()
    assert ((sums - terms.sum(dim=1)).abs() <= 2 * unit * terms.abs().sum(dim=1)).all()


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("num_slots", [1, 7, 300])
@pytest.mark.parametrize(("num_tokens", "many_threads"), [(0, 64), (1, 64), (500, 64), (500, rows.MANY_THREADS)])
def test_copies_are_put_in_order_by_slot(monkeypatch, mover, num_tokens, many_threads, num_slots, drops):
    """As Python's sort has them, which keeps the order of equals; what is not kept has no row."""
    monkeypatch.setattr(rows, "MANY_THREADS", many_threads)  # with few a thread looks at many copies
    mover, device = mover
    generator = torch.Generator().manual_seed(num_tokens)
    slots = torch.randint(num_slots, (num_tokens, 2), generator=generator)
    kept = torch.rand(num_tokens, 2, generator=generator) < (0.8 if drops else 2)
    copies, ends = mover.arrange(slots.to(device), kept.to(device) if drops else None, num_slots)
    order = sorted(kept.flatten().nonzero().flatten().tolist(), key=lambda copy: slots.flatten()[copy].item())
    entries = copies.entries.flatten().cpu()
    assert entries[order].tolist() == list(range(len(order))) and (entries < 0).sum() == (~kept).sum()
    assert ends.tolist() == slots[kept].bincount(minlength=num_slots).cumsum(0).tolist()
    assert copies.order is None or copies.first(len(order)).order.tolist() == order


def test_kernels_round_as_torch_does(mover):
    """To the nearest, of two as near the even one; what is not finite stays so."""
    mover, device = mover
    edges = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 3.4e38, float("inf"), float("-inf"), 1e-40, -0.0]
    numbers = torch.cat([torch.tensor(edges), draw(4096)]).to(device)[None]
    rounded = Rows(values=torch.empty_like(numbers, dtype=torch.bfloat16), beside=None)
    mover.move(Rows(values=numbers, beside=None), rounded)
    assert torch.equal(rounded.values.view(torch.int16), numbers.bfloat16().view(torch.int16))
    mover.move(Rows(values=torch.full_like(numbers, float("nan")), beside=None), rounded)
    assert rounded.values.isnan().all()


def test_rows_are_read_as_wide_as_they_are_aligned():
    memory = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    assert find_chunk(memory, memory) == find_chunk(memory, memory.float()) == 8
    assert find_chunk(memory.float(), memory.float()) == 4
    pitched = torch.zeros(4, 36, dtype=torch.bfloat16)[:, :24]
    for narrow, chunk in ((memory[:, 1:25], 1), (memory[:, 2:26], 2), (memory[:, :20], 4), (pitched, 4)):
        assert find_chunk(memory, narrow) == find_chunk(narrow, memory) == chunk


def test_what_kernels_would_misread_is_refused(compile_on_host):
    mover, rows = KernelMover(compile_on_host), Rows(values=draw(4, 8), beside=draw(4))
    wrong = [
        Rows(values=draw(8, 4).T, beside=None),
        Rows(values=draw(4, 8), beside=draw(4).double()),
        Rows(values=draw(4, 8), beside=None, order=torch.arange(4, dtype=torch.int32)),
        Rows(values=draw(4, 8), beside=None, order=torch.arange(8)[::2]),
    ]
    for source in wrong:
        with pytest.raises(ValueError, match="side by side|where kernels read"):
            mover.move(source, rows)
    three, short = Rows(values=draw(3, 8), beside=None, order=torch.arange(3)), Rows(values=draw(3, 8), beside=draw(3))
    wide = Rows(values=draw(4, 9), beside=None)
    for source, target in ((three, put_in(rows, [0, 1])), (rows, three), (rows, short), (wide, rows)):
        with pytest.raises(ValueError, match="as many rows|as wide on both sides"):
            mover.move(source, target)
    with pytest.raises(ValueError, match="int32 where kernels read torch.int64"):
        mover.sum(rows.values, torch.zeros(2, 2, dtype=torch.int32), draw(2, 2))


@pytest.mark.parametrize(("chunks", "block"), [(1, (1, 256)), (3, (4, 64)), (256, (256, 1)), (5000, (256, 1))])
def test_a_block_has_as_many_rows_as_its_threads_are_enough_for(chunks, block):
    assert shape_block(chunks) == block


def test_where_kernels_cannot_be_compiled_torch_moves_rows_and_says_why(compile_on_host):
    def refuse(source, name, options):
        raise OSError("libnvrtc.so.13 is not there\nmore of it")

    mover = open_mover(refuse)
    assert mover.name == "torch, for our kernels cannot be compiled: libnvrtc.so.13 is not there"
    rows = Rows(values=draw(3, 8), beside=None)
    moved = Rows(values=torch.zeros(3, 8), beside=None)
    mover.move(rows, moved)
    assert torch.equal(moved.values, rows.values)
    assert open_mover(compile_on_host).name == "kernels of our own"
