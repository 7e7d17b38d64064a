"""Memory of a rank, measured while it runs: activations in flight, and all arrays that are there."""

import dataclasses
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.model.language import LanguageModel
from hpcmoe.prepare.memory import Memory


class ActivationTracker:
    """Tracks what micro-batches in flight keep for the backward pass: saved by autograd, and in their contexts."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.saved: dict[int, list[int]] = {}  # address of a storage: [how many times saved, bytes]
        self.in_flight: dict[int, int] = {}  # address: bytes, of what contexts held when last observed
        self.context_bytes, self.autograd_bytes = 0, 0  # of these, and of what is saved besides
        self.peak_bytes = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context manager that tracks what autograd saves."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor: Tensor) -> "Saved":
        """Count a tensor from when autograd saves it until it is released, within one op too, as the head's."""
        address, num_bytes = locate(tensor)
        saved = Saved(tensor)
        if address not in self.parameters:
            self.saved.setdefault(address, [0, num_bytes])[0] += 1
            if self.saved[address][0] == 1 and address not in self.in_flight:
                self.autograd_bytes += num_bytes
            weakref.finalize(saved, self.release, address)
            self.update_peak()
        return saved

    def release(self, address: int) -> None:
        """Drop a tensor that autograd released."""
        self.saved[address][0] -= 1
        if self.saved[address][0] == 0:
            _, num_bytes = self.saved.pop(address)
            if address not in self.in_flight:
                self.autograd_bytes -= num_bytes

    def observe(self, contexts: Iterable[object]) -> None:
        """Add up what contexts hold now."""
        found = find_arrays(list(contexts))
        self.in_flight = {address: size for address, size in map(locate, found) if address not in self.parameters}
        beside = [size for address, (_, size) in self.saved.items() if address not in self.in_flight]
        self.context_bytes, self.autograd_bytes = sum(self.in_flight.values()), sum(beside)
        self.update_peak()

    def update_peak(self) -> None:
        """Keep the most that was held at one time."""
        self.peak_bytes = max(self.peak_bytes, self.context_bytes + self.autograd_bytes)


class Saved:
    """A saved tensor, in an object whose end weakref can report."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def find_arrays(value: object) -> Iterator[Tensor | np.ndarray]:
    """Yield the tensors and NumPy arrays inside nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif isinstance(value, dict):
        yield from find_arrays(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from find_arrays(inner)
    elif dataclasses.is_dataclass(value):
        yield from find_arrays([getattr(value, field.name, None) for field in dataclasses.fields(value)])


def locate(array: Tensor | np.ndarray) -> tuple[int, int]:
    """Find the memory behind a tensor or NumPy array, of which it may be a view -> (address, bytes)."""
    if isinstance(array, Tensor):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.ctypes.data, array.nbytes


def measure_memory(
    network: LanguageModel, adamw: torch.optim.AdamW | None, dispatcher: TokenDispatcher, tracker: ActivationTracker
) -> Memory:
    """Add up the arrays that are really there -> Memory; one_expert is a local one times its shards."""
    # Count the parameters of the experts.
    experts = [layer.experts.local for layer in network.layers]
    num_replicas = sum(len(local.local_replicas()) for local in experts)
    expert_bytes = sum(p.nbytes for local in experts for p in local.parameters())
    parameters = list(network.parameters())
    states = [] if adamw is None else adamw.state.values()
    return Memory(
        states=4 if adamw else 1,
        one_expert=expert_bytes * network.mesh.tensor_parallel // max(num_replicas, 1),
        experts=expert_bytes,
        dense=sum(p.nbytes for p in parameters) - expert_bytes,
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        optimizer=sum(value.nbytes for state in states for value in state.values() if value.dim() > 0),
        buffers=dispatcher.buffer_bytes,
        copies=sum(local.cast_bytes for local in experts),
        activations=tracker.peak_bytes,
    )
