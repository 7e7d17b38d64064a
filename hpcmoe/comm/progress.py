"""Messages that move while the host multiplies: a thread that enters MPI a thousand times a second.

Large messages progress only while some thread is inside an MPI call. Between two GEMMs the transport is poked; a long
GEMM lets the interpreter go, and then this thread does it.
"""

import contextlib
import threading

from mpi4py import MPI

PERIOD_SECONDS = 1e-3


@contextlib.contextmanager
def open_progress_thread(comm, is_busy):
    """Keep MPI going within the with-block, while is_busy().

    Without MPI's leave to call it from several threads there is no thread.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        yield
        return
    over, last_tag = threading.Event(), MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)

    def work():
        """Ask for some message: what MPI does on the way is the point."""
        while not over.wait(PERIOD_SECONDS):
            if is_busy():
                comm.Iprobe(MPI.ANY_SOURCE, last_tag)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
