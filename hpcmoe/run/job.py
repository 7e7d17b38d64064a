"""A run put together: text, device, placement, transport, dispatcher, network."""

import contextlib
from dataclasses import dataclass

import torch

from hpcmoe.clock import Clock
from hpcmoe.cluster.discover import Topology
from hpcmoe.cluster.machine import count_own_cores
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.comm.device import open_device
from hpcmoe.comm.heap import keep_heap
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.transport import Loopback
from hpcmoe.comm.window import check_shared_memory, open_window
from hpcmoe.config import Config
from hpcmoe.dispatch.host import HostDispatcher
from hpcmoe.errors import ClusterError, keep_on_root, on_all, on_root
from hpcmoe.model.language import make_model
from hpcmoe.model.text import Text
from hpcmoe.placement.problem import PlacementProblem, count_slots_per_rank
from hpcmoe.prepare.budget import MemoryBudget, make_budget, share_gpu_memory
from hpcmoe.prepare.gpus import (
    find_communicators,
    open_device_dispatcher,
    record_gpu_memory,
    select_device_backend,
)
from hpcmoe.prepare.memory import Memory, estimate_memory
from hpcmoe.prepare.placement import RunPlacement, make_run_problem, place_experts, time_expert
from hpcmoe.prepare.process import estimate_process
from hpcmoe.prepare.sizes import check_tags, find_routes, make_sizes
from hpcmoe.report.meter import Meter
from hpcmoe.run.step import Stepper
from hpcmoe.wait import barrier, gather_to_all


@dataclass(slots=True, kw_only=True)
class Job:
    """What training and inference work with; its layout changes when experts move (hpcmoe.run.rebalance)."""

    config: Config
    topology: Topology
    mesh: Mesh
    run_placement: RunPlacement
    problem: PlacementProblem | None  # that the first placement solves, on rank 0 alone
    budget: MemoryBudget
    memory: Memory  # of a rank, as estimated
    stepper: Stepper
    meter: Meter
    training: Text
    validation: Text
    staged_bytes: int = 0  # the most that this rank has held of experts on their way to it

    @property
    def placement(self):
        """Where the experts are now -> Placement."""
        return self.run_placement.placement


@contextlib.contextmanager
def open_job(config, topology, mesh, split, loads):
    """Build everything that a run works with, its text split -> Job. Collective over mesh.world, both ends.

    loads tell rank 0 what the experts' tokens will be; the other ranks may give None.
    """
    world, here = mesh.world, topology.ranks_of_node(topology.node_of_rank[mesh.world.rank])
    torch.set_num_threads(config.run.threads_per_rank or min(choose_threads(topology, world.rank), count_own_cores()))
    keep_heap()
    device = on_all(world, lambda: open_device(config.comm.device, list(here).index(world.rank)))
    kind, trains = select_backend(config, world, device), config.run.mode == "train"

    # Estimate what a rank needs besides experts, and place these in the rest of the memory.
    slots = count_slots_per_rank(config.model.num_experts, mesh.expert_parallel, config.cluster.spare_slots_per_rank)
    routes = find_routes(config, topology, mesh, slots)
    sizes = on_all(world, lambda: make_sizes(config, topology, mesh, routes, on_device=kind != "window"))
    if kind == "window":
        check_windows(world, topology, sizes, routes)
    on_all(world, lambda: check_tags(sizes, config.model.num_layers))
    buffer_bytes = max(gather_to_all(world, sizes.buffer_bytes(routes)))
    memory = estimate_memory(config, mesh, slots, sizes, buffer_bytes)
    gpus = share_gpu_memory(gather_to_all(world, device.read_memory()))  # asked when every rank has opened its device
    topology = record_gpu_memory(topology, gpus)
    communicators = find_communicators(mesh, kind, trains).values()
    share_of_gpu = None if config.cluster.memory_bytes_per_node else gpus
    budget = find_budget(topology, world, memory, share_of_gpu, sum(comm.size > 1 for comm in communicators), trains)
    seconds = time_expert(config, mesh, sizes.expert_rows // slots, device)
    problem = keep_on_root(
        world, lambda: make_run_problem(config, topology, mesh, budget, memory.per_expert, (loads, seconds))
    )
    layout = on_root(world, lambda: place_experts(problem, config, budget))

    opened = (
        open_host_dispatcher(mesh.group, device, sizes, routes)
        if kind == "window"
        else open_device_dispatcher(mesh, device, sizes, routes, kind, trains)
    )
    with opened as dispatcher:
        network = make_model(config, mesh, layout.placement, dispatcher, device)
        yield Job(
            config=config,
            topology=topology,
            mesh=mesh,
            run_placement=layout,
            problem=problem,
            budget=budget,
            memory=memory,
            stepper=Stepper(config, mesh, network, dispatcher),
            meter=Meter(dispatcher, mesh),
            training=Text(split.training),
            validation=Text(split.validation),
        )


def check_windows(world, topology, sizes, routes):
    """Raise ClusterError when all windows on a node exceed its shared memory. Collective over world."""
    node = int(topology.node_of_rank[world.rank])
    shares = len(routes.local_peers) > 1 and routes.local_index == 0  # the first of some local peers speaks for them
    own = sizes.window_sizes(routes).num_bytes(len(routes.local_peers)) if shares else 0
    everyone = gather_to_all(world, (node, own))
    on_all(world, lambda: check_shared_memory(sum(num_bytes for other, num_bytes in everyone if other == node)))


def select_backend(config, world, device):
    """Find who carries the ranks' rows: "window" on the host, else what select_device_backend chooses. Collective over world.

    Raises ClusterError on all ranks when only some have a GPU, or none has and [comm] asks for what GPUs have.
    """
    names = gather_to_all(world, device.name)
    if len(set(names)) > 1:
        ranks = ", ".join(str(rank) for rank, name in enumerate(names) if name == "host")
        on_root(world, lambda: _reject(f'[comm] device = "{config.comm.device}": ranks {ranks} have no GPU, others do'))
    if device.name == "host":
        if config.comm.transport == "nccl":
            on_root(world, lambda: _reject('[comm] transport = "nccl": the ranks have no GPU; use "auto", or "mpi"'))
        return "window"
    if config.comm.once_per_node == "on":
        on_root(world, lambda: _reject('[comm] once_per_node = "on": between GPUs each copy is sent; use "auto"'))
    return select_device_backend(config, world, device).kind


def _reject(text):
    """Raise ClusterError."""
    raise ClusterError(text)


def find_budget(topology, world, memory, share_of_gpu, num_communicators, trains):
    """Find the memory of each node for experts, a GPU's where they lie there -> MemoryBudget. Collective over world."""
    process_bytes = estimate_process(world, topology.node_of_rank, trains)
    return on_all(world, lambda: make_budget(topology, memory, process_bytes, share_of_gpu, num_communicators))


def choose_threads(topology, rank):
    """Share a node's cores among its ranks -> threads of each, at least one."""
    node = topology.node_of_rank[rank]
    return max(int(topology.cores_of_node[node]) // len(topology.ranks_of_node(node)), 1)


@contextlib.contextmanager
def open_host_dispatcher(comm, device, sizes, routes):
    """Open what carries the rows among the ranks of comm -> HostDispatcher. Collective over comm, both ends."""
    barrier(comm)
    local_comm = comm.Split(int(routes.local_peers[0]), comm.rank)
    one_node = len(routes.local_peers) == comm.size
    with (
        open_window(local_comm, sizes.window_sizes(routes)) as window,
        contextlib.nullcontext(Loopback(comm.rank, comm.size))
        if one_node
        else open_mpi_transport(comm, sizes.row_bytes) as transport,
    ):
        yield HostDispatcher(transport, window, device, Clock(), sizes, routes)
    local_comm.Free()
