"""One MoE layer of hpcmoe, opened as a run opens it: router, plan, dispatch, experts, combine, residual."""

import contextlib

import torch
from bench.stages import carry, finish

from hpcmoe.cluster.discover import read_topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import Config, DataConfig, DispatchConfig, ModelConfig, PipelineConfig, PlacementConfig, RunConfig
from hpcmoe.errors import on_root
from hpcmoe.experts.feed_forward import make_expert_weights
from hpcmoe.experts.layer import LayerContext
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.model.text import find_text
from hpcmoe.placement.demand import find_loads
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


class Bare(torch.nn.Module):
    """No dense part: tokens come normed, as a user of a layer alone would give them."""

    def forward(self, x):
        """x [T, H] -> (residual, normed) [T, H]."""
        return x, x


class Layer:
    """The one layer of a job, called by itself. All its calls are collective."""

    def __init__(self, job):
        self.layer, self.dispatcher = job.stepper.network.layers[0], job.stepper.dispatcher
        self.layer.dense = Bare()
        self.device = job.stepper.network.device
        self.load = torch.ones(job.config.model.num_experts, device=self.device.torch_device)

    @property
    def router_weight(self):
        """The gate's matrix. [E, H] float32"""
        return self.layer.router.weight.detach()

    def forward(self, x):
        """x [T, H] float32 -> the next layer's x [T, H]."""
        with torch.no_grad():
            return self.rise(LayerContext(layer=0, micro_batch=0, training=False), x)

    def train(self, x, grad):
        """Go up from x [T, H] and down from the gradient of the result -> gradient of x; weights' gradients add up."""
        context = LayerContext(layer=0, micro_batch=0, training=True)
        with torch.enable_grad():
            self.rise(context, x)
            finish(self.dispatcher, self.layer.combine_backward(context, grad))
            finish(self.dispatcher, self.layer.compute_backward(context))
            zero_grads = torch.zeros_like(self.load), self.load.new_zeros(())
            finish(self.dispatcher, self.layer.route_backward(context, *zero_grads))
            return context.output

    def rise(self, context, x):
        """Take the four stages of the way up."""
        self.layer.route(context, x, self.load)
        finish(self.dispatcher, self.layer.dispatch(context))
        finish(self.dispatcher, self.layer.compute(context))
        finish(self.dispatcher, self.layer.combine(context))
        return context.output

    def route(self, x):
        """Choose experts for x [T, H] -> what `carry` takes."""
        context = LayerContext(layer=0, micro_batch=0, training=False)
        with torch.no_grad():
            self.layer.route(context, x, self.load)
        return context

    def carry(self, context):
        """Dispatch and combine: rows reach their experts, who do nothing, and come home."""
        with torch.no_grad():
            carry(self.layer, context)
