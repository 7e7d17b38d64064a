"""The rows of all ranks stand one after the other, and a rank may have none."""

import h5py
import numpy as np
import pytest

from hpcmoe.errors import CheckpointError
from hpcmoe.write.activations import write_activations


def make_rows(num_rows_of_rank, rank):
    """Number all ranks' rows from 0 -> this rank's, as hidden states and chosen experts."""
    first = sum(num_rows_of_rank[:rank])
    number = np.arange(first, first + num_rows_of_rank[rank])
    hidden = np.repeat(number[:, None], 8, axis=1).astype(np.float32)
    return {"layer0/input": hidden, "layer0/experts": np.stack([number, -number], axis=1)}


@pytest.mark.mpi
@pytest.mark.parametrize("num_rows_of_rank", [[3, 5, 2, 4], [0, 0, 7, 0], [4, 0, 0, 1], [0, 0, 0, 0]])
def test_rows_in_rank_order(comm, shared, num_rows_of_rank):
    num_rows_of_rank = (num_rows_of_rank * comm.size)[: comm.size]
    write_activations(comm, shared, 100, make_rows(num_rows_of_rank, comm.rank))
    total = sum(num_rows_of_rank)
    with h5py.File(shared / "activations-100" / "master.h5") as master:
        assert master["metadata/step"][()] == 100
        assert master["layer0/input"].shape == (total, 8) and master["layer0/input"].dtype == np.float32
        assert master["layer0/input"][:, 3].tolist() == list(range(total))
        assert master["layer0/experts"][:].tolist() == [[row, -row] for row in range(total)]
    comm.Barrier()


def test_alone(comm, tmp_path):
    write_activations(comm, tmp_path, 5, {"layer1/output": np.ones((2, 3), np.float32)})
    with h5py.File(tmp_path / "activations-5" / "master.h5") as master:
        assert master["layer1/output"][:].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert [path.name for path in tmp_path.iterdir()] == ["activations-5"]


def test_full_disk_leaves_nothing(comm, tmp_path, file_size_limit):
    with pytest.raises(CheckpointError, match=r"activations-5\.partial/rank0000\.h5: cannot be written: File too"):  # noqa: SIM117
        with file_size_limit(1 << 17):
            write_activations(comm, tmp_path, 5, {"layer1/output": np.ones((1 << 10, 1 << 7), np.float32)})
    assert not any(tmp_path.iterdir())
