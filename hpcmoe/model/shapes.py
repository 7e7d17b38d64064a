"""The number of a model's dense parameters, known before anything is imported that takes seconds."""

from hpcmoe.config import ModelConfig
from hpcmoe.model.text import VOCABULARY_SIZE


def count_dense_parameters(model: ModelConfig) -> int:
    """Count the numbers outside the experts: embedding, positions, norms, attention, routers, head."""
    block = model.hidden + model.num_experts * model.hidden
    if model.attention:
        block += model.hidden + 4 * model.hidden**2
    return model.num_layers * block + model.hidden + (2 * VOCABULARY_SIZE + model.sequence_length) * model.hidden
