"""Whether MPI takes CUDA pointers is its function's word, or the standard's list's, or UCX's where that carries all."""

import pytest
from mpi4py import MPI

from hpcmoe.cluster.topology import BY_UCX
from hpcmoe.comm.pointers import MAPS, ask_mpi, loaded_libraries

LINE = "7f00-7f01 r-xp 00000000 fe:00 12 /usr/lib/{}\n"
VENDOR = MPI.get_vendor()[0]
CUDA_UCX = LINE.format("libuct_cuda.so.0") + LINE.format("libucp.so.0")


@pytest.fixture
def maps(tmp_path):
    """A process's map of libraries, for a test to write -> its path."""
    return tmp_path / "maps"


def test_this_mpi_answers_by_its_function_or_by_the_standards_list(maps):
    takes, how = ask_mpi(MPI.COMM_SELF)
    assert not takes and "no to CUDA pointers" in how  # no wheel of PyPI's takes any
    maps.write_text(LINE.format("libmpich_else.so.12") + "7f02-7f03 rw-p 0 00:00 0 [heap]\n")
    assert loaded_libraries(maps, "libmpi") == []
    takes, how = ask_mpi(MPI.COMM_SELF, maps)
    assert not takes and ("memory of the kinds" in how or "tells nothing" in how)


@pytest.mark.skipif(VENDOR not in BY_UCX, reason="an MPI of which we do not know what it leaves to UCX")
@pytest.mark.parametrize(
    "transports, takes",
    [(None, True), ("tcp,self,cuda_copy", True), ("^tcp", True), ("all", True), ("tcp,self", False), ("^cuda", False)],
)
def test_ucx_takes_cuda_pointers_where_it_carries_all(maps, monkeypatch, transports, takes):
    maps.write_text(MAPS.read_text() + CUDA_UCX)
    monkeypatch.setenv(*BY_UCX[VENDOR])
    monkeypatch.delenv("UCX_TLS", raising=False)
    if transports is not None:
        monkeypatch.setenv("UCX_TLS", transports)
    found, how = ask_mpi(MPI.COMM_SELF, maps)
    assert found == takes and how.startswith("MPI says no to CUDA pointers") and "UCX takes them" in how
    assert how.endswith("and carries all messages" if takes else f"but UCX_TLS={transports} keeps it from them")


def test_what_has_ucx_carry_all_is_said_where_it_does_not(maps, monkeypatch):
    maps.write_text(MAPS.read_text() + CUDA_UCX)
    for key, _ in BY_UCX.values():
        monkeypatch.delenv(key, raising=False)
    for name, (key, value) in BY_UCX.items():
        monkeypatch.setattr("hpcmoe.cluster.topology.MPI.get_vendor", lambda name=name: (name, (1, 0)))
        takes, how = ask_mpi(MPI.COMM_SELF, maps)
        assert not takes and how.endswith(f"UCX takes them, but it carries all messages only with {key}={value}")
    monkeypatch.setattr("hpcmoe.cluster.topology.MPI.get_vendor", lambda: ("Some MPI", (1, 0)))
    assert ask_mpi(MPI.COMM_SELF, maps)[1].endswith("but Some MPI may not leave all messages to it")


def test_another_mpis_variable_does_not_count(maps, monkeypatch):
    maps.write_text(MAPS.read_text() + CUDA_UCX)
    own = BY_UCX.get(VENDOR, ("", ""))[0]
    for key, value in BY_UCX.values():
        if key == own:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, value)
    assert not ask_mpi(MPI.COMM_SELF, maps)[0]
