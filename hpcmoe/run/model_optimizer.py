"""AdamW over what is trained of any model of a group: moments in float32, whatever the weights are.

Weights of bfloat16 are rounded up or down at random, in the mean to what AdamW computes: a step is often less than half
their spacing, and the nearest would be where they are. Gupta et al. 2015 (arXiv:1502.02551), section 3.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.config import TrainConfig
from hpcmoe.experts.moe import Experts
from hpcmoe.run.gradient_sums import GradientSums
from hpcmoe.run.model_gradients import list_parts
from hpcmoe.run.optimizer import MOMENTS, AdamW, SteppedRows, make_zero_state
from hpcmoe.run.slices import cut_rows

_LOW_BITS = 16  # of float32, that bfloat16 has not


class ModelOptimizer:
    """AdamW over this rank's trained parameters, dense and of experts.

    stepped_rows[parameter] are the rows of a dense parameter that this rank steps, and whose moments it keeps: all of
    them, or with shard_optimizer its share. Experts' parameters are those of adamw's groups, whatever moves.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Experts], mesh: Mesh, train: TrainConfig, seed: int) -> None:
        """layers: the model's; seed: of the roundings. All ranks train the same parameters of the same model."""
        self.layers, self.mesh, self.train, self.seed = layers, mesh, train, seed
        self.dense = dict(part for part in list_parts(model, layers) if isinstance(part, tuple))
        self.stepped_rows = {p: [SteppedRows(rows=p, first=0)] for p in self.dense.values()}
        if train.shard_optimizer:
            self.stepped_rows = cut_dense_rows(list(self.dense.values()), mesh.world.rank, mesh.world.size)

        # Norms and biases are not decayed.
        stepped = [(name, own.rows) for name, p in self.dense.items() for own in self.stepped_rows[p]]
        stepped += [(name, p) for layer in layers for name, p in layer.local.named_parameters() if p.requires_grad]
        decayed = [p for name, p in stepped if is_decayed(name, p)]
        others = [p for name, p in stepped if not is_decayed(name, p)]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (train.beta1, train.beta2)
        self.adamw = Float32AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon)

    def step(self, number: int, rate: float, sums: GradientSums) -> None:
        """Apply the gradients of step `number` (from 1), which are summed, at a learning rate. Collective over world.

        sums: those of the gradients, in whose memory the rows are gathered that other ranks have stepped.
        """
        for parameter, rows in self.stepped_rows.items():
            for own in rows:
                if own.rows is not parameter:
                    own.rows.grad = None if parameter.grad is None else view_rows(parameter.grad, own)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step_from(number - 1, {p: self.make_seed(number, name) for p, name in self.name_rounded().items()})
        if self.train.shard_optimizer:
            self.gather_dense(sums)
        for layer in self.layers:
            layer.refresh()

    def name_rounded(self) -> dict[nn.Parameter, str]:
        """Name what is rounded at random: replicas of an expert alike, so that they stay equal."""
        named = {own.rows: f"{name} {own.first}" for name, p in self.dense.items() for own in self.stepped_rows[p]}
        for layer in self.layers:
            for expert, slot in layer.list_slots():
                for name, parameter in layer.local.replicas[slot].named_parameters():
                    named[parameter] = f"{layer.number} {expert} {name}"
        return {parameter: name for parameter, name in named.items() if parameter.dtype != torch.float32}

    def make_seed(self, number: int, name: str) -> int:
        """Make the seed by which a step rounds a parameter."""
        (drawn,) = np.random.SeedSequence((self.seed, number, zlib.crc32(name.encode()))).generate_state(1, np.uint64)
        return int(drawn)

    @torch.no_grad()
    def gather_dense(self, sums: GradientSums) -> None:
        """Gather the rows that other ranks have stepped, in the memory of their gradients. Collective over world."""
        arrays = sums.dense.grad_of
        for parameter, rows in self.stepped_rows.items():
            for own in rows:
                view_rows(arrays[parameter], own).copy_(own.rows)
        num_ranks, views = self.mesh.world.size, [with_rows(p) for p in sums.dense.parameters]
        shares = [cut_rows(views, rank, num_ranks) for rank in range(num_ranks)]
        sums.all_gather_dense([sum((end - first) * p[0].numel() for p, first, end in share) for share in shares])
        for parameter, array in arrays.items():
            parameter.copy_(array)

    def moments_of(self, rows: nn.Parameter) -> dict[str, Tensor]:
        """Return AdamW's moments of what it steps, by its names; before its first step they are zero."""
        state = self.adamw.state[rows]
        if not state:
            state |= make_zero_state(rows, 0)
        return {name: state[name] for name in MOMENTS.values()}

    def set_step(self, number: int) -> None:
        """Set the steps that have been taken."""
        for state in self.adamw.state.values():
            state["step"].fill_(float(number))


class Float32AdamW(AdamW):
    """AdamW that computes in float32 and keeps float32 moments, one parameter after the other."""

    @torch.no_grad()
    def step_from(self, before: int, seeds: Mapping[nn.Parameter, int]) -> None:
        """Step each parameter that has a gradient, after so many steps; those of other types are rounded by seeds."""
        for group in self.param_groups:
            (beta1, beta2), decay, epsilon = group["betas"], group["weight_decay"], group["eps"]
            for parameter in [p for p in group["params"] if p.grad is not None]:
                state = self.state[parameter]
                if not state:
                    state |= make_zero_state(parameter, before)
                weights, (first, second) = parameter.float(), (state[name] for name in MOMENTS.values())
                adamw(
                    [weights], [parameter.grad.float()], [first], [second], [], [state["step"]], fused=True,
                    beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=decay, eps=epsilon, amsgrad=False,
                    maximize=False,
                )  # fmt: skip
                if weights is not parameter:
                    parameter.copy_(round_at_random(weights, seeds[parameter]))


def round_at_random(weights: Tensor, seed: int) -> Tensor:
    """Round float32 numbers to ones of bfloat16, in place, up as often as they are near that -> they, still float32."""
    generator = torch.Generator(weights.device).manual_seed(seed)
    bits = weights.view(torch.int32)
    bits += torch.randint(2**_LOW_BITS, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    bits &= -(2**_LOW_BITS)
    return weights


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return True if the weights of a parameter decay: matrices do, norms and biases do not."""
    return parameter.dim() > 1 and not name.endswith("bias")


def cut_dense_rows(dense: Sequence[nn.Parameter], index: int, num_shares: int) -> dict[nn.Parameter, list[SteppedRows]]:
    """Build the SteppedRows of one share of dense parameters, by parameter: views of these."""
    views = [with_rows(parameter) for parameter in dense]
    parameter_of = dict(zip(map(id, views), dense, strict=True))
    stepped: dict[nn.Parameter, list[SteppedRows]] = {parameter: [] for parameter in dense}
    for view, first, end in cut_rows(views, index, num_shares):
        stepped[parameter_of[id(view)]].append(SteppedRows(rows=nn.Parameter(view[first:end]), first=first))
    return stepped


def with_rows(tensor: Tensor) -> Tensor:
    """Return a view of a tensor without its graph, one number as a row of one."""
    return tensor.detach().view(-1, *tensor.shape[1:])


def view_rows(tensor: Tensor, own: SteppedRows) -> Tensor:
    """Return a view of what of a tensor belongs to rows of its parameter."""
    return with_rows(tensor)[own.first : own.first + len(with_rows(own.rows))]
