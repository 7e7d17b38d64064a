"""A job takes its share of the cores, and refuses what does not fit on all ranks together."""

import dataclasses

import numpy as np
import pytest
import torch
from small import make_topology, open_small_job

from hpcmoe.errors import ClusterError, PlacementError
from hpcmoe.run import job
from hpcmoe.run.job import choose_threads


@pytest.mark.parametrize(("num_ranks", "num_nodes", "threads"), [(1, 1, 8), (3, 1, 2), (4, 2, 4), (16, 1, 1)])
def test_a_nodes_cores_are_shared_among_its_ranks(num_ranks, num_nodes, threads):
    topology = dataclasses.replace(make_topology(num_ranks, num_nodes), cores_of_node=np.full(num_nodes, 8))
    assert {choose_threads(topology, rank) for rank in range(num_ranks)} == {threads}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"comm__device": "cuda"}, ClusterError, 'use "host", or "auto" to take what there is'),
        ({"model__feed_forward": 2**34}, PlacementError, "do not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_on_all_ranks_together(comm, shared, changes, error, said):
    if changes.get("comm__device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error) as refused, open_small_job(comm, shared, **changes):
        pass
    assert refused.value.shared and said in str(refused.value)


@pytest.mark.mpi
def test_threads_are_as_asked_or_the_ranks_share_of_the_cores(comm, shared, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for asked, own in ((3, 1), (0, 8), (0, 1)):  # a rank that is bound, or held back, to one core of its node's two
        monkeypatch.setattr(job, "count_own_cores", lambda own=own: own)
        with open_small_job(comm, shared, run__threads_per_rank=asked):
            pass
    assert taken == [3, max(2 // comm.size, 1), 1]
