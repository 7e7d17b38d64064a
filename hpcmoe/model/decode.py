"""Texts continued by our own language model, byte by byte, with the keys and values of earlier bytes in a cache.

The model has learned so many positions as its sequences have. A longer text is seen through a window of its last bytes,
at positions from 0 on: when it is full it moves on by half its length, and its bytes are computed anew. Where a window
begins depends on the text's length alone, so that what is cached equals what would be computed anew for each byte.
"""

import functools
from collections.abc import Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.gemm import multiply
from hpcmoe.model.continuations import Continuations
from hpcmoe.model.language import LanguageModel, norm


class ByteCodec:
    """Text as its bytes in UTF-8."""

    num_positions: int | None = None  # the window moves on

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text; half of a character, as JSON may hold one, by what stands for it."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", "replace")


class KeyValueCache:
    """The keys and values of a batch's windows in all layers, and where the bytes of the step stand."""

    def __init__(self, network: LanguageModel, num_rows: int) -> None:
        model = network.spec.model
        shape = 2, model.num_layers, num_rows, model.num_heads, model.sequence_length, model.hidden // model.num_heads
        self.keys, self.values = network.embedding.new_zeros(shape, dtype=getattr(torch, model.dtype))
        self.held = np.zeros(num_rows, np.int64)  # bytes of each row's window that are computed

    def place(self, new: Sequence[Sequence[int]], starts_anew: Sequence[bool]) -> None:
        """Place the new bytes of each row behind those that it holds, or at its beginning."""
        counts = np.array([len(own) for own in new], np.int64)
        self.held[np.array(starts_anew, bool)] = 0
        places = np.concatenate([np.arange(count) for count in counts] or [counts])
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = self.held[rows] + places
        self.held += counts
        self.last = np.cumsum(counts)[counts > 0] - 1  # of each row with new bytes, among these
        self.rows, self.places, self.positions = (
            torch.from_numpy(array).to(self.keys.device) for array in (rows, places, positions)
        )

        # A query sees what stands before it; those that pad a row see its first byte.
        self.num_new, self.longest = int(counts.max(initial=0)), int(self.held.max(initial=0))
        of_query = self.positions.new_zeros(len(counts), self.num_new)
        of_query[self.rows, self.places] = self.positions
        self.mask = torch.arange(self.longest, device=self.keys.device) <= of_query[:, None, :, None]

    def attend(self, layer: int, mixed: Tensor) -> Tensor:
        """Keep the keys and values of the new bytes, and attend their queries: mixed [T, 3 H] -> [T, H]."""
        keys, values = self.keys[layer], self.values[layer]
        query, key, value = mixed.view(len(mixed), 3, keys.shape[1], keys.shape[3]).unbind(1)
        if len(mixed) == 0:
            return query.flatten(1)
        keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = key, value
        queries = query.new_zeros(len(keys), self.num_new, *query.shape[1:])
        queries[self.rows, self.places] = query
        seen = slice(self.longest)
        heads = nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2), keys[:, :, seen], values[:, :, seen], attn_mask=self.mask
        )
        return heads.transpose(1, 2)[self.rows, self.places].flatten(1)


class ByteEngine:
    """Continues texts by a language model whose step has begun: what loads its routers feel is known."""

    ends: Set[int] = frozenset()  # no byte ends a text

    def __init__(self, network: LanguageModel) -> None:
        self.network = network

    @torch.no_grad()
    def run(self, texts: Continuations) -> None:
        """Extend this rank's texts until all ranks have finished theirs. Collective over the group.

        Raises ValueError for more texts than the buffers have room for whole windows of.
        """
        length, most = self.network.spec.model.sequence_length, self.network.layers[0].experts.dispatcher.sizes.tokens
        if len(texts.rows) * length > most:
            raise ValueError(f"{len(texts.rows)} texts x {length} bytes: the buffers hold {most} tokens")
        cache = KeyValueCache(self.network, len(texts.rows))
        while True:
            new, starts_anew = self.list_new(texts)
            cache.place(new, starts_anew)
            texts.add(self.compute_scores(new, cache))
            if texts.is_over():
                return

    def list_new(self, texts: Continuations) -> tuple[list[list[int]], list[bool]]:
        """List the bytes of each row that are to be computed, none where it is finished -> (bytes, is a new window)."""
        length, new, starts_anew = self.network.spec.model.sequence_length, [], []
        for row in texts.rows:
            text = [*row.prompt.tokens, *row.added]
            start = begin_window(len(text), length)
            starts_anew.append(not row.added or start != begin_window(len(text) - 1, length))
            new.append([] if row.finish_reason else text[start:] if starts_anew[-1] else text[-1:])
        return new, starts_anew

    def compute_scores(self, new: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
        """Compute the scores of the byte after each row that has new ones -> [n, V]. Collective over the group."""
        network = self.network
        tokens = torch.tensor([byte for own in new for byte in own], dtype=torch.int64, device=cache.keys.device)
        x = nn.functional.embedding(tokens, network.embedding) + network.positions[cache.positions]
        for layer, (block, load) in enumerate(zip(network.layers, network.load, strict=True)):
            residual, normed = block.dense(x, functools.partial(cache.attend, layer))
            routing = block.router(normed, load)
            x = block.experts(normed, routing.experts, routing.gates, routing.kept, residual)
        return multiply(norm(x[cache.last], network.last_norm), network.head_weight)


def begin_window(length: int, most: int) -> int:
    """Return where the window of a text of so many bytes begins, that sees `most` of them at most."""
    stride = max(most // 2, 1)
    return max(-(-(length - most) // stride), 0) * stride
