"""A group of ranks for any torch model: where they are, what carries rows among them, and what its layers share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer as TorchOptimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from hpcmoe.checkpointing import load_model, save_model
from hpcmoe.clock import Clock
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import open_device
from hpcmoe.comm.failures import open_failures
from hpcmoe.comm.heap import keep_heap
from hpcmoe.comm.reduce import make_reducer
from hpcmoe.comm.stalls import Stalls, open_stalls
from hpcmoe.config import CommConfig, DispatchConfig, ParallelConfig
from hpcmoe.errors import ConfigError, HpcmoeError, TrainingError, agree_on, on_all, share
from hpcmoe.experts.losses import LaneSums
from hpcmoe.experts.moe import Experts, LayerParts, MoE
from hpcmoe.experts.options import GroupOptions, make_options
from hpcmoe.experts.own import Dispatcher
from hpcmoe.hangs import watched_group
from hpcmoe.model.balance import update_routers
from hpcmoe.pipeline.lanes import SCHEDULES, Lanes
from hpcmoe.prepare.layer import choose_method, make_layer_experts, place_layer
from hpcmoe.prepare.sizes import make_layer_sizes
from hpcmoe.run.dispatchers import select_row_backend
from hpcmoe.run.layer_moves import rebalance_layers
from hpcmoe.run.model_gradients import ModelGradients
from hpcmoe.run.ranks import OPEN, check_comm, choose_own_threads, read_group_topology, torch_threads
from hpcmoe.run.shared_dispatchers import SharedDispatchers
from hpcmoe.run.token_counts import TokenCounts
from hpcmoe.validate import validate_arguments

_BUCKET_BYTES = 4_000_000  # of gradients in one message

StepResult = TypeVar("StepResult")
MicroBatch = TypeVar("MicroBatch")


class Group:
    """Ranks that run one model together: hpcmoe.open() makes it, its layers take it."""

    def __init__(self, dispatchers: SharedDispatchers, options: GroupOptions, stalls: Stalls) -> None:
        """dispatchers: those that the layers share, none as yet."""
        self.dispatchers, self.options, self.stalls = dispatchers, options, stalls
        self.mesh, self.topology, self.device = dispatchers.mesh, dispatchers.topology, dispatchers.device
        self.rank, self.size = self.mesh.world.rank, self.mesh.world.size
        self.layers: list[Experts | Dispatcher] = []
        self.routers: list[MoE] = []
        self.engine = Lanes([], Clock(), options.schedule, self.device.bind_thread, self.device.generators)
        self.engine.pokes.append(stalls.poke_answers)
        self.sums: LaneSums | None = None
        self.refuses_more, self.num_optimizer_steps = options.reject_more, 0
        self.counts = TokenCounts(self.mesh.world, self.layers, self.topology.node_of_rank)
        self.gradients: dict[nn.Module, ModelGradients] = {}

    def lanes(
        self,
        step: Callable[[MicroBatch], StepResult],
        micro_batches: Sequence[MicroBatch],
        in_flight: int | None = None,
        schedule: str | None = None,
    ) -> Iterator[StepResult]:
        """Call step(micro_batch) for each micro-batch, several at a time -> an iterator of the results, in order.

        While one waits for rows another goes on. in_flight: that of the group by default, or what divides it.
        schedule: "serial", "overlap" or "arrival", by default the group's. A step calls forward and backward as it
        likes; what it raises is raised here. Collective over the group: as many micro-batches on every rank.
        """
        most = self.options.in_flight
        if in_flight is not None and (in_flight < 1 or most % in_flight):  # else lanes would share buffers
            raise ConfigError(f"hpcmoe lanes: in_flight = {in_flight}: must divide that of hpcmoe.open, {most}")
        if schedule is not None and schedule not in SCHEDULES:
            raise ConfigError(f"hpcmoe lanes: schedule = {schedule!r}: must be 'serial', 'overlap' or 'arrival'")
        self.engine.kind = schedule or self.options.schedule
        for gradients in self.gradients.values() if torch.is_grad_enabled() else ():
            gradients.expect(len(micro_batches))
        try:
            results = self.engine.run(lambda m: step(micro_batches[m]), len(micro_batches), in_flight or most)
        finally:
            self.engine.kind = self.options.schedule
        return iter(results)

    def save(
        self,
        folder: Path | str,
        model: nn.Module,
        optimizer: TorchOptimizer | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write a model, its optimizer and extra (what JSON holds) to a folder, whole or not at all.

        Collective over the group. Raises CheckpointError on all ranks.
        """
        self.meet("save")
        save_model(self.mesh, folder, model, optimizer, extra)

    def load(self, folder: Path | str, model: nn.Module, optimizer: TorchOptimizer | None = None) -> dict[str, Any]:
        """Read what save() wrote, on any number of ranks -> extra. Collective over the group.

        Raises CheckpointError on all ranks, before anything has changed.
        """
        self.meet("load")
        return load_model(self.mesh, folder, model, optimizer)

    def loads(self, by_node: bool = False) -> list[np.ndarray]:
        """Return the tokens that each expert of each layer has had since the last call, on all ranks -> int64 [E] each.

        by_node: [nodes, E], by the node that was their home. Collective over the group.
        """
        self.meet("loads")
        return self.counts.pop("loads", by_node=by_node)

    def update_routers(self) -> None:
        """Move the load feedback and the biases of all MoE layers by what was routed since the last call.

        Call it after the optimizer's step. Collective over the group.
        """
        self.meet("update_routers")
        update_routers(self.routers, self.counts.pop("update_routers"))

    def rebalance(self, model: nn.Module, optimizer: TorchOptimizer | None = None) -> int:
        """Move a model's experts to where their tokens since the last call would have them -> how many have moved.

        The optimizer's state of them moves too. Between an optimizer's step and the next forward pass. A second or so a
        layer for the search. Collective over the group.
        """
        self.meet("rebalance")
        counts = self.counts.pop("rebalance", by_node=True)
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        loads = {layer: counts[layer.number] for layer in layers if counts[layer.number].any()}
        return rebalance_layers(self.mesh, self.topology, loads, optimizer)

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each trained parameter's gradient over the ranks that hold it: of experts its replicas, else all.

        From the second step on, sums begin during the last backward pass. A parameter without a gradient on all ranks
        keeps none. Collective over the group. Raises TrainingError on all ranks where their parameters differ.
        """
        self.meet("sum_gradients")
        if model not in self.gradients:
            groups = next((dispatcher.sum_groups for dispatcher in self.engine.dispatchers), None)
            reducer = make_reducer(self.mesh, self.device, groups, _BUCKET_BYTES)
            experts = [layer for layer in self.layers if isinstance(layer, Experts)]
            self.gradients[model] = ModelGradients(model, experts, reducer)
            self.engine.pokes.append(self.gradients[model].poke)
        self.gradients[model].finish()

    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients that are summed to a norm of at most max_norm -> the norm before.

        Each logical parameter counts once. Collective over the group. Raises TrainingError before sum_gradients().
        """
        self.meet("clip_grad_norm_")
        if model not in self.gradients:
            raise TrainingError("clip_grad_norm_: no gradients are summed yet: call sum_gradients first")
        return self.gradients[model].clip_grad_norm_(max_norm)

    def finish(self) -> None:
        """Finish what other ranks want, and sums that nobody has waited for. Collective over the group."""
        self.engine.drain()
        if self.sums is not None:
            self.sums.finish()
        self.meet("finish")

    def meet(self, call: str) -> None:
        """Wait for all ranks to make the same call. Collective over the group; raises ClusterError on all ranks."""
        self.engine.check_open()
        self.stalls.meet(call, self.poke)

    def poke(self) -> bool:
        """Advance what goes on beside this rank's computing, without waiting -> whether anything moved."""
        return self.engine.poke()

    def add_layer(self, layer: Experts | Dispatcher, **arguments: Any) -> LayerParts:
        """Check that all ranks build the same layer, place its experts, and open what carries their rows.

        Collective over the group. Raises ConfigError, PlacementError or ClusterError on all ranks.
        """
        self.meet("add_layer")
        number, mesh = len(self.layers), self.mesh
        where = f"hpcmoe.{type(layer).__name__}, layer {number}"
        if arguments["max_tokens"] is None:
            arguments["max_tokens"] = self.options.max_tokens
        options = agree_on(mesh.world, where, lambda: make_options(where, mesh.tensor_parallel, **arguments))
        try:
            placement = place_layer(self.topology, mesh, make_layer_experts(options, mesh), choose_method(options))
        except HpcmoeError as error:
            raise share(type(error)(f"{where}: {error}")) from None
        busy = len(np.unique(placement.rank_of_replica[placement.expert_of_replica[0] >= 0]))
        sizes = make_layer_sizes(options, mesh, busy, self.options.in_flight)
        dispatcher, is_new = self.dispatchers.find(
            sizes, placement.slots_per_rank, number if isinstance(layer, Dispatcher) else None
        )
        if is_new:
            self.engine.dispatchers.append(dispatcher)
        self.layers.append(layer)
        return LayerParts(
            number=number,
            options=options,
            placement=placement,
            dispatcher=dispatcher,
            mesh=mesh,
            device=self.device,
            turns=self.engine,
        )

    def add_router(self, moe: MoE, **arguments: Any) -> tuple[DispatchConfig, LaneSums]:
        """Check that all ranks build the same router -> its settings, and what sums its losses' counts.

        Collective over the group. Raises ConfigError on all ranks.
        """
        self.meet("add_router")
        world, where = self.mesh.world, f"hpcmoe.MoE, layer {len(self.layers)}"
        settings = agree_on(world, where, lambda: validate_arguments(DispatchConfig, arguments, where))
        self.routers.append(moe)
        return settings, self.open_sums()

    def open_sums(self) -> LaneSums:
        """Return what sums counts over all ranks beside the lanes, opened at the first call. Collective."""
        if self.sums is None:
            self.sums = LaneSums([self.dispatchers.open_comm() for _ in range(self.options.in_flight)], self.device)
            self.engine.pokes.append(self.sums.poke)
        return self.sums

    def count_step(self, *_: Any) -> None:
        """Callback: an optimizer has stepped."""
        self.num_optimizer_steps += 1


@contextlib.contextmanager
def open(
    comm: MPI.Intracomm | None = None,
    *,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    expert_parallel: int = 0,
    device: str = "auto",
    links: str | Topology | None = None,
    schedule: str = "overlap",
    deterministic: bool = True,
    in_flight: int = 2,
    max_tokens: int = 4096,
    reject_more: bool = False,
    threads: int = 0,
    hang_seconds: float = 1800.0,
) -> Iterator[Group]:
    """Open a group of the ranks of comm, all of the world by default. Collective over comm, both ends.

    Experts are spread over expert_parallel ranks (0: what the others leave), each over tensor_parallel ranks, and held
    data_parallel times; the product is the number of ranks. device: "auto", "host" or "cuda". links: None takes all
    links between nodes as alike, "measure" measures them for some seconds, else a links file or a Topology. schedule,
    in_flight: how micro-batches take turns (Group.lanes). deterministic: the same bits at every run, but for lanes by
    "arrival". max_tokens: of a rank in one exchange; a call with more takes several, or is an error by reject_more.
    threads of torch while the group is open, 0: this rank's share of its node's cores; malloc keeps large blocks from
    then on. hang_seconds: a rank that does nothing here for so long, while others wait, is named with its stack, and
    ClusterError raised by those; 10 s later it is killed, as nothing else ends what hangs outside Python; 0: never.
    Raises ConfigError or ClusterError on all ranks.
    """
    arguments = {
        "tensor_parallel": tensor_parallel, "data_parallel": data_parallel, "expert_parallel": expert_parallel,
        "device": device, "links": "" if links is None or isinstance(links, Topology) else links, "schedule": schedule,
        "deterministic": deterministic, "in_flight": in_flight, "max_tokens": max_tokens, "reject_more": reject_more,
        "threads": threads, "hang_seconds": hang_seconds,
    }  # fmt: skip
    world = check_comm(comm)
    options = agree_on(world, OPEN, lambda: validate_arguments(GroupOptions, arguments, OPEN))
    topology = read_group_topology(world, links if isinstance(links, Topology) else options.links)
    parallel = ParallelConfig(data=options.data_parallel, expert=expert_parallel, tensor=tensor_parallel)
    with (
        watched_group(world, options.hang_seconds),
        open_failures(world),
        open_stalls(world) as stalls,
        open_mesh(world, parallel) as mesh,
        torch_threads(options.threads or choose_own_threads(topology, mesh)),
    ):
        keep_heap()
        here = topology.ranks_of_node(topology.node_of_rank[mesh.world.rank]).tolist()
        own = on_all(mesh.world, lambda: open_device(options.device, here.index(mesh.world.rank)))
        config = CommConfig(device=options.device)
        backend = select_row_backend(config, options.schedule, mesh.world, own)
        dispatchers = SharedDispatchers(mesh, topology, own, config, backend, options.deterministic)
        group = Group(dispatchers, options, stalls)
        hook = register_optimizer_step_post_hook(group.count_step)
        try:
            with dispatchers.stack:
                yield group
                group.finish()
        finally:
            hook.remove()
            group.engine.close()
