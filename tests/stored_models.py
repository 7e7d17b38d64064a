"""Models of Hugging Face transformers in folders: saved by transformers, and compared with what was loaded."""

import torch
from tiny_families import make_config

import hpcmoe
from hpcmoe.wait import barrier


def save(comm, folder, model, shard="5GB"):
    """Save a model, the same on all ranks, from rank 0. Collective."""
    if comm.rank == 0:
        model.save_pretrained(folder, max_shard_size=shard)
    barrier(comm)
    return folder


def save_tiny(comm, folder, family, shard="5GB", **changes):
    """Save a family's new tiny model, its configuration changed. Collective."""
    from transformers import AutoModelForCausalLM

    config = make_config(family)
    config.update(changes)
    torch.manual_seed(0)
    return save(comm, folder, AutoModelForCausalLM.from_config(config) if comm.rank == 0 else None, shard)


def read_whole(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def list_held(model):
    """List this rank's tensors by their names in transformers' own model, experts [1, ...] with their numbers."""
    layers = {path.removesuffix(".hpcmoe"): m for path, m in model.named_modules() if isinstance(m, hpcmoe.Experts)}
    for path, layer in layers.items():
        for expert, slot in layer.list_slots():
            for name, parameter in layer.local.replicas[slot].named_parameters():
                name = getattr(layer.template[0], "original", {}).get(name, name)  # of a family that is adapted
                owner = path.rpartition(".")[0] if name.startswith("../") else path
                yield f"{owner}.{name.removeprefix('../')}", expert, parameter
    inside = tuple(f"{path}." for path in layers)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not name.startswith(inside):
            yield name, None, tensor


def assert_same(model, whole):
    """Assert that a loaded model's numbers are a whole model's, bit by bit -> the names that were compared."""
    wanted = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers())
    seen = set()
    for name, expert, tensor in list_held(model):
        part = wanted[name] if expert is None else wanted[name][expert : expert + 1]
        assert tensor.dtype == part.dtype and torch.equal(tensor, part), (name, expert)
        seen.add(name)
    return seen


def place_unevenly(num_ranks):
    """Place 8 experts: all that the first rank can hold there, expert 7 everywhere."""
    slots = [
        [7, *(e for e in range(7) if e % num_ranks == rank or (rank == 0 and e == 1))] for rank in range(num_ranks)
    ]
    most = max(map(len, slots))
    return [expert for own in slots for expert in own + [-1] * (most - len(own))]
