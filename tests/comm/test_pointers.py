"""MPI's answer to CUDA pointers is its function's, or the standard's list's; UCX's counts where that carries all."""

import pytest
from mpi4py import MPI

from hpcmoe.comm.pointers import ask_mpi, first_netmod, knows_cuda, loaded_libraries, why_not_all_by_ucx

LINE = "7f00-7f01 r-xp 00000000 fe:00 12 /usr/lib/{}\n"
WHEEL = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH configure:    --with-device=ch4:ucx,ofi\n"
DEBIAN = "MPICH Version:      4.0.2\nMPICH Device:       ch4:ofi\n"
KEYS = ("UCX_TLS", "MPI_UCX_TLS", "OMPI_MCA_pml", "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_NOLOCAL")


@pytest.fixture
def maps(tmp_path):
    """A process's map of libraries, for a test to write -> its path."""
    return tmp_path / "maps"


@pytest.fixture
def unset(monkeypatch):
    """Nothing is set for MPI or UCX."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def test_this_mpi_answers_by_its_function():
    takes, _, how = ask_mpi(MPI.COMM_SELF)
    assert how.startswith(f"MPI says {'yes' if takes else 'no'} to CUDA pointers (")


def test_where_it_has_none_it_answers_by_the_standards_list(maps):
    maps.write_text(LINE.format("libmpich_else.so.12") + "7f02-7f03 rw-p 0 00:00 0 [heap]\n")
    assert loaded_libraries(maps, "libmpi") == []
    how = ask_mpi(MPI.COMM_SELF, maps)[-1]
    assert "memory of the kinds" in how or "tells nothing" in how


@pytest.mark.parametrize("mpi_takes", [True, False])
@pytest.mark.parametrize("why_not", ["", "it does not"])
def test_ucx_is_asked_where_mpi_says_no_and_ucx_has_cuda(maps, monkeypatch, mpi_takes, why_not):
    monkeypatch.setattr("hpcmoe.comm.pointers.ask_function", lambda maps: (mpi_takes, "as told"))
    monkeypatch.setattr("hpcmoe.comm.pointers.why_not_all_by_ucx", lambda name: why_not)
    maps.write_text(LINE.format("libucp.so.0"))
    assert ask_mpi(MPI.COMM_SELF, maps)[:2] == (mpi_takes, False)
    maps.write_text(LINE.format("libucp.so.0") + LINE.format("libuct_cuda.so.0"))
    *takes, how = ask_mpi(MPI.COMM_SELF, maps)
    assert takes == [mpi_takes, not mpi_takes and not why_not]
    assert ("UCX has CUDA" in how) == (not mpi_takes) and (mpi_takes or why_not in how) and "\n" not in how


@pytest.mark.parametrize(
    "vendor, told, reason",
    [
        ("Open MPI", {"OMPI_MCA_pml": "ucx"}, ""),
        ("Open MPI", {}, "only with OMPI_MCA_pml=ucx"),
        ("Open MPI", {"MPIR_CVAR_NOLOCAL": "1"}, "only with OMPI_MCA_pml=ucx"),
        ("Open MPI", {"OMPI_MCA_pml": "ucx", "MPI_UCX_TLS": "tcp"}, "MPI_UCX_TLS=tcp leaves out cuda_copy"),
        ("Open MPI", {"OMPI_MCA_pml": "ucx", "UCX_TLS": "rc,cuda_ipc"}, "UCX_TLS=rc,cuda_ipc leaves out cuda_copy"),
        ("MPICH", {"MPIR_CVAR_NOLOCAL": "1"}, ""),
        ("MPICH", {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ucx"}, ""),
        ("MPICH", {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi"}, "MPICH goes by ofi"),
        ("MPICH", {"OMPI_MCA_pml": "ucx"}, "only with MPIR_CVAR_NOLOCAL=1"),
        ("Some MPI", {"OMPI_MCA_pml": "ucx", "MPIR_CVAR_NOLOCAL": "1"}, "what Some MPI leaves to it is not known"),
    ],
)
def test_what_keeps_ucx_from_carrying_all_is_said(monkeypatch, unset, vendor, told, reason):
    monkeypatch.setattr("hpcmoe.comm.pointers.MPI.Get_library_version", lambda: WHEEL)
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    found = why_not_all_by_ucx(vendor)
    assert found.endswith(reason) and bool(found) == bool(reason)


def test_an_mpich_built_for_another_way_is_not_believed(monkeypatch, unset):
    monkeypatch.setattr("hpcmoe.comm.pointers.MPI.Get_library_version", lambda: DEBIAN)
    monkeypatch.setenv("MPIR_CVAR_NOLOCAL", "1")
    assert why_not_all_by_ucx("MPICH") == "MPICH goes by ofi"
    assert [first_netmod(text) for text in (WHEEL, DEBIAN, "MPICH Device: ch3:nemesis")] == ["ucx", "ofi", ""]


@pytest.mark.parametrize(
    "transports", ["all", "cuda", "tcp,self,cuda_copy", "rc,cuda", "^tcp", "^cuda_ipc", "^rc,cuda_ipc"]
)
def test_transports_that_know_a_gpus_memory(transports):
    assert knows_cuda(transports)


@pytest.mark.parametrize("transports", ["tcp,self", "cuda_ipc", "tcp,cuda_ipc", "^cuda", "^tcp,cuda_copy", "^all"])
def test_transports_that_take_it_for_the_hosts(transports):
    assert not knows_cuda(transports)
