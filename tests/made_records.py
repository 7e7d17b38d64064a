"""Records as runs write them, of any size, without a run: for the report and its tests."""

import h5py
import numpy as np

STAGES = ("data", "dense", "route", "dispatch", "compute", "combine", "optimizer", "waiting")
CONFIG = '[run]\nname = "made"\nsteps = 40\n# --set model.top_k=1'


def write_metric(file, name, steps, values, unit=""):
    """Write a metric."""
    group = file.require_group(name)
    group.attrs["unit"] = unit
    group["step"], group["value"] = np.asarray(steps), np.asarray(values)


def make_record(path, layers=2, experts=8, nodes=2, ranks_per_node=2, points=12, moves=True, seed=0, **values):
    """Write a run.h5 of these sizes -> path; values: by chapter__name, replace what it holds, None leaves out."""
    rng, ranks = np.random.default_rng(seed), nodes * ranks_per_node
    steps = np.arange(1, points + 1)
    slots = -(-experts // ranks)
    layout = np.full((layers, ranks * slots), -1)
    layout[:, :experts] = np.arange(experts)
    rates = np.where(np.eye(nodes, dtype=bool), 1e10, 1e8)
    load = rng.gamma(4, 0.25, (points, layers, experts))
    with h5py.File(path, "w") as file:
        for name in STAGES:
            write_metric(file, f"run/seconds_{name}", steps, 0.01 * (1 + rng.random(points)), "s")
        write_metric(file, "run/seconds", steps, 0.1 * (1 + rng.random(points)), "s")
        write_metric(file, "run/tokens_per_second", steps, 1e4 * (1 + rng.random(points)), "tokens/s")
        write_metric(file, "train/loss", steps, 5 / np.sqrt(steps), "nats/byte")
        write_metric(file, "train/validation_loss", [0, points], [5.5, 2.5], "nats/byte")
        write_metric(file, "train/gradient_norm", steps, rng.random(points))
        write_metric(file, "experts/utilisation", steps, load / load.mean(axis=2, keepdims=True), "U_e")
        write_metric(file, "experts/balancedness", steps, 0.5 + rng.random(points) / 2)
        write_metric(file, "experts/balancedness_of_layer", steps, 0.5 + rng.random((points, layers)) / 2)
        write_metric(file, "dispatch/link_sigma", steps, rng.random(points))
        write_metric(file, "dispatch/link_sigma_of_layer", steps, rng.random((points, layers)))
        if moves:
            moved = np.stack([layout, layout[:, ::-1]])
            write_metric(file, "cluster/migrated", [1, points // 2], moved)
            write_metric(file, "cluster/moved", [points // 2], [3.0])
        for name, value in (list_values(layers, experts, nodes, ranks, slots, layout, rates, load) | values).items():
            if value is not None:
                file[name.replace("__", "/")] = value
    return path


def list_values(layers, experts, nodes, ranks, slots, layout, rates, load):
    """List the values of the whole run, by chapter__name."""
    node_of_rank = np.repeat(np.arange(nodes), ranks // nodes)
    names, racks = [f"node{number:03d}" for number in range(nodes)], np.arange(nodes) * 2 // max(nodes, 2)
    num_racks = int(racks.max()) + 1
    cluster = {"node_of_rank": node_of_rank, "rack_of_node": racks, "node_names": names, "bytes_per_second": rates,
               "expert_of_replica": layout, "lower_bound_seconds": 1e-3, "objective_seconds": 2e-3,
               "placement": "packed",
               "source": [["links", "measured"]]}  # fmt: skip
    problem = {
        "num_layers": layers, "num_experts": experts, "slots_per_rank": slots, "replicate": False,
        "node_of_rank": node_of_rank, "rack_of_node": racks, "bytes_per_second": rates,
        "latency_seconds": np.zeros((nodes, nodes)), "egress_bytes_per_second": np.full(nodes, 1e9),
        "ingress_bytes_per_second": np.full(nodes, 1e9), "uplink_bytes_per_second": np.full(num_racks, 1e9),
        "memory_bytes": np.full(nodes, 10**12), "expert_bytes": 1000, "bytes_per_token": 256.0,
        "seconds_per_token": 1e-6, "tokens_of_rank": np.full(ranks, 64.0),
        "probability": np.full((layers, 1, experts), 1 / experts), "objective": "step", "count_latency": False,
        "node_names": names,
    }  # fmt: skip
    others = {
        "run__config": CONFIG, "run__versions": [["hpcmoe", "0.5.0"], ["numpy", "2.4"]],
        "run__tokens_per_second_overall": 12345.0, "run__peak_resident_bytes": 5 * 10**8,
        "comm__bytes_of_link": 1e6 * np.arange(1.0, ranks**2 + 1).reshape(ranks, ranks) / ranks**2,
        "dispatch__link_sigma_floor": 0.1, "dispatch__link_sigma_aim": 0.2,
        "experts__tokens_of_node": np.repeat(load.sum(axis=0)[:, None], nodes, axis=1),
        "memory__parts": ["experts, parameters", "gradients", "all of these"],
        "memory__computed_bytes": [10**6, 2 * 10**6, 3 * 10**6], "memory__measured_bytes": [10**6, 10**6, 2 * 10**6],
    }  # fmt: skip
    named = {"cluster": cluster, "problem": problem}
    return others | {f"{chapter}__{name}": value for chapter, each in named.items() for name, value in each.items()}
