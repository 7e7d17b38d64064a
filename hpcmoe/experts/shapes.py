"""The shapes of an expert's weights, known before anything is imported that takes seconds."""

MATRICES = {"gelu": ("up", "down"), "relu": ("up", "down"), "swiglu": ("gate", "up", "down")}


def weight_shape(model, name):
    """Shape of a whole matrix, [out, in]."""
    return (model.hidden, model.feed_forward) if name == "down" else (model.feed_forward, model.hidden)


def split_axis(name):
    """Axis over which a tensor-parallel group shares a weight: down by its input, the others by their output."""
    return 1 if name == "down" else 0


def count_expert_parameters(model, experts):
    """Numbers in one logical expert: two matrices H x F (three when gated), and biases."""
    names = MATRICES[experts.kind]
    biases = (len(names) - 1) * model.feed_forward + model.hidden if experts.bias else 0
    return len(names) * model.hidden * model.feed_forward + biases


def estimate_expert(spec):
    """Bytes of one logical expert's parameters, and how many arrays of that size it keeps -> (bytes, arrays).

    Training keeps float32 parameters, gradients and two moments; inference the parameters in the model's precision.
    """
    itemsize = 2 if spec.model.dtype == "bfloat16" and not spec.trains else 4
    return count_expert_parameters(spec.model, spec.experts) * itemsize, 4 if spec.trains else 1
