"""Row kernels: a device permutes, gathers, scatters and sums rows, and a gate value beside each; by torch or by CUDA.

Torch does it on any device. On a GPU a kernel of rows.cu does in one pass what takes torch several: it casts on the
way, carries the gate values along, and reads and writes 16 bytes at once. To sort assignments by slot takes torch some
thirty kernels, each of which the host must start.
"""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SOURCE = pathlib.Path(__file__).with_name("rows.cu")
_C_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_ALIGNED_BYTES = 16  # the most that a thread of a GPU reads at once
_THREADS = 256  # of a block
_MIN_CHUNK = 32  # assignments that one thread looks at to sort them, at least
_MANY_THREADS = 2**17  # enough to fill a GPU
_NO_DTYPES = torch.float32, torch.float32, 1  # of a kernel that moves no rows

Kernel = Callable[[tuple[int, ...], tuple[int, int], tuple[int, ...]], None]  # (grid, block, arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Message rows on a device, for who sends them and for who computes on them."""

    array: Any  # [n, row_bytes] uint8: NumPy's or CuPy's
    tensor: Tensor  # [n, row_bytes] uint8, of the same memory

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.array)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """Rows of a device, as a kernel reads or writes them."""

    values: Tensor  # [n, H], contiguous within a row
    gate_values: Tensor | None  # [n] float32
    order: Tensor | None = None  # [m] int64: the rows meant, in this order; None: the first m


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfAssignments:
    """A permutation of assignments, sorted by slot, both ways."""

    row_of_assignment: Tensor  # [T, K] int64, -1: none; kernels write a token to all its rows
    assignment_of_row: Tensor | None  # [n] int64: t * K + k; for torch, which reads each row's source

    def limit_to(self, num_rows: int) -> "RowsOfAssignments":
        """Return only those that lie in the first rows."""
        order = None if self.assignment_of_row is None else self.assignment_of_row[:num_rows]
        return RowsOfAssignments(row_of_assignment=self.row_of_assignment, assignment_of_row=order)


def open_row_ops(compile_kernel: Callable[[str, str, tuple[str, ...]], Kernel]) -> "RowOps":
    """Return our kernels where they can be compiled, else torch; its name says which, and why."""
    row_ops = KernelRowOps(compile_kernel)
    try:
        row_ops.find_kernel("permute_rows", torch.float32, torch.bfloat16, 8)
    except Exception as error:  # of CuPy, of its compiler, or of the system that looks for this
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return TorchRowOps(f"torch, for our kernels cannot be compiled: {first_line}")
    return row_ops


class TorchRowOps:
    """What a device does with rows, by torch."""

    def __init__(self, name: str = "torch") -> None:
        self.name = name

    def prepare(self, table: Tensor) -> None:
        """Return at once: torch is compiled."""

    def sort_by_slot(self, slots: Tensor, kept: Tensor | None, num_slots: int) -> tuple[RowsOfAssignments, Tensor]:
        """Sort assignments by their slots [T, K], kept [T, K] bool or None (all) -> (permutation, ends [num_slots]).

        Those of a slot keep their order, and end at an int64; those that are not kept have no row.
        """
        kept = torch.ones_like(slots, dtype=torch.bool) if kept is None else kept
        key = slots.masked_fill(~kept, num_slots).flatten()
        ordered, order = key.sort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(key), device=key.device))
        ends = torch.searchsorted(ordered, torch.arange(1, num_slots + 1, device=key.device))
        rows = row.view(slots.shape).masked_fill(~kept, -1)
        return RowsOfAssignments(row_of_assignment=rows, assignment_of_row=order), ends

    def permute(self, rows: Tensor, gates: Tensor, assignments: RowsOfAssignments, target: RowView) -> None:
        """Write row t of rows [T, H] and each of gates [T, K] to the rows of their assignments."""
        order = assignments.assignment_of_row
        assert order is not None, "these rows were sorted by kernels"
        move_by_torch(rows.to(target.values.dtype), order // gates.shape[1], target.values, None)
        move_by_torch(gates.flatten(), order, target.gate_values, None)

    def move(self, source: RowView, target: RowView) -> None:
        """Copy rows from one view to another, in its precision, and their gate values if any: gather or scatter."""
        move_by_torch(source.values.to(target.values.dtype), source.order, target.values, target.order)
        if source.gate_values is not None:
            move_by_torch(source.gate_values, source.order, target.gate_values, target.order)

    def sum(self, table: Tensor, entries: Tensor, weights: Tensor) -> Tensor:
        """Sum rows of a table [n, H], table[entries[t, k]] * weights[t, k] over k -> fresh [T, H] float32.

        An entry below 0 is none, for which the table's last row must be zero. Sums and weights have its precision.
        """
        entries, weights = replace_none_by_last(entries, table), weights.to(table.dtype)
        return nn.functional.embedding_bag(entries, table, mode="sum", per_sample_weights=weights).float()


def replace_none_by_last(entries: Tensor, table: Tensor) -> Tensor:
    """Return entries with the table's last row, which is zero, where one is below 0."""
    return torch.where(entries < 0, len(table) - 1, entries)


def move_by_torch(
    source: Tensor, source_order: Tensor | None, target: Tensor | None, target_order: Tensor | None
) -> None:
    """Write source[source_order] to target[target_order]; an order that is None counts up from 0."""
    assert target is not None, "gate values need a place"
    if target_order is not None:
        rows = source if source_order is None else source.index_select(0, source_order)
        target.index_copy_(0, target_order, rows)
    elif source_order is not None:
        torch.index_select(source, 0, source_order, out=target[: len(source_order)])
    else:
        target[: len(source)].copy_(source)


class KernelRowOps:
    """The same by the kernels of rows.cu, each compiled when it is first needed, or before.

    All raise ValueError for what a kernel would misread.
    """

    name = "kernels of our own"

    def __init__(self, compile_kernel: Callable[[str, str, tuple[str, ...]], Kernel]) -> None:
        """compile_kernel(source, name, options) -> a Kernel, whose arguments are integers."""
        self.compile_kernel = compile_kernel
        self.kernels: dict[tuple, Kernel] = {}

    def prepare(self, table: Tensor) -> None:
        """Compile what rows on their way into a table [n, H], from it, and summed need."""
        wide = table.new_empty(1, table.shape[1], dtype=torch.float32)
        self.find_kernel("permute_rows", wide.dtype, table.dtype, find_chunk(wide, table))
        self.find_kernel("move_rows", table.dtype, table.dtype, find_chunk(wide.to(table.dtype), table))
        self.find_kernel("sum_rows", table.dtype, wide.dtype, find_chunk(table, wide))
        for name in ("count_assignments", "place_assignments"):
            self.find_kernel(name, *_NO_DTYPES)

    def sort_by_slot(self, slots: Tensor, kept: Tensor | None, num_slots: int) -> tuple[RowsOfAssignments, Tensor]:
        """Sort assignments by slot: a counting sort, a thread for each chunk of assignments and each slot."""
        slots, kept = slots.contiguous(), None if kept is None else kept.contiguous()
        require_dtype(slots, torch.int64)
        require_dtype(kept, torch.bool)
        chunk = max(_MIN_CHUNK, -(-slots.numel() * num_slots // _MANY_THREADS))
        num_chunks = max(-(-slots.numel() // chunk), 1)
        counts, rows = slots.new_empty(num_slots, num_chunks), torch.empty_like(slots)
        shape = (-(-counts.numel() // _THREADS),), (_THREADS, 1)
        given = slots.data_ptr(), 0 if kept is None else kept.data_ptr(), slots.numel(), num_slots

        # Count each slot's assignments by chunk, add up, and place those of a chunk from where the one before ends.
        self.find_kernel("count_assignments", *_NO_DTYPES)(*shape, (*given, counts.data_ptr(), num_chunks, chunk))
        ends = counts.flatten().cumsum(0)
        places = (*given, ends.data_ptr(), num_chunks, chunk, rows.data_ptr())
        self.find_kernel("place_assignments", *_NO_DTYPES)(*shape, places)
        return RowsOfAssignments(row_of_assignment=rows, assignment_of_row=None), ends[num_chunks - 1 :: num_chunks]

    def permute(self, rows: Tensor, gates: Tensor, assignments: RowsOfAssignments, target: RowView) -> None:
        """Write rows and gates to the rows of their assignments, each row read once."""
        entries, gates = assignments.row_of_assignment.contiguous(), gates.contiguous()
        require_dtype(entries, torch.int64)
        require_dtype(gates, torch.float32)
        source = rows.data_ptr(), rows.stride(0), gates.data_ptr(), entries.data_ptr(), gates.shape[1]
        *places, _ = point_to(target)
        self.launch("permute_rows", rows, target.values, len(rows), (*source, *places, len(rows)))

    def move(self, source: RowView, target: RowView) -> None:
        """Copy rows from one view to another, and their gate values if any."""
        lengths = {len(order) for order in (source.order, target.order) if order is not None} or {len(source.values)}
        num_rows = lengths.pop()
        too_short = any(side.order is None and len(side.values) < num_rows for side in (source, target))
        if lengths or too_short or (source.gate_values is not None and target.gate_values is None):
            raise ValueError("a move's two sides must have as many rows, and gate values beside them")
        arguments = (*point_to(source), *point_to(target), num_rows)
        self.launch("move_rows", source.values, target.values, num_rows, arguments)

    def sum(self, table: Tensor, entries: Tensor, weights: Tensor) -> Tensor:
        """Sum rows of a table, in float32."""
        num_rows, top_k = entries.shape
        sums = table.new_empty(num_rows, table.shape[1], dtype=torch.float32)
        entries, weights = entries.contiguous(), weights.float().contiguous()
        require_dtype(entries, torch.int64)
        addresses = (table.data_ptr(), table.stride(0), entries.data_ptr(), weights.data_ptr())
        self.launch("sum_rows", table, sums, num_rows, (*addresses, top_k, sums.data_ptr(), num_rows))
        return sums

    def launch(self, name: str, source: Tensor, target: Tensor, num_rows: int, arguments: tuple[int, ...]) -> None:
        """Launch a kernel on so many rows of the source's and the target's width, its last argument."""
        if num_rows == 0:
            return
        if source.stride(1) != 1 or target.stride(1) != 1 or source.shape[1] != target.shape[1]:
            raise ValueError("rows must be as wide on both sides, with their scalars side by side")
        width, chunk = source.shape[1], find_chunk(source, target)
        block = shape_block(width // chunk)
        kernel = self.find_kernel(name, source.dtype, target.dtype, chunk)
        kernel((-(-num_rows // block[1]),), block, (*arguments, width))

    def find_kernel(self, name: str, source: torch.dtype, target: torch.dtype, chunk: int) -> Kernel:
        """Return a kernel for two dtypes and so many scalars at once, compiled before or now."""
        key = name, source, target, chunk
        if key not in self.kernels:
            options = (f"-DFROM={_C_TYPES[source]}", f"-DTO={_C_TYPES[target]}", f"-DCHUNK={chunk}")
            self.kernels[key] = self.compile_kernel(_SOURCE.read_text(), name, options)
        return self.kernels[key]


RowOps = TorchRowOps | KernelRowOps


def point_to(view: RowView) -> tuple[int, ...]:
    """Return a view's address and pitch, those of its gate values, and the address of its order; 0 for what is None."""
    gates, order = view.gate_values, view.order
    require_dtype(order, torch.int64)
    require_dtype(gates, torch.float32)
    if order is not None and not order.is_contiguous():
        raise ValueError("the places of an order must lie side by side")
    to_gates = (0, 0) if gates is None else (gates.data_ptr(), gates.stride(0))
    return view.values.data_ptr(), view.values.stride(0), *to_gates, 0 if order is None else order.data_ptr()


def require_dtype(tensor: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ValueError for a tensor of another dtype, which a kernel would read as this one."""
    if tensor is not None and tensor.dtype != dtype:
        raise ValueError(f"{tensor.dtype} where kernels read {dtype}")


def find_chunk(*tensors: Tensor) -> int:
    """Return how many scalars of a row a thread may read at once: 16 bytes of the narrowest, or what is aligned."""
    chunk = _ALIGNED_BYTES // min(tensor.itemsize for tensor in tensors)
    while not all(is_aligned(tensor, chunk) for tensor in tensors):
        chunk //= 2
    return chunk


def is_aligned(tensor: Tensor, chunk: int) -> bool:
    """Return True if all rows can be read so many scalars at once."""
    num_bytes = min(chunk * tensor.itemsize, _ALIGNED_BYTES)
    places = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
    return tensor.shape[1] % chunk == 0 and not any(place % num_bytes for place in places)


def shape_block(chunks: int) -> tuple[int, int]:
    """Return the shape of a block of threads for rows of so many chunks -> (threads of a row, rows)."""
    threads = min(_THREADS, 1 << max(chunks - 1, 0).bit_length())
    return threads, _THREADS // threads
