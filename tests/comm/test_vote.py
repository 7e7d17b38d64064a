"""A vote of all ranks is answered a call later, by the same answer everywhere, and at once where a rank is alone."""

import pytest
from mpi4py import MPI

from hpcmoe.comm.vote import Vote


@pytest.mark.mpi
def test_all_ranks_hear_at_one_call_that_all_have_finished(comm):
    vote = Vote(comm)
    for _ in range(3):  # a new vote begins after each
        asked = 0
        while not vote.ask(asked >= 2 * comm.rank):  # the last rank finishes last
            asked += 1
            assert asked < 99
        assert asked == 2 * (comm.size - 1) + (comm.size > 1)


@pytest.mark.mpi
def test_a_vote_that_nobody_waits_for_is_closed(comm):
    vote = Vote(comm)
    assert not vote.close()
    vote.ask(comm.size == 1 or comm.rank > 0)
    assert vote.close() == (comm.size > 1)
    assert vote.request is None and not vote.close()


def test_a_rank_alone_is_answered_at_once():
    vote = Vote(MPI.COMM_SELF)
    assert [vote.ask(False), vote.ask(True)] == [False, True] and vote.request is None
