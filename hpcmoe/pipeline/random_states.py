"""The random numbers of micro-batches: torch's generators are the process's, so each lane puts its own states there."""

import contextlib
from collections.abc import Iterator, Sequence

import torch


class RandomStates:
    """The states of torch's generators, of the CPU and of what else a rank computes on."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """generators: the CPU's first."""
        self.generators = generators
        self.seeds: list[int] = []  # of each micro-batch

    @contextlib.contextmanager
    def draw_seeds(self, number: int) -> Iterator[None]:
        """Draw a seed for each micro-batch; behind the with-block the caller's random numbers go on after these."""
        self.seeds = torch.randint(2**62, (number,), generator=self.generators[0], device="cpu").tolist()
        outside = self.read()
        try:
            yield
        finally:
            self.set(outside)

    def seed(self, micro_batch: int) -> None:
        """Start the random numbers of a micro-batch."""
        for generator in self.generators:
            generator.manual_seed(self.seeds[micro_batch])

    def read(self) -> list[torch.Tensor]:
        """Read all states, to set them later: about 3 us on a host."""
        return [generator.get_state() for generator in self.generators]

    def set(self, states: list[torch.Tensor]) -> None:
        """Set states that were read."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
