"""One MoE layer of hpcmoe, opened as a run opens it: router, plan, dispatch, experts, combine, residual."""

import contextlib

import torch
from bench.stages import carry

from hpcmoe.cluster.discover import read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import Config, DataConfig, DispatchConfig, ModelConfig, PipelineConfig, PlacementConfig, RunConfig
from hpcmoe.errors import on_root
from hpcmoe.experts.feed_forward import make_expert_weights
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.model.text import find_text
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.run.job import open_job
from hpcmoe.write.problem import read_loads

SEQUENCE = 16  # tokens; without attention it matters only that it divides the tokens of a rank
SEED = 3


def make_config(shape):
    """State a run of this layer alone, its experts laid on the ranks in order -> Config."""
    return Config(
        run=RunConfig(mode="train" if shape.training else "infer", threads_per_rank=1, seed=SEED),
        model=ModelConfig(
            hidden=shape.hidden, feed_forward=shape.feed_forward, num_layers=1, num_experts=shape.experts,
            top_k=shape.top_k, attention=False, sequence_length=SEQUENCE, dtype=shape.dtype,
        ),
        placement=PlacementConfig(method="contiguous", seconds_per_token=1e-6),
        dispatch=DispatchConfig(load_feedback=0.0),
        pipeline=PipelineConfig(micro_batches=1, schedule="serial", deterministic=False),
        data=DataConfig(batch_sequences=shape.ranks * shape.tokens // SEQUENCE),
    )  # fmt: skip


@contextlib.contextmanager
def open_layer(comm, shape):
    """Open the layer of a shape -> Layer. Collective over comm, both ends."""
    config = make_config(shape)
    topology = read_topology(comm, config.cluster)
    split = on_root(comm, lambda: find_text(config.data, config.model.sequence_length))
    loads = find_loads(config.placement.loads, config.model, read_loads)
    with open_mesh(comm, config.parallel) as mesh, open_job(config, topology, mesh, split, loads) as job:
        yield Layer(job)


def draw_expert(shape, expert):
    """Draw an expert's matrices as the layer of this shape has them -> dict up [F, H], down [H, F], float32."""
    return make_expert_weights(make_expert_shape(make_config(shape).spec), (SEED, 0, expert), 0, 1)


class Layer:
    """The one layer of a job, called by itself: its router and its experts. All its calls are collective."""

    def __init__(self, job):
        block, self.dispatcher = job.stepper.network.layers[0], job.stepper.dispatcher
        self.router, self.experts = block.router, block.experts
        self.device = job.stepper.network.device
        self.load = torch.ones(job.config.model.num_experts, device=self.device.torch_device)

    @property
    def router_weight(self):
        """The gate's matrix. [E, H] float32"""
        return self.router.weight.detach()

    def call(self, x):
        """x [T, H] float32 -> x and what its experts add to it [T, H]."""
        routing = self.choose(x)
        return self.experts(x, routing.experts, routing.gates, routing.kept, residual=x)

    def forward(self, x):
        """x [T, H] float32 -> the next layer's x [T, H]."""
        with torch.no_grad():
            return self.call(x)

    def train(self, x, grad):
        """Go forward from x [T, H] and back from the gradient of the result -> that of x; weights' gradients add up."""
        x = x.detach().requires_grad_()
        self.call(x).backward(grad)
        return x.grad

    def choose(self, x):
        """Choose experts for x [T, H] -> Routing."""
        return self.router(x, self.load)

    def route(self, x):
        """Choose experts for x [T, H] -> what `carry` takes: x, its plan and gates."""
        with torch.no_grad():
            routing = self.choose(x)
            return x, self.dispatcher.plan(routing.experts, routing.kept, self.experts.chooser), routing.gates

    def carry(self, routed):
        """Dispatch and combine: rows reach their experts, who do nothing, and come home."""
        with torch.no_grad():
            carry(self.dispatcher, *routed)
