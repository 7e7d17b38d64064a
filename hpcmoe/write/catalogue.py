"""What run.h5 holds, by the name of each dataset: the names of its axes, and a description for who reads the file."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What one figure is."""

    about: str
    axes: tuple[str, ...] = ()  # of a step's value, or of the run's


_NODES, _LAYERS, _EXPERTS = ("node",), ("layer",), ("layer", "expert")
_NODE_PAIRS, _RANK_PAIRS = ("source_node", "target_node"), ("source_rank", "target_rank")
_RATES = {
    "bytes_per_second": Entry("bandwidth from node to node; the diagonal is within a node", _NODE_PAIRS),
    "egress_bytes_per_second": Entry("bandwidth of a node's port, out", _NODES),
    "ingress_bytes_per_second": Entry("bandwidth of a node's port, in", _NODES),
    "uplink_bytes_per_second": Entry("bandwidth of a rack's uplink", ("rack",)),
    "latency_seconds": Entry("latency from node to node", _NODE_PAIRS),
    "memory_bytes": Entry("memory of a node; of the placement problem, what experts may take of it", _NODES),
    "node_names": Entry("names of the nodes", _NODES),
    "node_of_rank": Entry("node of each rank", ("rank",)),
    "rack_of_node": Entry("rack of each node", _NODES),
    "objective": Entry("what the placement minimises"),
}
_CATALOGUE = {
    "run/config": Entry("the config file and the options that changed it"),
    "run/versions": Entry("versions of what computed", ("version", "key_value")),
    "run/seconds": Entry("wall-clock time of the step on rank 0"),
    "run/tokens_per_second": Entry("tokens of all ranks per wall-clock second of the step"),
    "run/tokens_per_second_overall": Entry("tokens of all ranks per wall-clock second of all measured steps"),
    "run/peak_resident_bytes": Entry("peak resident memory of the process that took most"),
    "run/unshared_bytes": Entry("unshared memory of a process, mean of the fullest node's ranks"),
    "train/loss": Entry("mean cross-entropy of the step's batch"),
    "train/validation_loss": Entry("mean cross-entropy of the validation sequences"),
    "train/gradient_norm": Entry("global norm of the gradients before clipping"),
    "train/learning_rate": Entry("learning rate of the step"),
    "dispatch/aux_loss": Entry("load-balancing loss, sum of the layers, without its weight"),
    "dispatch/z_loss": Entry("router z-loss, sum of the layers, without its weight"),
    "dispatch/dropped": Entry("assignments over the experts' capacity"),
    "dispatch/link_sigma": Entry("standard deviation / mean of the tokens dispatched over the links between ranks"),
    "dispatch/link_sigma_of_layer": Entry("the same of each layer", _LAYERS),
    "dispatch/link_sigma_floor": Entry("root mean square of an even router's link sigma"),
    "dispatch/link_sigma_floor_of_layer": Entry("the same of each layer", _LAYERS),
    "dispatch/link_sigma_aim": Entry("an even exchange has less link sigma than this"),
    "dispatch/link_tokens_mean": Entry("tokens dispatched over a link between ranks, mean of the links"),
    "experts/utilisation": Entry("tokens of an expert / tokens it would have if all had the same", _EXPERTS),
    "experts/balancedness": Entry("mean / max of the tokens that ranks serve, layer by layer"),
    "experts/balancedness_of_layer": Entry("the same of each layer", _LAYERS),
    "experts/batches": Entry("GEMMs of an expert, forward, in all measured steps", _EXPERTS),
    "experts/batch_rows_least": Entry("rows of an expert's smallest GEMM, forward", _EXPERTS),
    "experts/batch_rows_mean": Entry("rows of an expert's mean GEMM, forward", _EXPERTS),
    "experts/batch_rows_most": Entry("rows of an expert's largest GEMM, forward", _EXPERTS),
    "experts/tokens_of_node": Entry("assignments of each expert by their home node", ("layer", "node", "expert")),
    "comm/bytes_of_link": Entry("bytes of experts' rows sent from rank to rank in all measured steps", _RANK_PAIRS),
    "comm/hidden_share": Entry("share of the transfers behind the experts' work, in the steps that were traced"),
    **{f"{chapter}/{name}": entry for chapter in ("cluster", "problem") for name, entry in _RATES.items()},
    "cluster/rack_names": Entry("names of the racks", ("rack",)),
    "cluster/devices_of_node": Entry("CUDA devices of a node", _NODES),
    "cluster/cores_of_node": Entry("cores of a node that its ranks may use", _NODES),
    "cluster/source": Entry("where each fact of the cluster came from", ("fact", "key_value")),
    "cluster/placement": Entry("method of the placement"),
    "cluster/optimal": Entry("the placement's objective meets its lower bound"),
    "cluster/objective_seconds": Entry("the placement's objective, per step"),
    "cluster/lower_bound_seconds": Entry("no placement has a smaller objective than this"),
    "cluster/cross_node_share": Entry("share of the assignments whose expert is on another node"),
    "cluster/link_sigma": Entry("link sigma as the placement predicts it"),
    "cluster/search_seconds": Entry("time of the placement's search on rank 0"),
    "cluster/search_proposals": Entry("proposals of the placement's search"),
    "cluster/expert_of_replica": Entry("expert in each slot; -1: none", ("layer", "slot")),
    "cluster/rank_of_replica": Entry("rank of each slot, within the expert-parallel group", ("slot",)),
    "cluster/replica_count": Entry("replicas of each expert", _EXPERTS),
    "cluster/split": Entry("share of a node's tokens for the slot's expert", ("layer", "node", "slot")),
    "cluster/migrated": Entry("expert in each slot, from a step on", ("layer", "slot")),
    "cluster/migrated_split": Entry(
        "share of a node's tokens for the slot's expert, from a step on; NaN: the nearest", ("layer", "node", "slot")
    ),
    "problem/probability": Entry(
        "probability that a node's token chooses an expert; one row for all nodes where they are equal",
        ("layer", "home_node", "expert"),
    ),
    "problem/tokens_of_rank": Entry("tokens of a step on each rank", ("rank",)),
    "problem/bytes_per_token": Entry("bytes of a token on its way, one direction"),
    "problem/count_latency": Entry("a link in use costs its latency too"),
    "problem/expert_bytes": Entry("memory of an expert of one layer"),
    "problem/num_experts": Entry("experts of a layer"),
    "problem/num_layers": Entry("layers"),
    "problem/replicate": Entry("slots left over hold further replicas"),
    "problem/seconds_per_token": Entry("an expert's forward pass on one assignment"),
    "problem/slots_per_rank": Entry("slots of a rank and layer"),
}


def find_entry(path: str, num_axes: int) -> Entry:
    """Return what a figure /chapter/name is, with a name for each axis of its value, whatever the figure."""
    name = path.rpartition("/")[2]
    entry = _CATALOGUE.get(path) or Entry(name.replace("_", " "))
    if len(entry.axes) != num_axes:
        entry = Entry(entry.about, tuple(f"{name}_axis_{number}" for number in range(num_axes)))
    return entry
