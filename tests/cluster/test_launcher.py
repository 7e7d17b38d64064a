"""A process that a launcher started among others, but whose MPI does not see them, is rejected."""

import sys

import pytest
from launch import run

from hpcmoe.cluster import launcher
from hpcmoe.cluster.launcher import describe_launcher, find_launched, reject_mixed_mpi, reject_mixed_mpi_once
from hpcmoe.errors import ClusterError

SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
FLUX = {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "key", "size"),
    [
        ({"PMI_SIZE": "16"}, "PMI_SIZE", 16),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "OMPI_COMM_WORLD_SIZE", 16),
        ({"MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_RANK": "0"}, "MV2_COMM_WORLD_SIZE", 8),
        ({"JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_RANK": "0"}, "JSM_NAMESPACE_SIZE", 6),
        (SRUN, "SLURM_STEP_NUM_TASKS", 16),
        (TORCHRUN, "WORLD_SIZE", 4),
        (FLUX, "FLUX_JOB_SIZE", 4),
        (TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, "WORLD_SIZE", 4),  # torchrun in a job
        ({"PALS_SIZE": "4", "PALS_RANKID": "0"}, "PALS_SIZE", 4),
        ({"PALS_RANKID": "2", "PALS_LOCAL_SIZE": "2"}, "PALS_RANKID", 3),
        ({"PMIX_RANK": "5"}, "PMIX_RANK", 6),
        ({"ALPS_APP_PE": "5"}, "ALPS_APP_PE", 6),
        ({"HOROVOD_SIZE": "4", "HOROVOD_RANK": "0"}, "HOROVOD_SIZE", 4),
        ({"MPI_NRANKS": "4", "MPI_RANKID": "0"}, "MPI_NRANKS", 4),
        ({"MVP_COMM_WORLD_SIZE": "4"}, "MVP_COMM_WORLD_SIZE", 4),  # any MPI's
    ],
)
def test_a_rank_alone_under_a_launcher_of_many_is_rejected(environ, key, size):
    assert find_launched(environ) == (key, size)
    told = rf"^two MPIs are mixed: the launcher says {key} = \d+ \(.*\), but|, of at least .* sees 1 rank; start"
    with pytest.raises(ClusterError, match=told) as rejected:
        reject_mixed_mpi(environ)
    assert len(str(rejected.value).splitlines()) == 1


def test_the_error_says_how_to_start_instead():
    with pytest.raises(
        ClusterError, match=r"sees 1 rank; torchrun starts .* start with mpirun -n 4 python .*, or srun"
    ):
        reject_mixed_mpi(TORCHRUN)
    with pytest.raises(ClusterError, match=r"\(Flux\), but .* flux run"):
        reject_mixed_mpi(FLUX)
    with pytest.raises(ClusterError, match="start with .*mpirun"):
        reject_mixed_mpi({"PMI_SIZE": "2"})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PMI_SIZE": "1"},
        {"PMI_SIZE": ""},
        {"SLURM_NTASKS": "16"},  # the shell of salloc
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"},
        SRUN
        | {"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "1"},  # mpirun -n 1 on the first of four nodes, a proxy on each
        {"WORLD_SIZE": "4"},  # a script's, for other ends
        {"WORLD_SIZE": "x", "RANK": "y"},
        TORCHRUN | {"WORLD_SIZE": "1"},
        TORCHRUN | {"PMI_SIZE": "1"},  # mpirun -n 1 in a script that has set torch's variables
        FLUX | {"PMI_SIZE": "1"},
        {"PMIX_RANK": "0"},
        {"PMIX_RANK": "3", "PMI_SIZE": "1"},  # Slurm's PMIx started the proxies
        {"PMIX_RANK": "4294967294"},  # a tool
    ],
)
def test_a_rank_that_is_meant_to_be_alone_may_run(environ):
    assert find_launched(environ)[1] == 1
    reject_mixed_mpi(environ)


@pytest.mark.parametrize(
    ("environ", "size", "rejected"),
    [
        ({"PMI_SIZE": "4"}, 4, False),
        ({"PMI_SIZE": "4"}, 2, True),
        (FLUX, 2, True),
        (SRUN, 16, False),
        (SRUN, 8, True),
        (SRUN | {"PMI_SIZE": "2"}, 2, False),  # mpirun -n 2 within a job
        (SRUN | TORCHRUN, 4, False),  # one of them is MPI's
        ({"PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "2"}, 2, False),  # mpirun in a task of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 4, False),
        ({"PMIX_RANK": "3"}, 4, False),
        ({"PMIX_RANK": "3"}, 2, True),
    ],
)
def test_a_world_smaller_than_its_launcher_s_is_rejected(environ, size, rejected):
    if not rejected:
        reject_mixed_mpi(environ, size)
        return
    with pytest.raises(ClusterError, match=rf"two MPIs are mixed: .* sees {size} ranks"):
        reject_mixed_mpi(environ, size)


@pytest.mark.parametrize("value", ["four", "-1", "1.5", "9" * 5000])
@pytest.mark.parametrize(
    "environ",
    [
        {"PMI_SIZE": "?"}, {"OMPI_COMM_WORLD_SIZE": "?"}, TORCHRUN | {"WORLD_SIZE": "?"}, FLUX | {"FLUX_JOB_SIZE": "?"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "?"}, {"PMIX_RANK": "?"},
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_named(environ, value):
    key = next(key for key, text in environ.items() if text == "?")
    with pytest.raises(ClusterError, match=f"the environment's {key} = '{value[:10]}.*: must be a whole number"):
        find_launched(environ | {key: value})


def test_the_launcher_is_named(monkeypatch):
    for key in ("PMI_SIZE", "PMI_RANK", "SLURM_JOB_ID", *SRUN):
        monkeypatch.delenv(key, raising=False)
    assert describe_launcher() == "none: a process alone; no Slurm"
    for key, value in SRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert describe_launcher() == "srun; Slurm, job 7"
    monkeypatch.setenv("PMI_SIZE", "2")
    assert describe_launcher() == "mpirun or srun by PMI; Slurm, job 7"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"PMI_RANK": "0", "SLURM_PROCID": "1"}, {"PMI_RANK": "1", "SLURM_PROCID": "0"}),
        (TORCHRUN, TORCHRUN | {"RANK": "2"}),
        (FLUX, FLUX | {"FLUX_TASK_RANK": "3"}),
        ({"OMPI_COMM_WORLD_RANK": "0", "RANK": "7"}, {"OMPI_COMM_WORLD_RANK": "1"}),
    ],
)
def test_one_rank_tells_that_mpis_are_mixed(first, second, monkeypatch):
    """Each is alone in its world, and would say it."""
    monkeypatch.setattr(launcher, "DRAIN_SECONDS", 0)
    size = {"OMPI_COMM_WORLD_SIZE": "16"}
    with pytest.raises(ClusterError, match="two MPIs are mixed"):
        reject_mixed_mpi_once(first | size, 1)
    with pytest.raises(ClusterError) as silent:
        reject_mixed_mpi_once(second | size, 1)
    assert str(silent.value) == ""


def test_what_starts_this_environment_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ClusterError, match="start with the mpirun of that MPI, or .*pip install"):
        reject_mixed_mpi({"PMI_SIZE": "2"})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch()
    with pytest.raises(ClusterError, match=f"start with {tmp_path}/bin/mpirun"):
        reject_mixed_mpi({"PMI_SIZE": "2"})


CHECK = """
from hpcmoe.mpi_library import import_mpi
MPI = import_mpi()
from hpcmoe.cluster.launcher import check_launcher
from hpcmoe.errors import HpcmoeError, exit_with
try:
    check_launcher(MPI.COMM_WORLD)
except HpcmoeError as error:
    exit_with(MPI.COMM_WORLD, error, "here")
print("started")
"""


def test_mixed_mpis_end_with_one_line():
    """MPICH would abort at PMIx's variables, which Open MPI's mpirun sets."""
    pmix = {"PMIX_NAMESPACE": "1", "PMIX_RANK": "0"}
    ended = run(sys.executable, "-c", CHECK, OMPI_COMM_WORLD_SIZE="16", PMI_SIZE="16", **pmix)
    assert ended.status == 2
    assert ended.errors.startswith("hpcmoe: two MPIs are mixed: the launcher says ") and ended.errors.count("\n") == 1


def test_a_lone_program_in_a_batch_script_starts():
    ended = run(sys.executable, "-c", CHECK, SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_JOB_ID="7")
    assert (ended.status, ended.output) == (0, "started\n"), ended
