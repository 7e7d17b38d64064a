"""Activations that somebody asked for: the rows of all ranks, one after the other."""

from hpcmoe.wait import gather_to_all
from hpcmoe.write.pieces import Piece, write_pieces


def write_activations(comm, folder, step, rows):
    """Write folder/activations-STEP: rows {name: [rows of this rank, ...]}, in rank order. Collective over comm.

    All ranks give the same names; a rank may have no rows. Raises CheckpointError on all ranks.
    """
    num_rows_of_rank = gather_to_all(comm, {name: len(array) for name, array in rows.items()})
    pieces = [
        make_piece(name, array, [num[name] for num in num_rows_of_rank], comm.rank) for name, array in rows.items()
    ]
    write_pieces(comm, folder / f"activations-{step}", pieces, {"step": step})


def make_piece(name, array, num_rows_of_rank, rank):
    """Place this rank's rows after those of the ranks before it."""
    row_shape = array.shape[1:]
    start = (sum(num_rows_of_rank[:rank]), *(0 for _ in row_shape))
    return Piece(name=name, shape=(sum(num_rows_of_rank), *row_shape), start=start, array=array)
