"""Rows move on a device, and a number beside each: spread, gathered, laid down, summed; by torch or kernels of ours.

Torch moves rows on any device. On a GPU a kernel of rows.cu does in one pass what takes torch several: it casts on the
way, moves the numbers along, and reads and writes 16 bytes at once. To put assignments in order takes torch some thirty
kernels, each of which the host must start.
"""

import pathlib
from dataclasses import dataclass

import torch
from torch import nn

SOURCE = pathlib.Path(__file__).with_name("rows.cu")
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
ALIGNED_BYTES = 16  # the most that a thread of a GPU reads at once
THREADS = 256  # of a block
LEAST_CHUNK, MANY_THREADS = (
    32,
    2**17,
)  # assignments that a thread looks at, to put them in order; threads that fill a GPU
ANY = torch.float32, torch.float32, 1  # the dtypes and chunk of a kernel that has none


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """Rows of a device, as a move reads or writes them."""

    values: torch.Tensor  # [n, H], the numbers of a row side by side
    gate_values: torch.Tensor | None  # [n] float32
    order: torch.Tensor | None = None  # [m] int64: which are meant, one after the other; None: the first m


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfAssignments:
    """Where rows are spread to, said both ways."""

    row_of_assignment: (
        torch.Tensor
    )  # [T, K] int64: the row of each copy, -1: none; kernels write a token to all its rows
    order: torch.Tensor | None  # [n] int64: the copy, t * K + k, of each row; torch alone looks for each row's source

    def limit_to(self, num_rows):
        """Mean only those that lie in the first rows -> RowsOfAssignments."""
        return (
            self
            if self.order is None
            else RowsOfAssignments(row_of_assignment=self.row_of_assignment, order=self.order[:num_rows])
        )


def open_row_ops(compile_kernel):
    """Have our kernels move rows where they can be compiled, else torch -> a row_ops whose name says which, and why."""
    row_ops = KernelRowOps(compile_kernel)
    try:
        row_ops.find_kernel("permute_rows", torch.float32, torch.bfloat16, 8)
    except Exception as error:  # of CuPy, of its compiler, or of the system that looks for this
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return TorchRowOps(f"torch, for our kernels cannot be compiled: {first_line}")
    return row_ops


class TorchRowOps:
    """Moves rows by torch."""

    def __init__(self, name="torch"):
        self.name = name

    def prepare(self, table):
        """Need nothing beforehand."""

    def sort_by_slot(self, slots, kept, num_slots):
        """Put assignments in order by their slots [T, K], kept [T, K] bool or None (all) -> (RowsOfAssignments, ends [num_slots]).

        Those of a slot keep their order, and end at an int64; those that are not kept come last, and have no row.
        """
        kept = torch.ones_like(slots, dtype=torch.bool) if kept is None else kept
        key = slots.masked_fill(~kept, num_slots).flatten()
        ordered, order = key.sort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(key), device=key.device))
        ends = torch.searchsorted(ordered, torch.arange(1, num_slots + 1, device=key.device))
        return RowsOfAssignments(row_of_assignment=row.view(slots.shape).masked_fill(~kept, -1), order=order), ends

    def move(self, source, target):
        """Write the rows of one RowView into those of another, in its precision, and the numbers beside them if any."""
        move_by_torch(source.values.to(target.values.dtype), source.order, target.values, target.order)
        if source.gate_values is not None:
            move_by_torch(source.gate_values, source.order, target.gate_values, target.order)

    def permute(self, rows, numbers, assignments, target):
        """Write row t of rows [T, H] and each of numbers [T, K] to those rows of a RowView where RowsOfAssignments have them."""
        tokens = assignments.order // numbers.shape[1]
        move_by_torch(rows.to(target.values.dtype), tokens, target.values, None)
        move_by_torch(numbers.flatten(), assignments.order, target.gate_values, None)

    def sum(self, table, entries, weights):
        """Sum rows of a table [n, H], table[entries[t, k]] * weights[t, k] over k -> fresh [T, H] float32.

        An entry below 0 is none, for which the table's last row must be zero. Sums and weights have its precision.
        """
        entries, weights = replace_none_by_last(entries, table), weights.to(table.dtype)
        return nn.functional.embedding_bag(entries, table, mode="sum", per_sample_weights=weights).float()


def replace_none_by_last(entries, table):
    """Name the last row of a table, which is zero, where an entry is below 0 -> entries."""
    return torch.where(entries < 0, len(table) - 1, entries)


def move_by_torch(source, source_order, target, target_order):
    """Write source[source_order] to target[target_order]; an order that is None counts up from 0."""
    if target_order is not None:
        rows = source if source_order is None else source.index_select(0, source_order)
        target.index_copy_(0, target_order, rows)
    elif source_order is not None:
        torch.index_select(source, 0, source_order, out=target[: len(source_order)])
    else:
        target[: len(source)].copy_(source)


class KernelRowOps:
    """Moves rows by the kernels of rows.cu, each compiled when it is first needed, or before.

    All raise ValueError for what a kernel would misread.
    """

    name = "kernels of our own"

    def __init__(self, compile_kernel):
        """compile_kernel(source, name, options) -> a kernel to launch(grid, block, arguments), all of them integers."""
        self.compile_kernel, self.kernels = compile_kernel, {}

    def prepare(self, table):
        """Compile what rows need on their way into a table [n, H], from it, and summed: no step is to wait for it."""
        wide = table.new_empty(1, table.shape[1], dtype=torch.float32)
        self.find_kernel("permute_rows", wide.dtype, table.dtype, find_chunk(wide, table))
        self.find_kernel("move_rows", table.dtype, table.dtype, find_chunk(wide.to(table.dtype), table))
        self.find_kernel("sum_rows", table.dtype, wide.dtype, find_chunk(table, wide))
        for name in ("count_assignments", "place_assignments"):
            self.find_kernel(name, *ANY)

    def sort_by_slot(self, slots, kept, num_slots):
        """Put assignments in order by their slots [T, K], kept [T, K] bool or None (all) -> (RowsOfAssignments, ends [num_slots]).

        Those of a slot keep their order, and end at an int64; those that are not kept have no row. No order of assignments
        is made: the kernel that spreads rows needs none. Each copy is looked at once for every slot.
        """
        slots, kept = slots.contiguous(), None if kept is None else kept.contiguous()
        require_dtype(slots, torch.int64)
        require_dtype(kept, torch.bool)
        chunk = max(LEAST_CHUNK, -(-slots.numel() * num_slots // MANY_THREADS))
        num_chunks = max(-(-slots.numel() // chunk), 1)
        ends, entries = slots.new_empty(num_slots, num_chunks), torch.empty_like(slots)
        grid, of_kept = -(-ends.numel() // THREADS), 0 if kept is None else kept.data_ptr()
        given = slots.data_ptr(), of_kept, slots.numel(), num_slots

        self.find_kernel("count_assignments", *ANY)((grid,), (THREADS, 1), (*given, ends.data_ptr(), num_chunks, chunk))
        ends = ends.flatten().cumsum(0)
        places = (*given, ends.data_ptr(), num_chunks, chunk, entries.data_ptr())
        self.find_kernel("place_assignments", *ANY)((grid,), (THREADS, 1), places)
        return RowsOfAssignments(row_of_assignment=entries, order=None), ends[num_chunks - 1 :: num_chunks]

    def move(self, source, target):
        """Write the rows of one RowView into those of another, in its precision, and the numbers beside them if any."""
        lengths = {len(order) for order in (source.order, target.order) if order is not None} or {len(source.values)}
        num_rows = lengths.pop()
        too_short = any(side.order is None and len(side.values) < num_rows for side in (source, target))
        if lengths or too_short or (source.gate_values is not None and target.gate_values is None):
            raise ValueError("a move's two sides must have as many rows, and numbers beside them")
        self.launch(
            "move_rows", source.values, target.values, num_rows, (*point_to(source), *point_to(target), num_rows)
        )

    def permute(self, rows, numbers, assignments, target):
        """Write row t of rows [T, H] and each of numbers [T, K] to those rows of a RowView where RowsOfAssignments have them."""
        entries, numbers = assignments.row_of_assignment.contiguous(), numbers.contiguous()
        require_dtype(entries, torch.int64)
        require_dtype(numbers, torch.float32)
        source = rows.data_ptr(), rows.stride(0), numbers.data_ptr(), entries.data_ptr(), numbers.shape[1]
        *places, _ = point_to(target)
        self.launch("permute_rows", rows, target.values, len(rows), (*source, *places, len(rows)))

    def sum(self, table, entries, weights):
        """Sum rows of a table [n, H], table[entries[t, k]] * weights[t, k] over k -> fresh [T, H] float32.

        An entry below 0 is none.
        """
        num_rows, top_k = entries.shape
        sums = table.new_empty(num_rows, table.shape[1], dtype=torch.float32)
        entries, weights = entries.contiguous(), weights.float().contiguous()
        require_dtype(entries, torch.int64)
        addresses = (table.data_ptr(), table.stride(0), entries.data_ptr(), weights.data_ptr())
        self.launch("sum_rows", table, sums, num_rows, (*addresses, top_k, sums.data_ptr(), num_rows))
        return sums

    def launch(self, name, source, target, num_rows, arguments):
        """Run a kernel on so many rows of the source's and the target's width, its last argument."""
        if num_rows == 0:
            return
        if source.stride(1) != 1 or target.stride(1) != 1 or source.shape[1] != target.shape[1]:
            raise ValueError("rows must be as wide on both sides, with their numbers side by side")
        width, chunk = source.shape[1], find_chunk(source, target)
        block = shape_block(width // chunk)
        kernel = self.find_kernel(name, source.dtype, target.dtype, chunk)
        kernel((-(-num_rows // block[1]),), block, (*arguments, width))

    def find_kernel(self, name, source, target, chunk):
        """Find a kernel for two dtypes and so many numbers at once, compiled before or now."""
        key = name, source, target, chunk
        if key not in self.kernels:
            options = (f"-DFROM={TYPES[source]}", f"-DTO={TYPES[target]}", f"-DCHUNK={chunk}")
            self.kernels[key] = self.compile_kernel(SOURCE.read_text(), name, options)
        return self.kernels[key]


def point_to(rows):
    """Point to a RowView -> its address and pitch, those of the numbers beside it, and the address of its order, or 0."""
    beside, order = rows.gate_values, rows.order
    require_dtype(order, torch.int64)
    require_dtype(beside, torch.float32)
    if order is not None and not order.is_contiguous():
        raise ValueError("the places of an order must lie side by side")
    to_beside = (0, 0) if beside is None else (beside.data_ptr(), beside.stride(0))
    return rows.values.data_ptr(), rows.values.stride(0), *to_beside, 0 if order is None else order.data_ptr()


def require_dtype(tensor, dtype):
    """Raise ValueError for a tensor of another dtype, which a kernel would read as this one."""
    if tensor is not None and tensor.dtype != dtype:
        raise ValueError(f"{tensor.dtype} where kernels read {dtype}")


def find_chunk(*tensors):
    """Find how many numbers of rows a thread may take at once: 16 bytes of the narrowest, or as few as are aligned."""
    chunk = ALIGNED_BYTES // min(tensor.itemsize for tensor in tensors)
    while not all(is_aligned(tensor, chunk) for tensor in tensors):
        chunk //= 2
    return chunk


def is_aligned(tensor, chunk):
    """Whether all rows can be read so many numbers at once."""
    num_bytes = min(chunk * tensor.itemsize, ALIGNED_BYTES)
    places = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
    return tensor.shape[1] % chunk == 0 and not any(place % num_bytes for place in places)


def shape_block(chunks):
    """Shape a block of threads for rows of so many chunks -> (threads of a row, rows)."""
    threads = min(THREADS, 1 << max(chunks - 1, 0).bit_length())
    return threads, THREADS // threads
