"""A run of a Hugging Face model prepared: what training, inference and the report work with."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from hpcmoe.clock import Clock
from hpcmoe.cluster.mesh import Mesh
from hpcmoe.cluster.topology import Topology
from hpcmoe.comm.device import Device
from hpcmoe.config import Config, NetworkSpec
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.traffic import Traffic, make_traffic
from hpcmoe.ending import Ending
from hpcmoe.errors import ConfigError
from hpcmoe.experts.moe import Experts
from hpcmoe.float32 import FLOAT32_BYTES
from hpcmoe.model.text import Text, count_sequences
from hpcmoe.pipeline.lanes import Lanes
from hpcmoe.placement.result import Placement
from hpcmoe.prepare.activations import ActivationTracker
from hpcmoe.prepare.budget import MemoryBudget
from hpcmoe.prepare.memory import Memory
from hpcmoe.prepare.placement import RunPlacement
from hpcmoe.report.meter import Meter
from hpcmoe.run.model_gradients import ModelGradients
from hpcmoe.run.model_optimizer import ModelOptimizer
from hpcmoe.run.token_counts import TokenCounts
from hpcmoe.run.trained_parts import list_expert_layers


class TuningGroup(Protocol):
    """What a run needs of a group (hpcmoe.group.Group)."""

    mesh: Mesh
    topology: Topology
    device: Device
    engine: Lanes
    counts: TokenCounts
    gradients: dict[nn.Module, ModelGradients]

    def lanes(self, step: Callable[[Any], Any], micro_batches: Sequence[Any]) -> Iterator[Any]:
        """Call step(micro_batch) for each micro-batch, several at a time -> their results."""

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each trained parameter's gradient over the ranks that hold it."""

    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients that are summed to a norm of at most max_norm -> the norm before."""

    def rebalance(self, model: nn.Module, optimizer: Any) -> int:
        """Move a model's experts to where their tokens would have them -> how many have moved."""


class JoinedDispatchers:
    """A group's dispatchers as one: their traffic, and the clock of the lanes that drive them."""

    def __init__(self, dispatchers: Sequence[TokenDispatcher], clock: Clock) -> None:
        """dispatchers: one at least; sizes and routes are those of the first."""
        self.dispatchers, self.clock = dispatchers, clock
        self.sizes: Any = dispatchers[0].sizes
        self.routes, self.transport = dispatchers[0].routes, dispatchers[0].transport

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of the message buffers of all."""
        return sum(dispatcher.buffer_bytes for dispatcher in self.dispatchers)

    def pop_traffic(self) -> Traffic:
        """Return what was sent since the last call, of all layers."""
        joined = make_traffic(self.transport.size)
        for dispatcher in self.dispatchers:
            traffic = dispatcher.pop_traffic()
            joined.assignments |= traffic.assignments
            joined.batches |= traffic.batches
            joined.rows += traffic.rows
        return joined


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBlock:
    """A block of the model, as the report looks at it."""

    experts: Experts


class TunedNetwork:
    """A model as the report looks at it: its parameters, and its blocks of experts."""

    def __init__(self, model: nn.Module, layers: Sequence[Experts], mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.layers = [ExpertBlock(experts=layer) for layer in layers]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's parameters."""
        return self.model.parameters()


@dataclass(slots=True, kw_only=True)
class ModelRunner:
    """What runs the model."""

    network: TunedNetwork
    dispatcher: JoinedDispatchers
    tracker: ActivationTracker
    ending: Ending = field(default_factory=Ending)


@dataclass(slots=True, kw_only=True)
class TuningJob:
    """What training, inference and the report of a Hugging Face model work with."""

    config: Config
    group: TuningGroup
    model: Any
    layers: list[Experts]
    optimizer: ModelOptimizer | None  # None in inference
    stepper: ModelRunner
    meter: Meter
    budget: MemoryBudget
    memory: Memory  # of a rank, as computed
    training: Text
    validation: Text
    spec: NetworkSpec  # with the sizes of the model
    loss_unit: str = "nats/token"
    problem: None = None  # experts are dealt evenly
    staged_bytes: int = 0

    @property
    def mesh(self) -> Mesh:
        """Return the ranks' mesh."""
        return self.group.mesh

    @property
    def topology(self) -> Topology:
        """Return where the ranks are."""
        return self.group.topology

    @property
    def placement(self) -> Placement:
        """Return where the experts are now."""
        return join_placements([layer.placement for layer in self.layers])

    @property
    def run_placement(self) -> RunPlacement:
        """Return where the experts are now; nothing else was tried."""
        return RunPlacement(placement=self.placement, seconds_of_method={})

    @property
    def sequences_of_rank(self) -> np.ndarray:
        """Return the number of sequences of a step that each rank reads, [ranks]."""
        data, pipeline = self.config.data, self.config.pipeline
        return count_sequences(data.batch_sequences, pipeline.micro_batches, self.mesh.num_token_shares)


def make_tuning_job(
    config: Config, group: TuningGroup, model: Any, training: Text, validation: Text, process_bytes: int
) -> TuningJob:
    """Make the job of a model whose experts are spread, and its optimizer if it trains. Collective over mesh.world.

    process_bytes: of a rank's process in the steps, beside arrays.
    """
    layers, mesh, trains = list_expert_layers(model), group.mesh, config.run.mode == "train"
    optimizer = ModelOptimizer(model, layers, mesh, config.train, config.run.seed) if trains else None
    dispatcher = JoinedDispatchers(group.engine.dispatchers, group.engine.clock)
    memory = count_memory(model, layers, mesh, optimizer, dispatcher)
    budget = MemoryBudget(
        what="memory",
        node_bytes=group.topology.memory_bytes,
        num_ranks=np.bincount(group.topology.node_of_rank),
        needs={"process": process_bytes, "messages": memory.buffers, "dense parts": memory.dense_with_state},
        process_bytes=process_bytes,
    )
    return TuningJob(
        config=config,
        group=group,
        model=model,
        layers=layers,
        optimizer=optimizer,
        stepper=ModelRunner(
            network=TunedNetwork(model, layers, mesh), dispatcher=dispatcher, tracker=ActivationTracker(model)
        ),
        meter=Meter(dispatcher, mesh),
        budget=budget,
        memory=memory,
        training=training,
        validation=validation,
        spec=make_tuned_spec(config, layers),
    )


def check_sequences(config: Config, num_ranks: int) -> None:
    """Raise ConfigError where a rank would have no sequence of a micro-batch, which no family can take."""
    data, micro_batches = config.data, config.pipeline.micro_batches
    for key in ("batch_sequences", "validation_sequences"):
        if (sequences := getattr(data, key)) // micro_batches < num_ranks:
            least = f"[pipeline] micro_batches {micro_batches} x {num_ranks} ranks = {micro_batches * num_ranks}"
            raise ConfigError(f'[data] {key} = {sequences}: must be at least {least} for [model] source = "hf"')


def make_tuned_spec(config: Config, layers: Sequence[Experts]) -> NetworkSpec:
    """Return what the report needs to know of the network: the largest of its layers' sizes."""
    sizes = {
        name: max(getattr(layer, name) for layer in layers)
        for name in ("hidden", "feed_forward", "num_experts", "top_k")
    }
    return dataclasses.replace(config.spec, model=dataclasses.replace(config.model, num_layers=len(layers), **sizes))


def join_placements(placements: Sequence[Any]) -> Placement:
    """Join placements of one layer each. Their seconds are added; shares of a node are nearest where one's are."""
    (first, *_), split = placements, None
    if all(placement.split is not None for placement in placements):
        split = np.concatenate([placement.split for placement in placements])
    joined = {
        name: np.concatenate([getattr(placement, name) for placement in placements])
        for name in ("expert_of_replica", "replica_count")
    }
    added = {
        name: sum(getattr(placement, name) for placement in placements)
        for name in ("objective_seconds", "lower_bound_seconds")
    }
    return dataclasses.replace(first, split=split, **joined, **added)


def count_memory(
    model: nn.Module,
    layers: Sequence[Experts],
    mesh: Mesh,
    optimizer: ModelOptimizer | None,
    dispatcher: JoinedDispatchers,
) -> Memory:
    """Count a rank's memory from its parameters; activations are measured in the first step."""
    experts = [parameter for layer in layers for parameter in layer.local.parameters()]
    replicas = sum(len(layer.local.local_replicas()) for layer in layers)
    expert_bytes = sum(p.nbytes for p in experts)
    trained = [p for p in model.parameters() if p.requires_grad] if optimizer else []
    stepped = [p for group in optimizer.adamw.param_groups for p in group["params"]] if optimizer else []
    return Memory(
        states=4 if optimizer else 1,
        one_expert=expert_bytes * mesh.tensor_parallel // max(replicas, 1),
        experts=expert_bytes,
        dense=sum(p.nbytes for p in model.parameters()) - expert_bytes,
        gradients=sum(p.nbytes for p in trained),
        optimizer=2 * FLOAT32_BYTES * sum(p.numel() for p in stepped),
        buffers=dispatcher.buffer_bytes,
        copies=0,
        activations=0,
    )
