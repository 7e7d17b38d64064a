"""Keys of earlier versions of run.toml: refused, and told what stands in their place."""

_LINKS = "in the file of [cluster] links; inputs/links.json shows its form"
_PLACEMENT = "objective count_latency search_seconds search_iterations compare_eplb seconds_per_token replicate"

PLACE_OF_KEY = {
    "links_file": "[cluster] links, which takes the file itself",
    "rack_of_node": "[cluster] racks",
    "data_parallel": "[parallel] data",
    "expert_parallel": "[parallel] expert",
    "tensor_parallel": "[parallel] tensor",
    "placement": "[placement] method",
    "placement_file": "[placement] method, which takes the file itself",
    "probability": "[placement] loads",
    "loads_file": "[placement] loads, which takes the file itself",
    "expert_probability": "in a .json file of such rows, which [placement] loads takes",
    "spare_slots_per_rank": "[placement] spare_slots_per_rank",
    **{key: f"[placement] {key}" for key in _PLACEMENT.split()},
    **{f"rebalance_{key}": f"[rebalance] {key}" for key in ("every", "horizon", "margin", "moves")},
    **{f"{kind}bytes_per_second": _LINKS for kind in ("", "egress_", "ingress_", "uplink_")},
    "latency_seconds": _LINKS,
}  # of what [cluster] had, until it was split by chapters


def find_place(section: str, key: str) -> str | None:
    """Return where a key of an earlier version is now, None for what never was a key."""
    return PLACE_OF_KEY.get(key) if section == "cluster" else None
