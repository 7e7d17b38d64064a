"""Tokens are chosen as transformers' own processors would have it, and by random numbers of the prompt alone."""

import pytest
import torch

from hpcmoe.errors import ConfigError
from hpcmoe.model.sampling import choose_token, cut_scores, make_prompt_generator, make_sampling_options


def make_options(**changes):
    usual = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return make_sampling_options("command line", **(usual | changes))


def draw_scores(number, size=50):
    scores = 3 * torch.randn(size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return scores.round(decimals=number % 3)  # some of them equal


@pytest.mark.parametrize("top_k", [0, 1, 5, 49, 50, 99])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_what_is_cut_is_what_transformers_cuts(top_k, top_p):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")
    for number in range(20):
        scores = draw_scores(number)
        wanted = scores[None]
        if top_k:
            wanted = transformers.TopKLogitsWarper(top_k)(None, wanted)
        if top_p < 1:
            wanted = transformers.TopPLogitsWarper(top_p)(None, wanted)
        assert torch.equal(cut_scores(scores, make_options(top_k=top_k, top_p=top_p)), wanted[0])


def test_without_a_temperature_the_largest_score_is_chosen():
    scores = draw_scores(1)
    greedy = make_options(temperature=0.0)
    assert choose_token(scores, greedy, make_prompt_generator(0, 0)) == int(scores.argmax())
    cold = make_options(temperature=1e-9)
    assert choose_token(scores, cold, make_prompt_generator(0, 0)) == int(scores.argmax())


def test_tokens_are_drawn_by_their_probability():
    scores, generator = torch.tensor([0.0, 1.0, 2.0, -50.0]), make_prompt_generator(3, 1)
    options = make_options(temperature=2.0, top_k=2)
    drawn = torch.bincount(torch.tensor([choose_token(scores, options, generator) for _ in range(4000)]), minlength=4)
    wanted = torch.tensor([-torch.inf, 0.5, 1.0, -torch.inf]).softmax(0) * 4000
    assert torch.allclose(drawn.double(), wanted.double(), atol=120) and drawn[0] == drawn[3] == 0


def test_each_prompt_and_seed_has_random_numbers_of_its_own():
    drawn = {
        (seed, number): torch.rand(4, generator=make_prompt_generator(seed, number))
        for seed in (0, 1, 2**63 - 1)
        for number in (0, 1)
    }
    assert len({tuple(values.tolist()) for values in drawn.values()}) == len(drawn)
    assert torch.equal(drawn[1, 1], torch.rand(4, generator=make_prompt_generator(1, 1)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 0}, "command line: max_new_tokens = 0: must be greater than or equal to 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0: must be greater than 0"),
        ({"top_p": 1.5}, "top_p = 1.5: must be less than or equal to 1"),
        ({"seed": -1}, "seed = -1"),
        ({"temperature": 0.0, "top_k": 3}, "top_k, top_p: need a temperature above 0"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_k, top_p: need a temperature above 0"),
    ],
)
def test_what_cannot_be_is_one_line(changes, said):
    with pytest.raises(ConfigError) as error:
        make_options(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)
