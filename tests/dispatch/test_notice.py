"""Every rank knows the words of all others when their rows have come; calls that differ are one error on all ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from round_trips import check_backward, check_forward, go, make_round_trip, run_backward, run_forward, start
from small import make_dispatcher, open_small_device_dispatcher, open_small_dispatcher

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch import notice
from hpcmoe.dispatch.notice import Notice, Notices, Use, check_notices, unpack_notice
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all

HIDDEN, FOREVER = 4, 300.0
# A full message takes 22 rows: the pool holds one.
SIZES = {"slots": 2, "top_k": 3, "num_in_flight": 2, "message_tokens": 4, "pool_rows": 24, "messages_at_once": 1}
CARRIERS = [(1, False), (2, False), (2, True), ("ranks", False), (3, True), "device"]  # nodes, once

notices = st.builds(
    Notice,
    layer=st.integers(0, 2**16 - 1),
    direction=st.sampled_from([Direction.DISPATCH, Direction.COMBINE_BACKWARD]),
    top_k=st.integers(0, 255),
    use=st.sampled_from(Use),
    refuses=st.booleans(),
    rounds_left=st.integers(0, 2**31 - 1),
)


@given(notices)
def test_a_notice_is_a_word_and_comes_out_of_it_again(given_notice):
    word = given_notice.pack()
    assert 0 <= word < 2**63 and unpack_notice(np.int64(word)) == given_notice


@pytest.mark.parametrize("field", ["layer", "top_k", "rounds_left"])
@pytest.mark.parametrize("value", [-1, 2**31])
def test_what_does_not_fit_into_a_word_is_rejected(field, value):
    with pytest.raises(ValueError, match=rf"{field} = {value}: a notice has \d+ bits"):
        Notice(**{field: value}).pack()


def words_of(*calls):
    """The words of ranks, each by its fields."""
    return np.array([Notice(**fields).pack() for fields in calls])


def test_calls_that_fit_together_may_differ_in_their_rounds():
    check_notices(words_of({"layer": 3, "rounds_left": 2}, {"layer": 3}, {"layer": 3, "rounds_left": 70}))


ONE, TWO = {"layer": 1, "top_k": 2}, {"layer": 2, "top_k": 1}
BACK = {"layer": 1, "top_k": 2, "direction": Direction.COMBINE_BACKWARD}


@pytest.mark.parametrize(
    ("calls", "lines"),
    [
        ([ONE, ONE, ONE, TWO], ["rank 3 calls layer 2 top-1 forward where ranks 0-2 call layer 1 top-2 forward"]),
        ([TWO, ONE], ["rank 1 calls layer 1 top-2 forward where rank 0 calls layer 2 top-1 forward"]),
        (
            [TWO, ONE, ONE, BACK, TWO, ONE],
            [
                "ranks 0, 4 call layer 2 top-1 forward where ranks 1-2, 5 call layer 1 top-2 forward",
                "rank 3 calls layer 1 top-2 backward where ranks 1-2, 5 call layer 1 top-2 forward",
            ],
        ),
        (
            [ONE, ONE | {"use": Use.OWN_EXPERTS}],
            ["rank 1 calls layer 1 top-2 forward, own experts where rank 0 calls layer 1 top-2 forward"],
        ),
        (
            [ONE, ONE | {"refuses": True, "rounds_left": 2}, ONE | {"refuses": True, "rounds_left": 1}],
            ["ranks 1-2 call layer 1 top-2 forward with more tokens than a call may have: 3 calls would do"],
        ),
    ],
)
def test_the_error_names_ranks_and_what_each_calls(calls, lines):
    with pytest.raises(ClusterError) as caught:
        check_notices(words_of(*calls))
    assert caught.value.shared
    said = str(caught.value).splitlines()
    assert [line.startswith(start) for line, start in zip(said, lines, strict=True)] == [True] * len(lines), said


def test_an_error_waits_for_all_words_so_that_it_is_the_same_everywhere(monkeypatch):
    words = words_of(ONE, ONE, TWO)
    known = Notices(int(words[0]), 3)
    assert known.add(np.array([0, 2]), words[[0, 2]]).tolist() == [True, False]
    assert known.differ and known.find_conflict() is None
    known.add(np.array([1]), words[[1]])
    assert str(known.find_conflict()).startswith("rank 2 calls") and known.find_conflict().shared

    # A rank that calls nothing at all is missed only for a while.
    monkeypatch.setattr(notice, "_GRACE_SECONDS", 0.0)
    late = Notices(int(words[0]), 3)
    assert late.find_conflict() is None
    late.add(np.array([0, 2]), words[[0, 2]])
    assert "rank 2 calls" in str(late.find_conflict()) and not late.find_conflict().shared


def test_a_rank_alone_refuses_its_own_call():
    dispatcher = make_dispatcher(HIDDEN)
    round_trip = make_round_trip(dispatcher, 0, seed=1)
    round_trip.word = Notice(refuses=True, rounds_left=4).pack()
    for _ in range(2):  # and ever after
        with pytest.raises(ClusterError, match="more tokens than a call may have: 5 calls"):
            go(dispatcher, run_forward(dispatcher, round_trip))


@pytest.fixture(params=CARRIERS, ids=str)
def open_carrier(comm, request):
    """A function that opens what carries the rows."""
    if request.param == "device":
        return lambda: open_small_device_dispatcher(comm)
    num_nodes, once = request.param
    num_nodes = comm.size if num_nodes == "ranks" else num_nodes
    if num_nodes > comm.size:
        pytest.skip(f"needs {num_nodes} ranks")
    return lambda **changes: open_small_dispatcher(comm, HIDDEN, num_nodes, once, **SIZES | changes)


@pytest.mark.mpi
def test_all_ranks_learn_all_words_both_ways(comm, open_carrier):
    """Also of ranks that have no tokens, or none for anybody else."""
    with open_carrier() as dispatcher:
        for seed, num_tokens in enumerate([17, 5 * (comm.rank % 2), 0]):
            round_trip = make_round_trip(dispatcher, num_tokens, seed)
            for run, check in ((run_forward, check_forward), (run_backward, check_backward)):
                round_trip.word = Notice(**ONE, rounds_left=10 * seed + comm.rank).pack()
                go(dispatcher, run(dispatcher, round_trip))
                check(dispatcher, round_trip)
                rounds = [unpack_notice(word).rounds_left for word in round_trip.handle.words]
                assert rounds == [10 * seed + rank for rank in range(comm.size)]
        check_notices(round_trip.handle.words)


def call(dispatcher, round_trip, direction):
    """Go one way as far as the results."""
    if direction == Direction.DISPATCH:
        yield from run_forward(dispatcher, round_trip)
    else:
        yield from start(dispatcher, round_trip, round_trip.grad, direction)
        for _ in dispatcher.receive_again(round_trip.handle, []):
            yield


@pytest.mark.mpi
@pytest.mark.parametrize("odd", [0, -1])
@pytest.mark.parametrize("differs", [TWO, BACK, ONE | {"refuses": True, "rounds_left": 1}], ids=str)
def test_calls_that_differ_are_one_error_on_all_ranks(comm, open_carrier, monkeypatch, odd, differs):
    """Before any row of another call is computed on; and with pools that hold one message, which nobody frees."""
    if comm.size == 1:
        pytest.skip("a rank alone makes the same call as all")
    monkeypatch.setattr(notice, "_GRACE_SECONDS", FOREVER)
    fields = differs if comm.rank == odd % comm.size else ONE

    def err():
        with open_carrier() as dispatcher:
            round_trip = make_round_trip(dispatcher, 20, seed=3, kept_share=1.0)
            round_trip.word = Notice(**fields).pack()
            direction = fields.get("direction", Direction.DISPATCH)
            with pytest.raises(ClusterError) as caught:
                go(dispatcher, call(dispatcher, round_trip, direction))
            with pytest.raises(ClusterError):
                next(start(dispatcher, round_trip, round_trip.x, direction))
            assert round_trip.output is None and not torch.is_tensor(round_trip.grad_x)
            raise caught.value

    with pytest.raises(ClusterError) as caught:
        err()
    texts = gather_to_all(comm, str(caught.value))
    assert caught.value.shared and set(texts) == {texts[0]}
    assert f"rank {odd % comm.size} calls {unpack_notice(Notice(**differs).pack())}" in texts[0] or comm.size == 2
