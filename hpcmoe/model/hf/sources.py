"""Tensors of a checkpoint as their numbers are meant: plain, or dequantised while they are read.

fp8 (DeepSeek-V3): X [.., R, C] in 8 bits and X_scale_inv [.., ceil(R / b), ceil(C / c)]; a number is its bits' times
the scale of its block of b x c. MXFP4 (gpt-oss): X_blocks [E, R, G, 16], two numbers a byte, the low four bits first,
and X_scales [E, R, G]; number j of group g is value[bits] * 2^(scale - 127), and X is [E, 32 G, R], transposed.
"""

import abc
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from hpcmoe.errors import CheckpointError, ConfigError
from hpcmoe.messages import one_line, show_value
from hpcmoe.model.hf.stored_model import StoredModel
from hpcmoe.model.hf.tensor_files import StoredTensor, TensorReader, list_pieces

_PIECE_BYTES = 2**20  # dequantised at a time, some twenty times as much while it is
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_BIAS = 127  # of a scale's exponent
_MXFP4_BYTES = 16  # of a group
READABLE = ("fp8", "mxfp4")  # by quant_method


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A tensor of a checkpoint in full precision."""

    name: str  # in the checkpoint
    stored: StoredTensor
    shape: tuple[int, ...]  # of the numbers

    @property
    def where(self) -> str:
        """Return what errors call it: its file and name."""
        return f"{one_line(self.stored.path)}: {one_line(self.name)}"

    @property
    def num_bytes(self) -> int:
        """Return the bytes to read."""
        return self.stored.num_bytes

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the precision, None where it is the target's."""
        return self.stored.dtype

    def cut(self, begin: int, end: int) -> Self:
        """Return the rows [begin, end) of the first dimension: some of the experts of a fused tensor."""
        return replace(self, stored=self.stored.cut(begin, end), shape=(end - begin, *self.shape[1:]))

    def fill(self, reader: TensorReader, target: Tensor) -> None:
        """Read the numbers into a target of their shape. Raises CheckpointError."""
        reader.fill(self.stored, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedSource(Source, abc.ABC):
    """A tensor with scales of its blocks."""

    scales: StoredTensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes to read."""
        return self.stored.num_bytes + self.scales.num_bytes

    @property
    def dtype(self) -> torch.dtype | None:
        """Return None: it has no precision of its own."""
        return None

    def cut(self, begin: int, end: int) -> Self:
        """Return the rows [begin, end) of the first dimension: some of the experts of a fused tensor."""
        stored, scales = (tensor.cut(begin, end) for tensor in (self.stored, self.scales))
        return replace(self, stored=stored, scales=scales, shape=(end - begin, *self.shape[1:]))

    def fill(self, reader: TensorReader, target: Tensor) -> None:
        """Read the numbers into a target of their shape, some rows at a time. Raises CheckpointError."""
        if len(self.shape) == 2:
            self.fill_matrix(reader, target)
        for expert in range(self.shape[0]) if len(self.shape) > 2 else ():
            self.cut(expert, expert + 1).fill_matrix(reader, target[expert])

    @abc.abstractmethod
    def fill_matrix(self, reader: TensorReader, target: Tensor) -> None:
        """Read one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Source(QuantisedSource):
    """A tensor in 8 bits."""

    block: tuple[int, int]  # rows and columns that share a scale

    def fill_matrix(self, reader: TensorReader, target: Tensor) -> None:
        """Read target [R, C] from stored [R, C] and scales [ceil(R / b), ceil(C / c)], each perhaps after a 1."""
        rows, columns = self.shape[-2:]
        stored = self.stored.reshape(rows, columns)
        scales = reader.read_tensor(self.scales).float().reshape(-1, -(-columns // self.block[1]))
        for begin, end in list_pieces(stored, _PIECE_BYTES, self.block[0]):
            numbers = reader.read_tensor(stored.cut(begin, end)).float()
            own = scales[begin // self.block[0] : -(-end // self.block[0])]
            own = own.repeat_interleave(self.block[0], 0)[: end - begin].repeat_interleave(self.block[1], 1)
            target[begin:end].copy_(numbers.mul_(own[:, :columns]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Source(QuantisedSource):
    """A tensor of all experts in 4 bits."""

    def fill_matrix(self, reader: TensorReader, target: Tensor) -> None:
        """Read target [32 G, R] from stored [1, R, G, 16] and scales [1, R, G]."""
        _, rows, groups, _ = self.stored.shape
        stored = self.stored.reshape(rows, groups, _MXFP4_BYTES)
        scales = reader.read_tensor(self.scales.reshape(rows, groups, 1)).int() - _MXFP4_BIAS
        values = torch.tensor(_MXFP4_VALUES)
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # [256, 2], of a byte
        for begin, end in list_pieces(stored, _PIECE_BYTES):
            numbers = pairs[reader.read_tensor(stored.cut(begin, end)).int()].view(end - begin, groups, -1)
            target[:, begin:end].copy_(torch.ldexp(numbers, scales[begin:end]).view(end - begin, -1).T)


def read_quantisation(model: StoredModel) -> dict[str, Any] | None:
    """Return the quantisation that a model's config.json declares, None for none. Raises ConfigError."""
    declared = model.config.get("quantization_config")
    if declared is not None and not (isinstance(declared, dict) and isinstance(declared.get("quant_method"), str)):
        raise ConfigError(f"{one_line(model.folder)}/config.json: quantization_config.quant_method is missing")
    return declared


def make_sources(model: StoredModel) -> dict[str, Source]:
    """Pair a model's tensors with their scales -> sources by the names of their numbers. Raises CheckpointError."""
    quantisation, tensors = read_quantisation(model) or {}, model.tensors
    sources: dict[str, Source] = {}
    for name, stored in tensors.items():
        whole, scales = name.removesuffix(_BLOCKS), tensors.get(f"{name}{_SCALE}")
        if quantisation.get("quant_method") == "mxfp4" and name.endswith((_BLOCKS, _SCALES)):
            if name.endswith(_BLOCKS):
                sources[whole] = make_mxfp4_source(name, stored, tensors.get(f"{whole}{_SCALES}"))
        elif stored.dtype in _FP8:
            sources[name] = make_fp8_source(name, stored, scales, quantisation.get("weight_block_size"))
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors):
            sources[name] = Source(name=name, stored=stored, shape=stored.shape)
    return sources


def make_fp8_source(name: str, stored: StoredTensor, scales: StoredTensor | None, block: Any) -> Fp8Source:
    """Pair a tensor in 8 bits with the scales of its blocks; block: config.json's, None where one scale is for all."""
    where = f"{one_line(stored.path)}: {one_line(name)}"
    if scales is None:
        raise CheckpointError(f"{where}: {stored.dtype} without {one_line(name)}{_SCALE}")
    if len(stored.shape) < 2:
        raise CheckpointError(f"{where}: {stored.dtype} of shape {list(stored.shape)}: must be a matrix")
    block = list(stored.shape[-2:]) if block is None else block
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(f"{where}: quantization_config.weight_block_size = {show_value(block)}: must be [b, c]")
    grid = [-(-size // step) for size, step in zip(stored.shape[-2:], block, strict=True)]
    wanted = (*stored.shape[:-2], *grid)
    if scales.shape != wanted and not (grid == [1, 1] and scales.shape in [(), (1,)] and len(stored.shape) == 2):
        raise CheckpointError(f"{where}{_SCALE}: shape {list(scales.shape)}: must be {list(wanted)}, a scale a block")
    return Fp8Source(name=name, stored=stored, shape=stored.shape, scales=scales, block=(block[0], block[1]))


def make_mxfp4_source(name: str, stored: StoredTensor, scales: StoredTensor | None) -> Mxfp4Source:
    """Pair a tensor in 4 bits with the scales of its groups."""
    where, shape = f"{one_line(stored.path)}: {one_line(name)}", stored.shape
    if stored.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != _MXFP4_BYTES:
        raise CheckpointError(f"{where}: {stored.dtype} {list(shape)}: must be bytes [E, rows, groups, {_MXFP4_BYTES}]")
    if scales is None or scales.dtype != torch.uint8 or scales.shape != shape[:-1]:
        raise CheckpointError(f"{where}: must have {_SCALES[1:]} {list(shape[:-1])} of bytes beside it")
    return Mxfp4Source(name=name, stored=stored, shape=(shape[0], 2 * _MXFP4_BYTES * shape[2], shape[1]), scales=scales)
