"""Any model's gradients are the sums of all ranks', whatever its parameters, passes and precisions are."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.reduce import make_reducer
from hpcmoe.config import ParallelConfig
from hpcmoe.errors import TrainingError
from hpcmoe.experts.feed_forward import Expert, LocalExperts
from hpcmoe.gemm import ensure_grad
from hpcmoe.run.model_gradients import ModelGradients
from hpcmoe.wait import gather_to_all

pytestmark = pytest.mark.mpi
BUCKETS = pytest.mark.parametrize("bucket_bytes", [0, 40, 4_000_000])


class Experts(nn.Module):
    """A layer of as many experts as ranks; each rank holds its own and that of the next, which have replicas."""

    def __init__(self, mesh, number):
        super().__init__()
        rank, size = mesh.ep.rank, mesh.ep.size
        expert_of_replica = np.array([(r + k) % size if k < min(size, 2) else -1 for r in range(size) for k in (0, 1)])
        self.placement = SimpleNamespace(
            expert_of_replica=expert_of_replica[None], rank_of_replica=np.arange(size).repeat(2)
        )
        self.held, self.number = expert_of_replica[2 * rank :][:2].tolist(), number
        make = lambda e: Expert("relu", {"up": torch.ones(3, 2) + e, "down": torch.ones(2, 3)})  # noqa: E731
        self.local = LocalExperts([make(e) if e >= 0 else nn.Identity() for e in self.held])

    def add(self, scale):
        """Add gradients, as a backward pass does."""
        for parameter in self.local.parameters():
            ensure_grad(parameter).add_(scale)
        self.local.gradients_added()


class Model(nn.Module):
    """Tied, frozen, unused and narrow parameters around two layers of experts."""

    def __init__(self, mesh):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.experts = nn.ModuleList([Experts(mesh, number) for number in range(2)])
        self.narrow = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.somewhere = nn.Parameter(torch.zeros(5))  # used on rank 0 alone

    def add(self, rank, scale):
        """Run one backward pass whose gradients are scale * (rank + 1), twice that for the tied weight."""
        dense = [self.first.weight, self.first.bias, self.tied.weight, self.tied.bias, *self.narrow.parameters()]
        loss = sum(p.float().sum() for p in dense) + (self.somewhere.sum() if rank == 0 else 0)
        (scale * (rank + 1) * loss).backward()
        for layer in self.experts:
            layer.add(scale * (rank + 1))

    def expected(self, scale, size):
        """What each gradient is after the sum."""
        total = scale * size * (size + 1) / 2
        expected = dict.fromkeys([self.first.bias, self.tied.bias, *self.narrow.parameters()], total)
        expected |= {self.first.weight: 2 * total, self.somewhere: scale}
        for layer in self.experts:
            for replica, expert in zip(layer.local.replicas, layer.held, strict=True):
                holders = {expert, (expert - 1) % size}
                expected |= {p: scale * sum(rank + 1 for rank in holders) for p in replica.parameters()}
        return expected

    def check(self, scale, size):
        """Hold every gradient against what it must be."""
        expected = self.expected(scale, size)
        for name, parameter in self.named_parameters():
            if parameter in expected:
                assert parameter.grad.dtype == parameter.dtype, name
                assert torch.equal(parameter.grad, torch.full_like(parameter, expected[parameter])), name
            else:
                assert parameter.grad is None, name


@contextlib.contextmanager
def open_gradients(comm, bucket_bytes=40):
    """Open a mesh -> (Model, ModelGradients)."""
    with open_mesh(comm, ParallelConfig()) as mesh:
        torch.manual_seed(0)  # parameters that all ranks hold start alike
        model = Model(mesh)
        reducer = make_reducer(mesh, HostDevice(), None, bucket_bytes)
        yield model, ModelGradients(model, list(model.experts), reducer)


def zero(model, to_none):
    """Set the gradients to zero as an optimizer does."""
    torch.optim.SGD(model.parameters()).zero_grad(set_to_none=to_none)


@BUCKETS
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_gradients_are_the_sums_of_all_ranks(comm, bucket_bytes, to_none, told):
    with open_gradients(comm, bucket_bytes) as (model, gradients):
        for step in range(1, 4):
            if told:
                gradients.expect(2)
            for _ in range(2):
                model.add(comm.rank, step)
            early = gradients.sums is not None and gradients.sums.next_place
            assert (early > 0) == (told and step > 2)  # once it is seen what is unused
            gradients.finish()
            model.check(2 * step, comm.size)
            zero(model, True if step == 1 else to_none)
            if not to_none and step > 1:
                for p in (*model.unused.parameters(), *model.frozen.parameters()):
                    assert p.grad is None


def test_all_sums_start_early_once_a_step_has_shown_what_is_unused(comm):
    with open_gradients(comm) as (model, gradients):
        for _ in range(3):
            zero(model, True)
            gradients.expect(2)
            for _ in range(2):
                model.add(comm.rank, 1)
            waiting = None if gradients.sums is None else list(gradients.sums.waiting)
            gradients.finish()
        assert waiting == []


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
def test_a_step_with_other_passes_than_told_is_summed_whole(comm, passes):
    """More than were told come after sums have begun, and are summed too."""
    with open_gradients(comm) as (model, gradients):
        for number in (2, 2, passes):
            zero(model, True)
            gradients.expect(2)
            for _ in range(number):
                model.add(comm.rank, 1)
            gradients.finish()
            model.check(number, comm.size)
        zero(model, True)
        for _ in range(2):  # two runs of lanes before one sum
            gradients.expect(2)
            for _ in range(2):
                model.add(comm.rank, 1)
        gradients.finish()
        model.check(4, comm.size)


def test_passes_that_come_late_on_one_rank_alone_are_summed(comm):
    with open_gradients(comm) as (model, gradients):
        for extra in (0, 0, 1):
            zero(model, True)
            gradients.expect(1)
            model.add(comm.rank, 1)
            if extra and comm.rank == comm.size - 1:
                (7 * model.first.bias.sum()).backward()
            gradients.finish()
        expected = comm.size * (comm.size + 1) / 2 + 7
        assert torch.equal(model.first.bias.grad, torch.full((4,), expected))


def test_a_change_of_what_is_trained_is_noticed(comm):
    with open_gradients(comm) as (model, gradients):
        for frozen in (False, True, False):
            model.first.requires_grad_(not frozen)
            zero(model, True)
            gradients.expect(1)
            model.add(comm.rank, 1)
            gradients.finish()
            assert (model.first.bias.grad is None) == frozen
            if not frozen:
                model.check(1, comm.size)


def test_parameters_that_do_not_start_alike_are_named_on_all(comm):
    if comm.size == 1:
        pytest.skip("needs another rank")
    with open_gradients(comm) as (model, gradients):
        with torch.no_grad():
            model.narrow.weight[0, 0] += comm.rank  # bfloat16
        for _ in range(2):
            with pytest.raises(TrainingError, match=r"narrow\.weight has other values on rank 1 than on rank 0: "):
                gradients.finish()


@pytest.mark.parametrize("change", ["shape", "frozen"])
def test_parameters_that_differ_between_ranks_are_named_on_all(comm, change):
    if comm.size == 1:
        pytest.skip("needs another rank")
    with open_gradients(comm) as (model, gradients):
        gradients.finish()
        if comm.rank == 1 and change == "shape":
            model.unused = nn.Linear(2, 3)
        elif comm.rank == 1:
            model.unused.requires_grad_(False)
        for _ in range(2):
            gradients.expect(1)
            model.add(comm.rank, 1)
            with pytest.raises(
                TrainingError, match=r"rank 1 trains .* where rank 0 trains unused.bias \[2\] float32: "
            ):
                gradients.finish()


def test_other_parameters_in_the_midst_of_a_step_are_an_error_on_all(comm):
    with open_gradients(comm) as (model, gradients):
        for _ in range(2):
            gradients.expect(1)
            model.add(comm.rank, 1)
            gradients.finish()
        zero(model, True)
        gradients.expect(1)
        model.add(comm.rank, 1)
        model.frozen.requires_grad_(True)
        with pytest.raises(TrainingError, match="other parameters are trained"):
            gradients.finish()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_the_norm_counts_each_parameter_once_and_clips(comm, max_norm):
    with open_gradients(comm) as (model, gradients):
        with pytest.raises(TrainingError, match="call sum_gradients first"):
            gradients.clip_grad_norm_(1.0)
        model.add(comm.rank, 1)
        gradients.finish()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        own = [
            (layer.number, expert, sum(float(p.grad.square().sum()) for p in replica.parameters()))
            for layer in model.experts
            for replica, expert in zip(layer.local.replicas, layer.held, strict=True)
            if expert >= 0
        ]
        experts = {entry[:2]: entry[2] for of_rank in gather_to_all(comm, own) for entry in of_rank}
        dense = sum(float(g.float().square().sum()) for name, g in before.items() if "experts" not in name)
        norm = gradients.clip_grad_norm_(max_norm)
        assert norm == pytest.approx((dense + sum(experts.values())) ** 0.5, rel=1e-6)
        scale = min(max_norm / (norm + 1e-6), 1.0)
        for name, parameter in model.named_parameters():
            if name in before:
                assert torch.allclose(parameter.grad, before[name] * scale, rtol=1e-2 if "narrow" in name else 1e-6)
            else:
                assert parameter.grad is None
