"""A job's sizes hold what a step can bring, and its placement problem is that of its ranks and their memory."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import make_config, make_topology, open_small_job

from hpcmoe.errors import ClusterError, PlacementError
from hpcmoe.run.data import share_of
from hpcmoe.run.job import choose_threads, reckon_sizes


def make_mesh(expert_parallel, data_parallel=1, tensor_parallel=1):
    """The sizes of a mesh, without communicators."""
    return SimpleNamespace(
        expert_parallel=expert_parallel, data_parallel=data_parallel, tensor_parallel=tensor_parallel,
        num_token_shares=expert_parallel * data_parallel,
    )  # fmt: skip


@pytest.mark.parametrize(("num_ranks", "num_nodes", "threads"), [(1, 1, 8), (3, 1, 2), (4, 2, 4), (16, 1, 1)])
def test_a_nodes_cores_are_shared_among_its_ranks(num_ranks, num_nodes, threads):
    topology = dataclasses.replace(make_topology(num_ranks, num_nodes), cores_of_node=np.full(num_nodes, 8))
    assert {choose_threads(topology, rank) for rank in range(num_ranks)} == {threads}


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3))
def test_no_share_of_a_micro_batch_brings_more_home_rows_than_reckoned(sequences, micro_batches, ranks, top_k):
    config = make_config(
        data__batch_sequences=sequences, pipeline__micro_batches=micro_batches, model__top_k=top_k
    )  # fmt: skip
    sizes = reckon_sizes(config, make_mesh(ranks))
    parts = [range(sequences)[share_of(sequences, part, micro_batches)] for part in range(micro_batches)]
    most = max(len(part[share_of(len(part), rank, ranks)]) for part in parts for rank in range(ranks))
    assert most * config.model.sequence_length * top_k == sizes.home_rows


def test_sizes_are_those_of_the_config():
    config = make_config(
        model__dtype="bfloat16", comm__buffer_factor=1.5, experts__max_batch_rows=9, pipeline__deterministic=False
    )  # fmt: skip
    sizes = reckon_sizes(config, make_mesh(4))  # 14 sequences, 3 micro-batches, 4 ranks: at most 2 sequences
    assert (sizes.hidden, sizes.dtype, sizes.row_bytes) == (8, torch.bfloat16, 16)
    assert (sizes.home_rows, sizes.expert_rows) == (2 * 5 * 2, 30)
    assert (sizes.max_batch_rows, sizes.deterministic, sizes.num_micro_batches) == (9, False, 3)


@pytest.mark.parametrize(
    ("changes", "expert_rows"),
    [
        ({"model__num_experts": 2}, 40),  # two of four ranks serve all
        ({"model__num_experts": 2, "cluster__replicate": True}, 20),
        ({"model__num_experts": 4}, 20),
        ({"model__num_experts": 9}, 20),
    ],
)
def test_ranks_that_serve_others_expect_their_rows_too(changes, expert_rows):
    assert reckon_sizes(make_config(**changes), make_mesh(4)).expert_rows == expert_rows


@pytest.mark.parametrize(
    ("pipeline", "num_berths"),
    [({"schedule": "serial"}, 1), ({"in_flight": 2}, 2), ({"in_flight": 9}, 3), ({"schedule": "overlap"}, 2)],
)
def test_each_micro_batch_in_flight_has_a_berth(pipeline, num_berths):
    changes = {f"pipeline__{key}": value for key, value in pipeline.items()}
    assert reckon_sizes(make_config(**changes), make_mesh(2)).num_berths == num_berths


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"comm__device": "cuda"}, ClusterError, 'device = "cuda": torch finds no CUDA device'),
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
    for asked in (3, 0):
        with open_small_job(comm, shared, run__threads_per_rank=asked):
            pass
    assert taken == [3, max(2 // comm.size, 1)]
