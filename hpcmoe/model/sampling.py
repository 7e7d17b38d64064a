"""The next token of a text by a model's scores: the largest, or one drawn by its probability.

Temperature, top-k and top-p (nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751) act in this order, as those of
Hugging Face transformers do.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from hpcmoe.errors import ConfigError
from hpcmoe.validate import STRICT, validate_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How texts are continued."""

    __pydantic_config__: ClassVar = STRICT

    max_new_tokens: Annotated[int, Interval(ge=1, lt=2**31)]
    temperature: Annotated[float, Ge(0)]  # 0: the token of the largest score
    top_k: Annotated[int, Interval(ge=0, lt=2**31)]  # only the k largest scores; 0: all
    top_p: Annotated[float, Interval(gt=0, le=1)]  # only the most probable tokens that make up p
    seed: Annotated[int, Interval(ge=0, lt=2**63)]


def make_sampling_options(where: str, **arguments: float) -> SamplingOptions:
    """Check the arguments of SamplingOptions. Raises ConfigError with a line for each at fault, begun with `where`."""
    options = validate_arguments(SamplingOptions, arguments, where)
    if options.temperature == 0 and (options.top_k > 0 or options.top_p < 1):
        raise ConfigError(f"{where}: top_k, top_p: need a temperature above 0: without one nothing is drawn")
    return options


def make_prompt_generator(seed: int, number: int) -> torch.Generator:
    """Make the random numbers of a prompt, the same on whichever rank it is."""
    (drawn,) = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(drawn))


def choose_token(scores: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """Choose a token by its scores [V] on the host."""
    if options.temperature == 0:
        return int(scores.argmax())
    probabilities = cut_scores(scores.double() / options.temperature, options).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def cut_scores(scores: Tensor, options: SamplingOptions) -> Tensor:
    """Set the scores [V] of what is not to be drawn to minus infinity -> [V]; of equal scores at top-k all stay."""
    if 0 < options.top_k < len(scores):
        scores = scores.where(scores >= scores.topk(options.top_k).values[-1], -math.inf)
    if options.top_p < 1:
        ascending, order = scores.sort()
        is_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        is_out[-1] = False  # the most probable stays
        scores = scores.masked_fill(is_out.scatter(0, order, is_out), -math.inf)
    return scores
