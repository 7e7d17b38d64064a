"""A run put together: text, device, placement, transport, exchange, network."""

import contextlib
import math
from dataclasses import dataclass

import psutil
import torch

from hpcmoe.clock import Clock
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import open_device
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.config import Config
from hpcmoe.dispatch.exchange import Exchange, Sizes
from hpcmoe.errors import keep_on_root, on_all, on_root
from hpcmoe.placement.problem import PlacementProblem, slots_for
from hpcmoe.placement.result import Placement
from hpcmoe.run.data import Text
from hpcmoe.run.layout import Layout, find_pace, lay_out, make_problem
from hpcmoe.run.memory import Memory, reckon_memory
from hpcmoe.run.meter import Meter
from hpcmoe.run.model import make_model
from hpcmoe.run.room import Room, reckon_room, share_gpus
from hpcmoe.run.step import Stepper
from hpcmoe.wait import gather_to_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What training and inference work with."""

    config: Config
    topology: Topology
    mesh: Mesh
    placement: Placement
    layout: Layout
    problem: PlacementProblem | None  # that placement solves, on rank 0 alone
    room: Room
    memory: Memory  # of a rank, as reckoned
    stepper: Stepper
    meter: Meter
    training: Text
    validation: Text


@contextlib.contextmanager
def open_job(config, topology, mesh, split, loads):
    """Build everything that a run works with, its text split -> Job. Collective over mesh.world, both ends.

    loads tell rank 0 what the experts' tokens will be; the other ranks may give None.
    """
    world, here = mesh.world, topology.ranks_of_node(topology.node_of_rank[mesh.world.rank])
    torch.set_num_threads(config.run.threads_per_rank or choose_threads(topology, world.rank))
    device = on_all(world, lambda: open_device(config.comm.device, list(here).index(world.rank)))

    # Reckon what a rank needs besides experts, and place these in the rest of the memory.
    sizes = reckon_sizes(config, mesh)
    slots = slots_for(config.model.num_experts, mesh.expert_parallel, config.cluster.spare_slots_per_rank)
    memory = reckon_memory(config, mesh.tensor_parallel, slots, sizes)
    room = find_room(config, topology, world, memory, device)
    pace = find_pace(config, mesh, sizes.expert_rows // slots, device)
    problem = keep_on_root(world, lambda: make_problem(config, topology, mesh, room, memory.per_expert, (loads, pace)))
    layout = on_root(world, lambda: lay_out(problem, config, room))

    with open_mpi_transport(mesh.ep, sizes.row_bytes, config.experts.max_batch_rows) as transport:
        exchange = Exchange(transport, device, Clock(), sizes)
        network = make_model(config, mesh, layout.placement, exchange, device)
        yield Job(
            config=config,
            topology=topology,
            mesh=mesh,
            placement=layout.placement,
            layout=layout,
            problem=problem,
            room=room,
            memory=memory,
            stepper=Stepper(config, mesh, network, exchange),
            meter=Meter(exchange, mesh),
            training=Text(split.training),
            validation=Text(split.validation),
        )


def find_room(config, topology, world, memory, device):
    """Find the memory that each node has for experts, on GPUs where they lie there -> Room. Collective over world."""
    gpus = gather_to_all(world, device.read_memory())  # asked when every rank has opened its device
    share_of_gpu = None if config.cluster.memory_bytes_per_node else share_gpus(gpus)
    process_bytes = max(gather_to_all(world, psutil.Process().memory_full_info().uss))
    return reckon_room(topology, memory, process_bytes, share_of_gpu)


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
