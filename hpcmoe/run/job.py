"""A run prepared, which opens nothing, then opened: device, dispatcher, network, text."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from hpcmoe.cluster.machine import count_own_cores
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import Device, open_device
from hpcmoe.comm.heap import keep_heap
from hpcmoe.comm.stalls import open_stalls
from hpcmoe.comm.window import check_shared_memory
from hpcmoe.config import Config, NetworkSpec
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import AnySizes, HostSizes, make_device_sizes, make_host_sizes
from hpcmoe.errors import keep_on_root, on_all, on_root
from hpcmoe.model.language import make_model
from hpcmoe.model.split import Split
from hpcmoe.model.text import Text, count_sequences
from hpcmoe.pipeline.lanes import Lanes
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.problem import PlacementProblem, count_slots_per_rank
from hpcmoe.placement.result import Placement
from hpcmoe.prepare.budget import MemoryBudget, make_budget, record_gpu_memory, share_gpu_memory
from hpcmoe.prepare.memory import Memory, estimate_memory
from hpcmoe.prepare.placement import Demand, RunPlacement, make_run_problem, place_experts, time_expert
from hpcmoe.prepare.process import estimate_process
from hpcmoe.prepare.sizes import check_tags, find_routes, make_sizes
from hpcmoe.report.meter import Meter
from hpcmoe.run.dispatchers import find_communicators, open_dispatcher, select_row_backend
from hpcmoe.run.step import Stepper
from hpcmoe.wait import gather_to_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where a run is: ranks, nodes, this rank's device, and what carries rows between the ranks."""

    mesh: Mesh
    topology: Topology
    device: Device
    backend: str  # "window" on the host; "nccl", "direct" or "staged" between devices
    loads: Loads | None  # of the experts, on rank 0 alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of a run before its dispatcher and network are open."""

    topology: Topology  # with the memory of the GPUs
    routes: Routes
    sizes: AnySizes
    memory: Memory  # of a rank, as estimated
    budget: MemoryBudget
    problem: PlacementProblem | None  # that the first placement solves, on rank 0 alone
    run_placement: RunPlacement


@dataclass(slots=True, kw_only=True)
class Job:
    """What training and inference work with; its placement changes when experts move (hpcmoe.run.rebalance)."""

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
    loss_unit: str = "nats/byte"

    @property
    def placement(self) -> Placement:
        """Return where the experts are now."""
        return self.run_placement.placement

    @property
    def spec(self) -> NetworkSpec:
        """Return what the network is."""
        return self.config.spec

    @property
    def sequences_of_rank(self) -> np.ndarray:
        """Return the number of sequences of a step that each rank reads, [ranks]."""
        data, pipeline = self.config.data, self.config.pipeline
        return count_sequences(data.batch_sequences, pipeline.micro_batches, self.mesh.num_token_shares)


@contextlib.contextmanager
def open_job(config: Config, topology: Topology, mesh: Mesh, split: Split, loads: Loads | None) -> Iterator[Job]:
    """Open everything that a run works with, its text split -> Job. Collective over mesh.world, both ends.

    loads are the experts' on rank 0; the other ranks may give None.
    """
    # Open this rank's device, and select what carries rows between the ranks.
    world, here = mesh.world, topology.ranks_of_node(topology.node_of_rank[mesh.world.rank])
    torch.set_num_threads(config.run.threads_per_rank or min(choose_threads(topology, world.rank), count_own_cores()))
    keep_heap()
    device = on_all(world, lambda: open_device(config.comm.device, list(here).index(world.rank)))
    backend = select_row_backend(config.comm, config.pipeline.schedule, world, device)
    cluster = Cluster(mesh=mesh, topology=topology, device=device, backend=backend, loads=loads)

    # Compute what fits and where the experts go; then open what carries rows, and build the network over it.
    prepared = prepare(config, cluster)
    sizes, routes = prepared.sizes, prepared.routes
    with open_stalls(world, 0.0) as stalls, contextlib.ExitStack() as opened:
        dispatcher = opened.enter_context(open_dispatcher(mesh, device, backend, sizes, routes, config.spec.trains))
        lanes = Lanes([dispatcher], dispatcher.clock, config.pipeline.schedule, device.bind_thread, device.generators)
        opened.callback(lanes.close)
        network = make_model(config.spec, mesh, prepared.run_placement.placement, dispatcher, lanes, device)
        lanes.pokes += [network.poke, stalls.poke_answers]
        yield Job(
            config=config,
            topology=prepared.topology,
            mesh=mesh,
            run_placement=prepared.run_placement,
            problem=prepared.problem,
            budget=prepared.budget,
            memory=prepared.memory,
            stepper=Stepper(config, mesh, network, dispatcher, lanes),
            meter=Meter(dispatcher, mesh),
            training=Text(split.training),
            validation=Text(split.validation),
        )


def prepare(config: Config, cluster: Cluster) -> Prepared:
    """Compute routes, sizes, memory and placement; nothing is opened. Collective over mesh.world, to gather.

    Raises ConfigError, ClusterError or PlacementError on all ranks where something does not fit.
    """
    mesh, topology, spec, world = cluster.mesh, cluster.topology, config.spec, cluster.mesh.world

    # Compute how many rows come to a rank at most, and the buffers for them.
    slots = count_slots_per_rank(spec.model.num_experts, mesh.expert_parallel, config.placement.spare_slots_per_rank)
    same_order = config.pipeline.deterministic and spec.trains and config.rebalance.every > 0
    routes = find_routes(config.comm, topology, mesh, slots, spec.model.top_k, same_order)
    common = make_sizes(spec, config.pipeline, config.data.batch_sequences, config.placement.replicate, mesh)
    sizes: AnySizes = make_device_sizes(common, config.comm.buffer_factor)
    if cluster.backend == "window":
        more = config.comm, topology, routes, spec.trains, config.pipeline.deterministic
        sizes = host_sizes = on_all(world, lambda: make_host_sizes(common, *more))
        check_windows(world, topology, host_sizes, routes)
    on_all(world, lambda: check_tags(sizes, spec.model.num_layers))
    buffer_bytes = max(gather_to_all(world, sizes.buffer_bytes(routes)))

    # Estimate what a rank needs besides experts, which leaves the rest of the memory to these.
    memory = estimate_memory(
        spec, mesh, slots, sizes, buffer_bytes,
        shard_optimizer=config.train.shard_optimizer,
        keeps_snapshot=config.write.asynchronous and config.write.checkpoint_every > 0,
        num_moves=config.rebalance.moves if config.rebalance.every > 0 else 0,
    )  # fmt: skip
    gpus = share_gpu_memory(gather_to_all(world, cluster.device.read_memory()))  # asked when every rank has its device
    topology = record_gpu_memory(topology, gpus)
    process_bytes = estimate_process(world, topology.node_of_rank, spec.trains)
    share_of_gpu = None if config.cluster.memory_bytes_per_node else gpus
    num_groups = sum(comm.size > 1 for comm in find_communicators(mesh, cluster.backend, spec.trains).values())
    budget = on_all(world, lambda: make_budget(topology, memory, process_bytes, share_of_gpu, num_groups))

    # Place the experts, on rank 0 for all.
    seconds = config.placement.seconds_per_token or time_expert(spec, mesh, sizes.expert_rows // slots, cluster.device)
    demand = Demand(
        loads=cluster.loads,
        batch_sequences=config.data.batch_sequences,
        seconds_per_token=seconds,
        expert_bytes=memory.per_expert,
    )
    problem = keep_on_root(
        world, lambda: make_run_problem(spec.model, config.placement, demand, topology, mesh, budget)
    )

    def place() -> RunPlacement:
        assert problem is not None  # rank 0 has it
        return place_experts(problem, config.placement, budget, config.run.seed, config.rebalance.every > 0)

    run_placement = on_root(world, place)
    return Prepared(
        topology=topology,
        routes=routes,
        sizes=sizes,
        memory=memory,
        budget=budget,
        problem=problem,
        run_placement=run_placement,
    )


def check_windows(world: MPI.Comm, topology: Topology, sizes: HostSizes, routes: Routes) -> None:
    """Raise ClusterError when all windows on a node exceed its shared memory. Collective over world."""
    node = int(topology.node_of_rank[world.rank])
    shares = len(routes.local_peers) > 1 and routes.local_index == 0  # the first of some local peers speaks for them
    own = sizes.window_sizes(routes).num_bytes(len(routes.local_peers)) if shares else 0
    everyone = gather_to_all(world, (node, own))
    on_all(world, lambda: check_shared_memory(sum(num_bytes for other, num_bytes in everyone if other == node)))


def choose_threads(topology: Topology, rank: int) -> int:
    """Return a rank's share of its node's cores, at least one."""
    node = topology.node_of_rank[rank]
    return max(int(topology.cores_of_node[node]) // len(topology.ranks_of_node(node)), 1)
