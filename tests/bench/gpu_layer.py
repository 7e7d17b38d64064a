"""One MoE layer on a GPU, forward and training, against its floor: torch's GEMMs of the same rows, expert by expert.

The activation on the way up is in the floor too.
"""

import torch
from bench.ours import open_layer
from bench.pairs import compare, take_turns
from bench.shapes import Shape
from mpi4py import MPI
from torch.nn.functional import gelu

BF16 = {"ranks": 1, "dtype": "bfloat16"}
PUBLISHED = Shape(
    name="H 8192, F 32768, 10000 tokens", tokens=10000, hidden=8192, feed_forward=32768, experts=2, **BF16
)
MIDDLE = Shape(name="H 2048, F 8192, 8192 tokens", tokens=8192, hidden=2048, feed_forward=8192, experts=8, **BF16)
FEW = Shape(name="H 4096, F 14336, 64 tokens", tokens=64, hidden=4096, feed_forward=14336, experts=8, **BF16)
SHAPES = [
    PUBLISHED,
    PUBLISHED.but(training=True),
    MIDDLE,
    MIDDLE.but(training=True),
    FEW,
]
BUDGET_SECONDS = 2.0  # a shape
IN_A_ROW = 4  # layers: a host that starts the next meanwhile is not waited for


def measure_shape(shape, budget_seconds=BUDGET_SECONDS):
    """Let a layer and its floor take turns on this rank's device -> comparison, of IN_A_ROW layers."""
    comm = MPI.COMM_SELF
    with open_layer(comm, shape) as layer:
        draw = {"device": layer.device.torch_device}
        x, grad = (torch.randn(shape.tokens, shape.hidden, **draw) for _ in range(2))
        floor = Floor(shape, layer.choose(x).tokens_of_expert.tolist(), layer.device.torch_device)
        own = (lambda: layer.train(x, grad)) if shape.training else (lambda: layer.forward(x))
        calls = {"ours": own, "floor": floor.train if shape.training else floor.forward}
        several = {name: lambda call=call: repeat(call, layer.device) for name, call in calls.items()}
        return compare(take_turns(comm, several, budget_seconds), "ours", "floor")


def repeat(call, device):
    """Call a few times, and wait for the device once."""
    for _ in range(IN_A_ROW):
        call()
    device.compute_stream.record_event().synchronize()


class Floor:
    """The products of a layer's experts and the activation between, on rows that lie there, all in their precision."""

    def __init__(self, shape, rows_of_expert, torch_device):
        """rows_of_expert [E]: copies that each has."""
        draw = {"device": torch_device, "dtype": getattr(torch, shape.dtype)}
        sizes = [(rows, shape.hidden, shape.feed_forward) for rows in rows_of_expert if rows]
        self.parts = [
            [torch.randn(*size, **draw) for size in ((rows, h), (h, f), (f, h), (rows, f))] for rows, h, f in sizes
        ]

    def forward(self):
        """Up, the activation, down."""
        for x, up, down, _ in self.parts:
            gelu(x @ up) @ down

    def train(self):
        """Do all that, and the four products of the way back, without the activation's; any rows will do."""
        self.forward()
        for x, up, down, inner in self.parts:
            torch.mm(x, down.t())
            torch.mm(inner.t(), x)
            torch.mm(inner, up.t())
            torch.mm(x.t(), inner)
