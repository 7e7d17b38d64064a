"""Values come back as they were; a file is replaced whole or stays as it was."""

import errno
import fcntl
import os

import h5py
import numpy as np
import pytest

from hpcmoe.errors import CheckpointError
from hpcmoe.write.hdf5 import checkpoint_errors, describe_os_error, open_replacement, read_entry, write_entry


@pytest.mark.parametrize(
    "value", [3, -2.5, True, "text, é", "", np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int32)]
)
def test_a_value_comes_back_as_it_was(tmp_path, value):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_entry(file, "value", value)
        back = read_entry(file["value"])
    assert type(back) is type(value)
    np.testing.assert_array_equal(back, value)
    if isinstance(value, np.ndarray):
        assert back.dtype == value.dtype and back.shape == value.shape


@pytest.mark.parametrize("value", [{"numpy": "2.4", "mpi": "mpich\n5"}, {}])
def test_dict_of_strings_is_rows_of_key_and_value(tmp_path, value):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_entry(file, "versions", value, unit="version")
        assert dict(read_entry(file["versions"])) == value
        assert file["versions"].attrs["unit"] == "version"


def test_list_of_strings(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_entry(file, "nodes", ["node0", "node11"])
        assert list(read_entry(file["nodes"])) == ["node0", "node11"]


def test_file_stays_as_it_was_when_the_block_fails(tmp_path):
    path = tmp_path / "a.h5"
    with open_replacement(path) as file:
        file["x"] = 1
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), open_replacement(path) as file:
        file["x"][...] = 2
        file["y"] = 1 / 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_can_be_read_while_it_is_replaced(tmp_path):
    path = tmp_path / "a.h5"
    with open_replacement(path) as file:
        file["x"] = 1
    with h5py.File(path) as reader, open_replacement(path) as file:
        file["x"][...] = 2
        assert reader["x"][()] == 1
    with h5py.File(path) as reader:
        assert reader["x"][()] == 2


def test_what_a_killed_run_left_is_not_taken_up(tmp_path):
    path = tmp_path / "a.h5"
    (tmp_path / "a.h5.partial").write_bytes(b"half a file")
    with open_replacement(path) as file:
        file["x"] = 1
    assert list(tmp_path.iterdir()) == [path]


def test_reason_of_a_full_disk(tmp_path, small_disk):
    with pytest.raises(OSError) as full, h5py.File(small_disk / "a.h5", "w") as file:
        file["x"] = np.zeros(1 << 20)
    assert describe_os_error(full.value) == "No space left on device"


def test_error_is_one_line_with_path_and_reason(tmp_path):
    path = tmp_path / "none" / "a.h5"
    with pytest.raises(CheckpointError) as error, checkpoint_errors(path, "read"):
        h5py.File(path)
    assert str(error.value) == f"{path}: cannot be read: No such file or directory"


def test_error_of_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"not HDF5 at all" * 100)
    with pytest.raises(CheckpointError, match=r"a\.h5: cannot be read: .*signature") as error:  # noqa: SIM117
        with checkpoint_errors(path, "read"):
            h5py.File(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_locks_is_named_with_the_cure(number):
    error = OSError(number, f"Unable to synchronously open file (unable to lock file, errno = {number}, error ...")
    line = describe_os_error(error)
    assert line.startswith(os.strerror(number)) and "HDF5_USE_FILE_LOCKING=FALSE" in line


def test_a_file_that_another_process_holds_is_said_to_be_open(tmp_path):
    path = tmp_path / "a.h5"
    with open_replacement(path) as file:
        file["x"] = 1
    with path.open() as viewer:
        fcntl.flock(viewer, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"cannot be read: another process.*HDF5_USE_FILE_LOCKING=FALSE"):  # noqa: SIM117
            with checkpoint_errors(path, "read"):
                h5py.File(path)


def test_a_part_of_a_virtual_dataset_that_another_process_holds_is_no_zeros(tmp_path):
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["x"] = np.arange(3.0)
    layout = h5py.VirtualLayout((3,), float)
    layout[:] = h5py.VirtualSource("part.h5", "x", (3,), float)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with (tmp_path / "part.h5").open() as viewer, h5py.File(tmp_path / "whole.h5") as whole:
        fcntl.flock(viewer, fcntl.LOCK_EX)
        with (
            pytest.raises(CheckpointError, match="another process"),
            checkpoint_errors(tmp_path / "whole.h5", "read"),
        ):
            whole["x"][:]
