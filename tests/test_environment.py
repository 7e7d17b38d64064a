"""What others set in the environment is read as what it should be, or rejected with its name and value."""

import os

import pytest

from hpcmoe.environment import (
    environment_without,
    find_ucx_obstacle,
    is_set,
    knows_cuda,
    read_counts,
    read_memory,
    read_number,
    read_setting,
)
from hpcmoe.errors import ClusterError

NONSENSE = ("x", "-1", "1.5", "1e3", "0x10", "9" * 5000, "٣", "1 2", "16GG", "G", "nan", "\udcff", "(null)")


def test_text_is_as_it_is_set_but_for_space_around_it():
    assert read_setting("A", {"A": " b \n"}) == "b"
    assert read_setting("A", {}) == "" and not is_set("A", {}) and is_set("A", {"A": ""})


@pytest.mark.parametrize(("text", "number"), [(None, 7), ("", 7), (" ", 7), ("0", 0), (" 12 ", 12), ("007", 7)])
def test_a_number_is_whole_and_its_default_stands_where_nothing_is_set(text, number):
    assert read_number("N", default=7, environ={} if text is None else {"N": text}) == number


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (None, 0), ("", 0), ("0", 0), ("4096", 2**32), ("4096M", 2**32), ("16G", 2**34), ("16g", 2**34),
        ("1T", 2**40), ("2P", 2**51), ("1024K", 2**20),
    ],
)  # fmt: skip
def test_memory_is_read_in_slurm_s_units(text, num_bytes):
    assert read_memory("M", {} if text is None else {"M": text}) == num_bytes


@pytest.mark.parametrize(("text", "counts"), [("", []), ("8", [8]), ("72(x2),36", [72, 72, 36]), ("4(x4)", [4] * 4)])
def test_numbers_of_nodes_are_repeated_as_slurm_does(text, counts):
    assert read_counts("C", {"C": text}) == counts


@pytest.mark.parametrize("read", [read_number, read_memory, read_counts])
@pytest.mark.parametrize("text", NONSENSE)
def test_what_is_no_number_is_refused_in_one_line_with_variable_and_value(read, text):
    with pytest.raises(ClusterError) as rejected:
        read("SLURM_THING", environ={"SLURM_THING": text})
    told = str(rejected.value)
    assert told.startswith(f"the environment's SLURM_THING = {text[:40]!r}"[:40]) and ": must be " in told
    assert len(told.splitlines()) == 1 and len(told) < 250


def test_a_number_beyond_what_can_be_is_rejected():
    with pytest.raises(ClusterError, match="N = '5000': must be a whole number of 0 to 4096"):
        read_number("N", most=4096, environ={"N": "5000"})


def test_a_command_may_be_started_without_some_variables(monkeypatch):
    monkeypatch.setenv("CUTS", "1")
    assert set(os.environ) - set(environment_without("CUTS", "ABSENT")) == {"CUTS"}


@pytest.fixture
def unset(monkeypatch):
    """Nothing is set for MPI or UCX."""
    for key in ("UCX_TLS", "MPI_UCX_TLS", "OMPI_MCA_pml", "MPIR_CVAR_CH4_NETMOD", "MPIR_CVAR_NOLOCAL"):
        monkeypatch.delenv(key, raising=False)


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
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    found = find_ucx_obstacle(vendor, "ucx")
    assert found.endswith(reason) and bool(found) == bool(reason)


def test_an_mpich_built_for_another_network_is_not_believed(monkeypatch, unset):
    monkeypatch.setenv("MPIR_CVAR_NOLOCAL", "1")
    assert find_ucx_obstacle("MPICH", "ofi") == "MPICH goes by ofi"


@pytest.mark.parametrize(
    "transports", ["all", "cuda", "tcp,self,cuda_copy", "rc,cuda", "^tcp", "^cuda_ipc", "^rc,cuda_ipc"]
)
def test_transports_that_know_a_gpus_memory(transports):
    assert knows_cuda(transports)


@pytest.mark.parametrize("transports", ["tcp,self", "cuda_ipc", "tcp,cuda_ipc", "^cuda", "^tcp,cuda_copy", "^all"])
def test_transports_that_take_it_for_the_hosts(transports):
    assert not knows_cuda(transports)
