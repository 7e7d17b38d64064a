"""A process beside a node's ranks that reports which of them died first, and of what: launchers name any, or none.

Run by path, so that it starts in milliseconds: `python -S watcher.py HOST SIZE RANK:PID ...`. It ends with the ranks;
by SIGTERM, without a word, when they end in order; by SIGUSR1 when one of them fails, which may be because another
died: then it names who was dead by then. epoll hands events over in the order in which they came, so the first is the
first death even when the launcher has killed the others by then.

How a process ended is for its parent to know. Until the parent has asked, /proc shows it to the user's other processes;
afterwards the pidfd does, from Linux 6.15 on (pidfd.h: PIDFD_GET_INFO). On older kernels a parent that is quicker than
the watcher leaves it unknown, and the line says no more than that the process ended.
"""

import fcntl
import os
import select
import signal
import struct
import sys
import time

_DYING_SECONDS = 0.2  # a process's memory goes, and fails its peers, before its end can be seen
_INFO = struct.Struct("=QQ11Ii")  # struct pidfd_info: mask, cgroup, numbers of processes and users, the end
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3
_SIGNAL_BITS = 0x7F  # of a wait status: 0 where the process ended by itself


def main(host: str, size: str, *ranks: str) -> None:
    """Wait for the first process to end, and name it."""
    deaths, rank_of_file = select.epoll(), dict[int, tuple[str, str]]()

    def report_first(timeout_seconds: float | None = None) -> None:
        for first, _ in deaths.poll(timeout_seconds)[:1]:
            rank, pid = rank_of_file[first]
            report_death(host, size, rank, pid, read_end(first, pid))
        os._exit(0)

    # Be stopped or asked by signals.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGUSR1, lambda *_: report_first(_DYING_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business

    # Wait for the ranks' ends.
    for rank, pid in (word.split(":") for word in ranks):
        try:
            file = os.pidfd_open(int(pid))
        except ProcessLookupError:
            return report_death(host, size, rank, pid, None)
        except OSError:  # the kernel does not let us watch
            return None
        rank_of_file[file] = (rank, pid)
        deaths.register(file, select.EPOLLIN)
    return report_first()


def read_end(file: int, pid: str) -> int | None:
    """Read how a dead process ended -> its wait status, or None where nobody knows any more."""
    try:
        may_know = os.geteuid() in (0, os.stat(f"/proc/{pid}").st_uid)  # else the status reads 0
        with open(f"/proc/{pid}/stat", "rb") as stat:
            state, *_, status = stat.read().rpartition(b")")[2].split()
        if state in (b"Z", b"X") and may_know:
            return int(status)
    except OSError:
        pass  # its parent has buried it
    try:
        answered, *_, status = _INFO.unpack(fcntl.ioctl(file, _GET_INFO, _INFO.pack(_INFO_EXIT, *[0] * 13)))
    except OSError:
        return None
    return status if answered & _INFO_EXIT else None


def describe_end(status: int | None) -> str:
    """Format a wait status: the signal, or the exit status."""
    if status is None:
        return ""
    number = status & _SIGNAL_BITS
    if number == 0:
        return f": exit status {status >> 8}"
    try:
        name = f" ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal
        name = ""
    return f": signal {number}{name}" + "; killed, out of memory?" * (number == signal.SIGKILL)


def report_death(host: str, size: str, rank: str, pid: str, status: int | None) -> None:
    """Write the line, whole and at once."""
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
    sys.stderr.write(
        f"[rank {rank} of {size}, {host}] {clock} process {pid} ended before its time, the first of this node's "
        f"ranks{describe_end(status)}\n"
    )
    sys.stderr.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
