"""Sizes of the buffers that rows pass through, on host and device: computed and allocated once, constant over steps."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.pool import RowPool
from hpcmoe.comm.window import WindowSizes
from hpcmoe.config import CommConfig
from hpcmoe.dispatch.plan import num_trailing_rows
from hpcmoe.dispatch.routes import Routes
from hpcmoe.errors import ConfigError

MIN_BATCH_ROWS = 256  # of a GEMM: with fewer it is slower by the row, and reads its weights for little
_PORTION_BYTES = 2**21  # of the rows that a GEMM takes
_ALL_ROWS = 2**62  # of a GEMM on a GPU, which takes all rows at once
_ALIGNMENT = 16  # bytes; GEMMs and copies on a GPU read no row faster than those that begin there


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows pass through, whatever carries them."""

    works_at_once: ClassVar[bool] = False  # all rows of an exchange make one batch, which is never cut

    hidden: int  # H
    dtype: torch.dtype  # of the rows that travel
    tokens: int  # T, the most that a micro-batch of this rank has
    top_k: int  # assignments of a token: one to each shard of an expert
    num_in_flight: int  # micro-batches in flight
    num_micro_batches: int
    expert_rows: int  # rows expected at this rank's experts
    batch_rows: int  # of a GEMM, about


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSizes(Sizes):
    """Sizes of buffers on the host, and how rows are grouped into batches."""

    message_tokens: int  # B_max, tokens of a message between nodes
    num_messages_sent: int  # by this rank in an exchange, at most; 0: all ranks lie on one node
    pool_rows: int  # where messages are received, of each micro-batch in flight
    messages_at_once: int  # that the pool holds together, whatever their sizes
    in_order: bool  # the same rows meet in the same batches at every run
    deterministic: bool  # and the batches are worked on in the same order

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one token on the wire."""
        return self.hidden * self.dtype.itemsize

    @property
    def sent_message_rows(self) -> int:
        """Count the rows of all messages that a micro-batch sends in one exchange."""
        if self.num_messages_sent == 0:
            return 0
        assignments = self.tokens * self.top_k
        return assignments + num_trailing_rows(assignments, self.row_bytes) + self.num_messages_sent

    @property
    def home_window_rows(self) -> int:
        """Count the rows of the window for a micro-batch's tokens and results, and one that is zero."""
        return self.tokens + max(self.tokens * self.top_k, self.sent_message_rows) + 1

    @property
    def window_rows(self) -> int:
        """Count the rows of the window that belong to this rank."""
        return self.num_in_flight * (self.home_window_rows + self.pool_rows)

    @property
    def send_bytes(self) -> int:
        """Return the bytes of the buffers from which this rank sends."""
        return self.num_in_flight * self.sent_message_rows * self.row_bytes

    def window_sizes(self, routes: Routes) -> WindowSizes:
        """Return what each local peer has in the window."""
        return WindowSizes(
            rows=self.window_rows,
            row_bytes=self.row_bytes,
            num_in_flight=self.num_in_flight,
            max_senders=routes.max_senders,
            max_messages=count_messages(self.tokens, self.message_tokens),
            num_slots=routes.num_places,
        )

    def shared_bytes(self, routes: Routes) -> int:
        """Return the bytes of this rank's share of the window."""
        return self.window_sizes(routes).num_bytes(len(routes.local_peers)) // len(routes.local_peers)

    def buffer_bytes(self, routes: Routes) -> int:
        """Return the bytes of all message buffers of this rank: its share of the window, and what it sends from."""
        return self.shared_bytes(routes) + self.send_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSizes(Sizes):
    """Sizes of buffers on a device."""

    works_at_once: ClassVar[bool] = True
    num_messages_sent: ClassVar[int] = 0  # rows go by all-to-all

    buffer_factor: float  # capacity for rows at the experts / those expected

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a token and its gate value on the wire."""
        return -(-(self.hidden * self.dtype.itemsize + 4) // _ALIGNMENT) * _ALIGNMENT

    @property
    def home_rows(self) -> int:
        """Count the rows of a micro-batch's assignments, and one that is zero."""
        return self.tokens * self.top_k + 1

    @property
    def away_rows(self) -> int:
        """Count the rows at this rank's experts that the buffer holds without growth."""
        return max(int(self.expert_rows * self.buffer_factor), 1)

    def buffer_bytes(self, _routes: Routes | None) -> int:
        """Return the bytes of all message buffers on this rank's device."""
        return self.num_in_flight * (self.home_rows + self.away_rows) * self.row_bytes


AnySizes = HostSizes | DeviceSizes


def make_device_sizes(rows: Sizes, buffer_factor: float) -> DeviceSizes:
    """Compute the buffers for so many rows on a device."""
    return DeviceSizes(**dataclasses.asdict(rows) | {"batch_rows": _ALL_ROWS}, buffer_factor=buffer_factor)


def make_host_sizes(
    rows: Sizes, comm: CommConfig, topology: Topology, routes: Routes, trains: bool, deterministic: bool
) -> HostSizes:
    """Compute the buffers for so many rows on the host.

    Some rows come in messages between nodes, each token before and its results behind. Raises ConfigError when [comm]
    pool_bytes does not hold one token's message.
    """
    # Size messages between nodes and the pool where they are received, where there are other nodes.
    num_ranks, row_bytes = len(routes.publishers), rows.hidden * rows.dtype.itemsize
    message_tokens, pool_rows, at_once = 1, 0, 0
    if routes.min_local_peers < num_ranks:  # the same on all ranks
        remote_share = 1 - routes.min_local_peers / num_ranks
        expected = math.ceil(2 * comm.buffer_factor * rows.expert_rows * remote_share)
        most = comm.pool_bytes // (rows.num_in_flight * row_bytes)
        links = topology.bytes_per_second, topology.latency_seconds
        wanted = comm.message_rows or choose_message_tokens(*links, row_bytes)
        wanted = max(min(wanted, rows.tokens), 1)
        together = min(rows.top_k, routes.most_served)
        message_tokens, pool_rows, at_once = fit_messages(wanted, expected, most, together, row_bytes)
    return HostSizes(
        **dataclasses.asdict(rows),
        message_tokens=message_tokens,
        num_messages_sent=max_messages_sent(len(routes.receivers), rows.tokens, rows.top_k, message_tokens),
        pool_rows=pool_rows,
        messages_at_once=at_once,
        in_order=deterministic or trains,
        deterministic=deterministic,
    )


def make_pools(sizes: HostSizes, first_row: int) -> list[RowPool]:
    """Make each in-flight buffers' pool of rows for received messages, behind all homes' rows from first_row on."""
    begin = first_row + sizes.num_in_flight * sizes.home_window_rows
    return [RowPool(begin + number * sizes.pool_rows, sizes.pool_rows) for number in range(sizes.num_in_flight)]


def count_messages(tokens: int, message_tokens: int) -> int:
    """Count the messages into which one route's tokens are cut, at most."""
    return -(-tokens // max(message_tokens, 1))


def max_messages_sent(num_routes: int, tokens: int, top_k: int, message_tokens: int) -> int:
    """Count a rank's messages over all routes, at most: all but the last of each route are full, none is empty."""
    assignments, each = tokens * top_k, count_messages(tokens, message_tokens)
    return min(num_routes * each, num_routes + assignments // max(message_tokens, 1), assignments)


def count_inbound_rows(tokens: int, assignments_of_token: int, row_bytes: int) -> int:
    """Count the rows of a full message where it is received: tokens, gate values of their assignments, results."""
    assignments = tokens * assignments_of_token
    return tokens + num_trailing_rows(assignments, row_bytes) + assignments


def fit_messages(
    message_tokens: int, expected_rows: int, most_rows: int, assignments_of_token: int, row_bytes: int
) -> tuple[int, int, int]:
    """Fit a pool and the messages received in it: expected_rows where the limit allows.

    -> (tokens of a message, rows of the pool, messages that the pool holds together whatever their sizes)

    A message must fit whole; where the limit is tight it is made smaller. Raises ConfigError when not one token fits.
    """
    # Halve a message until it fits whole.
    while message_tokens > 1 and count_inbound_rows(message_tokens, assignments_of_token, row_bytes) > most_rows:
        message_tokens = -(-message_tokens // 2)
    least = count_inbound_rows(message_tokens, assignments_of_token, row_bytes)
    if least > most_rows:
        raise ConfigError(
            f"[comm] pool_bytes: has {most_rows} rows of {row_bytes} B for each micro-batch in flight, "
            f"and a token with its results takes {least} where it lands"
        )

    # Fill the limit with as many as are expected.
    pool_rows = min(max(expected_rows, least), most_rows)
    at_once = (pool_rows // least + 1) // 2  # with one less there, one of the gaps between them is still large enough
    return message_tokens, pool_rows, at_once


def choose_message_tokens(bytes_per_second: np.ndarray, latency_seconds: np.ndarray, row_bytes: int) -> int:
    """Choose B_max from the links between nodes [nodes, nodes]: latency is at most a tenth of what a message takes.

    At least MIN_BATCH_ROWS, since rows received together are worked on together.
    """
    product = (bytes_per_second * latency_seconds)[~np.eye(len(bytes_per_second), dtype=bool)]
    delay_bytes = float(product.max()) if product.size else 0.0  # bandwidth x delay
    return max(MIN_BATCH_ROWS, math.ceil(9 * delay_bytes / row_bytes))


def choose_gemm_rows(row_bytes: int) -> int:
    """Choose the rows of a GEMM: its input stays in a core's cache, and its weights are read for many rows."""
    return max(MIN_BATCH_ROWS, _PORTION_BYTES // row_bytes)


def group_peers(routes: Routes, sizes: HostSizes) -> list[list[int]]:
    """Group the peers, local ones first, whose rows meet in a batch: about batch_rows a slot, or a few nodes'."""
    enough = min(MIN_BATCH_ROWS, sizes.batch_rows) * routes.num_slots
    each = max(sizes.expert_rows / len(routes.publishers), 1e-9)
    at_once = max(int(sizes.batch_rows * routes.num_slots / each), 1)
    groups: list[list[int]] = []
    for peers in routes.peers_by_node:
        for first in range(0, len(peers), at_once):
            piece = peers[first : first + at_once].tolist()
            if groups and len(groups[-1]) * each < enough:
                groups[-1].extend(piece)
            else:
                groups.append(piece)
    return groups


def round_rows(count: int) -> int:
    """Round a number of rows up, by 3 % at most: libraries make a kernel, and malloc a hole, for each size they see."""
    step = 1 << max(count.bit_length() - 6, 0)
    return -(-count // step) * step
