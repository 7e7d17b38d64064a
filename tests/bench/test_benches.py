"""The benches of layers: turns are fair, figures follow from times, the floor does the work that it stands for."""

import itertools
import json

import numpy as np
import pytest
import torch
from bench import cost, exchange, layer, pairs, peers, ranks
from bench.floor import BACK, FORWARD, GRADIENT, BareExpert, RawExchange, choose, count_bytes, count_rows
from bench.shapes import NARROW, Shape, read_shapes, write_shapes
from mpi4py import MPI

from hpcmoe.gemm import TorchGemm, WideGemm

SMALL = Shape(name="small", ranks=2, tokens=32, feed_forward=32, hidden=64, experts=4)


def test_calls_take_turns_forth_and_back():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = pairs.take_turns(MPI.COMM_SELF, calls, 0, before=lambda: order.append("-"), least=2)
    assert "".join(order) == "-a-b-b-a-a-b"  # the first round warms up
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_turns_last_as_long_as_they_may():
    seconds = pairs.take_turns(MPI.COMM_SELF, {"a": lambda: None}, 60.0, least=1, most=7)
    assert len(seconds["a"]) == 7


def test_a_call_lasts_from_the_first_start_to_the_last_end():
    idle = [[np.nan, np.nan]] * 2
    assert pairs.spans([[[1.0, 3.0], [10.0, 11.0]], [[2.0, 5.0], [9.5, 10.5]], idle]) == [4.0, 1.5]


def test_ratios_are_those_of_rounds_not_of_medians():
    comparison = pairs.compare({"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 10.0]}, "a", "b")
    assert comparison["ratios"] == [0.25, 0.5, 0.9] and comparison["quartiles"] == pytest.approx([0.375, 0.5, 0.7])
    assert comparison["median_seconds"] == {"a": 2.0, "b": 4.0}
    assert pairs.show_ratio(comparison) == "0.50 (0.38 - 0.70)"
    assert [pairs.show_milliseconds(seconds) for seconds in (0.7, 0.0123, 0.00123)] == ["700", "12.3", "1.23"]


def test_shapes_travel_as_text():
    shapes = [NARROW, SMALL.but(dtype="bfloat16", training=True)]
    assert read_shapes(write_shapes(iter(shapes))) == shapes
    assert str(shapes[1]) == "small bf16 training"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_multiplies_what_an_expert_does(dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(48, 64, generator=draw).to(dtype), torch.randn(32, 64, generator=draw).to(dtype)
    grad = torch.randn(48, 32, generator=draw).to(dtype)
    expected = {
        "forward": torch.nn.functional.gelu(x.double() @ weight.double().T),
        "back": grad.double() @ weight.double(),
        "gradient": grad.double().T @ x.double(),
    }
    calls = [("forward", make, (weight, len(x), "gelu"), (x,)) for make in FORWARD]
    calls += [("back", make, (weight,), (grad,)) for make in BACK]
    calls += [("gradient", make, (), (grad, x)) for make in GRADIENT]
    for name, make, given, operands in calls:
        try:
            product = make(*given)(*operands)
        except RuntimeError:
            assert dtype == torch.bfloat16, name  # float32 every processor has
            continue
        off = (product.double() - expected[name]).norm() / expected[name].norm()
        assert off < (1e-6 if dtype == torch.float32 else 1e-2), name


def test_a_bare_expert_has_the_rows_and_products_of_its_shape():
    expert = BareExpert(SMALL.but(training=True), 5, torch.float32)
    assert expert.forward().shape == (5, 64) and expert.inner.shape == (5, 32)
    expert.backward()


def test_the_fastest_way_that_is_there_is_chosen():
    def refuse():
        raise RuntimeError("not on this processor")

    slow = lambda matrix: [matrix @ matrix for _ in range(50)]  # noqa: E731
    fast = lambda matrix: matrix @ matrix  # noqa: E731
    assert choose([refuse, lambda: slow, lambda: fast], (), torch.randn(64, 64)) is fast


@pytest.mark.mpi
def test_raw_bytes_go_there_and_back(comm):
    num_bytes = 3 * np.add.outer(np.arange(comm.size), 2 * np.arange(comm.size))
    raw = RawExchange(comm, num_bytes)
    for polite, back in itertools.product((True, False), (False, True)):
        source, target = (raw.recv, raw.send) if back else (raw.send, raw.recv)
        source[0][:], target[0][:] = comm.rank + 1, 0
        raw.carry(polite, back)
        counts = num_bytes[comm.rank] if back else num_bytes[:, comm.rank]
        assert (target[0] == np.repeat(np.arange(comm.size) + 1, counts)).all()


@pytest.mark.mpi
def test_rows_are_counted_as_tokens_choose(comm):
    shape = SMALL.but(ranks=comm.size, experts=2 * comm.size, hidden=2 * comm.size, top_k=1)
    x = torch.eye(2 * comm.size)[comm.rank].repeat(7, 1)  # all tokens of a rank choose the expert of its number
    rows = count_rows(comm, x, torch.eye(2 * comm.size), shape)
    assert (rows == 7 * np.eye(comm.size, 2 * comm.size)).all()
    num_bytes = count_bytes(shape, rows)
    assert num_bytes.sum() == 7 * comm.size * shape.hidden * 4
    assert (num_bytes[np.arange(comm.size), np.arange(comm.size) // 2] > 0).all()


@pytest.mark.mpi
def test_calls_are_counted_on_every_communicator_made_from_one(comm):
    counting, calls = cost.make_counting(comm)
    counting.Dup().Ibarrier().Wait()
    counting.Split(0, comm.rank).Dup().Iallreduce(MPI.IN_PLACE, np.ones(1)).Wait()
    comm.Ibarrier().Wait()  # not counted
    assert calls == {"Ibarrier": 1, "Iallreduce": 1}
    assert cost.show_calls(calls) == "Iallreduce 1, Ibarrier 1" and cost.show_calls({}) == "none"


def make_outputs(shape, *changes):
    """What the sides' ranks give, ours first; changes are added to what the other sides' tokens get."""
    x, _ = peers.draw_tokens(shape, range(shape.ranks))
    ours = 2 * x
    return [*ours.chunk(shape.ranks), *(rows for change in changes for rows in (ours + change).chunk(shape.ranks))]


def test_peers_must_give_the_same_for_every_token_whose_choice_is_clear():
    weight = torch.eye(SMALL.experts, SMALL.hidden)
    same, off = torch.zeros(()), torch.full((), 0.1)
    assert peers.find_difference(SMALL, weight, make_outputs(SMALL, same, same)) == 0
    assert peers.find_difference(SMALL, weight, make_outputs(SMALL, same, off)) == pytest.approx(0.1, rel=0.1)
    alone = [*make_outputs(SMALL), torch.cat(make_outputs(SMALL)), None]
    assert peers.find_difference(SMALL, weight, alone) == 0
    assert np.isnan(peers.find_difference(SMALL, weight, make_outputs(SMALL, same, same * float("nan"))))

    # A token that has no clear second choice may differ.
    x, _ = peers.draw_tokens(SMALL, range(2))
    weight[1] = weight[0]
    logits = torch.nn.functional.linear(x, weight)
    tied = (logits[:, 2:] > logits[:, :1]).sum(dim=1, keepdim=True) == 1
    assert peers.find_difference(SMALL, weight, make_outputs(SMALL, tied * 9.0)) == 0


def test_what_ails_a_peer_is_told_in_a_line():
    assert peers.attempt(lambda: 5) == (5, None)
    assert peers.attempt(lambda: {}["x\ny"])[1] == "KeyError: 'x\\ny'"
    case = {"shape": "W0 f32", "peer": "DeepSpeed", "skipped": "ModuleNotFoundError: No module named 'deepspeed'"}
    table = peers.make_table({"cases": [case, case | {"shape": "W1 f32"}]})
    assert table.endswith("skipped: DeepSpeed: ModuleNotFoundError: No module named 'deepspeed' (W0 f32, W1 f32)")


def test_sizes_of_the_exchange_are_what_they_say():
    for shape in exchange.SHAPES:
        rows_of_pair = shape.tokens * shape.top_k // shape.ranks
        size = rows_of_pair * shape.hidden * 4
        assert f"{size // 2**20} MB" in shape.name or f"{size // 2**10} KB" in shape.name


def test_ranks_leave_their_figures_or_their_reason(tmp_path):
    with pytest.raises(AssertionError, match="Expecting value"):
        ranks.run_ranks(2, "layer", tmp_path, "no shapes", 0.0)


def test_a_small_layer_runs_against_its_floor(tmp_path):
    shapes = [SMALL, SMALL.but(dtype="bfloat16", training=True)]
    figures = json.loads(json.dumps(layer.measure(tmp_path, shapes, 0.0)))
    for case in figures["cases"].values():
        assert len(case["ratios"]) == 3 and min(case["median_seconds"].values()) > 0
    assert all(str(shape) in layer.make_table(figures) for shape in shapes)


@pytest.mark.full
def test_a_small_exchange_runs_against_mpi(tmp_path):
    figures = exchange.measure(tmp_path, exchange.SHAPES[:1], 0.0)
    assert "2 ranks, 64 KB a pair" in exchange.make_table(figures)


def test_peers_are_measured_in_the_precisions_that_the_processor_has():
    assert peers.choose_shapes(TorchGemm()) == peers.SHAPES
    names = [str(shape) for shape in peers.choose_shapes(WideGemm(TorchGemm()))]
    assert names == ["W1 f32", "W0 f32", "decode f32", "W1 f32 training"]


@pytest.mark.full
def test_all_to_all_single_gives_what_we_give(tmp_path):
    kinds = itertools.product(("float32", "bfloat16"), (False, True))
    shapes = [SMALL.but(dtype=dtype, training=training) for dtype, training in kinds]
    figures = peers.measure(tmp_path, shapes, 0.0, models=())
    cases = {(case["peer"], case["shape"]): case for case in figures["cases"]}
    for shape in shapes:
        case = cases["all_to_all_single", str(shape)]
        assert "skipped" not in case and case["difference"] < peers.TOLERANCE[shape.dtype]
    assert "all_to_all_single" in peers.make_table(figures)


def test_cost_is_told_for_every_size(tmp_path):
    sizes = itertools.product((1, 2), cost.TOKENS, cost.EXPERTS)
    cases = [
        {"ranks": r, "tokens": t, "experts": e, "median_seconds": 1e-3 * r, "calls": {"Isend": r - 1}}
        for r, t, e in sizes
    ]
    table = cost.make_table({"cases": cases})
    assert len(table.splitlines()) == 2 + len(cost.TOKENS) * len(cost.EXPERTS) + 2
    assert "2.00" in table and "2 ranks: Isend 1" in table
