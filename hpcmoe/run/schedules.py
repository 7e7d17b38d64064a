"""The learning rate of each step, from its number alone, so that a resumed run goes on exactly.

Cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, one period; warm-up, stable, decay: Hu et al. 2024
(arXiv:2404.06395), section 4.
"""

import math

from hpcmoe.config import TrainConfig


def learning_rate_at(step: int, train: TrainConfig, num_steps: int) -> float:
    """Return the learning rate of a step, 1 to num_steps: a linear rise, then as the schedule says.

    It is learning_rate at the end of the rise; at num_steps, where the schedule falls, learning_rate_final times that.
    """
    rise = min(1.0, step / max(train.learning_rate_warmup_steps, 1))
    return train.learning_rate * rise * (1.0 - (1.0 - train.learning_rate_final) * fall_at(step, train, num_steps))


def fall_at(step: int, train: TrainConfig, num_steps: int) -> float:
    """Return how far the rate has fallen, from 0, not at all, to 1, at num_steps."""
    num_falling = num_steps - train.learning_rate_warmup_steps
    if train.learning_rate_schedule == "warmup-stable-decay":
        num_falling = min(num_falling, train.learning_rate_decay_steps or max(num_steps // 10, 1))
    progress = max(0.0, 1.0 - (num_steps - step) / num_falling) if num_falling > 0 else 0.0
    match train.learning_rate_schedule:
        case "constant":
            return 0.0
        case "linear" | "warmup-stable-decay":
            return progress
        case "cosine":
            return (1.0 - math.cos(math.pi * progress)) / 2
        case _:
            raise ValueError(train.learning_rate_schedule)
