"""Gradients summed by a group are the dense twin's, a norm counts each parameter once, and experts move."""

import pytest
import torch
from small import make_topology
from torch import nn
from twins import DenseExperts, compare, draw, gather_expert_grads

import hpcmoe
from hpcmoe.errors import TrainingError

H, F, E = 8, 12, 6
GROUPS = {
    "plain": ({}, {}),
    "replicas on two nodes": ({"spare_slots_per_rank": 1, "replicate": True}, {"num_nodes": 2}),
    "tensor parallel": ({}, {"tensor_parallel": 2}),
    "data parallel": ({}, {"data_parallel": 2}),
}


def open_group(comm, num_nodes=1, **options):
    options = {name: value for name, value in options.items() if comm.size % value == 0}
    return hpcmoe.open(comm, links=make_topology(comm.size, min(num_nodes, comm.size)), threads=1, **options)


class Model(nn.Module):
    """A classifier of one dense layer and the experts, the router elsewhere."""

    def __init__(self, experts, seed=0):
        super().__init__()
        self.dense, self.experts = nn.Linear(H, H), experts
        with torch.no_grad():
            for k, parameter in enumerate(self.dense.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=seed + k))

    def forward(self, x):
        h = self.dense(x).tanh()
        weights, index = h[:, :E].softmax(dim=1).topk(2)
        return self.experts(h, index, weights)


@pytest.mark.mpi
@pytest.mark.parametrize("case", GROUPS)
def test_summed_gradients_and_their_norm_are_the_dense_twins(comm, case):
    arguments, options = GROUPS[case]
    with open_group(comm, **options) as group:
        model = Model(hpcmoe.Experts(H, F, E, group=group, **arguments))
        twin = Model(DenseExperts(model.experts))
        for step in range(3):  # from the second on sums begin in the backward pass
            batches = [
                [draw(4 + rank, H, seed=10 * step + 100 * m + rank) for rank in range(comm.size)] for m in (0, 1)
            ]
            list(group.lanes(lambda xs: model(xs[comm.rank]).square().sum().backward(), batches))
            group.sum_gradients(model)
            for xs in batches:
                for x in xs:
                    twin(x).square().sum().backward()
            dense = [parameter.grad for parameter in twin.dense.parameters()]
            for found, wanted in zip(model.dense.parameters(), dense, strict=True):
                compare(found.grad, wanted, 2e-6)

            # Each rank has the whole sum of an expert, so that all of them together have it several times.
            replicas = torch.bincount(
                torch.from_numpy(model.experts.placement.expert_of_replica[0]) + 1, minlength=E + 1
            )
            times = (replicas[1:] * group.mesh.data_parallel).float()
            for name, grad in gather_expert_grads(comm, model.experts).items():
                compare(grad / times.view(-1, *[1] * (grad.dim() - 1)), twin.experts.weights[name].grad, 2e-6)

            # Clip, and compare the norm.
            grads = [*dense, *(weight.grad for weight in twin.experts.weights.values())]
            norm = torch.stack([grad.norm() for grad in grads]).norm().item()
            before = [parameter.grad.clone() for parameter in model.parameters()]
            assert group.clip_grad_norm_(model, 0.5 * norm) == pytest.approx(norm, rel=1e-4)
            for parameter, grad in zip(model.parameters(), before, strict=True):
                compare(parameter.grad, 0.5 * grad, 2e-6)
            model.zero_grad()
            twin.dense.zero_grad()
            for weight in twin.experts.weights.values():
                weight.grad = None


@pytest.mark.mpi
def test_a_norm_needs_sums(comm):
    with open_group(comm) as group, pytest.raises(TrainingError, match="call sum_gradients first"):
        group.clip_grad_norm_(nn.Linear(2, 2), 1.0)


@pytest.mark.mpi
def test_experts_move_and_training_goes_on_as_if_they_had_not(comm):
    with open_group(comm, num_nodes=2) as group:
        models = [Model(hpcmoe.Experts(H, F, E, group=group, spare_slots_per_rank=1)) for _ in range(2)]
        for layer in (models[0].experts, models[1].experts):
            for slot, expert in enumerate(layer.expert_of_slot.tolist()):
                for name, weight in layer.local.replicas[slot].named_parameters() if expert >= 0 else ():
                    weight.data.copy_(draw(*weight.shape, seed=50 * expert + len(name)))
            layer.refresh()
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
        for step in range(3):
            outputs = []
            for model, optimizer in zip(models, optimizers, strict=True):
                outputs.append(model(draw(5, H, seed=step + 10 * comm.rank)))
                outputs[-1].square().sum().backward()
                group.sum_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
            compare(*outputs, 1e-5)
            moved = group.rebalance(models[0], optimizers[0])
            assert moved >= 0 and group.rebalance(models[0], optimizers[0]) == 0  # no tokens since
