"""Memory of a rank, estimated from the spec before anything is built."""

from dataclasses import dataclass

import torch

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.config import DispatchConfig, ModelConfig, NetworkSpec
from hpcmoe.dispatch.gate import load_acts_on_gates, renormalizes
from hpcmoe.dispatch.sizes import AnySizes
from hpcmoe.experts.shapes import MATRICES, estimate_expert, make_expert_shape
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.gemm import adds_in_place, count_cast_bytes
from hpcmoe.model.shapes import count_dense_parameters
from hpcmoe.model.text import VOCABULARY_SIZE

FULLEST = 2.25  # rows at the fullest rank / at an even load: routers yet untrained sent 2.24 to one of 16 ranks
STAGING_BYTES = 2**24  # of experts that move to a rank, not in place yet; from a device as much that is to leave
_INDEX = 8  # bytes of an int64
_EXPERT_BYTES = 2 * _INDEX + FLOAT32_BYTES  # of each expert in a routing: two counts of its assignments, one sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank, by what they hold."""

    states: int  # arrays as large as the parameters: themselves, and in training gradient and two moments
    one_expert: int  # the matrices of one logical expert of one layer, whole
    experts: int  # parameters of the experts on this rank
    dense: int  # parameters of all else
    gradients: int
    optimizer: int  # AdamW's two moments
    buffers: int  # for messages
    copies: int  # of the experts' matrices: cast in training, packed in inference
    activations: int  # kept for the backward pass by the micro-batches in flight
    working: int = 0  # on a GPU, arrays that the experts make of a whole batch and do not keep
    moving: int = 0  # of experts that move: what is received and not in place yet, on the host
    snapshot: int = 0  # parameters and moments once more, on the host, from which a thread writes checkpoints

    @property
    def per_expert(self) -> int:
        """Return the bytes of one logical expert of one layer with its gradient and moments."""
        return self.one_expert * self.states

    @property
    def dense_with_state(self) -> int:
        """Return the bytes of all but experts, with gradients and this rank's share of the moments."""
        return self.dense + self.gradients + self.optimizer - self.experts * (self.states - 1)

    @property
    def total(self) -> int:
        """Return the sum of all on this rank."""
        parameters = self.experts + self.dense + self.copies
        passing = self.buffers + self.activations + self.working + self.moving
        return parameters + self.gradients + self.optimizer + passing + self.snapshot


def estimate_memory(
    spec: NetworkSpec, mesh: Mesh, slots: int, sizes: AnySizes, buffer_bytes: int,
    *, shard_optimizer: bool, keeps_snapshot: bool, num_moves: int,
) -> Memory:  # fmt: skip
    """Estimate the memory of a rank with all its slots full.

    num_moves: replicas of a layer that move at a time; keeps_snapshot: a thread writes checkpoints while steps go on.
    Activations are those of a rank that receives FULLEST times the rows of an even load. The snapshot is that of rank
    0, which saves the dense parts.
    """
    # Count the parameters of the experts and of all else.
    model, training = spec.model, spec.trains
    one_expert, states = estimate_expert(make_expert_shape(spec), spec.trains)
    experts = one_expert * slots * model.num_layers // mesh.tensor_parallel
    num_shares = mesh.world.size if shard_optimizer else 1
    dense = count_dense_parameters(model) * FLOAT32_BYTES
    return Memory(
        states=states,
        one_expert=one_expert,
        experts=experts,
        dense=dense,
        gradients=experts + dense if training else 0,
        optimizer=2 * (experts + dense // num_shares) if training else 0,
        buffers=buffer_bytes,
        copies=estimate_copies(spec, mesh.tensor_parallel, slots, sizes.works_at_once),
        activations=estimate_activations(spec, mesh, slots, sizes) if training else estimate_passing(spec, mesh, sizes),
        working=estimate_working(spec, mesh, slots, sizes) if sizes.works_at_once else 0,
        moving=estimate_moving(spec, num_moves, mesh.tensor_parallel, sizes.works_at_once),
        snapshot=3 * (experts + dense) if training and keeps_snapshot else 0,
    )


def estimate_copies(spec: NetworkSpec, tensor_parallel: int, slots: int, on_device: bool) -> int:
    """Estimate the bytes of copies of experts' matrices: cast in training, packed in inference on the host."""
    model, training, dtype = spec.model, spec.trains, getattr(torch, spec.model.dtype)
    numbers = len(MATRICES[spec.experts.kind]) * model.hidden * model.feed_forward // tensor_parallel
    of_parameters = torch.float32 if training else dtype
    if on_device:
        each = 0 if dtype == of_parameters else dtype.itemsize
    else:
        each = count_cast_bytes(dtype, of_parameters, not training)
    return each * numbers * slots * model.num_layers


def estimate_moving(spec: NetworkSpec, num_moves: int, tensor_parallel: int, on_device: bool) -> int:
    """Estimate the bytes of moving experts, a matrix of each at a time, that a rank's host holds at most."""
    number = FLOAT32_BYTES if spec.trains else getattr(torch, spec.model.dtype).itemsize
    matrices = num_moves * spec.model.hidden * spec.model.feed_forward * number // tensor_parallel
    return min(STAGING_BYTES, matrices) * (1 + on_device)


def estimate_activations(spec: NetworkSpec, mesh: Mesh, slots: int, sizes: AnySizes) -> int:
    """Estimate the bytes that micro-batches in flight keep for their backward pass, when all have come to the head.

    The head's own arrays are there for one micro-batch at a time.
    """
    model, tokens, wire = spec.model, sizes.tokens, sizes.dtype.itemsize

    # Count of each token in a layer: block input, normed input, both norms' inner results and scales; of the router the
    # log-sum, probabilities, and the weights where those are others.
    own_weights = load_acts_on_gates(spec.dispatch) and not renormalizes(spec.dispatch, model.top_k)
    width = 3 * model.hidden + 2 + (1 + own_weights) * model.num_experts
    token_bytes = FLOAT32_BYTES * width + count_choice_bytes(spec.dispatch, mesh, sizes) * model.top_k

    # Count in attention also the residual, its norm, queries, keys and values, the heads' output and its log-sums; in
    # bfloat16 its weights, which are cast for each micro-batch.
    weights = 0
    if model.attention:
        token_bytes += FLOAT32_BYTES * (2 * model.hidden + 1 + model.num_heads) + wire * 5 * model.hidden
        weights = wire * 4 * model.hidden**2 if wire < FLOAT32_BYTES else 0

    # Count of each row at its expert: input, what goes into the activation, and where it came from.
    row_bytes = wire * (model.hidden + count_inner(spec, mesh)) + 2 * _INDEX
    rows = count_fullest_rows(model, mesh, slots, sizes)
    of_layer = tokens * token_bytes + rows * row_bytes + weights + _EXPERT_BYTES * model.num_experts

    # Count the gradient of the last layer's output, and in the head this, its norm's results and scale, the logarithms
    # of the probabilities, and the bytes to be predicted.
    of_gradient = tokens * FLOAT32_BYTES * model.hidden
    of_head = tokens * (FLOAT32_BYTES * (3 * model.hidden + 1 + VOCABULARY_SIZE) + _INDEX)
    return sizes.num_in_flight * (model.num_layers * of_layer + of_gradient) + of_head


def estimate_passing(spec: NetworkSpec, mesh: Mesh, sizes: AnySizes) -> int:
    """Estimate the bytes of micro-batches in flight in inference: of one layer its rows, residual and choices.

    One of them has its output besides.
    """
    of_hidden = FLOAT32_BYTES * spec.model.hidden
    choices = count_choice_bytes(spec.dispatch, mesh, sizes) * spec.model.top_k
    return sizes.tokens * (sizes.num_in_flight * (2 * of_hidden + choices) + of_hidden)


def count_choice_bytes(dispatch: DispatchConfig, mesh: Mesh, sizes: AnySizes) -> int:
    """Count the bytes that one of a token's K choices takes at its home in a layer."""
    shards = mesh.tensor_parallel
    routing = _INDEX + FLOAT32_BYTES  # expert and gate
    routing += FLOAT32_BYTES * shards * (shards > 1)  # the gate once for each shard
    if dispatch.capacity_factor > 0:
        routing += FLOAT32_BYTES + 1  # the gate before it was dropped, and whether it was
    plan = 2 * _INDEX + 1  # assignment, row of its result, whether that is a sum
    if sizes.num_messages_sent:
        plan += _INDEX + _INDEX // 2  # the tokens of messages to other nodes, and the token of each assignment
    return routing + plan * shards


def estimate_working(spec: NetworkSpec, mesh: Mesh, slots: int, sizes: AnySizes) -> int:
    """Estimate the bytes of arrays that experts on a GPU make of a batch at most at one time, besides what they keep.

    Forward: rows, what goes into the activation, results. Backward: gradients of all these and the activation's output;
    in bfloat16 also a matrix's gradient, unless it is added in float32 as it is made.
    """
    hidden, wire = spec.model.hidden, sizes.dtype.itemsize
    part = spec.model.feed_forward // mesh.tensor_parallel
    gated, product = spec.experts.kind == "swiglu", 0
    if not spec.trains:
        width = max(hidden + 2 * part, 2 * hidden + part) if gated else 2 * hidden + part
    else:
        width = max(hidden + 4 * part, 3 * hidden + 3 * part) if gated else 2 * hidden + 3 * part
        product = 0 if wire == FLOAT32_BYTES or adds_in_place(sizes.dtype, hidden * part) else hidden * part
    return (count_fullest_rows(spec.model, mesh, slots, sizes) * width + product) * wire


def count_inner(spec: NetworkSpec, mesh: Mesh) -> int:
    """Count the numbers that go into an expert's activation, of one row on one shard."""
    matrices = len(MATRICES[spec.experts.kind]) - 1  # all but down
    return matrices * spec.model.feed_forward // mesh.tensor_parallel


def count_fullest_rows(model: ModelConfig, mesh: Mesh, slots: int, sizes: AnySizes) -> int:
    """Count the rows of a micro-batch at the experts of the fullest rank, which has so many slots."""
    every = sizes.tokens * mesh.group.size * min(model.top_k, slots)  # a token has no expert twice
    return min(int(FULLEST * sizes.expert_rows), every)
