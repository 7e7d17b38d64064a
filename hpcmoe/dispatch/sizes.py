"""How large everything is that rows pass through: computed once, allocated once, and the same at any step."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hpcmoe.comm.pool import RowPool
from hpcmoe.comm.window import WindowSizes
from hpcmoe.dispatch.plan import num_trailing_rows
from hpcmoe.errors import ConfigError

_PORTION_BYTES = 2**21  # of the rows that a GEMM takes
MIN_BATCH_ROWS = 256  # of a GEMM: with fewer it is slower by the row, and reads its weights for little


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows pass through, whatever carries them."""

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
    """What buffers on the host must hold, and how rows meet in batches."""

    message_tokens: int  # B_max, tokens of a message between nodes
    num_messages_sent: int  # by this rank in an exchange, at most; 0: all ranks lie on one node
    pool_rows: int  # where messages land, of each micro-batch in flight
    messages_at_once: int  # that find room there together, whatever they hold
    in_order: bool  # the same rows meet in the same batches at every run
    deterministic: bool  # and the batches are worked on in the same order

    @property
    def row_bytes(self):
        """Bytes of one token on the wire."""
        return self.hidden * self.dtype.itemsize

    @property
    def sent_message_rows(self):
        """Rows of all messages that a micro-batch sends in one exchange."""
        if self.num_messages_sent == 0:
            return 0
        return (
            self.tokens * self.top_k
            + num_trailing_rows(self.tokens * self.top_k, self.row_bytes)
            + self.num_messages_sent
        )

    @property
    def home_window_rows(self):
        """Rows of the window that a micro-batch has for its tokens and results, and one that is zero."""
        return self.tokens + max(self.tokens * self.top_k, self.sent_message_rows) + 1

    @property
    def window_rows(self):
        """Rows of the window that belong to this rank."""
        return self.num_in_flight * (self.home_window_rows + self.pool_rows)

    def window_sizes(self, routes):
        """What each local_peer puts into the window -> WindowSizes."""
        return WindowSizes(
            rows=self.window_rows,
            row_bytes=self.row_bytes,
            num_in_flight=self.num_in_flight,
            max_senders=routes.max_senders,
            max_messages=count_messages(self.tokens, self.message_tokens),
            num_slots=routes.num_places,
        )

    def shared_bytes(self, routes):
        """Memory of the window that is this rank's share."""
        return self.window_sizes(routes).num_bytes(len(routes.local_peers)) // len(routes.local_peers)

    @property
    def send_bytes(self):
        """Memory from which this rank sends."""
        return self.num_in_flight * self.sent_message_rows * self.row_bytes

    def buffer_bytes(self, routes):
        """Memory that messages take on this rank: its share of the window, and what it sends from."""
        return self.shared_bytes(routes) + self.send_bytes


def make_pools(sizes, first_row):
    """Make the pool of each of the in-flight buffers of rows for receivers, behind what homes have from window row first_row on."""
    begin = first_row + sizes.num_in_flight * sizes.home_window_rows
    return [
        RowPool(begin + buffer_index * sizes.pool_rows, sizes.pool_rows) for buffer_index in range(sizes.num_in_flight)
    ]


def count_messages(tokens, message_tokens):
    """Messages into which one way's tokens are cut, at most."""
    return -(-tokens // max(message_tokens, 1))


def max_messages_sent(num_ways, tokens, top_k, message_tokens):
    """Messages that a rank sends over all its ways, at most: all but the last of each way are full, none is empty."""
    assignments = tokens * top_k
    return min(
        num_ways * count_messages(tokens, message_tokens), num_ways + assignments // max(message_tokens, 1), assignments
    )


def count_inbound_rows(tokens, assignments_of_token, row_bytes):
    """Rows that a full message takes where it lands: tokens, their assignments' gate values, results of the assignments."""
    assignments = tokens * assignments_of_token
    return tokens + num_trailing_rows(assignments, row_bytes) + assignments


def fit_messages(message_tokens, expected_rows, most_rows, assignments_of_token, row_bytes):
    """Size a pool and the messages that land in it: expected_rows where the limit allows.

    -> (tokens of a message, rows of the pool, messages that find room together whatever they hold)

    A message must fit whole; where the limit is tight it is made smaller. Raises ConfigError when not one token fits.
    """
    while message_tokens > 1 and count_inbound_rows(message_tokens, assignments_of_token, row_bytes) > most_rows:
        message_tokens = -(-message_tokens // 2)
    least = count_inbound_rows(message_tokens, assignments_of_token, row_bytes)
    if least > most_rows:
        raise ConfigError(
            f"[comm] pool_bytes: has {most_rows} rows of {row_bytes} B for each micro-batch in flight, "
            f"and a token with its results takes {least} where it lands"
        )
    pool_rows = min(max(expected_rows, least), most_rows)
    at_once = (pool_rows // least + 1) // 2  # with one less there, one of the gaps between them is still large enough
    return message_tokens, pool_rows, at_once


def choose_message_tokens(bytes_per_second, latency_seconds, row_bytes):
    """Choose B_max from the links between nodes [nodes, nodes]: latency is at most a tenth of what a message takes.

    At least MIN_BATCH_ROWS, since rows that land together are worked on together.
    """
    in_flight = (bytes_per_second * latency_seconds)[~np.eye(len(bytes_per_second), dtype=bool)]
    bytes_in_flight = float(in_flight.max()) if in_flight.size else 0.0
    return max(MIN_BATCH_ROWS, math.ceil(9 * bytes_in_flight / row_bytes))


def choose_gemm_rows(row_bytes):
    """Choose the rows of a GEMM: its input stays in a core's cache, and its weights are read for many rows."""
    return max(MIN_BATCH_ROWS, _PORTION_BYTES // row_bytes)


def group_peers(routes, sizes):
    """Part the peers, local peers first, into lists whose rows meet in a batch: about batch_rows a slot, or a few nodes'."""
    enough = min(MIN_BATCH_ROWS, sizes.batch_rows) * routes.num_slots
    each = max(sizes.expert_rows / len(routes.publishers), 1e-9)
    at_once = max(int(sizes.batch_rows * routes.num_slots / each), 1)
    groups = []
    for peers in routes.peers_by_node:
        for first in range(0, len(peers), at_once):
            piece = peers[first : first + at_once].tolist()
            if groups and len(groups[-1]) * each < enough:
                groups[-1].extend(piece)
            else:
                groups.append(piece)
    return groups


def round_rows(count):
    """Round a number of rows up, by 3 % at most: libraries make a kernel, and malloc a hole, for each size they see."""
    step = 1 << max(count.bit_length() - 6, 0)
    return -(-count // step) * step
