"""Buffers hold what can come, fit what they may take, and stay bounded as ranks grow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import make_config, make_sizes, make_sizes_of, make_topology

from hpcmoe.comm.pool import RowPool
from hpcmoe.dispatch.plan import make_plan
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import (
    MIN_BATCH_ROWS,
    choose_message_tokens,
    count_inbound_rows,
    fit_messages,
    group_peers,
    make_pools,
    round_rows,
)
from hpcmoe.errors import ConfigError


@given(st.integers(1, 500), st.integers(0, 3000), st.integers(1, 4000), st.integers(1, 8), st.integers(8, 4096))
def test_a_pool_stays_in_its_limit_and_holds_a_full_message(wanted, expected, most, assignments, row_bytes):
    try:
        tokens, rows, at_once = fit_messages(wanted, expected, most, assignments, row_bytes)
    except ConfigError as refused:
        assert count_inbound_rows(1, assignments, row_bytes) > most
        assert "\n" not in str(refused) and f"has {most} rows" in str(refused)
        return
    least = count_inbound_rows(tokens, assignments, row_bytes)
    assert 1 <= tokens <= wanted and least <= rows <= most and at_once >= 1
    assert rows == max(min(expected, most), least)
    if tokens < wanted:  # it was cut because twice as many would not fit
        assert count_inbound_rows(min(2 * tokens, wanted), assignments, row_bytes) > most


@given(st.integers(1, 12), st.integers(0, 150), st.integers(1, 4), st.randoms())
def test_the_pool_always_holds_so_many_messages_together(tokens, expected, assignments, random):
    """They come and go in order, and each is smaller than a full one or as large; at_once of them are always there."""
    tokens, rows, at_once = fit_messages(tokens, expected, 10**6, assignments, 16)
    pool, held, full = RowPool(0, rows), [], count_inbound_rows(tokens, assignments, 16)
    for _ in range(100):
        wish = random.choice([full, random.randint(1, full)])
        while len(held) >= at_once:
            pool.free(*held.pop(random.randrange(len(held))))
        first = pool.allocate(wish)
        assert first is not None
        held.append((first, wish))


def test_a_token_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r"pool_bytes: has 5 rows of 16 B .* takes 6 where"):
        fit_messages(100, 50, 5, 3, 16)


def test_messages_are_long_enough_for_their_links():
    slow = np.array([[9e9, 2e8], [1e8, 9e9]]), np.array([[1e-3, 1e-3], [2e-3, 1e-3]])
    assert choose_message_tokens(*slow, 1000) == 9 * 2e8 * 1e-3 / 1000
    assert choose_message_tokens(*slow, 10**6) == MIN_BATCH_ROWS
    assert choose_message_tokens(np.full((1, 1), 1e9), np.full((1, 1), 1.0), 8) == MIN_BATCH_ROWS


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5000), st.integers(1, 600), st.data())
def test_every_peer_is_in_one_group_and_groups_are_neither_small_nor_needlessly_large(
    num_nodes, local_peers, expert_rows, batch_rows, data
):
    node_of_rank = np.repeat(np.arange(num_nodes), local_peers)
    rank = data.draw(st.integers(0, len(node_of_rank) - 1))
    routes = make_routes(node_of_rank, rank, 1, np.zeros((num_nodes, num_nodes), bool))
    groups = group_peers(routes, SimpleNamespace(expert_rows=expert_rows, batch_rows=batch_rows))
    assert sum(groups, []) == np.concatenate(routes.peers_by_node).tolist()
    each, enough = expert_rows / len(node_of_rank), min(MIN_BATCH_ROWS, batch_rows)
    for group in groups[:-1]:
        assert len(group) * each >= enough
    for group in groups:  # what was enough was not added to
        assert (len(group) - 1) * each < enough + batch_rows


@given(st.integers(0, 10**6))
def test_numbers_of_rows_are_rounded_up_to_a_few_sizes(count):
    rounded = round_rows(count)
    assert count <= rounded <= 1.04 * count and round_rows(rounded) == rounded
    assert len({round_rows(n) for n in range(1, 5000)}) < 350


@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_no_plan_needs_more_rows_than_its_buffers_have(tokens, top_k, message_tokens, once, seed):
    routes = make_routes([0, 0, 1, 1, 2], seed % 5, 1, np.full((3, 3), once))
    sizes = make_sizes(routes, hidden=3, tokens=tokens, top_k=top_k, message_tokens=message_tokens, num_in_flight=2)
    random = np.random.default_rng(seed)
    slots = random.permuted(np.tile(np.arange(5), (tokens, 1)), axis=1)[:, :top_k]
    plan = make_plan(slots, np.ones_like(slots, bool), routes, message_tokens, sizes.row_bytes)
    assert plan.num_rows - len(plan.assignments) <= sizes.sent_message_rows
    assert tokens + plan.num_rows + 1 <= sizes.home_window_rows  # and one that is zero
    assert len(plan.messages) <= sizes.num_messages_sent
    pools = make_pools(sizes, 1000)
    assert [pool.runs for pool in pools] == [
        [(1000 + 2 * sizes.home_window_rows + buffer_index * sizes.pool_rows, sizes.pool_rows)]
        for buffer_index in range(2)
    ]
    assert 1000 + sizes.window_rows == pools[1].runs[0][0] + sizes.pool_rows


def make_sizes_of_run(num_ranks, top_k, once, **changes):
    """Sizes and Routes of a rank among many, eight a node: twice 4096 tokens of 4096 bfloat16 in flight."""
    node_of_rank, num_nodes = np.arange(num_ranks) // 8, num_ranks // 8
    routes = make_routes(node_of_rank, 11, 1, np.full((num_nodes, num_nodes), once))
    config = make_config(
        model__hidden=4096, model__dtype="bfloat16", model__num_experts=num_ranks, model__top_k=top_k,
        model__sequence_length=4096, data__batch_sequences=2 * num_ranks, pipeline__micro_batches=2,
        comm__buffer_factor=1.5, **changes,
    )  # fmt: skip
    mesh = SimpleNamespace(
        expert_parallel=num_ranks, num_token_shares=num_ranks, tensor_parallel=1, data_parallel=1
    )  # fmt: skip
    return make_sizes_of(config, mesh, make_topology(num_ranks, num_nodes), routes), routes


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_at_4096_ranks_on_512_nodes_buffers_are_little_larger_than_at_1024(top_k, once):
    """Rows and pool do not grow with the ranks but for the last, part-filled message to each, and the table."""
    figures = {}
    for num_ranks in (1024, 4096):
        sizes, routes = make_sizes_of_run(num_ranks, top_k, once)
        window = sizes.window_sizes(routes)
        table_bytes = (window.num_bytes(8) - 8 * sizes.window_rows * (sizes.row_bytes + 12)) / 8
        figures[num_ranks] = sizes.buffer_bytes(routes) / 1e6, table_bytes / 1e6
        assert sizes.num_in_flight * sizes.pool_rows * sizes.row_bytes <= 1_000_000_000
    said = ", ".join(
        f"{ranks} ranks: {all_:.0f} MB each, the table_bytes {table_bytes:.1f}"
        for ranks, (all_, table_bytes) in figures.items()
    )
    print(f"top {top_k}{', once a node' * once}: {said}")
    own = 2 * 4096 * (1 + 2 * top_k) * 8192 / 1e6  # tokens, results and what is sent
    pool = min(1000.0, 1.5 * 2 * 2 * 4096 * top_k * 8192 / 1e6)
    assert figures[4096][0] <= 1.3 * (own + pool) + 100, said
    assert figures[4096][0] <= 1.3 * figures[1024][0], said
    assert figures[4096][1] <= 40, said


@pytest.mark.parametrize("pool_bytes", [2_000_000, 50_000_000])
def test_the_pool_obeys_its_key_however_many_rows_are_expected(pool_bytes):
    sizes, _ = make_sizes_of_run(64, 8, False, comm__pool_bytes=pool_bytes)
    assert 0.5 * pool_bytes <= sizes.num_in_flight * sizes.pool_rows * sizes.row_bytes <= pool_bytes
    assert sizes.message_tokens < 256 or pool_bytes > 10**7
    assert sizes.dtype == torch.bfloat16 and sizes.row_bytes == 8192
