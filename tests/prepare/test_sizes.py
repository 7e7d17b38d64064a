"""A run's sizes hold what a step can bring, and its tokens go once to a node where that pays."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import make_config, make_sizes_of, make_topology

from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import MIN_BATCH_ROWS
from hpcmoe.model.text import share_of
from hpcmoe.prepare.sizes import choose_once, find_routes, format_sizes
from hpcmoe.wait import gather_to_all


def make_sizes_of_run(config, num_ranks, num_nodes=1, once=False):
    """Sizes of a run on ranks dealt to nodes in blocks."""
    mesh = SimpleNamespace(expert_parallel=num_ranks, tensor_parallel=1, num_token_shares=num_ranks)
    topology = make_topology(num_ranks, num_nodes)
    routes = make_routes(topology.node_of_rank, 0, 1, np.full((num_nodes, num_nodes), once))
    return make_sizes_of(config, mesh, topology, routes)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3))
def test_no_share_of_a_micro_batch_brings_more_tokens_than_estimated(sequences, micro_batches, ranks, top_k):
    config = make_config(
        data__batch_sequences=sequences, pipeline__micro_batches=micro_batches, model__top_k=top_k
    )  # fmt: skip
    sizes = make_sizes_of_run(config, ranks)
    parts = [range(sequences)[share_of(sequences, part, micro_batches)] for part in range(micro_batches)]
    most = max(len(part[share_of(len(part), rank, ranks)]) for part in parts for rank in range(ranks))
    assert (most * config.model.sequence_length, top_k) == (sizes.tokens, sizes.top_k)


def test_sizes_are_those_of_the_config():
    config = make_config(model__dtype="bfloat16", experts__gemm_rows=9, pipeline__deterministic=False)
    sizes = make_sizes_of_run(config, 4)  # 14 sequences, 3 micro-batches, 4 ranks: at most 2 sequences
    assert (sizes.hidden, sizes.dtype, sizes.row_bytes) == (8, torch.bfloat16, 16)
    assert (sizes.tokens, sizes.expert_rows, sizes.batch_rows, sizes.num_micro_batches) == (10, 20, 9, 3)
    assert (sizes.pool_rows, sizes.num_messages_sent, sizes.sent_message_rows) == (
        0,
        0,
        0,
    )  # one node needs no messages
    assert sizes.home_window_rows == 10 + 20 + 1


@pytest.mark.parametrize(
    ("deterministic", "mode", "order"),
    [(True, "train", (True, True)), (False, "train", (True, False)), (False, "infer", (False, False)),
     (True, "infer", (True, True))],
)  # fmt: skip
def test_training_keeps_its_batches_and_determinism_their_order(deterministic, mode, order):
    sizes = make_sizes_of_run(make_config(pipeline__deterministic=deterministic, run__mode=mode), 2)
    assert (sizes.in_order, sizes.deterministic) == order


@pytest.mark.parametrize(
    ("changes", "expert_rows"),
    [
        ({"model__num_experts": 2}, 40),  # two of four ranks serve all
        ({"model__num_experts": 2, "placement__replicate": True}, 20),
        ({"model__num_experts": 4}, 20),
        ({"model__num_experts": 9}, 20),
    ],
)
def test_ranks_that_serve_others_expect_their_rows_too(changes, expert_rows):
    assert make_sizes_of_run(make_config(**changes), 4).expert_rows == expert_rows


@pytest.mark.parametrize(
    ("pipeline", "num_in_flight"),
    [({"schedule": "serial"}, 1), ({"in_flight": 2}, 2), ({"in_flight": 9}, 3), ({"schedule": "arrival"}, 2)],
)
def test_each_micro_batch_in_flight_has_buffers(pipeline, num_in_flight):
    changes = {f"pipeline__{key}": value for key, value in pipeline.items()}
    assert make_sizes_of_run(make_config(**changes), 2).num_in_flight == num_in_flight


def test_messages_are_as_long_as_asked_or_as_the_links_ask_but_no_longer_than_a_micro_batch():
    long = {"model__sequence_length": 1000}
    assert (
        make_sizes_of_run(make_config(**long), 2, 2).message_tokens == 282 > MIN_BATCH_ROWS
    )  # 9 x 1 us x 1 GB/s of 32 B
    assert make_sizes_of_run(make_config(**long, comm__message_rows=7), 2, 2).message_tokens == 7
    assert make_sizes_of_run(make_config(), 2, 2).message_tokens == make_sizes_of_run(make_config(), 2, 2).tokens == 15
    assert make_sizes_of_run(make_config(comm__pool_bytes=1500), 2, 2).message_tokens < 15


@pytest.mark.parametrize(
    ("key", "top_k", "once"),
    [
        ("on", 1, [[True] * 3] * 3),
        ("off", 2, [[False] * 3] * 3),
        ("racks", 2, [[False, False, True], [False, False, True], [True, True, False]]),
        ("auto", 2, [[False, False, False], [True, False, False], [True, True, False]]),
        ("auto", 1, [[False] * 3] * 3),
    ],
)
def test_a_token_goes_once_to_a_node_where_asked_or_where_the_link_is_slow_and_local_peers_share(key, top_k, once):
    """Node 2 has a rank alone. All links are slow but that from node 0 to node 1, half a memory's speed."""
    topology = dataclasses.replace(
        make_topology(3, 3),
        bytes_per_second=np.array([[8e9, 4e9, 1e9], [1e9, 8e9, 1e9], [1e9, 1e9, 8e9]]),
        rack_of_node=np.array([0, 0, 1]),
    )
    assert choose_once(key, topology, np.array([0, 0, 0, 1, 1, 2]), top_k).tolist() == once


def test_what_messages_take_is_announced():
    config = make_config(comm__once_per_node="on")
    topology = make_topology(4, 2)
    routes = make_routes(topology.node_of_rank, 0, 1, np.ones((2, 2), bool))
    sizes = make_sizes_of_run(config, 4, 2, once=True)
    lines = list(format_sizes(sizes, routes))
    assert len(lines) == 2 and "2 ranks of its node share" in lines[0] and "for all of their node" in lines[1]
    assert f"at most {sizes.message_tokens} tokens" in lines[1] and f"2 x {sizes.pool_rows} rows" in lines[1]
    assert len(list(format_sizes(make_sizes_of_run(config, 4), make_routes([0] * 4, 0, 1, np.ones((1, 1), bool))))) == 1


def test_each_shard_of_an_expert_gets_a_copy_of_its_own():
    """Four ranks, two to an expert: each token has 2 experts x 2 shards, and a rank gets all rows of its experts."""
    config = make_config(model__num_experts=1, model__top_k=1)
    mesh = SimpleNamespace(expert_parallel=2, tensor_parallel=2, num_token_shares=4)
    sizes = make_sizes_of(config, mesh, make_topology(4), make_routes([0] * 4, 0, 1, np.ones((1, 1), bool)))
    assert (sizes.tokens, sizes.top_k, sizes.expert_rows) == (10, 2, 10 * 4)
    two = make_config(model__top_k=2)
    sizes = make_sizes_of(two, mesh, make_topology(4), make_routes([0] * 4, 0, 1, np.ones((1, 1), bool)))
    assert (sizes.top_k, sizes.expert_rows) == (4, 10 * 4)  # half of 4 x 10 x 2 assignments


@pytest.mark.mpi
@pytest.mark.parametrize("shared_memory", [True, False])
def test_ranks_of_a_node_are_local_peers_unless_the_key_forbids(comm, shared_memory):
    config = make_config(comm__shared_memory=shared_memory)
    mesh = SimpleNamespace(group=comm, world=comm, tensor_parallel=1)
    routes = find_routes(config.comm, make_topology(comm.size, min(2, comm.size)), mesh, 1, 2, False)
    nodes = np.arange(comm.size) * min(2, comm.size) // comm.size
    own = np.flatnonzero(nodes == nodes[comm.rank]) if shared_memory else [comm.rank]
    assert routes.local_peers.tolist() == list(own)
    assert sum(gather_to_all(comm, len(routes.senders))) == sum(gather_to_all(comm, len(routes.receivers)))
