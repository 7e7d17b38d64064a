"""MPI's answer to CUDA pointers is its function's, or the standard's list's; UCX's counts where that carries all."""

import pytest
from mpi4py import MPI

from hpcmoe.comm.pointers import find_netmod, list_libraries, read_cuda_support

LINE = "7f00-7f01 r-xp 00000000 fe:00 12 /usr/lib/{}\n"
WHEEL = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH configure:    --with-device=ch4:ucx,ofi\n"
DEBIAN = "MPICH Version:      4.0.2\nMPICH Device:       ch4:ofi\n"


@pytest.fixture
def maps(tmp_path):
    """A process's map of libraries, for a test to write -> its path."""
    return tmp_path / "maps"


def test_this_mpi_answers_by_its_function():
    takes, _, how = read_cuda_support(MPI.COMM_SELF)
    assert how.startswith(f"MPI says {'yes' if takes else 'no'} to CUDA pointers (")


def test_where_it_has_none_it_answers_by_the_standards_list(maps):
    maps.write_text(LINE.format("libmpich_else.so.12") + "7f02-7f03 rw-p 0 00:00 0 [heap]\n")
    assert list_libraries(maps, "libmpi") == []
    how = read_cuda_support(MPI.COMM_SELF, maps)[-1]
    assert "memory of the kinds" in how or "tells nothing" in how


@pytest.mark.parametrize("mpi_takes", [True, False])
@pytest.mark.parametrize("obstacle", ["", "it does not"])
def test_ucx_is_asked_where_mpi_says_no_and_ucx_has_cuda(maps, monkeypatch, mpi_takes, obstacle):
    monkeypatch.setattr("hpcmoe.comm.pointers.query_function", lambda maps: (mpi_takes, "as told"))
    monkeypatch.setattr("hpcmoe.comm.pointers.find_ucx_obstacle", lambda name, netmod: obstacle)
    maps.write_text(LINE.format("libucp.so.0"))
    assert read_cuda_support(MPI.COMM_SELF, maps)[:2] == (mpi_takes, False)
    maps.write_text(LINE.format("libucp.so.0") + LINE.format("libuct_cuda.so.0"))
    *takes, how = read_cuda_support(MPI.COMM_SELF, maps)
    assert takes == [mpi_takes, not mpi_takes and not obstacle]
    assert ("UCX has CUDA" in how) == (not mpi_takes) and (mpi_takes or obstacle in how) and "\n" not in how


def test_the_network_module_of_an_mpich_is_what_it_was_built_for():
    assert [find_netmod(text) for text in (WHEEL, DEBIAN, "MPICH Device: ch3:nemesis")] == ["ucx", "ofi", ""]
