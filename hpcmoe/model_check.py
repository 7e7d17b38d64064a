"""A Hugging Face checkpoint on these ranks against transformers' own model on one process, as tables."""

import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from hpcmoe import hf
from hpcmoe.cluster.machine import read_memory_bytes
from hpcmoe.errors import ConfigError, on_root
from hpcmoe.experts.family import FamilyExperts, run_expert
from hpcmoe.group import Group
from hpcmoe.messages import format_size
from hpcmoe.model.hf.build import build_model
from hpcmoe.model.hf.compare import Difference, compare_step
from hpcmoe.model.hf.stored_model import read_stored_model
from hpcmoe.placement.problem import PlacementProblem
from hpcmoe.placement.result import SearchStats, Usage, compute_usage, evaluate
from hpcmoe.prepare.layer import make_layer_experts, make_layer_problem
from hpcmoe.prepare.process import peak_resident_bytes
from hpcmoe.report.placement_tables import make_placement_tables
from hpcmoe.wait import gather_to_all

_NUM_TOKENS = 16  # of each rank's sequence
_STEP_TOKENS = 1024  # of each rank, in the step whose traffic is shown
_MOST_LINKS = 8
_TIMED_ROWS, _NUM_TIMINGS = 256, 3
_BYTES_OF_PARAMETER = 16  # in float32 with its gradient: of the whole model, and of all ranks on one node
_TEXT = "An expert sees the tokens that a router sends to it, and no others; what it makes of them goes back home. "


def compare_checkpoint(group: Group, folder: Path) -> list[str]:
    """Compare a checkpoint's model on these ranks with transformers' own -> tables. Collective over the group."""
    from transformers import AutoModelForCausalLM

    on_root(group.mesh.world, lambda: check_memory(folder))
    model = hf.load(folder, group, max_tokens=_NUM_TOKENS, dtype="float32")

    def open_whole() -> Any:
        """Open the whole model by transformers alone."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", experts_implementation="eager")

    ids = make_ids(folder, model.config.vocab_size, group.size)
    model.eval()
    found = compare_step(model, lambda: open_whole().eval(), group, ids)
    return ["", format_differences(found), "", format_traffic(group), "", format_memory(group)]


def check_memory(folder: Path) -> None:
    """Raise ConfigError unless this node can hold the whole model, its gradients and this rank's part beside them.

    Or where there is no such checkpoint.
    """
    whole = build_model(read_stored_model(folder), torch.float32)
    num_parameters = sum(parameter.numel() for parameter in whole.parameters())
    wanted, there = num_parameters * _BYTES_OF_PARAMETER, read_memory_bytes()
    if wanted > there:
        raise ConfigError(
            f"hpcmoe hf {folder} --check: one process's model takes {num_parameters / 1e9:.3g} billion parameters x "
            f"{_BYTES_OF_PARAMETER} B, {format_size(wanted)}; this node has {format_size(there)}"
        )


def make_ids(folder: Path, vocabulary_size: int, num_ranks: int) -> list[Tensor]:
    """Make a short sequence for each rank, of text where the checkpoint has a tokenizer -> [1, S] each."""
    from transformers import AutoTokenizer

    try:
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)(_TEXT * _NUM_TOKENS)["input_ids"]
        tokens = torch.tensor(words) % vocabulary_size
    except (OSError, ValueError):  # transformers' errors for a folder without one
        tokens = torch.randint(
            vocabulary_size, (_NUM_TOKENS * (num_ranks + 1),), generator=torch.Generator().manual_seed(0)
        )
    starts = np.arange(num_ranks) * 7 % (len(tokens) - _NUM_TOKENS)  # other tokens on each rank
    return [tokens[start : start + _NUM_TOKENS][None] for start in starts.tolist()]


def format_differences(found: list[Difference]) -> str:
    """Format the largest difference of each kind of tensor, all layers together."""
    kinds: dict[str, list[Difference]] = {}
    for difference in found:
        name = re.sub(r"\.\d+\.", ".*.", difference.name)
        kinds.setdefault(name if name in ("logits", "loss") else f"gradient of {name}", []).append(difference)
    rows = []
    for kind, members in kinds.items():
        worst = max(members, key=lambda each: each.ratio)
        rows.append((kind, f"{worst.ratio:.1e}", f"{worst.largest:.1e}", f"{worst.scale:.1e}", len(members)))
    headers = ("tensor", "difference / largest", "difference", "largest", "of")
    return tabulate(rows, headers=headers, disable_numparse=True)


def format_traffic(group: Group) -> str:
    """Format what such routing costs in a step: links, nodes, the busiest, what binds. Collective over the group."""
    loads = group.loads()
    layers = [layer for layer in group.layers if isinstance(layer, FamilyExperts)]
    alike = [layer for layer in layers if layer.num_experts == layers[0].num_experts]
    problem, experts = make_problem_of(group, alike, loads)
    placement = evaluate(problem, experts, [0.0], "given", SearchStats())
    usage = compute_usage(problem, placement)
    tables = make_placement_tables(problem, placement, usage, {}, 0)
    return "\n\n".join([*format_links(problem, usage), f"a step of {_STEP_TOKENS} tokens a rank, forward:", tables])


def format_links(problem: PlacementProblem, usage: Usage) -> list[str]:
    """Format the bytes of a token on the links between nodes that carry most; nothing where there are none."""
    if problem.num_nodes == 1:
        return []
    home_tokens = _STEP_TOKENS * problem.ranks_of_node[:, None]
    sent = usage.tokens.sum(axis=0) * problem.bytes_per_token / np.maximum(home_tokens, 1)  # [nodes, nodes]
    np.fill_diagonal(sent, -1.0)
    links = zip(*np.unravel_index(np.argsort(-sent, axis=None, kind="stable"), sent.shape), strict=True)
    shown = [(a, b) for a, b in links if a != b][:_MOST_LINKS]
    rows = [(f"{problem.node_names[a]} -> {problem.node_names[b]}", format_size(round(sent[a, b]))) for a, b in shown]
    return [tabulate(rows, headers=("link", "bytes of one of the node's tokens, dispatch of all layers"))]


def make_problem_of(
    group: Group, layers: list[FamilyExperts], loads: list[np.ndarray]
) -> tuple[PlacementProblem, np.ndarray]:
    """Build the placement problem of layers as they were routed -> it, and where their experts are [L, S].

    Collective over the group.
    """
    problems, seconds = [], time_assignment(group, layers[0])
    for layer in layers:
        asked = make_layer_experts(layer.options, group.mesh)
        asked = replace(asked, tokens_per_rank=_STEP_TOKENS, seconds_per_token=seconds)
        known = loads[layer.number] if loads[layer.number].any() else None
        problems.append(make_layer_problem(group.topology, group.mesh, replace(asked, loads=known)))
    experts = np.concatenate([layer.placement.expert_of_replica for layer in layers])
    probability = np.concatenate([problem.probability for problem in problems])
    return replace(problems[0], num_layers=len(layers), probability=probability), experts


def time_assignment(group: Group, layer: FamilyExperts) -> float:
    """Measure an expert's forward pass on all ranks at once -> seconds of one row, their median. Collective."""
    times, rows = [], torch.zeros(_TIMED_ROWS, layer.options.hidden, device=layer.anchor.device)
    for replica in layer.local.local_replicas()[:1] * _NUM_TIMINGS:
        begun = time.perf_counter()
        run_expert(replica, rows, None)  # both are float32 here
        times.append((time.perf_counter() - begun) / _TIMED_ROWS)
    of_ranks = gather_to_all(group.mesh.world, statistics.median(times) if times else None)
    return statistics.median([seconds for seconds in of_ranks if seconds is not None])


def format_memory(group: Group) -> str:
    """Format the memory of ranks. Collective over the group."""
    experts = [replica for layer in group.layers for replica in layer.parameters()]
    of_experts = sum(parameter.numel() * parameter.element_size() for parameter in experts)
    ranks = gather_to_all(group.mesh.world, (of_experts, peak_resident_bytes()))
    names = ("experts' weights", "all that the process has had")
    rows = [
        (name, format_size(min(of)), format_size(max(of)))
        for name, of in zip(names, zip(*ranks, strict=True), strict=True)
    ]
    return tabulate(rows, headers=("memory of a rank", "least", "most"))
