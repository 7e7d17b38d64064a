"""The sizes that the benches measure, by the names that the figures go by."""

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One MoE layer and what comes to it."""

    name: str
    ranks: int
    tokens: int  # of each rank
    feed_forward: int
    dtype: str = "float32"  # of weights in inference, of rows that travel and of products
    hidden: int = 1024
    experts: int = 16
    top_k: int = 2
    training: bool = False  # forward and backward

    def __str__(self):
        return f"{self.name} {'f32' if self.dtype == 'float32' else 'bf16'}{' training' if self.training else ''}"

    @property
    def experts_of_rank(self):
        """Number of experts that live on a rank."""
        return self.experts // self.ranks

    def but(self, **changes):
        """Make the same shape with some fields changed."""
        return dataclasses.replace(self, **changes)


WIDE = Shape(name="W1", ranks=2, tokens=4096, feed_forward=4096)  # GEMMs dominate
MIDDLE = Shape(name="F 512", ranks=2, tokens=4096, feed_forward=512)
NARROW = Shape(name="W0", ranks=2, tokens=4096, feed_forward=128)  # dispatch dominates
DECODE = Shape(name="decode", ranks=2, tokens=16, feed_forward=4096)
MANY = Shape(name="16 ranks", ranks=16, tokens=256, feed_forward=4096)
DTYPES = ("float32", "bfloat16")


def write_shapes(shapes):
    """Put shapes into one argument of a command -> text."""
    return json.dumps([dataclasses.asdict(shape) for shape in shapes])


def read_shapes(text):
    """Read what write_shapes wrote -> list of Shape."""
    return [Shape(**fields) for fields in json.loads(text)]
