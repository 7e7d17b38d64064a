"""A rank's prompts as they grow by a token a step: what each has got, and when all ranks have finished theirs."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from hpcmoe.comm.vote import Vote
from hpcmoe.model.prompts import Prompt
from hpcmoe.model.sampling import SamplingOptions, choose_token, make_prompt_generator


@dataclass(slots=True, kw_only=True)
class Continuation:
    """A prompt, and what has been added to it."""

    prompt: Prompt
    added: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "eos": a token that ends texts; "length": its limit; "": it grows still

    def add(self, token: int, ends: Set[int]) -> None:
        """Add a token; one of `ends` is the last."""
        self.added.append(token)
        if token in ends:
            self.finish_reason = "eos"
        elif len(self.added) == self.prompt.limit:
            self.finish_reason = "length"


class Continuations:
    """The prompts that a rank continues at once, none on some ranks; all ranks take equally many steps."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        ends: Set[int],
        vote: Vote,
        listen: Callable[[Continuation], None] = lambda _: None,
    ) -> None:
        """ends: the tokens that end a text. vote: of all ranks that run the model together.

        listen(continuation) is called after each token.
        """
        self.rows = [Continuation(prompt=prompt) for prompt in prompts]
        self.generators = [make_prompt_generator(options.seed, prompt.number) for prompt in prompts]
        self.options, self.ends, self.vote, self.listen = options, ends, vote, listen
        self.num_steps = 0

    @property
    def growing(self) -> list[int]:
        """List the rows that are not finished."""
        return [index for index, row in enumerate(self.rows) if not row.finish_reason]

    def add(self, scores: Tensor) -> list[int]:
        """Choose a token of each growing row by its scores [growing, V], and add it -> these tokens."""
        tokens, on_host = list[int](), scores.float().cpu()
        for index, own in zip(self.growing, on_host, strict=True):
            tokens.append(choose_token(own, self.options, self.generators[index]))
            self.rows[index].add(tokens[-1], self.ends)
            self.listen(self.rows[index])
        return tokens

    def is_over(self) -> bool:
        """End a step, and return True if it was the last one of all ranks. Collective over the vote's ranks."""
        self.num_steps += 1
        if self.num_steps == self.options.max_new_tokens:  # none grows further
            self.vote.close()
            return True
        return self.vote.ask(not self.growing)


class Engine(Protocol):
    """A model that continues prompts."""

    ends: Set[int]  # the tokens that end a text

    def run(self, texts: Continuations) -> None:
        """Extend this rank's prompts until all ranks have finished theirs. Collective over the model's ranks."""
