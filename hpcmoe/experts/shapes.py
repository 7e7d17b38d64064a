"""The shapes of an expert's weights, known before anything is imported that takes seconds."""

from hpcmoe.config import ModelConfig, NetworkSpec

MATRICES = {"gelu": ("up", "down"), "relu": ("up", "down"), "swiglu": ("gate", "up", "down")}  # by kind of expert


def weight_shape(model: ModelConfig, name: str, inner: int = 0) -> tuple[int, int]:
    """Return the shape of a matrix, [out, in], whole or a shard that is `inner` wide."""
    inner = inner or model.feed_forward
    return (model.hidden, inner) if name == "down" else (inner, model.hidden)


def split_axis(name: str) -> int:
    """Return the axis over which a tensor-parallel group shares a matrix: down by input, the others by output."""
    return 1 if name == "down" else 0


def estimate_expert(spec: NetworkSpec) -> tuple[int, int]:
    """Compute the bytes of one logical expert's parameters, and how many arrays of that size it has -> (bytes, arrays).

    Training keeps float32 parameters, gradients and two moments; inference the parameters in the model's precision.
    """
    model, names, training = spec.model, MATRICES[spec.experts.kind], spec.trains
    biases = (len(names) - 1) * model.feed_forward + model.hidden if spec.experts.bias else 0
    itemsize = 2 if model.dtype == "bfloat16" and not training else 4
    return (len(names) * model.hidden * model.feed_forward + biases) * itemsize, 4 if training else 1
