"""Memory of a rank: estimated from the config before anything is built, and measured while it runs."""

import dataclasses
import resource
import weakref

import numpy as np
import torch

from hpcmoe.dispatch.device import DeviceSizes
from hpcmoe.dispatch.gate import load_acts_on_gates, renormalizes
from hpcmoe.experts.shapes import MATRICES, estimate_expert
from hpcmoe.gemm import adds_as_made, count_copy_bytes
from hpcmoe.model.text import VOCABULARY_SIZE
from hpcmoe.prepare.budget import FLOAT32_BYTES, count_dense_parameters

FULLEST = 2.25  # rows at the fullest rank / at an even load: routers yet untrained sent 2.24 to one of 16 ranks
INDEX = 8  # bytes of an int64
EXPERT_BYTES = (
    2 * INDEX + FLOAT32_BYTES
)  # of each expert in a routing: its assignments, those of the plan, its probability's sum
STAGING_BYTES = 2**24  # of experts that move to a rank, not laid down yet; from a device as much that is to leave


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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
    moving: int = 0  # of experts that move: what has come and is not laid down yet, on the host
    snapshot: int = 0  # parameters and moments once more, on the host, from which a thread writes checkpoints

    @property
    def per_expert(self):
        """One logical expert of one layer with its gradient and moments."""
        return self.one_expert * self.states

    @property
    def dense_with_state(self):
        """All else with its gradient and this rank's share of its moments."""
        return self.dense + self.gradients + self.optimizer - self.experts * (self.states - 1)

    @property
    def total(self):
        """All of it on this rank."""
        parameters = self.experts + self.dense + self.copies
        passing = self.buffers + self.activations + self.working + self.moving
        return parameters + self.gradients + self.optimizer + passing + self.snapshot


def estimate_memory(spec, mesh, slots, sizes, buffer_bytes, shard_optimizer=False, keeps_snapshot=False, num_moves=0):
    """Compute the memory of a rank with all its slots full -> Memory.

    num_moves: replicas of a layer that move at a time; keeps_snapshot: a thread writes checkpoints while steps go on.

    Activations are those of a rank that draws FULLEST times the rows of an even load. The snapshot is that of rank 0,
    which saves the dense parts.
    """
    model, training, tensor_parallel = spec.model, spec.trains, mesh.tensor_parallel
    on_device = isinstance(sizes, DeviceSizes)
    one_expert, states = estimate_expert(spec)
    experts = one_expert * slots * model.num_layers // tensor_parallel
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
        copies=estimate_copies(spec, tensor_parallel, slots, on_device),
        activations=estimate_activations(spec, mesh, slots, sizes) if training else estimate_passing(spec, mesh, sizes),
        working=estimate_working(spec, mesh, slots, sizes) if on_device else 0,
        moving=estimate_moving(spec, num_moves, tensor_parallel, on_device),
        snapshot=3 * (experts + dense) if training and keeps_snapshot else 0,
    )


def estimate_copies(spec, tensor_parallel, slots, on_device):
    """Bytes of the experts' matrices as products read them: cast in training, packed in inference on the host."""
    model, training, dtype = spec.model, spec.trains, getattr(torch, spec.model.dtype)
    numbers = len(MATRICES[spec.experts.kind]) * model.hidden * model.feed_forward // tensor_parallel
    of_parameters = torch.float32 if training else dtype
    if on_device:
        each = 0 if dtype == of_parameters else dtype.itemsize
    else:
        each = count_copy_bytes(dtype, of_parameters, not training)
    return each * numbers * slots * model.num_layers


def estimate_moving(spec, num_moves, tensor_parallel, on_device):
    """Bytes of experts on their way, a matrix of each at a time, that a rank's host holds at most."""
    model = spec.model
    number = FLOAT32_BYTES if spec.trains else getattr(torch, model.dtype).itemsize
    matrices = num_moves * model.hidden * model.feed_forward * number // tensor_parallel
    return min(STAGING_BYTES, matrices) * (1 + on_device)


def estimate_activations(spec, mesh, slots, sizes):
    """Bytes that the micro-batches in flight keep for their backward pass, on a rank with so many slots.

    At most when all of them have come to the head, of which one at a time has its own.
    """
    model, dispatch, shards = spec.model, spec.dispatch, mesh.tensor_parallel
    tokens, wire = sizes.tokens, sizes.dtype.itemsize

    # Count of each token in a layer: block input, normed input, both norms' inner results and scales; in attention also
    # the residual, what is normed for it, queries, keys and values, the heads' output and its log-sums; of the router
    # the log-sum, probabilities, and what it weighs by where those are others.
    own_weights = load_acts_on_gates(dispatch) and not renormalizes(dispatch, model.top_k)
    width = 3 * model.hidden + 2 + (1 + own_weights) * model.num_experts
    token_bytes = FLOAT32_BYTES * width + count_choice_bytes(dispatch, shards, sizes) * model.top_k
    if model.attention:
        token_bytes += FLOAT32_BYTES * (2 * model.hidden + 1 + model.num_heads) + wire * 5 * model.hidden

    # Count of each assignment at its expert: input, what goes into the activation, and where it came from.
    assignment_bytes = wire * (model.hidden + count_inner(spec, mesh)) + 2 * INDEX
    assignments = count_rows(model, mesh, slots, sizes)

    # Count in bfloat16 the weights of attention as products read them: cast for each micro-batch.
    weights = wire * 4 * model.hidden**2 if model.attention and wire < FLOAT32_BYTES else 0
    of_layer = tokens * token_bytes + assignments * assignment_bytes + weights + EXPERT_BYTES * model.num_experts

    # Count the last layer's output and its gradient, and in the head its norm's results and scale, the
    # logarithms of the probabilities, and the bytes that were to be predicted.
    of_ends = tokens * FLOAT32_BYTES * 2 * model.hidden
    of_head = tokens * (FLOAT32_BYTES * (2 * model.hidden + 1 + VOCABULARY_SIZE) + INDEX)
    return sizes.num_in_flight * (model.num_layers * of_layer + of_ends) + of_head


def count_choice_bytes(dispatch, shards, sizes):
    """Count the bytes that one of a token's K choices takes at its home in a layer."""
    routing = INDEX + FLOAT32_BYTES  # expert and gate
    routing += FLOAT32_BYTES * shards * (shards > 1)  # the gate once for each shard
    if dispatch.capacity_factor > 0:
        routing += FLOAT32_BYTES + 1  # the gate before it was dropped, and whether it was
    plan = 2 * INDEX + 1  # copy, row of its result, whether that is a sum
    if getattr(sizes, "num_messages_sent", 0):
        plan += INDEX + INDEX // 2  # the tokens of messages to other nodes, and which of these an assignment is of
    return routing + plan * shards


def estimate_working(spec, mesh, slots, sizes):
    """Bytes of the arrays that experts on a GPU make of a batch at most at one time, besides what they keep.

    Forward: rows, what goes into the activation, results. Back: gradients of all these and what the activation gave; in
    bfloat16 also a matrix's gradient, unless it is added up in float32 as it is made.
    """
    hidden, wire = spec.model.hidden, sizes.dtype.itemsize
    part = spec.model.feed_forward // mesh.tensor_parallel
    if not spec.trains:
        width, product = 2 * hidden + count_inner(spec, mesh), 0
    else:
        gated = spec.experts.kind == "swiglu"
        width = max(hidden + 4 * part, 3 * hidden + 3 * part) if gated else 2 * hidden + 3 * part
        product = 0 if wire == FLOAT32_BYTES or adds_as_made(sizes.dtype, hidden * part) else hidden * part
    return (count_rows(spec.model, mesh, slots, sizes) * width + product) * wire


def count_inner(spec, mesh):
    """Count the numbers that go into an expert's activation, of one row on one shard."""
    matrices = len(MATRICES[spec.experts.kind]) - 1  # all but the one that leads down
    return matrices * spec.model.feed_forward // mesh.tensor_parallel


def count_rows(model, mesh, slots, sizes):
    """Count the rows of a micro-batch at the experts of the fullest rank, which has so many slots."""
    every = sizes.tokens * mesh.group.size * min(model.top_k, slots)  # a token has no expert twice
    return min(int(FULLEST * sizes.expert_rows), every)


def estimate_passing(spec, mesh, sizes):
    """Bytes that the micro-batches in flight hold in inference: each layer's input and routing, until the last.

    The last layer has its router's input, and in attention its residual, until its results are home.
    """
    model = spec.model
    choices = count_choice_bytes(spec.dispatch, mesh.tensor_parallel, sizes) * model.top_k
    of_layer = sizes.tokens * (FLOAT32_BYTES * model.hidden + choices) + EXPERT_BYTES * model.num_experts
    of_last = sizes.tokens * FLOAT32_BYTES * model.hidden * (1 + model.attention)
    return sizes.num_in_flight * (model.num_layers * of_layer + of_last)


class ActivationTracker:
    """Measures what micro-batches in flight keep for the backward pass: in autograd's hands and in their contexts."""

    def __init__(self, network):
        self.parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.saved = {}  # address of a storage: [how many times saved, bytes]
        self.in_flight = {}  # address: bytes, of what contexts held when they were looked at
        self.context_bytes, self.autograd_bytes = 0, 0  # of these, and of what is saved besides
        self.peak_bytes = 0

    def hooks(self):
        """Watch what autograd saves within a with-block."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor):
        """Count a tensor that autograd saves until autograd lets it go: within an op too, as the head's."""
        storage = tensor.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        held = Held(tensor)
        if address not in self.parameters:
            self.saved.setdefault(address, [0, num_bytes])[0] += 1
            if self.saved[address][0] == 1 and address not in self.in_flight:
                self.autograd_bytes += num_bytes
            weakref.finalize(held, self.release, address)
            self.note()
        return held

    def release(self, address):
        """Forget a tensor that autograd let go."""
        self.saved[address][0] -= 1
        if self.saved[address][0] == 0:
            _, num_bytes = self.saved.pop(address)
            if address not in self.in_flight:
                self.autograd_bytes -= num_bytes

    def observe(self, contexts, passing=()):
        """Add up what is held now, and what passes from stage to stage, and keep the most."""
        found = find_arrays([list(contexts), passing])
        self.in_flight = {address: size for address, size in map(locate, found) if address not in self.parameters}
        beside = [size for address, (_, size) in self.saved.items() if address not in self.in_flight]
        self.context_bytes, self.autograd_bytes = sum(self.in_flight.values()), sum(beside)
        self.note()

    def note(self):
        """Keep the most that was held at one time."""
        self.peak_bytes = max(self.peak_bytes, self.context_bytes + self.autograd_bytes)


class Held:
    """A saved tensor, in an object whose end can be noticed."""

    def __init__(self, tensor):
        self.tensor = tensor


def find_arrays(value):
    """Yield the tensors and NumPy arrays inside nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, dict):
        yield from find_arrays(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from find_arrays(inner)
    elif dataclasses.is_dataclass(value):
        yield from find_arrays([getattr(value, field.name, None) for field in dataclasses.fields(value)])


def locate(array):
    """Find the memory behind a tensor or NumPy array, of which it may be a view -> (address, bytes)."""
    if isinstance(array, torch.Tensor):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.ctypes.data, array.nbytes


def measure_memory(network, optimizer, dispatcher, tracker):
    """Add up the arrays that are really there -> Memory; one_expert is a local one times its shards."""
    experts = [p for layer in network.layers for p in layer.experts.parameters()]
    num_replicas = sum(len(list(r.parameters())) > 0 for layer in network.layers for r in layer.experts.replicas)
    parameters = list(network.parameters())
    of_experts = sum(p.nbytes for p in experts)
    moments = [] if optimizer is None else [
        value for state in optimizer.adamw.state.values() for value in state.values() if value.dim() > 0
    ]  # fmt: skip
    return Memory(
        states=4 if optimizer else 1,
        one_expert=of_experts * network.mesh.tensor_parallel // max(num_replicas, 1),
        experts=of_experts,
        dense=sum(p.nbytes for p in parameters) - of_experts,
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        optimizer=sum(value.nbytes for value in moments),
        buffers=dispatcher.buffer_bytes,
        copies=sum(layer.experts.cast_bytes for layer in network.layers),
        activations=tracker.peak_bytes,
    )


def peak_resident_bytes():
    """Most memory that this process has had in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
