"""A bench's two halves: `measure` starts its module on MPI ranks, and there `work` measures and leaves the figures."""

import json
import os
import pathlib
import sys

from bench.shapes import write_shapes
from launch import MPIRUN, ROOT, run
from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name
from hpcmoe.errors import exit_with

LIMIT_SECONDS = 1800.0


def run_ranks(num_ranks, module, folder, *arguments):
    """Run a module of this folder on ranks of this machine -> what its `work` returned on rank 0.

    The module ends with `main(work)`. Its standard error stays in the folder when it fails.
    """
    path = folder.absolute() / f"{module}-{num_ranks}.json"
    path.unlink(missing_ok=True)
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    worker = [sys.executable, "-m", f"bench.{module}", path, *arguments]
    ended = run(MPIRUN, "-n", num_ranks, *worker, timeout_seconds=LIMIT_SECONDS, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    assert ended.status == 0, ended
    return json.loads(path.read_text())


def run_shapes(shapes, module, folder, budget_seconds):
    """Run a module on shapes, one group of ranks a size -> {name: case} of all."""
    cases = {}
    for num_ranks in sorted({shape.ranks for shape in shapes}):
        chosen = write_shapes(shape for shape in shapes if shape.ranks == num_ranks)
        cases |= run_ranks(num_ranks, module, folder, chosen, budget_seconds)
    return cases


def main(work):
    """Be one of the ranks: call work(comm, *arguments), and write what it returns on rank 0."""
    comm = MPI.COMM_WORLD
    try:
        path, *arguments = sys.argv[1:]
        figures = work(comm, *arguments)
        if comm.rank == 0:
            pathlib.Path(path).write_text(json.dumps(figures))
    except Exception as error:
        exit_with(comm, error, read_host_name())
