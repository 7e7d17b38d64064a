"""run.h5 names its axes, describes its datasets and says where it came from; what it points to leads nowhere else."""

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from hpcmoe.errors import CheckpointError
from hpcmoe.write import records as records_of_a_run
from hpcmoe.write.catalogue import find_entry
from hpcmoe.write.records import open_records
from hpcmoe.write.trust import find_own


def write_run(folder, steps=range(1, 4), num_ranks=2, keep_until_step=None):
    """Write a record as a run on so many ranks does, replacing what is there twice."""
    with open_records(MPI.COMM_SELF, folder, keep_until_step) as records:
        for step in steps:
            records.append(step, "train", "loss", 1 / step, "nats/byte")
            records.append(step, "experts", "utilisation", np.ones((2, 4)), "actual/expected tokens")
            records.append(step, "mine", "odd_figure", np.ones((3, 3)))
            records.describe("experts", "tokens_of_node", np.ones((2, 1, 4), np.int64), "assignments")
            records.describe("comm", "bytes_of_link", np.ones((num_ranks, num_ranks)), "B")
            records.describe("run", "versions", {"numpy": "2", "MPI library": "MPICH"})
            records.describe("run", "config", "[run]")
            records.flush()
    return folder / "run.h5"


def list_scaled(file):
    """List the datasets that are no scales -> {path: names of their axes}; each must have one scale an axis."""
    found = {}

    def visit(name, entry):
        if not isinstance(entry, h5py.Dataset):
            return
        assert entry.attrs["description"] and "unit" in entry.attrs, name
        if entry.is_scale:
            return
        for axis, dimension in enumerate(entry.dims):
            assert len(dimension) == 1 and dimension[0].shape == (entry.shape[axis],), name
        found[name] = tuple(dimension[0].name.rpartition("/")[2] for dimension in entry.dims)

    file.visititems(visit)
    return found


def test_every_axis_has_a_scale_and_every_dataset_a_description_and_unit(tmp_path):
    with h5py.File(write_run(tmp_path)) as file:
        assert list_scaled(file) == {
            "train/loss/value": ("step",),
            "experts/utilisation/value": ("step", "layer", "expert"),
            "mine/odd_figure/value": ("step", "odd_figure_axis_0", "odd_figure_axis_1"),
            "experts/tokens_of_node": ("layer", "node", "expert"),
            "comm/bytes_of_link": ("source_rank", "target_rank"),
            "run/versions": ("version", "key_value"),
            "run/config": (),
        }
        assert file["train/loss/step"][:].tolist() == [1, 2, 3] and file["expert"][:].tolist() == [0, 1, 2, 3]
        assert file["run/versions"].attrs["numpy"] == "2" and file["train/loss"].attrs["unit"] == "nats/byte"


def test_no_scale_points_to_what_was_replaced(tmp_path):
    with h5py.File(write_run(tmp_path)) as file:
        for name in ("layer", "node", "source_rank"):
            assert all(file[reference] for reference, _ in file[name].attrs["REFERENCE_LIST"]), name


def test_the_root_says_where_the_file_came_from(tmp_path):
    with h5py.File(write_run(tmp_path)) as file:
        assert set(file.attrs) == {"format_version", "creator", "created", "host", "command_line", "git_commit"}
        assert file.attrs["format_version"] == 2 and file.attrs["creator"].startswith("hpcmoe ")


def test_outside_a_clone_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records_of_a_run, "__file__", str(tmp_path / "hpcmoe" / "write" / "records.py"))
    assert records_of_a_run.read_commit.__wrapped__() == ""


def test_a_resume_on_other_ranks_and_of_an_old_file_has_scales(tmp_path):
    path = write_run(tmp_path)
    with h5py.File(path, "a") as file:  # as version 1 wrote it
        del file["train/loss/value"], file["train/loss/step"]
        file["train/loss/step"] = [1, 2, 3]
        file["train/loss"].create_dataset("value", data=[1.0, 0.5, 0.3], maxshape=(None,), chunks=(4,))
        del file["train/loss/step"]
        file["train/loss"].create_dataset("step", data=[1, 2, 3], maxshape=(None,), chunks=(4,))
    write_run(tmp_path, steps=range(3, 5), num_ranks=3, keep_until_step=2)
    with h5py.File(path) as file:
        scaled = list_scaled(file)
        assert scaled["train/loss/value"] == ("step",) and file["train/loss/step"][:].tolist() == [1, 2, 3, 4]
        assert scaled["comm/bytes_of_link"] == ("source_rank_of_3", "target_rank_of_3")


def test_xarray_opens_every_group_without_a_made_up_name(tmp_path):
    xarray, _ = pytest.importorskip("xarray"), pytest.importorskip("h5netcdf")
    tree = xarray.open_datatree(write_run(tmp_path), engine="h5netcdf")
    axes = {axis for node in tree.subtree for variable in node.variables.values() for axis in variable.dims}
    assert {"step", "layer", "expert"} <= axes and not any("phony" in axis for axis in axes)
    tree.close()


def test_a_reference_to_anywhere_is_followed_by_no_reader(tmp_path):
    path = write_run(tmp_path)
    with h5py.File(path, "a") as file:
        file["experts/tokens_of_node"].attrs["DIMENSION_LIST"] = 7
        file.create_dataset("cluster/references", data=[file["run"].ref], dtype=h5py.ref_dtype)
    with h5py.File(path) as file:
        assert find_own(file, "experts/tokens_of_node", path).shape == (2, 1, 4)
        with pytest.raises(CheckpointError, match="must be numbers or texts"):
            find_own(file, "cluster/references", path)


def test_a_figure_of_another_shape_than_it_is_known_by_has_axes_all_the_same():
    assert find_entry("train/loss", 2).axes == ("loss_axis_0", "loss_axis_1")
    assert find_entry("train/loss", 0).axes == ()
