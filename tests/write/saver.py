"""Programs that save without end, to be killed: `python saver.py FOLDER` on all ranks of an mpirun, or one by one.

`python saver.py FOLDER KILLS SEED` forks a process for each kill, which saves in FOLDER/NUMBER, and kills it at a
random moment after its first checkpoint.
"""

import itertools
import os
import pathlib
import random
import signal
import sys
import time

import mpi4py

mpi4py.rc.initialize = False  # each fork starts its own

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from hpcmoe.write.boxes import Piece  # noqa: E402
from hpcmoe.write.writer import open_writer  # noqa: E402

NUMBERS, LOOKS, KEPT = 200_000, 6, 2  # of a rank's array; between two saves; checkpoints
LONGEST_LIFE_SECONDS = 0.4  # after the first checkpoint


def save_forever(comm, folder, asynchronous):
    """Save a row of each rank, filled with the step, again and again. Collective over comm."""
    with open_writer(comm, folder, KEPT, asynchronous) as writer:
        for step in itertools.count(1):
            array = np.full((1, NUMBERS), step, np.float32)
            piece = Piece(name="w", shape=(comm.size, NUMBERS), start=(comm.rank, 0), array=array)
            writer.save(step, [piece], {"step": step})
            array[:] = -1  # what a thread writes is a copy
            for _ in range(LOOKS):
                time.sleep(1e-3)
                writer.poll()


def kill_one(folder, number, moment):
    """Fork a process that saves in folder/NUMBER, and kill it so many seconds after its first checkpoint."""
    own = folder / str(number)
    own.mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            MPI.Init_thread()
            save_forever(MPI.COMM_WORLD, own, asynchronous=number % 2 == 0)
        finally:
            os._exit(1)
    while not (own / "checkpoint-1").exists() and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(1e-3)
    time.sleep(moment)
    segments = list_segments(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for segment in segments:
        segment.unlink(missing_ok=True)


def list_segments(pid):
    """List the shared memory of a process, which MPI would remove at an orderly end -> paths."""
    maps = pathlib.Path(f"/proc/{pid}/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {pathlib.Path(line.split()[-1]) for line in lines if "/dev/shm/mpich" in line}


def main(folder, num_kills=None, seed=0):
    """Save as one of some ranks, or fork and kill."""
    if num_kills is None:
        MPI.Init_thread()
        save_forever(MPI.COMM_WORLD, pathlib.Path(folder), asynchronous=True)
        return
    moments = random.Random(int(seed))
    for number in range(int(num_kills)):
        kill_one(pathlib.Path(folder), number, moments.uniform(0, LONGEST_LIFE_SECONDS))


if __name__ == "__main__":
    main(*sys.argv[1:])
