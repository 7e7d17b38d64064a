"""A spread model on many ranks beside the whole one on each: tokens, calls, and what is compared."""

import contextlib

import torch
from small import make_topology
from tiny_families import make_model
from twins import sum_over

import hpcmoe

CLOSE = 2e-6  # of the largest number of a tensor
SEQUENCES = (2, 1, 3, 2)  # of the ranks
LENGTH = 12


@contextlib.contextmanager
def open_group(comm, num_nodes=1, **options):
    links = make_topology(comm.size, min(num_nodes, comm.size))
    with hpcmoe.open(comm, links=links, threads=1, max_tokens=SEQUENCES[2] * LENGTH, **options) as group:
        yield group


def draw_ids(comm, sequences=SEQUENCES):
    """Draw the tokens of all ranks, the same on each -> (all, this rank's)."""
    total = sum(sequences[rank % len(sequences)] for rank in range(comm.size))
    ids = torch.randint(3, 96, (total, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, split_by_rank(comm, ids, sequences)


def split_by_rank(comm, of_all, sequences=SEQUENCES):
    """Cut this rank's sequences out of those of all ranks."""
    return of_all.split([sequences[rank % len(sequences)] for rank in range(comm.size)])[comm.rank]


def call(model, ids, all_ids, **more):
    num_items = len(all_ids) * (LENGTH - 1)
    return model(**{"input_ids": ids, "labels": ids, "num_items_in_batch": num_items, "use_cache": False} | more)


def assert_close(found, wanted, what):
    assert found.shape == wanted.shape
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    furthest = float((found - wanted).detach().abs().max()) if wanted.numel() else 0.0
    assert furthest <= CLOSE * scale, f"{what}: {furthest:.1e} of {scale:.1e}"


def run_whole(family, all_ids):
    """Run the whole batch on one process by transformers' own loop over experts."""
    whole = make_model(family)
    whole.set_experts_implementation("eager")
    output = call(whole, all_ids, all_ids)
    output.loss.backward()
    return whole, output


def gather_expert_grads(comm, whole, path, layer):
    """Put the experts' summed gradients together by logical number -> by name of the fused parameter [E, ...]."""
    found = {name: torch.zeros_like(p) for name, p in whole.get_submodule(path).named_parameters(recurse=False)}
    holders = torch.bincount(torch.from_numpy(layer.placement.expert_of_replica[0]).clamp(min=0), minlength=8)
    for expert, slot in layer.list_slots():
        for name, parameter in layer.local.replicas[slot].named_parameters():
            empty = (layer.placement.expert_of_replica[0] < 0).sum() if expert == 0 else 0
            found[name][expert] += parameter.grad[0] / (holders[expert] - empty)
    return {f"{path}.{name}": sum_over(comm, grad) for name, grad in found.items()}


def compare_gradients(comm, model, whole):
    """Compare every gradient, once they are summed, with those of the whole batch."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, hpcmoe.Experts)}
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if name in wanted}
    for path, layer in layers.items():
        found |= gather_expert_grads(comm, whole, path.removesuffix(".hpcmoe"), layer)
    assert set(found) == set(wanted) and layers
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            assert_close(found[name], grad, name)


def place_unevenly(num_ranks, num_experts=8):
    """Place experts unevenly: dealt backwards, expert 0 on the first rank and on the last."""
    slots = [[0], *([] for _ in range(num_ranks - 1))]
    for place, expert in enumerate(range(num_experts - 1, 0, -1)):
        slots[(place + 1) % num_ranks if place % 3 else 0].append(expert)
    if num_ranks > 1:
        slots[-1].append(0)
    most = max(map(len, slots))
    return [expert for own in slots for expert in own + [-1] * (most - len(own))]
