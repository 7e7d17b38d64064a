"""A whole Hugging Face model by hpcmoe.hf and by transformers' own expert parallelism, over gloo with FSDP, by turns.

Two groups of ranks share the machine and never work at once. Both read the same checkpoint, and take the same tokens;
both sum the gradients of the dense parts in training. The second model has two layers where one has four, so that the
experts of both sides and their gradients fit into 16 GB.
"""

import contextlib
import dataclasses
import json
import os
import time
from dataclasses import dataclass

import torch
from bench import ranks
from bench.pairs import compare, show_milliseconds, show_ratio, take_turns
from bench.rivals import keep_memory, open_gloo
from tabulate import tabulate

import hpcmoe
from hpcmoe.wait import barrier, gather_to_all

BUDGET_SECONDS = 30.0  # a model and phase
SIDES = ("ours", "transformers")  # the groups of ranks
NUM_RANKS = 2  # of a side
CLOSE = 1e-4  # of the largest logit, and of the largest gradient
CONTEXT = 32  # tokens in the cache of each sequence, before one is decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of a family, of random weights; its dense parts are small beside its experts."""

    family: str
    hidden: int
    feed_forward: int
    experts: int
    top_k: int
    layers: int

    def __str__(self):
        return f"{self.family} H {self.hidden} F {self.feed_forward} E {self.experts} K {self.top_k} L {self.layers}"

    def make_config(self):
        """State the model as transformers does -> its configuration."""
        from transformers import CONFIG_MAPPING

        cls = CONFIG_MAPPING[self.family]
        sizes = {
            "vocab_size": 1024, "hidden_size": self.hidden, "num_hidden_layers": self.layers, "head_dim": 64,
            "num_attention_heads": self.hidden // 64, "num_key_value_heads": self.hidden // 256,
            "num_experts_per_tok": self.top_k, "num_experts": self.experts, "num_local_experts": self.experts,
            "intermediate_size": self.feed_forward, "moe_intermediate_size": self.feed_forward,
            "max_position_embeddings": 1024,
        }  # fmt: skip
        known = cls().to_dict()
        return cls(**{name: value for name, value in sizes.items() if name in known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a step does."""

    name: str
    sequences: int  # of a rank
    length: int  # tokens of each
    training: bool = False
    context: int = 0  # tokens of each that are in the cache already

    def __str__(self):
        return f"{self.name}, {self.sequences * self.length} tokens a rank"


MODELS = (
    Model(family="mixtral", hidden=1024, feed_forward=2048, experts=16, top_k=2, layers=4),
    Model(family="qwen3_moe", hidden=2048, feed_forward=1024, experts=64, top_k=8, layers=2),
)
PHASES = (
    Phase(name="forward", sequences=1, length=256),
    Phase(name="training", sequences=1, length=256, training=True),
    Phase(name="decode", sequences=1, length=1, context=CONTEXT),
    Phase(name="decode", sequences=16, length=1, context=CONTEXT),
)


def measure(folder, models=MODELS, phases=PHASES, budget_seconds=BUDGET_SECONDS):
    """Run every phase of every model -> list of cases."""
    arguments = [json.dumps([dataclasses.asdict(each) for each in some]) for some in (models, phases)]
    return ranks.run_ranks(len(SIDES) * NUM_RANKS, "peers_models", folder, folder, *arguments, budget_seconds)


def work(comm, folder, models, phases, budget_seconds):
    """Measure the phases of the models -> list of cases. Collective over comm."""
    side = SIDES[comm.rank // NUM_RANKS]
    group = comm.Split(SIDES.index(side), comm.rank)
    torch.set_num_threads(1)
    if side != "ours":
        keep_memory()  # hpcmoe.open does the same
        open_gloo_of_launcher(group)
    phases = [Phase(**fields) for fields in json.loads(phases)]
    return [
        case
        for fields in json.loads(models)
        for case in measure_model(comm, group, side, Model(**fields), phases, folder, float(budget_seconds))
    ]


def open_gloo_of_launcher(group):
    """Open torch.distributed over gloo, and tell transformers as a launcher would. Collective over group."""
    open_gloo(group)
    names = {"RANK": group.rank, "LOCAL_RANK": group.rank, "WORLD_SIZE": group.size}
    os.environ.update({name: str(value) for name, value in names.items()})


def measure_model(comm, group, side, model, phases, folder, budget_seconds):
    """Measure a model's phases -> list of cases. Collective over comm."""
    path = write_model(comm, model, folder)
    most = max(phase.sequences * max(phase.length, phase.context) for phase in phases)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context((open_ours if side == "ours" else open_theirs)(group, path, most))
        return [measure_phase(comm, group, side, model, opened, phase, budget_seconds) for phase in phases]


def write_model(comm, model, folder):
    """Write a checkpoint of random weights -> its path. Collective over comm."""
    from transformers import AutoModelForCausalLM

    path = f"{folder}/{model.family}"
    if comm.rank == 0:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(model.make_config()).save_pretrained(path)
    barrier(comm)
    return path


@contextlib.contextmanager
def open_ours(group, path, max_tokens):
    """Open a checkpoint by hpcmoe -> Side. Collective over group."""
    from transformers import AutoModelForCausalLM

    with hpcmoe.open(group, threads=1, max_tokens=max_tokens) as opened:
        model = hpcmoe.hf.spread(AutoModelForCausalLM.from_pretrained(path), opened)
        yield Side(model, lambda: opened.sum_gradients(model))


@contextlib.contextmanager
def open_theirs(group, path, max_tokens):
    """Open a checkpoint by transformers, its dense parts sharded by FSDP as its expert parallelism asks -> Side."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=1, fsdp_size=group.size, ep_size=group.size, ep_implementation="auto")
    yield Side(AutoModelForCausalLM.from_pretrained(path, distributed_config=config), lambda: None)


class Side:
    """A model of one of the sides, and its steps."""

    def __init__(self, model, sum_gradients):
        """sum_gradients: what makes the sums of the dense parts' gradients complete."""
        self.model, self.sum_gradients, self.caches = model, sum_gradients, {}

    def step(self, phase, ids):
        """Take a step on ids [sequences, length] -> logits, detached."""
        return self.train(ids) if phase.training else self.infer(phase, ids)

    def train(self, ids):
        """Go forward and backward."""
        self.model.train().zero_grad(set_to_none=True)
        output = self.model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        self.sum_gradients()
        return output.logits.detach()

    @torch.no_grad()
    def infer(self, phase, ids):
        """Go forward, after what is in the cache already."""
        if not phase.context:
            return self.model.eval()(input_ids=ids, use_cache=False).logits
        if phase not in self.caches:
            before = torch.arange(phase.context).repeat(phase.sequences, 1)
            self.caches[phase] = self.model.eval()(input_ids=before, use_cache=True).past_key_values
        logits = self.model(input_ids=ids, past_key_values=self.caches[phase], use_cache=True).logits
        self.caches[phase].crop(-phase.length)  # drops these
        return logits

    def read_gradient(self):
        """Return the mean over ranks of the embedding's gradient, to which all others lead. Collective."""
        grad = self.model.get_input_embeddings().weight.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad / NUM_RANKS


def measure_phase(comm, group, side, model, opened, phase, budget_seconds):
    """Check that both sides give the same, then let them take turns -> case. Collective over comm."""
    draw = torch.Generator().manual_seed(group.rank)
    ids = torch.randint(0, 1024, (phase.sequences, phase.length), generator=draw)
    cpu_seconds = {name: [] for name in SIDES}

    def step():
        begin = time.process_time()
        opened.step(phase, ids)
        cpu_seconds[side].append(time.process_time() - begin)

    difference = compare_outputs(comm, opened, phase, ids)
    seconds = take_turns(comm, {name: step if name == side else None for name in SIDES}, budget_seconds)
    of_ranks = gather_to_all(comm, cpu_seconds[side][1:])
    of_side = [[sum(each) for each in zip(*of_ranks[i : i + NUM_RANKS], strict=True)] for i in (0, NUM_RANKS)]
    return {
        "model": str(model),
        "phase": str(phase),
        "difference": difference,
        "seconds": compare(seconds, SIDES[1], SIDES[0]),
        "cpu_seconds": compare(dict(zip(SIDES, of_side, strict=True)), SIDES[1], SIDES[0]),
    }


def compare_outputs(comm, opened, phase, ids):
    """Compare what both sides' first steps give -> the largest difference, relative. Collective over comm."""
    found = [opened.step(phase, ids)]
    if phase.training:
        found.append(opened.read_gradient())
    ours, theirs = gather_to_all(comm, found)[::NUM_RANKS]
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert difference <= CLOSE, f"{phase}: off by {difference:.1e}"
    return difference


def make_table(cases):
    """Lay the cases out -> text."""
    if not cases:
        return ""
    headers = ("model", "phase", "ours, ms", "transformers, ms", "theirs / ours (quartiles)", "CPU, theirs / ours")
    rows = [
        (
            case["model"],
            case["phase"],
            *(show_milliseconds(case["seconds"]["median_seconds"][side]) for side in SIDES),
            show_ratio(case["seconds"]),
            show_ratio(case["cpu_seconds"]),
        )
        for case in cases
    ]
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    ranks.main(work)
