"""What a layer of the library computes, written out without ranks, and the sums of its gradients over all ranks."""

import numpy as np
import torch
from mpi4py import MPI
from torch.nn import functional as F

from hpcmoe.experts.feed_forward import make_expert_weights
from hpcmoe.experts.shapes import split_axis
from hpcmoe.wait import gather_to_all

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


def draw(*shape, seed):
    """Draw normal numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_bias(name, expert, shape):
    """Draw the bias that a test gives an expert: zeros would hide one that is forgotten."""
    return draw(*shape, seed=1000 + 10 * expert + len(name))


class DenseExperts:
    """All experts of a layer on one rank: weights by name [E, ...]."""

    def __init__(self, layer):
        options = layer.options
        drawn = [
            make_expert_weights(options.shape, (options.seed, layer.number, e), 0, 1)
            for e in range(options.num_experts)
        ]
        self.kind, self.num_experts = options.kind, options.num_experts
        self.weights = {name: torch.stack([w[name] for w in drawn]) for name in drawn[0]}
        for name, weight in self.weights.items():
            if name.endswith("_bias"):
                weight.copy_(torch.stack([draw_bias(name, e, weight[0].shape) for e in range(self.num_experts)]))
            weight.requires_grad_()

    def linear(self, x, expert, name):
        bias = self.weights.get(f"{name}_bias")
        return F.linear(x, self.weights[name][expert], None if bias is None else bias[expert])

    def expert(self, x, expert):
        up = self.linear(x, expert, "up")
        hidden = F.silu(self.linear(x, expert, "gate")) * up if self.kind == "swiglu" else ACTIVATIONS[self.kind](up)
        return self.linear(hidden, expert, "down")

    def __call__(self, x, choices, gates):
        """Every expert on every token [T, H], times a weight [T] that is mostly zero."""
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            y = y + (gates * (choices == expert)).sum(dim=1, keepdim=True) * self.expert(x, expert)
        return y


def compare(found, wanted, atol=1e-6):
    """Assert that two tensors agree to some part of the largest number."""
    assert found.shape == wanted.shape
    scale = max(float(wanted.detach().abs().max()), 1.0) if wanted.numel() else 1.0
    furthest = (found.float() - wanted.float()).abs().max().item() if wanted.numel() else 0.0
    assert furthest <= 4 * atol * scale, f"{furthest} of {scale}"


def set_biases(layer):
    """Give this rank's experts the biases of DenseExperts, which are drawn as zeros."""
    mesh = layer.group.mesh
    for slot, expert in enumerate(layer.expert_of_slot.tolist()):
        for name, parameter in layer.local.replicas[slot].named_parameters() if expert >= 0 else ():
            if name.endswith("_bias"):
                whole = draw_bias(name, expert, (layer.hidden,) if name == "down_bias" else (layer.feed_forward,))
                shard = whole if name == "down_bias" else whole.chunk(mesh.tensor_parallel)[mesh.tensor_index]
                parameter.data.copy_(shard)
    layer.refresh()


def gather_expert_grads(comm, layer):
    """Add up the gradients of all ranks' shards and replicas -> by name [E, ...]. Collective."""
    options, mesh, sums = layer.options, layer.group.mesh, {}
    whole = make_expert_weights(options.shape, (0, 0, 0), 0, 1)
    for name, weight in whole.items():
        total = np.zeros((options.num_experts, *weight.shape), np.float32)
        for slot, expert in enumerate(layer.expert_of_slot.tolist()):
            replica = layer.local.replicas[slot]
            grad = getattr(getattr(replica, name, None), "grad", None)
            if grad is None:
                continue
            own = total[expert]
            if name != "down_bias":
                own = np.split(own, mesh.tensor_parallel, axis=split_axis(name.removesuffix("_bias")))[
                    mesh.tensor_index
                ]
            own += grad.float().numpy()
        comm.Allreduce(MPI.IN_PLACE, total)
        sums[name] = torch.from_numpy(total)
    return sums


def sum_over(comm, tensor):
    """Add up a tensor of all ranks. Collective."""
    total = tensor.detach().numpy().copy()
    comm.Allreduce(MPI.IN_PLACE, total)
    return torch.from_numpy(total)


def gather_summed_grads(comm, layer):
    """Gather the gradients of experts after their sum, one for all replicas -> by name [E, ...]. Collective."""
    own = [
        (expert, name, layer.group.mesh.tensor_index, None if p.grad is None else p.grad.float())
        for slot, expert in enumerate(layer.expert_of_slot.tolist())
        for name, p in (layer.local.replicas[slot].named_parameters() if expert >= 0 else ())
    ]
    shards = {}
    for expert, name, shard, grad in (entry for of_rank in gather_to_all(comm, own) for entry in of_rank):
        first = shards.setdefault((name, expert), {}).setdefault(shard, grad)
        assert first is grad or torch.equal(first, grad), f"replicas of expert {expert} differ in {name}"
    sums = {}
    for name, whole in make_expert_weights(layer.options.shape, (0, 0, 0), 0, 1).items():
        axis = 0 if name == "down_bias" else split_axis(name.removesuffix("_bias"))
        of_expert = [shards[name, e] for e in range(layer.num_experts)]
        grads = [
            torch.zeros_like(whole) if None in of.values() else torch.cat([of[s] for s in sorted(of)], axis)
            for of in of_expert
        ]
        sums[name] = torch.stack(grads)
    return sums
