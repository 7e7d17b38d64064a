"""Non-finite numbers: reported at once with their likely causes, and kept out of every checkpoint."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.config import Config
from hpcmoe.errors import TrainingError, on_all, raise_or_return
from hpcmoe.model.balance import read_biases
from hpcmoe.run.slices import ArraySlice
from hpcmoe.run.state import BIAS, SharedArrays, TrainingState

_SMALL_EPSILON = 1e-12  # below it steps are unbounded where the square of a gradient underflows float32
_LARGE_RATE = 1.0  # AdamW moves each weight by about that much per step
_LARGE_LOSS_WEIGHT = 10.0  # of a routing loss, compared with the cross-entropy of 5.5 nats a byte at the start


def check_finite(step: int, config: Config, **figures: float) -> None:
    """Raise TrainingError, on all ranks alike, where a figure of a step, equal on all of them, is not finite."""
    if not all(map(math.isfinite, figures.values())):
        values = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in figures.items())
        raise_or_return(None, TrainingError(f"step {step}: {values}: {describe_causes(step, config)}"))


def describe_causes(step: int, config: Config) -> str:
    """Describe why training may have diverged, the likeliest cause first."""
    return f"likely causes, the likeliest first: {'; '.join(find_causes(step, config))}"


def find_causes(step: int, config: Config) -> Iterator[str]:
    """Yield the settings that may be the cause; at the first step none of the optimizer's has acted yet."""
    train, dispatch, model, stepped = config.train, config.dispatch, config.model, step > 1

    # Name the extreme settings first.
    too_large = f"the steps are too large: try less than [train] learning_rate = {train.learning_rate}"
    if stepped and train.learning_rate >= _LARGE_RATE:
        yield too_large
    if stepped and train.epsilon < _SMALL_EPSILON:
        yield f"[train] epsilon = {train.epsilon}, too small for gradients near 0: try 1e-8"
    if stepped and train.learning_rate * train.weight_decay > 1:
        product = train.learning_rate * train.weight_decay
        yield f"[train] learning_rate x weight_decay = {product:.3g}: must be far below 1, or weights grow"
    for key, weight in (("aux_loss_weight", dispatch.aux_loss_weight), ("z_loss_weight", dispatch.z_loss_weight)):
        if weight > _LARGE_LOSS_WEIGHT:
            yield f"[dispatch] {key} = {weight}: its loss outweighs the text's, try 0.01"

    # Then name those that may be too weak a guard, and what is left.
    if stepped:
        if train.learning_rate < _LARGE_RATE:
            yield too_large
        if train.clip_norm == 0:
            yield "[train] clip_norm = 0: try 1"
        if train.learning_rate_warmup_steps == 0:
            yield "[train] learning_rate_warmup_steps = 0: try 20"
        if train.beta1**2 >= train.beta2:
            yield f"[train] beta2 = {train.beta2}: must be well above beta1 squared = {train.beta1**2:.3g}"
    elif model.source == "hf":
        yield f"weights or activations overflow: a damaged checkpoint, [model] path = {model.path}"
    else:
        yield f"activations overflow: [model] hidden = {model.hidden}, num_layers = {model.num_layers}"
    if model.dtype == "bfloat16":
        yield '[model] dtype = "bfloat16": try "float32", which tells whether rounding is to blame'
    yield "a processor or memory that errs: [train] check_every = 1 finds a rank that differs from its copies"


def check_state(world: MPI.Comm, state: TrainingState, step: int, shared: SharedArrays) -> None:
    """Raise TrainingError on all ranks where what a checkpoint would hold is not finite. Collective over world.

    Each rank reads what it would save, without a copy. shared {name: array} is equal on all.
    """
    owned = [(label_array(part), tensor) for part, tensor in state.arrays() if part.owned]
    alike = shared | {BIAS: read_biases(state.network.layers)}
    on_all(world, lambda: check_arrays([*owned, *alike.items()], step, state.job.config))


def label_array(part: ArraySlice) -> str:
    """Name a slice of an array in a message; that of an expert by its number."""
    return f"{part.name} of expert {part.start[0]}" if part.name.startswith("experts/") else part.name


def check_arrays(arrays: Iterable[tuple[str, torch.Tensor | np.ndarray]], step: int, config: Config) -> None:
    """Raise TrainingError where an array holds a number that is not finite."""
    for name, array in arrays:
        tensor = torch.as_tensor(array)
        if tensor.numel() > 0 and not all(math.isfinite(end) for end in torch.aminmax(tensor)):
            what = f"step {step}: {name} is not finite, so no checkpoint is made; those before stay"
            raise TrainingError(f"{what}; {describe_causes(step + 1, config)}")
