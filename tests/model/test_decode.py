"""Bytes that are cached continue a text as the whole network does, computed anew for each of them."""

import itertools

import pytest
import torch
from mpi4py import MPI
from small import open_small_job

from hpcmoe.comm.vote import Vote
from hpcmoe.gemm import multiply
from hpcmoe.model.continuations import Continuations
from hpcmoe.model.decode import ByteCodec, ByteEngine, KeyValueCache, begin_window
from hpcmoe.model.language import norm
from hpcmoe.model.prompts import Prompt
from hpcmoe.model.sampling import choose_token, make_prompt_generator, make_sampling_options

LENGTHS = (1, 4, 5, 6, 13)  # of prompts, where a window has 5 bytes
LIMIT = 7


def open_job(comm, shared, **changes):
    """Open a job of inference with room for all prompts on one rank."""
    sizes = {"data__batch_sequences": len(LENGTHS) * comm.size, "pipeline__micro_batches": 1}
    return open_small_job(comm, shared, run__mode="infer", **sizes, **changes)


def make_prompts():
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Prompt(number=n, tokens=tuple(text), limit=LIMIT - n % 2) for n, text in enumerate(texts)]


def compute_anew(network, text):
    """Compute the scores of the next byte by the network's own forward pass over the window. Collective."""
    length = network.spec.model.sequence_length
    window = text[begin_window(len(text), length) :]
    x = network(torch.tensor([window + [0] * (length - len(window))]))  # what follows is not seen
    return multiply(norm(x[len(window) - 1 : len(window)], network.last_norm), network.head_weight)[0]


@torch.no_grad()
def continue_anew(network, prompt, options):
    """Continue a prompt without a cache. Collective."""
    added, generator = [], make_prompt_generator(options.seed, prompt.number)
    for _ in range(prompt.limit):
        scores = compute_anew(network, [*prompt.tokens, *added])
        added.append(choose_token(scores, options, generator))
    return added


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_a_window_moves_on_by_half_and_sees_the_end(most):
    starts = [begin_window(length, most) for length in range(1, 40)]
    for length, start in enumerate(starts, 1):
        assert 1 <= length - start <= most and (length - start > most // 2 or start == 0 or most == 1)
    assert starts[:most] == [0] * most and {b - a for a, b in itertools.pairwise(starts)} <= {0, max(most // 2, 1)}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("temperature", "changes"),
    [
        (0.0, {}),
        (1.0, {"model__top_k": 1, "dispatch__load_feedback": 0.9, "num_nodes": 3}),
        (0.7, {"model__attention": False}),
        (0.0, {"experts__kind": "swiglu", "model__num_layers": 3, "comm__device": "host"}),
    ],
)
def test_a_cache_changes_nothing_at_any_number_of_ranks(comm, shared, temperature, changes):
    top_k = {"top_k": 40, "top_p": 0.9} if temperature else {"top_k": 0, "top_p": 1.0}
    options = make_sampling_options("test", max_new_tokens=LIMIT, temperature=temperature, seed=3, **top_k)
    with open_job(comm, shared, **changes) as (job, _, _):
        network, prompts = job.stepper.network, make_prompts()
        load = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)).repeat(2, 1)[: len(network.layers)]
        network.begin([], 0, load.numpy(), "infer")
        wanted = [continue_anew(network, prompt, options) for prompt in prompts]
        busy = max(comm.size - 1, 1)  # the last rank has none
        texts = Continuations(prompts[comm.rank :: busy] if comm.rank < busy else [], options, (), Vote(comm))
        ByteEngine(network).run(texts)
        assert texts.num_steps == LIMIT and len({tuple(added) for added in wanted}) == len(wanted)
        for row in texts.rows:
            assert row.added == wanted[row.prompt.number] and row.finish_reason == "length"


@pytest.mark.mpi
def test_scores_are_those_computed_anew(comm, shared):
    with open_job(comm, shared) as (job, _, _), torch.no_grad():
        network, text = job.stepper.network, list(b"a longer text")
        network.begin([], 0, torch.ones(2, 4).numpy(), "infer")
        cache, engine = KeyValueCache(network, 2), ByteEngine(network)
        for first, new in ((True, [text[:2], text[:4]]), (False, [text[2:3], []]), (False, [text[3:4], text[4:5]])):
            cache.place(new, [first, first])
            found = engine.compute_scores(new, cache)
        for scores, end in zip(found, (4, 5), strict=True):
            assert torch.allclose(scores, compute_anew(network, text[:end]), rtol=1e-5, atol=1e-5)


def test_more_texts_than_there_is_room_for_are_a_callers_error(tmp_path):
    options = make_sampling_options("test", max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    with open_job(MPI.COMM_SELF, tmp_path) as (job, _, _):
        texts = Continuations(2 * make_prompts(), options, (), Vote(MPI.COMM_SELF))
        with pytest.raises(ValueError, match="10 texts x 5 bytes: the buffers hold 25 tokens"):
            ByteEngine(job.stepper.network).run(texts)


def test_bytes_are_text_and_what_is_no_text_has_a_sign():
    codec = ByteCodec()
    assert codec.decode(codec.encode("a\xe9\u20ac\n")) == "a\xe9\u20ac\n"
    assert codec.decode([97, 255]) == "a\ufffd" and codec.encode("\ud800") == [63]
