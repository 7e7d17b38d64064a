"""Activations that the config asks for: the rows of all ranks, one after the other."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mpi4py import MPI

from hpcmoe.wait import gather_to_all
from hpcmoe.write.boxes import Piece
from hpcmoe.write.pieces import write_pieces


def write_activations(comm: MPI.Comm, folder: Path, step: int, rows: Mapping[str, np.ndarray]) -> None:
    """Write folder/activations-STEP: rows {name: [rows of this rank, ...]}, in rank order. Collective over comm.

    All ranks give the same names; a rank may have no rows. Raises CheckpointError on all ranks.
    """
    pieces = []
    num_rows_of_rank = gather_to_all(comm, {name: len(array) for name, array in rows.items()})
    for name, array in rows.items():
        num_rows = [num[name] for num in num_rows_of_rank]
        start = (sum(num_rows[: comm.rank]), *(0 for _ in array.shape[1:]))
        pieces.append(Piece(name=name, shape=(sum(num_rows), *array.shape[1:]), start=start, array=array))
    write_pieces(comm, folder / f"activations-{step}", pieces, {"step": step})
