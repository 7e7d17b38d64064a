"""Where NCCL is there but cannot be set up, rows go by MPI as [comm] buffers says, and the log says why."""

import pytest
from mpi4py import MPI

from hpcmoe.comm.select import SelectedBackend, TransportSupport
from hpcmoe.errors import ClusterError
from hpcmoe.run.dispatchers import try_nccl

NCCL = SelectedBackend(kind="nccl", reason="each rank has a GPU")
FAULT = "NCCL cannot be set up: no memory"


def see(takes_pointers):
    """What the ranks see, one of them, with NCCL."""
    answer = "MPI says yes" if takes_pointers else "MPI says no"
    support = TransportSupport(
        gpu="a",
        nccl=23203,
        no_nccl="",
        shares=False,
        takes_pointers=takes_pointers,
        ucx_takes=False,
        answer=answer,
    )
    return [support]


@pytest.fixture
def broken(monkeypatch):
    """NCCL's communicators cannot be made."""

    def refuse(*_):
        raise ClusterError(FAULT)

    monkeypatch.setattr("hpcmoe.run.dispatchers.open_nccl", refuse)


def try_nccl_or_mpi(buffers, takes_pointers):
    """Try NCCL -> SelectedBackend."""
    return try_nccl(buffers, MPI.COMM_SELF, None, NCCL, see(takes_pointers))


@pytest.mark.parametrize(
    "buffers, takes_pointers, kind, reason",
    [
        ("auto", True, "direct", "MPI says yes"),
        ("auto", False, "staged", "rank 0: MPI says no"),
        ("direct", True, "direct", "MPI says yes"),
        ("staged", True, "staged", "[comm] buffers"),
    ],
)
def test_mpi_takes_its_place(broken, buffers, takes_pointers, kind, reason):
    assert try_nccl_or_mpi(buffers, takes_pointers) == SelectedBackend(kind=kind, reason=f"{FAULT}; {reason}")


def test_direct_buffers_that_are_asked_for_and_not_to_be_had_are_refused(broken):
    with pytest.raises(ClusterError, match=r'^\[comm\] buffers = "direct": rank 0: MPI says no; use'):
        try_nccl_or_mpi("direct", False)
