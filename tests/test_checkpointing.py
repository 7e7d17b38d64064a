"""Any model with experts, saved at one shape of the ranks, is the same at any other; what is not whole is one line."""

import logging
import os

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from hpcmoe.checkpointing import load_model, save_model
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import ParallelConfig
from hpcmoe.errors import CheckpointError
from hpcmoe.experts.feed_forward import Expert, GroupedExperts, LocalExperts
from hpcmoe.experts.logical import LogicalExperts
from hpcmoe.experts.shapes import MATRICES
from hpcmoe.wait import barrier, gather_to_all

pytestmark = pytest.mark.mpi
SPLIT_AXIS = {"up": 0, "gate": 0, "up_bias": 0, "gate_bias": 0, "down": 1}  # over tensor-parallel ranks
IDLE_EXPERT = 1  # never has a gradient, so the optimizer no state


def draw(name, shape):
    """Numbers of a logical array, from its name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + len(name)))


def shard(mesh, weight, whole):
    """A tensor-parallel rank's part of an expert's weight."""
    axis = SPLIT_AXIS.get(weight)
    return whole if axis is None else whole.chunk(mesh.tensor_parallel, axis)[mesh.tensor_index].contiguous()


def draw_expert(mesh, kind, hidden, inner, name):
    """This rank's shard of an expert, with biases."""
    weights = {}
    for matrix in MATRICES[kind]:
        rows, columns = (hidden, inner) if matrix == "down" else (inner, hidden)
        weights[matrix] = shard(mesh, matrix, draw(f"{name}.{matrix}", (rows, columns)))
        if matrix != "down" or mesh.tensor_index == 0:
            bias = f"{matrix}_bias"
            weights[bias] = shard(mesh, bias, draw(f"{name}.{bias}", (rows,)))
    return Expert(kind, weights)


class Experts(LogicalExperts):
    """What stands for the library's module: its experts in slots, and nothing that computes."""

    def __init__(self, mesh, seed, num_experts, spare, kind="swiglu", hidden=6, inner=8, local=LocalExperts):
        super().__init__()
        self.num_experts, self.kind, self.hidden, self.feed_forward = num_experts, kind, hidden, inner
        per_rank = -(-num_experts // mesh.expert_parallel) + spare
        slots = np.full((mesh.expert_parallel, per_rank), -1)
        for number in range(num_experts + spare * mesh.expert_parallel // 2):  # replicas in half of the spare slots
            rank, slot = number % mesh.expert_parallel, number // mesh.expert_parallel
            slots[rank, per_rank - 1 - slot] = number * 3 % num_experts if number >= num_experts else number
        self.slots = slots[mesh.expert_index]
        self.local = local([
            draw_expert(mesh, kind, hidden, inner, f"{seed}.{e}") if e >= 0 else nn.Identity() for e in self.slots
        ])  # fmt: skip
        self.local.stack_weights()

    @property
    def expert_of_slot(self):
        return self.slots


class Model(nn.Module):
    """Dense modules of many kinds around two layers of experts."""

    def __init__(self, mesh, seed, spare=0, num_experts=5, width=6, local=LocalExperts):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.odd = nn.ParameterDict({"a/b": torch.zeros(2, 3), "a": torch.zeros(2), "%b~": torch.zeros(1)})
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("cache", torch.full((2,), float(mesh.world.rank)), persistent=False)
        for name, parameter in self.named_parameters():
            parameter.data = draw(f"{seed}.{name}", parameter.shape)
        self.norm.running_mean.copy_(draw(f"{seed}.mean", (width,)))
        self.norm.num_batches_tracked += seed
        self.mask[seed % 3] = True
        self.moe = nn.ModuleDict({"experts": Experts(mesh, seed, num_experts, spare, local=local)})
        self.last = Experts(mesh, seed + 50, 3, 0, kind="gelu", hidden=width, inner=4)


def experts_of(model):
    """Yield (layer, expert, weight, parameter) of this rank."""
    for layer, module in (("moe", model.moe["experts"]), ("last", model.last)):
        for expert, slot in module.list_slots():
            for weight, parameter in module.local.replicas[slot].named_parameters():
                yield layer, expert, weight, parameter


def name_parameters(mesh, model):
    """Name each parameter logically -> {parameter: (name, shape of the whole, weight of an expert or nothing)}."""
    names = {}
    for layer, expert, weight, parameter in experts_of(model):
        shape = list(parameter.shape)
        if weight in SPLIT_AXIS:
            shape[SPLIT_AXIS[weight]] *= mesh.tensor_parallel
        names[parameter] = f"{layer}.{expert}.{weight}", shape, weight
    dense = ((name, parameter) for name, parameter in model.named_parameters() if parameter not in names)
    return names | {parameter: (name, list(parameter.shape), "") for name, parameter in dense}


def take_step(mesh, model, optimizer, number):
    """Step by gradients that each logical parameter has at any shape; one expert and the frozen ones have none."""
    for parameter, (name, shape, weight) in name_parameters(mesh, model).items():
        if parameter.requires_grad and not name.startswith(f"moe.{IDLE_EXPERT}."):
            parameter.grad = shard(mesh, weight, draw(f"{number}.{name}", shape)).to(parameter.dtype)
    optimizer.step()


def adamw(model, scale=1.0):
    """AdamW in two groups, the biases in the second."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1 * scale, "initial_lr": 0.5},
              {"params": [p for p in parameters if p.dim() <= 1], "betas": (0.5, 0.7 * scale)}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=0.01 * scale)


OPTIMIZERS = {
    "AdamW": adamw,
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD without state": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.1),
    "Adam, lr a tensor": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), capturable=False),
    "ASGD": lambda model: torch.optim.ASGD(model.parameters(), lr=0.1),
}


def state_of(optimizer, parameter):
    return optimizer.state.get(parameter, {})


def assert_same(mesh, models, optimizers):
    """Assert that two models, and optimizers, are the same bit for bit on this rank."""
    named = [name_parameters(mesh, model) for model in models]
    assert [*named[0].values()] == [*named[1].values()]
    for (one, (name, *_)), other in zip(named[0].items(), named[1], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype, name
        first, second = (state_of(o, p) for o, p in zip(optimizers, (one, other), strict=True))
        assert first.keys() == second.keys(), name
        for entry in first:
            assert type(first[entry]) is type(second[entry])
            assert torch.equal(torch.as_tensor(first[entry]), torch.as_tensor(second[entry])), (name, entry)
    for (name, one), (_, other) in zip(models[0].named_buffers(), models[1].named_buffers(), strict=True):
        assert torch.equal(one, other), name
    groups = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    assert groups[0] == groups[1]


def split(comm, size):
    """The first ranks, and the others."""
    return comm.Split(int(comm.rank >= size), comm.rank)


def shapes_of(size):
    """The parallel shapes of some ranks."""
    return [ParallelConfig(data=1, tensor=1)] + [
        ParallelConfig(**keys) for keys in ({"data": 2}, {"tensor": 2}) if size % 2 == 0
    ]


def save_trained(comm, shape, folder, make, spare=1, extra=None, **model):
    """Save a model after two steps. Collective over comm."""
    with open_mesh(comm, shape) as mesh:
        saved = Model(mesh, 0, spare=spare, **model)
        optimizer = make(saved)
        take_step(mesh, saved, optimizer, 1)
        take_step(mesh, saved, optimizer, 2)
        save_model(mesh, folder, saved, optimizer, extra)


def check_loaded(comm, shape, folder, make, stepped=False):
    """Load into another model, and see that it is, and goes on as, the one that was saved."""
    with open_mesh(comm, shape) as mesh:
        expected, loaded = Model(mesh, 0, spare=0), Model(mesh, 3, spare=0, local=GroupedExperts)
        optimizers = make(expected), make(loaded)
        take_step(mesh, expected, optimizers[0], 1)
        take_step(mesh, expected, optimizers[0], 2)
        if stepped:
            take_step(mesh, loaded, optimizers[1], 9)
        assert load_model(mesh, folder, loaded, optimizers[1]) == {"step": 2, "seen": [1, "a"]}
        assert loaded.head.weight is loaded.embedding.weight
        assert loaded.cache.tolist() == [float(mesh.world.rank)] * 2
        assert_same(mesh, (expected, loaded), optimizers)
        take_step(mesh, expected, optimizers[0], 3)
        take_step(mesh, loaded, optimizers[1], 3)
        assert_same(mesh, (expected, loaded), optimizers)


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_what_some_ranks_save_any_others_load(comm, shared, writers):
    """Each shape of the writers, at another placement, into each shape of all ranks, and of some and the others."""
    if writers > comm.size:
        pytest.skip("more writers than ranks")
    some, extra = split(comm, writers), {"step": 2, "seen": (1, "a")}
    for number, shape in enumerate(shapes_of(writers)):
        folder = shared / f"{number}" / "ckpt"
        if comm.rank < writers:
            save_trained(some, shape, folder, adamw, spare=number, extra=extra)
        barrier(comm)
        for readers in range(1, comm.size + 1):
            own = split(comm, readers)
            for other in shapes_of(own.size):
                check_loaded(own, other, folder, adamw, stepped=readers == comm.size)
            own.Free()
    some.Free()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(comm, shared, name):
    shape = shapes_of(comm.size)[-1]
    save_trained(comm, shape, shared / "ckpt", OPTIMIZERS[name], extra={"step": 2, "seen": (1, "a")})
    check_loaded(comm, ParallelConfig(), shared / "ckpt", OPTIMIZERS[name])


def test_arrays_are_named_logically_and_written_once(comm, shared):
    with open_mesh(comm, ParallelConfig()) as mesh:
        model = Model(mesh, 0, spare=2)
        save_model(mesh, shared / "ckpt", model, None, None)
        assert load_model(mesh, str(shared / "ckpt"), model, None) == {}
    if comm.rank == 0:
        with h5py.File(shared / "ckpt" / "master.h5") as master:
            up = master["experts/moe.experts.up/value"][:]
            assert up.shape == (5, 8, 6)
            assert all(np.array_equal(up[e], draw(f"0.{e}.up", (8, 6))) for e in range(5))
            assert master["experts/last.experts.down_bias/value"].shape == (3, 6)
            assert master["dense/odd.a~1b/value"].shape == (2, 3) and master["dense/scale/value"].shape == (1,)
            assert "dense/head.weight" not in master and "dense/cache" not in master
            assert master["dense/mask/value"][:].tolist() == [True, False, False]
        held = sum(path.stat().st_size for path in (shared / "ckpt").glob("rank*.h5"))
        numbers = sum(p.numel() for p in Model(alone(), 0).parameters())
        assert 4 * numbers < held < 4 * numbers + 40_000 * comm.size


def alone():
    """A mesh of this rank, without communicators."""

    class Alone:
        world = type("World", (), {"rank": 0})
        expert_parallel, expert_index, tensor_parallel, tensor_index = 1, 0, 1, 0

    return Alone


def test_precisions(comm, shared, caplog):
    """bfloat16 comes back bit for bit; into another precision it is cast, which one line tells."""
    with open_mesh(comm, ParallelConfig()) as mesh:

        def make(dtype, seed):
            model = Model(mesh, seed)
            model.embedding.to(dtype)
            optimizer = adamw(model)
            take_step(mesh, model, optimizer, 1)
            return model, optimizer

        (model, optimizer), (other, others) = make(torch.bfloat16, 0), make(torch.bfloat16, 1)
        save_model(mesh, shared / "ckpt", model, optimizer, None)
        caplog.set_level(logging.INFO)
        load_model(mesh, shared / "ckpt", other, others)
        assert_same(mesh, (model, other), (optimizer, others))
        assert "cast" not in caplog.text

        other, others = make(torch.float32, 1)
        load_model(mesh, shared / "ckpt", other, others)
        assert torch.equal(other.embedding.weight, model.embedding.weight.float())
        assert others.state[other.embedding.weight]["exp_avg"].dtype == torch.float32
        (line,) = [line for line in caplog.messages if "cast" in line]
        assert line.endswith("arrays of bfloat16 are cast to this model's float32, such as dense/embedding.weight")

        save_model(mesh, shared / "ckpt", other, others, None)
        load_model(mesh, shared / "ckpt", model, None)
        assert torch.equal(model.embedding.weight, other.embedding.weight.bfloat16())


def error_of(comm, call):
    """The one line that all ranks raise alike, without the name of a rank before it."""
    with pytest.raises(CheckpointError) as error:
        call()
    lines = gather_to_all(comm, str(error.value))
    assert error.value.shared and len(set(lines)) == 1 and "\n" not in lines[0]
    return lines[0].partition("] ")[2] if lines[0].startswith("[rank ") else lines[0]


def drop_bias(model):
    model.norm.bias = None


CHANGED = {
    "another number of experts": (
        {"num_experts": 4}, None,
        "checkpoint has experts/moe.experts.gate/value [5, 8, 6], this model wants [4, 8, 6]: num_experts",
    ),
    "another width": ({"width": 5}, None, "checkpoint has experts/last.experts.up/value [3, 4, 6], this model wants "),
    "one more": (
        {}, lambda model: setattr(model, "new", nn.Parameter(torch.zeros(4))),
        "checkpoint has no dense/new/value, this model wants it [4]",
    ),
    "one fewer": ({}, drop_bias, "checkpoint has dense/norm.bias, which this model has not"),
    "no such layer": ({}, lambda model: delattr(model, "last"), "which this model has not"),
    "whole numbers": (
        {}, lambda model: setattr(model, "mask", torch.zeros(3)),
        "checkpoint has dense/mask as bool, this model wants float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_another_model_is_one_line_and_keeps_its_values(comm, shared, name):
    keys, change, line = CHANGED[name]
    with open_mesh(comm, ParallelConfig()) as mesh:
        save_model(mesh, shared / "ckpt", Model(mesh, 0), None, None)
        model = Model(mesh, 1, **keys)
        if change:
            change(model)
        before = [tensor.clone() for tensor in model.state_dict().values()]
        message = error_of(comm, lambda: load_model(mesh, shared / "ckpt", model, None))
        assert message.startswith(f"{shared}/ckpt/master.h5: ") and line in message
        assert all(torch.equal(*pair) for pair in zip(before, model.state_dict().values(), strict=True))


def test_another_optimizer_is_one_line(comm, shared):
    with open_mesh(comm, ParallelConfig()) as mesh:
        model, path = Model(mesh, 0), shared / "ckpt"
        optimizer = adamw(model)
        take_step(mesh, model, optimizer, 1)
        save_model(mesh, path, model, optimizer, None)

        def load(other):
            return error_of(comm, lambda: load_model(mesh, path, model, other)).removeprefix(f"{path}/master.h5: ")

        sgd = torch.optim.SGD(model.parameters(), lr=1)
        assert load(sgd) == "checkpoint has the optimizer AdamW of 2 param_groups, this is SGD of 1"
        swapped = adamw(model)
        swapped.param_groups.reverse()
        assert "in param_groups[" in load(swapped)
        strange = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 3))])
        assert load(strange) == "the optimizer has a parameter [2, 3] that is not among the model's"
        save_model(mesh, path, model, None, None)
        assert load(optimizer) == "checkpoint was saved without an optimizer, this is AdamW"


def test_state_of_a_shape_of_its_own(comm, shared):
    """Adafactor's factors are saved whole, but not of experts that several ranks share."""

    def make(model):
        return torch.optim.Adafactor([p for p in model.parameters() if p.numel()], lr=0.1)

    save_trained(comm, ParallelConfig(), shared / "ckpt", make, extra={"step": 2, "seen": (1, "a")})
    alone = comm.Split(comm.rank)
    check_loaded(alone, ParallelConfig(), shared / "ckpt", make)
    alone.Free()
    if comm.size % 2 == 0:
        with open_mesh(comm, ParallelConfig(tensor=2)) as mesh:
            model = Model(mesh, 0)
            line = error_of(comm, lambda: load_model(mesh, shared / "ckpt", model, make(model)))
            assert "of experts that 2 tensor-parallel ranks share, only state of their own shape can be saved" in line
            assert "Adafactor keeps " in line


def test_what_cannot_be_saved_is_one_line_and_the_last_checkpoint_stays(comm, shared):
    with open_mesh(comm, ParallelConfig()) as mesh:
        model, path = Model(mesh, 0), shared / "ckpt"
        save_model(mesh, path, model, None, {"step": 1})
        line = error_of(comm, lambda: save_model(mesh, path, model, None, {"x": object()}))
        assert line == "extra: cannot be saved as JSON: Object of type object is not JSON serializable"
        optimizer = torch.optim.LBFGS(model.parameters())
        optimizer.state[model.scale]["old_dirs"] = []
        line = error_of(comm, lambda: save_model(mesh, path, model, optimizer, None))
        assert line.startswith("LBFGS: state of dense/scale, old_dirs is a list: only tensors and numbers of ")
        assert load_model(mesh, path, model, None) == {"step": 1}
        save_model(mesh, path, model, None, {"step": 2})
        assert load_model(mesh, path, model, None) == {"step": 2}
        assert [entry.name for entry in shared.iterdir()] == ["ckpt"]


def test_a_folder_of_anybody_else_is_not_replaced(comm, shared):
    with open_mesh(comm, ParallelConfig()) as mesh:
        model = Model(mesh, 0)
        if comm.rank == 0:
            (shared / "mine").mkdir()
            (shared / "mine" / "notes.txt").write_text("mine")
            (shared / "file").write_text("mine")
        line = error_of(comm, lambda: save_model(mesh, shared / "mine", model, None, None))
        assert line.startswith(f"{shared}/mine: holds notes.txt, so it is no checkpoint and is not replaced")
        line = error_of(comm, lambda: save_model(mesh, shared / "file", model, None, None))
        assert line == f"{shared}/file: is no folder that a checkpoint can replace"
        line = error_of(comm, lambda: load_model(mesh, shared / "none", model, None))
        assert line == f"{shared}/none: no such folder, so no checkpoint to load"
        assert (shared / "mine" / "notes.txt").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "altered": (flip, "is altered: it does not match its checksum"),
    "cut short": (lambda path: os.truncate(path, 1000), " bytes, "),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["rank0000.h5", "master.h5", "SHA256SUMS"])
def test_a_damaged_file_is_one_line_that_names_it(comm, shared, damage, name):
    with open_mesh(comm, ParallelConfig()) as mesh:
        save_model(mesh, shared / "ckpt", Model(mesh, 0), None, None)
        model = Model(mesh, 1)
        before = model.embedding.weight.clone()
        if comm.rank == 0:
            DAMAGE[damage][0](shared / "ckpt" / name)
        line = error_of(comm, lambda: load_model(mesh, shared / "ckpt", model, None))
        assert f"{shared}/ckpt/" in line and (name != "rank0000.h5" or name in line and DAMAGE[damage][1] in line)
        assert torch.equal(model.embedding.weight, before)


def test_a_checkpoint_of_the_program_is_not_a_models(comm, shared):
    from hpcmoe.write.pieces import write_pieces

    write_pieces(comm, shared / "ckpt", [], {"step": 2})
    with open_mesh(comm, ParallelConfig()) as mesh:
        (shared / "old.old.partial").mkdir(exist_ok=True)
        line = error_of(comm, lambda: load_model(mesh, shared / "ckpt", Model(mesh, 1), None))
        assert "was not written by save() of this version of hpcmoe" in line or "SHA256SUMS" in line
        line = error_of(comm, lambda: load_model(mesh, shared / "old", Model(mesh, 1), None))
        assert line.endswith(f"; one that was being replaced is {shared}/old.old.partial: rename it")
