"""The random numbers of lanes: torch's generators are the process's, so each lane puts its own states into them."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def draw_seeds(number: int) -> Iterator[list[int]]:
    """Draw some seeds; behind the with-block the caller's random numbers go on after them."""
    seeds = torch.randint(2**62, (number,), device="cpu").tolist()
    outside = read_random_states()
    try:
        yield seeds
    finally:
        set_random_states(outside)


def read_random_states() -> list[torch.Tensor]:
    """Read the states of torch's generators of random numbers: all threads share them."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Set what read_random_states() has read."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def seed_generators(seed: int) -> None:
    """Start the random numbers of torch's generators anew."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
