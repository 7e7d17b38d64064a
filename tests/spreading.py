"""A step of a Hugging Face model with its experts on many ranks beside one of the whole model by transformers' loop."""

import contextlib

import pytest
import torch
from small import make_topology
from tiny_families import make_model
from twins import sum_over

import hpcmoe
from hpcmoe.model.hf.adapters import adapt_model
from hpcmoe.model.hf.spread import list_fused

CLOSE = 2e-6  # of the largest number of a tensor
SEQUENCES = (2, 1, 3, 2)  # of the ranks
LENGTH = 12


def skip_unless_here(family):
    """Skip the test where this release of transformers has no such family, none that works, or none in its registry."""
    from transformers import CONFIG_MAPPING, __version__

    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {__version__} has no {family}")
    model = make_model(family)
    if family == "dbrx":  # in 5.9 for F = H alone
        try:
            model(input_ids=torch.ones(1, 2, dtype=torch.int64))
        except RuntimeError as error:
            pytest.skip(f"transformers {__version__}'s own {family}: {error}")
    adapt_model(model)
    if not list_fused(model):
        pytest.skip(f"transformers {__version__} has {family} outside of its registry")


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


def skip_unless_pair(comm):
    """Skip but on two ranks: each of gloo's groups leaves threads behind, and the tests to come then take minutes."""
    if comm.size != 2:
        pytest.skip("torch.distributed is tried on two ranks")


def split_by_rank(comm, of_all, sequences=SEQUENCES):
    """Cut this rank's sequences out of those of all ranks."""
    return of_all.split([sequences[rank % len(sequences)] for rank in range(comm.size)])[comm.rank]


def call(model, ids, all_ids, **more):
    num_items = len(all_ids) * (LENGTH - 1)
    return model(**{"input_ids": ids, "labels": ids, "num_items_in_batch": num_items, "use_cache": False} | more)


def assert_close(found, wanted, what, close=CLOSE):
    assert found.shape == wanted.shape
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    furthest = float((found - wanted).detach().abs().max()) if wanted.numel() else 0.0
    assert furthest <= close * scale, f"{what}: {furthest:.1e} of {scale:.1e}, {furthest / (scale or 1):.1e}"


def make_whole(family, dtype=torch.float32):
    """Make a family's model, which runs by transformers' own loop over experts."""
    whole = make_model(family).to(dtype)
    if whole._can_set_experts_implementation():
        whole.set_experts_implementation("eager")
    return whole


def run_whole(family, all_ids, dtype=torch.float32):
    """Run the whole batch on one process by transformers' own loop over experts."""
    whole = make_whole(family, dtype)
    output = call(whole, all_ids, all_ids)
    output.loss.backward()
    return whole, output


def find_rows(fused, name, shard, mesh):
    """Find where a tensor-parallel rank's shard of a weight [1, ...] lies in the whole -> (axis, rows)."""
    if name.endswith("_bias") or getattr(fused, "feed_forward_axis", None) == 1:
        axis = 1
    else:
        axis = 2 if name.startswith("down") != fused.is_transposed else 1
    size = shard.shape[axis]
    if name == "down_proj_bias":
        return axis, torch.arange(size)
    if name.startswith("gate_up") and fused.is_concatenated:
        own = torch.arange(size // 2) + mesh.tensor_index * size // 2
        return axis, torch.cat([own, own + size // 2 * mesh.tensor_parallel])
    return axis, torch.arange(size) + mesh.tensor_index * size


def gather_expert_grads(comm, whole, path, layer):
    """Put the experts' summed gradients together by logical number -> by the whole model's names of its parameters."""
    mesh, fused = layer.group.mesh, layer.template[0]
    found = {}
    for expert, slot in layer.list_slots():
        holders = (layer.placement.expert_of_replica[0] == expert).sum() * mesh.dp.size
        for name, parameter in layer.local.replicas[slot].named_parameters():
            axis, rows = find_rows(fused, name, parameter, mesh)
            known = find_name(path, fused, name)
            grad = found.setdefault(known, torch.zeros_like(whole.get_parameter(known)))
            size = list(parameter.shape[1:])
            size[axis - 1] *= 1 if name == "down_proj_bias" else mesh.tensor_parallel
            grad.view(-1, *size)[expert].index_add_(axis - 1, rows, parameter.grad[0] / holders)
    names = {find_name(path, fused, name) for name, _ in layer.template[0].named_parameters()}
    names |= {f"{path}.{name}" for name, _ in layer.template[0].named_buffers()}
    missing = {name: torch.zeros_like(whole.get_parameter(name)) for name in sorted(names - found.keys())}
    return {name: sum_over(comm, grad) for name, grad in sorted((found | missing).items())}


def find_name(path, fused, name):
    """Find what the family calls a parameter of the fused module at a path."""
    known = getattr(fused, "original", {}).get(name, name)
    return f"{path.rpartition('.')[0]}.{known[3:]}" if known.startswith("../") else f"{path}.{known}"


def compare_gradients(comm, model, whole, close=CLOSE):
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
            assert_close(found[name], grad, name, close)


def compare_step(comm, group, family, close=CLOSE, **options):
    """Compare a step of a spread model with one of the whole -> the spread model."""
    all_ids, ids = draw_ids(comm)
    whole, wanted = run_whole(family, all_ids)
    model = hpcmoe.hf.spread(make_model(family), group, **options)
    output = call(model, ids, all_ids)
    output.loss.backward()
    group.sum_gradients(model)
    assert_close(output.logits, split_by_rank(comm, wanted.logits), "logits", close)
    assert comm.allreduce(output.loss.item()) == pytest.approx(wanted.loss.item(), rel=CLOSE)
    compare_gradients(comm, model, whole, close)
    return model


def measure_rounding(family, all_ids):
    """Measure how far float32 is from float64 on one process, as a part of a tensor's largest number."""
    (whole, output), (twin, exact) = (run_whole(family, all_ids, dtype) for dtype in (torch.float32, torch.float64))
    pairs = [
        (output.logits, exact.logits),
        *((p.grad, twin.get_parameter(n).grad) for n, p in whole.named_parameters()),
    ]
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs if a is not None and b.any()
    )


def place_unevenly(num_ranks, num_experts=8):
    """Place experts unevenly: dealt backwards, expert 0 on the first rank and on the last."""
    slots = [[0], *([] for _ in range(num_ranks - 1))]
    for place, expert in enumerate(range(num_experts - 1, 0, -1)):
        slots[(place + 1) % num_ranks if place % 3 else 0].append(expert)
    if num_ranks > 1:
        slots[-1].append(0)
    most = max(map(len, slots))
    return [expert for own in slots for expert in own + [-1] * (most - len(own))]
