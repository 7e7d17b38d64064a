"""Placement by the rules of DeepSeek's Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB), and better.

Its three steps: groups of experts are packed onto nodes, the hottest experts of each node are replicated, the replicas
are packed onto the GPUs of the node. Here pairs of replicas are then exchanged while the fullest GPU gets less to do.
"""

import sys
from typing import Any, TypeVar

import numpy as np

from hpcmoe.errors import PlacementError
from hpcmoe.messages import format_index

Array = TypeVar("Array")
_LEAST_GAIN = 1e-6  # of the fullest pack's load, for which two items are exchanged
_SWAPS_A_PACK = 8  # at most, on average: a few suffice


def rebalance(
    weight: Array, num_replicas: int, num_groups: int = 1, num_nodes: int = 1, num_gpus: int = 1
) -> tuple[Array, Array, Array]:
    """Place replicas of experts on GPUs so that the fullest has least to do; EPLB's signature, in its order. No MPI.

    weight [layers, E]: each expert's load, a torch tensor or an array; each replica serves an equal part of it. Where
    num_nodes divides num_groups, the experts of a group stay on one node; else nodes and groups do not count.
    -> (expert of each replica slot [layers, num_replicas], slots of each expert [layers, E, most replicas], -1 where it
    has fewer, number of its replicas [layers, E]), int64, on the host, of weight's kind. GPU g has num_replicas /
    num_gpus slots in a row. No GPU has more to do than the fullest of EPLB's own placement. Raises PlacementError.
    """
    loads = _read_weight(weight)
    _check_sizes(loads.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1

    # Pack the groups by EPLB's rule and better; in each layer the one counts that leaves GPUs less to do.
    in_group = loads.reshape(len(loads), num_groups, -1).sum(axis=2)
    by_rule = pack_heaviest_first(in_group, num_nodes)
    expert_of_slot, most = _fill_gpus(loads, by_rule, num_replicas, num_nodes, num_gpus)
    if 1 < num_nodes < num_groups:
        better = exchange_items(in_group, by_rule, num_nodes)
        other, most_of_other = _fill_gpus(loads, better, num_replicas, num_nodes, num_gpus)
        expert_of_slot = np.where((most_of_other < most)[:, None], other, expert_of_slot)
    count, slots_of_expert = invert_slots(expert_of_slot, loads.shape[1])
    first, second, third = (_as_kind_of(weight, array) for array in (expert_of_slot, slots_of_expert, count))
    return first, second, third


def _read_weight(weight: Any) -> np.ndarray:
    """Return loads as EPLB reads them -> float32 [layers, E]. Raises PlacementError for what are none."""
    try:
        loads = np.asarray(weight.detach().float().cpu() if _is_tensor(weight) else weight, np.float32)
    except (TypeError, ValueError):
        raise PlacementError("weight: must be an array of numbers, [layers, experts]") from None
    if loads.ndim != 2 or loads.size == 0:
        raise PlacementError(f"weight has shape {list(loads.shape)}: must be [layers, experts]")
    wrong = np.argwhere(~((loads >= 0) & np.isfinite(loads)))
    if len(wrong):
        index = tuple(wrong[0].tolist())
        raise PlacementError(f"weight{format_index(index)} = {loads[index]:g}: must be finite and >= 0")
    return loads


def _is_tensor(weight: Any) -> bool:
    """Return True for a torch tensor, without an import of torch."""
    return "torch" in sys.modules and isinstance(weight, sys.modules["torch"].Tensor)


def _as_kind_of(weight: Any, array: np.ndarray) -> Any:
    """Return an array as a torch tensor on the host where weight is a tensor."""
    return sys.modules["torch"].from_numpy(array) if _is_tensor(weight) else array


def _check_sizes(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    """Raise PlacementError, with the arithmetic, unless the sizes divide each other."""
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, size in sizes.items():
        if size < 1:
            raise PlacementError(f"{name} = {size}: must be at least 1")
    if num_replicas < num_experts:
        raise PlacementError(f"num_replicas = {num_replicas}: must be at least the {num_experts} experts")
    for whole, name, part in (
        (f"num_replicas = {num_replicas}", "num_gpus", num_gpus),
        (f"num_gpus = {num_gpus}", "num_nodes", num_nodes),
        (f"the experts = {num_experts}", "num_groups", num_groups),
    ):
        if int(whole.split()[-1]) % part:
            raise PlacementError(f"{whole}: must be a multiple of {name} = {part}")


def _fill_gpus(
    loads: np.ndarray, node_of_group: np.ndarray, num_replicas: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replicate and pack the experts of each node -> (expert of each slot [layers, slots], the fullest GPU's load)."""
    # List each node's experts, a row a layer and node: [X, E / nodes].
    (num_layers, num_experts), num_groups = loads.shape, node_of_group.shape[1]
    node_of_expert = np.repeat(node_of_group, num_experts // num_groups, axis=1)
    experts = np.argsort(node_of_expert, axis=1, kind="stable")
    loads = np.take_along_axis(loads, experts, axis=1).reshape(num_layers * num_nodes, -1)

    # Replicate the hottest: [X, slots of a node].
    replicas = replicate_hottest(loads, num_replicas // num_nodes)
    expert_of_item = np.repeat(experts.ravel(), replicas.ravel()).reshape(len(loads), -1)
    load_of_item = np.repeat((loads / replicas).ravel(), replicas.ravel()).reshape(len(loads), -1)

    # Pack them onto the node's GPUs.
    num_packs = num_gpus // num_nodes
    pack = exchange_items(load_of_item, pack_heaviest_first(load_of_item, num_packs), num_packs)
    most = sum_packs(load_of_item, pack, num_packs).max(axis=1).reshape(num_layers, -1).max(axis=1)
    order = np.argsort(pack, axis=1, kind="stable")
    return np.take_along_axis(expert_of_item, order, axis=1).reshape(num_layers, -1), most


def replicate_hottest(tokens: np.ndarray, num_replicas: int) -> np.ndarray:
    """Replicate, again and again, the expert with most tokens a replica: [X, E] -> their numbers [X, E]."""
    replicas, rows = np.ones(tokens.shape, np.int64), np.arange(len(tokens))
    for _ in range(num_replicas - tokens.shape[1]):
        replicas[rows, np.argmax(tokens / replicas.astype(tokens.dtype), axis=1)] += 1
    return replicas


def pack_heaviest_first(weight: np.ndarray, num_packs: int) -> np.ndarray:
    """Pack items, heaviest first, each into the lightest pack with a place left: [X, n] -> the pack of each [X, n].

    Packs get equal numbers of items, to within one.
    """
    (num_rows, num_items), rows = weight.shape, np.arange(len(weight))
    pack, (base, extras) = np.zeros(weight.shape, np.int64), divmod(num_items, num_packs)
    load, count = np.zeros((num_rows, num_packs), weight.dtype), np.zeros((num_rows, num_packs), np.int64)
    for items in np.argsort(-weight, axis=1, kind="stable").T:
        may_take = count < base + ((count > base).sum(axis=1, keepdims=True) < extras)
        lightest = np.argmin(np.where(may_take, load, np.inf), axis=1)
        pack[rows, items] = lightest
        load[rows, lightest] += weight[rows, items]
        count[rows, lightest] += 1
    return pack


def exchange_items(weight: np.ndarray, pack: np.ndarray, num_packs: int) -> np.ndarray:
    """Exchange an item of the heaviest pack for another's, as long as that makes it lighter: [X, n] -> packs [X, n].

    All packs have equal numbers of items.
    """
    pack, per_pack = pack.copy(), weight.shape[1] // num_packs
    rows = np.arange(len(weight))  # that may still get better
    for _ in range(_SWAPS_A_PACK * num_packs):
        load = sum_packs(weight[rows], pack[rows], num_packs)
        heaviest, most = load.argmax(axis=1), load.max(axis=1)

        # Compute the heavier of both packs after each exchange: [X, its items, n].
        is_mine = pack[rows] == heaviest[:, None]
        mine = np.argsort(~is_mine, axis=1, kind="stable")[:, :per_pack]
        own = np.take_along_axis(weight[rows], mine, axis=1)
        lighter_by = own[:, :, None].astype(np.float64) - weight[rows][:, None, :]
        of_others = np.take_along_axis(load, pack[rows], axis=1)[:, None, :]
        after = np.maximum(most[:, None, None] - lighter_by, of_others + lighter_by)
        after = np.where(is_mine[:, None, :], np.inf, after).reshape(len(rows), -1)

        # Take the best exchange of each row; a row that has none is done.
        best = after.argmin(axis=1)
        gains = after[np.arange(len(rows)), best] < most * (1 - _LEAST_GAIN)
        if not gains.any():
            break
        one, other = mine[gains, best[gains] // weight.shape[1]], best[gains] % weight.shape[1]
        rows = rows[gains]
        pack[rows, one], pack[rows, other] = pack[rows, other], pack[rows, one]
    return pack


def sum_packs(weight: np.ndarray, pack: np.ndarray, num_packs: int) -> np.ndarray:
    """Sum the weights in each pack: [X, n] -> float64 [X, packs]."""
    number = pack + num_packs * np.arange(len(pack))[:, None]
    return np.bincount(number.ravel(), weight.ravel(), len(pack) * num_packs).reshape(len(pack), -1)


def invert_slots(expert_of_slot: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Find experts' slots: maps [layers, slots] -> (replicas of each [layers, E], slots [layers, E, most])."""
    layers = np.arange(len(expert_of_slot))[:, None]
    count = np.zeros((len(expert_of_slot), num_experts), np.int64)
    np.add.at(count, (layers, expert_of_slot), 1)

    # Number each expert's slots in their order.
    slots = np.argsort(expert_of_slot, axis=1, kind="stable")
    experts = np.take_along_axis(expert_of_slot, slots, axis=1)
    first = np.cumsum(count, axis=1) - count
    place = np.arange(slots.shape[1]) - np.take_along_axis(first, experts, axis=1)
    slots_of_expert = np.full((*count.shape, count.max()), -1, np.int64)
    slots_of_expert[layers, experts, place] = slots
    return count, slots_of_expert
