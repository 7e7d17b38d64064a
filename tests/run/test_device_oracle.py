"""The GPUs' way of the rows, whole, on the host in their place: losses and gradients equal those of the dense oracle."""

import pytest
from against_oracle import check_against_oracle

from hpcmoe.comm.plain import PlainDevice


@pytest.fixture
def plain(monkeypatch):
    """Have ranks take the host for a GPU."""
    monkeypatch.setattr("hpcmoe.run.job.open_device", lambda kind, rank: PlainDevice())


@pytest.mark.mpi
@pytest.mark.parametrize("buffers", ["direct", "staged"])
def test_step_equals_the_oracle(comm, shared, plain, buffers):
    check_against_oracle(comm, shared, comm__transport="mpi", comm__buffers=buffers)
