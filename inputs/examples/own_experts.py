"""Experts of one's own, here a recurrent network each: dispatch() brings them their tokens, combine() the results home.

`python inputs/examples/own_experts.py`, or on two ranks `mpirun -n 2 python inputs/examples/own_experts.py`. At the
end each rank computes all experts on all tokens by itself, and compares outputs and gradients.
"""

import torch
from mpi4py import MPI
from torch import Tensor, nn

import hpcmoe

TOKENS, HIDDEN, NUM_EXPERTS, TOP_K = 50, 16, 5, 2


class Recurrent(nn.Module):
    """Any module will do that computes each of its rows for itself: [R, HIDDEN] -> [R, HIDDEN], R from 0."""

    def __init__(self, number: int):
        super().__init__()
        torch.manual_seed(number)  # the same expert, whichever rank holds it
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, rows: Tensor) -> Tensor:
        return self.cell(rows, self.cell(rows))


def compare(what: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Print the largest difference on any rank."""
    furthest = MPI.COMM_WORLD.allreduce(max([(a - b).norm(torch.inf).item() for a, b in pairs], default=0.0), MPI.MAX)
    if MPI.COMM_WORLD.rank == 0:
        print(f"{what} differ by {furthest:.1e} at most")


# All ranks draw the same tokens [TOKENS, HIDDEN], their experts and gates [TOKENS, TOP_K]; a router would choose these.
torch.manual_seed(1)
tokens = torch.randn(TOKENS, HIDDEN)
gates, choices = torch.randn(TOKENS, NUM_EXPERTS).softmax(dim=1).topk(TOP_K)
with hpcmoe.open() as group:
    dispatcher = hpcmoe.Dispatcher(HIDDEN, NUM_EXPERTS, top_k=TOP_K, group=group)
    experts = [Recurrent(e) if e >= 0 else nn.Identity() for e in dispatcher.expert_of_slot.tolist()]  # -1: none

    # Send this rank's share of the tokens to all experts, get the rows [R, HIDDEN] of its own, and return the results.
    own = slice(group.rank, None, group.size)
    x = tokens[own].requires_grad_()
    rows, counts, handle = dispatcher.dispatch(x, choices[own], gates[own])
    results = [expert(part) for expert, part in zip(experts, rows.split(counts.tolist()), strict=True)]
    output = dispatcher.combine(torch.cat(results), handle)
    output.square().sum().backward()  # an expert's gradients are those of all ranks' tokens: nothing is to be summed

    # The dense twin: all experts on all tokens.
    twins, twin_x = [Recurrent(e) for e in range(NUM_EXPERTS)], tokens.clone().requires_grad_()
    weights = torch.zeros(TOKENS, NUM_EXPERTS).scatter(1, choices, gates)
    wanted = sum(weights[:, e, None] * twin(twin_x) for e, twin in enumerate(twins))
    wanted.square().sum().backward()
    compare("outputs", [(output, wanted[own])])
    compare("gradients of tokens", [(x.grad, twin_x.grad[own])])
    held = [(expert, twins[e]) for expert, e in zip(experts, dispatcher.expert_of_slot, strict=True) if e >= 0]
    compare("gradients of experts", [(a.cell.weight_hh.grad, b.cell.weight_hh.grad) for a, b in held])
