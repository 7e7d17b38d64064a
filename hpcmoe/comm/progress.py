"""Messages that move while the host multiplies: a thread that enters MPI a thousand times a second.

Large messages progress only while some thread is inside an MPI call. Between two GEMMs the transport is poked; a long
GEMM lets the interpreter go, and then this thread does it. While the transport is poked anyway it stays out of the way:
sixteen such threads on two cores took half of their time.
"""

import concurrent.futures
import contextlib
import threading

from mpi4py import MPI

SHORTEST_SECONDS, LONGEST_SECONDS = 1e-3, 8e-3  # between two looks


@contextlib.contextmanager
def open_progress_thread(transport, begin):
    """Keep a transport's messages going within the with-block, whenever nobody pokes it.

    begin() is the thread's first call; what it raises is raised here. Without MPI's leave to call it from several
    threads there is no thread.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        yield
        return
    over, begun, last_tag = threading.Event(), concurrent.futures.Future(), MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)

    def work():
        """Ask for some message: what MPI does on the way is the point."""
        try:
            begun.set_result(begin())
        except Exception as error:
            begun.set_exception(error)
            return
        pause, seen = SHORTEST_SECONDS, 0
        while not over.wait(pause):
            pokes = transport.num_pokes
            if transport.requests and pokes == seen:
                transport.comm.Iprobe(MPI.ANY_SOURCE, last_tag)
                pause = SHORTEST_SECONDS
            else:
                pause = min(2 * pause, LONGEST_SECONDS)
            seen = pokes

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun.result()
    try:
        yield
    finally:
        over.set()
        thread.join()
