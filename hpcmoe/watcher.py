"""A process beside a node's ranks that reports which of them died first, and of what, which hangs, and where.

Run by path, so that it starts in milliseconds: `python -S watcher.py HOST SIZE DEATHS LAUNCHER RANK:PID:PIDFD:PAGE
...`. It ends with the ranks; by SIGTERM, without a word, when they end in order; by SIGUSR1 when one of them fails,
which may be because another died: then it names who was dead by then. epoll hands events over in the order in which
they came, so the first is the first death even when the launcher has killed the others by then.

How a process ended is for its parent to know. Until the parent has asked, /proc shows it to the user's other processes;
afterwards the pidfd does, from Linux 6.15 on (pidfd.h: PIDFD_GET_INFO). On older kernels a parent that is quicker than
the watcher leaves it unknown, and the line says no more than that the process ended.

A rank counts in its page, a file in memory, whatever it does: work, and each look while it waits. One whose count has
stood still for the time that its page allows neither works nor waits. Time is the sum of this process's own looks, so
that a node that was suspended, or has no core to spare, is no hang.
"""

import contextlib
import fcntl
import mmap
import os
import select
import signal
import struct
import sys
import time

PAGE_BYTES = 4096  # of a rank's page; what faulthandler writes follows
COUNT, BUSY, STEP, LAYER, MICRO_BATCH, LIMIT_MS, AWAITED, WAITS_SINCE_MS, ENDS = range(9)  # int64 words
NAME, TEXT = slice(128, 256), slice(1024, PAGE_BYTES)  # bytes: what the rank does; why it is to end
STACK_SIGNAL = signal.SIGRTMAX - 3  # at which a rank writes its stack
_DYING_SECONDS = 0.2  # a process's memory goes, and fails its peers, before its end can be seen
_LEAST_LOOK_SECONDS, _MOST_LOOK_SECONDS = 0.05, 1.0  # between two looks at the pages
_LOOKS = 20  # in the time after which a rank hangs
_BUSY_SECONDS, _BUSY_FACTOR = 3600.0, 20.0  # the time of a rank that has said that it is busy, unless it is stopped
_WRITE_SECONDS = 0.01  # between two lines of a stack, at most
_STACK_SECONDS = 1.0  # for a rank to write its stack
_LEAVE_SECONDS = 10.0  # for the others to end by themselves, before the rank that hangs is killed
_INFO = struct.Struct("=QQ11Ii")  # struct pidfd_info: mask, cgroup, numbers of processes and users, the end
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3
_SIGNAL_BITS = 0x7F  # of a wait status: 0 where the process ended by itself
_STATES = {b"T": "stopped by a signal", b"R": "running", b"D": "waiting for a disk or the network", b"S": "asleep"}


class Rank:
    """A rank: its process, its page, and for how long it has stood still."""

    def __init__(self, word: str) -> None:
        """word: RANK:PID:PIDFD:PAGE; a file is -1 where there is none."""
        self.rank, self.pid, pidfd, page = word.split(":")
        self.pidfd, self.page = int(pidfd), int(page)
        self.map = mmap.mmap(self.page, PAGE_BYTES)  # -1: of nobody
        self.words = memoryview(self.map).cast("q")
        self.count, self.still_seconds, self.moved = -1, 0.0, time.time()

    def look(self, seconds: float) -> None:
        """Read the count, some seconds after the last look."""
        if self.words[COUNT] == self.count:
            self.still_seconds += seconds
        else:
            self.count, self.still_seconds, self.moved = self.words[COUNT], 0.0, time.time()

    @property
    def limit_seconds(self) -> float:
        """Return after how long it hangs, 0 where that is not looked for."""
        return self.words[LIMIT_MS] / 1000

    def is_alive(self) -> bool:
        """Return True if its process has not ended."""
        return read_process_state(self.pid)[0] not in (b"Z", b"X", b"")

    def has_waited(self) -> bool:
        """Return True if it has waited in one place for as long as a hang takes."""
        since = self.words[WAITS_SINCE_MS] / 1000
        return self.still_seconds < _MOST_LOOK_SECONDS and 0 < since < time.monotonic() - self.limit_seconds

    def hangs(self) -> bool:
        """Return True if it has neither worked nor waited for its time."""
        limit = self.limit_seconds
        if not limit or self.still_seconds < limit:
            return False
        state, is_traced = read_process_state(self.pid)
        if is_traced:  # by a debugger
            self.still_seconds = 0.0
            return False
        if state != b"T" and self.words[BUSY]:
            return self.still_seconds >= max(_BUSY_SECONDS, _BUSY_FACTOR * limit)
        return True

    def describe(self) -> str:
        """Format what it does, since when, and in which state."""
        name = self.map[NAME].rstrip(b"\0").decode(errors="replace")
        layer, micro_batch, step = self.words[LAYER], self.words[MICRO_BATCH], self.words[STEP]
        place = f"in {name or 'no stage'}" + (f" of layer {layer}, micro-batch {micro_batch}" if layer >= 0 else "")
        since = time.strftime("%H:%M:%S", time.localtime(self.moved))
        return (
            f"hangs: it neither works nor waits since {since}, for {self.still_seconds:.0f} s, {place}"
            + f", step {step}" * (step > 0)
            + f"; process {self.pid} is {describe_state(self.pid)}"
        )

    def end(self, text: str) -> None:
        """Write why it is to end, which it reads when it next waits."""
        encoded = text.encode()[: TEXT.stop - TEXT.start]
        self.map[TEXT.start : TEXT.start + len(encoded)] = encoded
        self.words[ENDS] = len(encoded)

    def send(self, number: int) -> None:
        """Send its process a signal."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, number)

    def read_stack(self) -> list[str]:
        """Request its Python stack -> the lines, none where it writes none."""
        file, num_bytes = self.page, 0
        if file < 0:
            return []
        begin, deadline = os.fstat(file).st_size, time.monotonic() + _STACK_SECONDS
        is_stopped = read_process_state(self.pid)[0] == b"T"
        self.send(STACK_SIGNAL)
        self.send(signal.SIGCONT)  # whoever is stopped goes on for as long as it takes to write
        while time.monotonic() < deadline and (not num_bytes or os.fstat(file).st_size > begin + num_bytes):
            num_bytes = os.fstat(file).st_size - begin
            time.sleep(_WRITE_SECONDS)
        if is_stopped:
            self.send(signal.SIGSTOP)
        return os.pread(file, os.fstat(file).st_size - begin, begin).decode(errors="replace").splitlines()


class Watcher:
    """What watches the ranks of a node."""

    def __init__(self, host: str, size: str, deaths: str, launcher: str, words: tuple[str, ...]) -> None:
        """deaths: an epoll that holds all pidfds; launcher: PID:PIDFD of what started the ranks, "" if nothing did."""
        self.host, self.size, self.deaths = host, size, select.epoll.fromfd(int(deaths))
        self.ranks = [Rank(word) for word in words]
        self.rank_of_file = {rank.pidfd: rank for rank in self.ranks}
        self.launcher, self.looked, self.has_named = launcher.partition(":")[0], time.monotonic(), False

    def watch(self) -> None:
        """Wait for the first process to end, and name it; name whoever hangs, and end it."""
        if gone := self.rank_of_file.get(-1):  # before anything could watch it
            return self.write_death(gone, None)
        while not self.report_first(self.choose_pause()):
            self.look()
        return None

    def choose_pause(self) -> float:
        """Return the seconds until the next look: few where little time makes a hang."""
        limits = [rank.limit_seconds for rank in self.ranks if rank.limit_seconds] or [_MOST_LOOK_SECONDS * _LOOKS]
        return min(max(min(limits) / _LOOKS, _LEAST_LOOK_SECONDS), _MOST_LOOK_SECONDS)

    def report_first(self, timeout_seconds: float) -> bool:
        """Name the first process that has ended -> whether there was one."""
        for file, _ in self.deaths.poll(timeout_seconds)[:1]:
            if file in self.rank_of_file:
                rank = self.rank_of_file[file]
                self.write_death(rank, read_end(file, rank.pid))
            else:
                self.end_orphans()
            return True
        return False

    def end_orphans(self) -> None:
        """End the ranks, whose launcher has ended: nobody else will."""
        time.sleep(_DYING_SECONDS)  # it may have ended them itself
        if any(rank.is_alive() for rank in self.ranks):
            ranks = ", ".join(rank.rank for rank in self.ranks)
            self.write(f"[{self.host}]", [f"process {self.launcher}, which started ranks {ranks}, ended: so do they"])
        for rank in self.ranks:
            rank.send(signal.SIGKILL)

    def look(self) -> None:
        """Read all pages; where ranks hang name them, and end all."""
        now = time.monotonic()
        seconds, self.looked = min(now - self.looked, 2 * self.choose_pause()), now
        if self.launcher and read_process_state(self.launcher)[0] == b"T":
            return  # all are suspended
        for rank in self.ranks:
            rank.look(seconds)
        hanging = [rank for rank in self.ranks if rank.hangs()]
        if hanging and any(rank.words[AWAITED] for rank in hanging):  # the time between is the user's
            hanging = hanging if any(rank.has_waited() for rank in self.ranks) else []
        if hanging:
            stopped = [rank for rank in hanging if read_process_state(rank.pid)[0] == b"T"]
            self.end_hang(stopped or hanging)  # the others may wait for these within MPI

    def end_hang(self, hanging: list[Rank]) -> None:
        """Name ranks that hang, with their stacks; have the others end, and kill these."""
        self.has_named, texts = True, []
        for rank in hanging:
            name = f"[rank {rank.rank} of {self.size}, {self.host}]"
            text = rank.describe()
            texts.append(f"{name} {text}")
            self.write(name, [text])
            rank.end(texts[-1])  # if it goes on at all
            self.write(name, rank.read_stack(), has_clock=False)

        # What was printed has to come out before the launcher ends.
        time.sleep(_DYING_SECONDS)
        for rank in self.ranks:
            rank.end("; ".join(texts))
        self.await_ends(_LEAVE_SECONDS)
        for rank in hanging:
            rank.send(signal.SIGKILL)
        os._exit(0)

    def await_ends(self, seconds: float) -> None:
        """Wait until all ranks have ended, for some seconds at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(rank.is_alive() for rank in self.ranks):
            time.sleep(_LEAST_LOOK_SECONDS)

    def write_death(self, rank: Rank, status: int | None) -> None:
        """Name a rank that has died."""
        text = f"process {rank.pid} ended before its time, the first of this node's ranks{describe_end(status)}"
        self.write(f"[rank {rank.rank} of {self.size}, {self.host}]", [text])

    def write(self, name: str, lines: list[str], has_clock: bool = True) -> None:
        """Write lines, whole and at once."""
        now = time.time()
        clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d} "
        with contextlib.suppress(OSError):
            sys.stderr.write("".join(f"{name} {clock if has_clock else ''}{line}\n" for line in lines))
            sys.stderr.flush()


def main(host: str, size: str, deaths: str, launcher: str, *ranks: str) -> None:
    """Watch until the ranks end, or a signal asks."""
    watcher = Watcher(host, size, deaths, launcher, ranks)

    def answer() -> None:
        if not watcher.has_named:
            watcher.report_first(_DYING_SECONDS)
            os._exit(0)

    # Be stopped or asked by signals.
    signal.signal(signal.SIGTERM, lambda *_: None if watcher.has_named else os._exit(0))
    signal.signal(signal.SIGUSR1, lambda *_: answer())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's business
    watcher.watch()


def read_process_state(pid: str) -> tuple[bytes, bool]:
    """Read a process's state, one letter, and whether a debugger holds it -> b"" where there is no such process."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    except OSError:
        return b"", False
    return lines[b"State"].split()[0], int(lines.get(b"TracerPid", 0)) > 0


def describe_state(pid: str) -> str:
    """Format what a process does, as the system sees it: running, where any of its threads is."""
    state = read_process_state(pid)[0]
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
        if state == b"S" and any(read_process_state(f"{pid}/task/{thread}")[0] == b"R" for thread in threads):
            state = b"R"
    return _STATES.get(state, f"in state {state.decode()}")


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


if __name__ == "__main__":
    main(*sys.argv[1:])
