"""A process beside a node's ranks that says which of them died first: launchers name any, or none.

Run by path, so that it starts in milliseconds: `python -S watcher.py HOST SIZE RANK:PID ...`. It ends with the ranks;
by SIGTERM, without a word, when they end in order; by SIGUSR1 when one of them fails, which may be because another
died: then it names who was dead by then. epoll hands events over in the order in which they came, so the first is the
first death even when the launcher has killed the others by then.
"""

import os
import select
import signal
import sys
import time

DYING_SECONDS = 0.2  # a process's memory goes, and fails its peers, before its end can be seen


def main(host, size, *ranks):
    """Wait for the first process to end, and name it."""
    deaths, rank_of_file = select.epoll(), {}

    def name_the_first(timeout_seconds=None):
        for first, _ in deaths.poll(timeout_seconds)[:1]:
            say(host, size, *rank_of_file[first])
        os._exit(0)

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGUSR1, lambda *_: name_the_first(DYING_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business
    for rank, pid in (word.split(":") for word in ranks):
        try:
            file = os.pidfd_open(int(pid))
        except ProcessLookupError:
            return say(host, size, rank, pid)
        except OSError:  # the kernel does not let us watch
            return None
        rank_of_file[file] = (rank, pid)
        deaths.register(file, select.EPOLLIN)
    return name_the_first()


def say(host, size, rank, pid):
    """Write the line, whole and at once."""
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
    sys.stderr.write(
        f"[rank {rank} of {size}, {host}] {clock} process {pid} ended before its time, the first of this node's "
        "ranks (killed? out of memory?)\n"
    )
    sys.stderr.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
