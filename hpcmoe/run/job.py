"""A run put together: text, device, placement, transport, exchange, network."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from hpcmoe.clock import Clock
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.placement import Placement, PlacementProblem, make_placement, slots_for
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import open_device
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.config import Config
from hpcmoe.dispatch.exchange import Exchange, Sizes
from hpcmoe.errors import PlacementError, on_all, on_root
from hpcmoe.run.data import Text
from hpcmoe.run.memory import Memory, reckon_memory
from hpcmoe.run.meter import Meter
from hpcmoe.run.model import make_model
from hpcmoe.run.step import Stepper
from hpcmoe.wait import gather_to_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What training and inference work with."""

    config: Config
    topology: Topology
    mesh: Mesh
    placement: Placement
    memory: Memory  # of a rank, as reckoned
    stepper: Stepper
    meter: Meter
    training: Text
    validation: Text


@contextlib.contextmanager
def open_job(config, topology, mesh, split):
    """Build everything that a run works with, its text split -> Job. Collective over mesh.world, both ends."""
    world, here = mesh.world, topology.ranks_of_node(topology.node_of_rank[mesh.world.rank])
    torch.set_num_threads(config.run.threads_per_rank or choose_threads(topology, world.rank))
    device = on_all(world, lambda: open_device(config.comm.device, list(here).index(world.rank)))

    # Reckon what a rank needs, and place the experts in the rest of the memory.
    sizes = reckon_sizes(config, mesh)
    slots = slots_for(config.model.num_experts, mesh.expert_parallel, config.cluster.spare_slots_per_rank)
    memory = reckon_memory(config, mesh.tensor_parallel, slots, sizes)
    process_bytes = max(gather_to_all(world, psutil.Process().memory_full_info().uss))
    problem = make_problem(config, topology, mesh, memory.per_expert, memory.besides_experts + process_bytes)
    placement = on_root(world, lambda: place_experts(problem, config.cluster.placement, memory, process_bytes))

    with open_mpi_transport(mesh.ep, sizes.row_bytes, config.experts.max_batch_rows) as transport:
        exchange = Exchange(transport, device, Clock(), sizes)
        network = make_model(config, mesh, placement, exchange, device)
        yield Job(
            config=config,
            topology=topology,
            mesh=mesh,
            placement=placement,
            memory=memory,
            stepper=Stepper(config, mesh, network, exchange),
            meter=Meter(exchange, mesh),
            training=Text(split.training),
            validation=Text(split.validation),
        )


def choose_threads(topology, rank):
    """Share a node's cores among its ranks -> threads of each, at least one."""
    node = topology.node_of_rank[rank]
    return max(int(topology.cores_of_node[node]) // len(topology.ranks_of_node(node)), 1)


def reckon_sizes(config, mesh):
    """Compute how many rows a micro-batch brings at most to a rank's home, and likely to its experts -> Sizes."""
    model, pipeline, cluster = config.model, config.pipeline, config.cluster
    sequences = math.ceil(math.ceil(config.data.batch_sequences / pipeline.micro_batches) / mesh.num_token_shares)
    home_rows = sequences * model.sequence_length * model.top_k

    # With fewer experts than ranks and no replicas, the ranks that hold one serve the others too.
    busy = mesh.expert_parallel if cluster.replicate else min(model.num_experts, mesh.expert_parallel)
    expected = home_rows * mesh.expert_parallel / busy
    return Sizes(
        hidden=model.hidden,
        dtype=getattr(torch, model.dtype),
        home_rows=home_rows,
        expert_rows=math.ceil(config.comm.buffer_factor * expected),
        num_berths=1 if pipeline.schedule == "serial" else min(pipeline.in_flight, pipeline.micro_batches),
        num_micro_batches=pipeline.micro_batches,
        max_batch_rows=config.experts.max_batch_rows,
        deterministic=pipeline.deterministic,
    )


def place_experts(problem, method, memory, process_bytes):
    """Solve the placement problem, or say what else takes the memory."""
    try:
        return make_placement(problem, method)
    except PlacementError as fault:
        others = memory.besides_experts + process_bytes
        raise PlacementError(
            f"{fault}; of its node's memory each rank needs {others / 1e6:.0f} MB besides experts: "
            f"process {process_bytes / 1e6:.0f}, dense parts {memory.dense * memory.states / 1e6:.0f}, "
            f"messages {memory.buffers / 1e6:.0f}, activations {memory.activations / 1e6:.0f}"
        ) from None


def make_problem(config, topology, mesh, bytes_of_expert, other_bytes):
    """State the placement problem of the first expert-parallel group -> PlacementProblem.

    Every other group lies alike over its own ranks. An expert takes bytes_of_expert with all its state; a rank needs
    other_bytes before it holds any.
    """
    model, cluster, width = config.model, config.cluster, mesh.tensor_parallel
    ranks = np.arange(mesh.expert_parallel) * width
    nodes, node_of_rank = np.unique(topology.node_of_rank[ranks], return_inverse=True)
    ranks_of_node = np.bincount(topology.node_of_rank)[nodes]
    room = np.maximum(topology.memory_bytes[nodes] / ranks_of_node - other_bytes, 0)  # for experts, of a rank
    copies = config.data.batch_sequences * model.sequence_length * model.top_k / mesh.num_token_shares
    return PlacementProblem(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        slots_per_rank=slots_for(model.num_experts, mesh.expert_parallel, cluster.spare_slots_per_rank),
        replicate=cluster.replicate,
        node_of_rank=node_of_rank,
        rack_of_node=topology.rack_of_node[nodes],
        bytes_per_second=topology.bytes_per_second[np.ix_(nodes, nodes)],
        latency_seconds=topology.latency_seconds[np.ix_(nodes, nodes)],
        memory_bytes=(room * width * np.bincount(node_of_rank)).astype(np.int64),
        expert_bytes=bytes_of_expert,
        bytes_per_token=model.hidden * getattr(torch, model.dtype).itemsize,
        tokens_of_rank=np.full(mesh.expert_parallel, copies),
        node_names=tuple(topology.node_names[node] for node in nodes),
        probability=np.broadcast_to(1 / model.num_experts, (model.num_layers, len(nodes), model.num_experts)),
    )
