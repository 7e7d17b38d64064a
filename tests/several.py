"""Several runs of the program one after the other on the same ranks: `mpirun -n 3 python several.py RUNS`.

RUNS is a JSON list of arguments of hpcmoe.main; a line `run NUMBER` precedes what each run prints.
"""

import contextlib
import json
import sys

from mpi4py import MPI

from hpcmoe.cluster.discover import read_host_name
from hpcmoe.errors import exit_with
from hpcmoe.main import read_run_arguments, run
from hpcmoe.output import start_log
from hpcmoe.wait import barrier


def main(runs):
    """Do each run as the program would; the first that fails ends all."""
    comm = MPI.COMM_WORLD
    start_log(comm.rank, comm.size, read_host_name())
    try:
        for number, words in enumerate(runs):
            if comm.rank == 0:
                print(f"run {number}", flush=True)
            with contextlib.ExitStack() as opened:
                run(comm, read_run_arguments(words), opened)
                barrier(comm)
    except Exception as error:
        exit_with(comm, error, read_host_name())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
