"""A rank that leaves a group by an exception sends the others its reason, so that none waits for it for ever.

One short message to each rank, which nobody needs to expect: whoever waits probes for one. Nothing here is collective
but opening, and closing in order.
"""

import contextlib
import os
import pathlib
import sysconfig
import time
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType

from mpi4py import MPI

from hpcmoe.errors import HpcmoeError, PeerError
from hpcmoe.messages import printable
from hpcmoe.wait import barrier, call_at_pauses

_CHECK_SECONDS = 0.05  # between two probes
_PAUSE_SECONDS = 1e-3  # between two looks at what is sent
_SEND_SECONDS = 1.0  # how long a rank that leaves waits for its messages to be on their way
_MESSAGE_BYTES = 512  # so short that MPI sends it whether anybody waits for it or not
PACKAGE = pathlib.Path(__file__).parents[1]


class FailureReports:
    """The reasons for which ranks of a group have left."""

    def __init__(self, comm: MPI.Comm) -> None:
        """comm: nobody else's messages are in it."""
        self.comm = comm
        self.place: object = ""  # what this rank does now, as an error is to name it: "dispatch of layer 2"
        self.error: PeerError | None = None  # once a rank is known to have left
        self.next_check = 0.0

    def report(self, error: BaseException, place: str = "") -> None:
        """Send every other rank this rank's reason to leave. Not collective, and blocks for a second at most.

        place: where it happened; the user's line in the error's traceback if empty. An error that many ranks share goes
        to few others, who forward it; another rank's reason has been forwarded when it came.
        """
        if isinstance(error, PeerError):
            return
        rank, size = self.comm.rank, self.comm.size
        is_shared = isinstance(error, HpcmoeError) and error.shared
        send_short(
            self.comm,
            format_failure(f"[rank {rank} of {size}, {os.uname().nodename}]", error, place),
            list_neighbours(rank, size) if is_shared else [other for other in range(size) if other != rank],
        )

    def check(self) -> None:
        """Raise PeerError if another rank has left. Not collective; looks every 50 ms at most."""
        if self.error is None:
            now = time.monotonic()
            if now < self.next_check:
                return
            self.next_check = now + _CHECK_SECONDS
            self.error = self.receive()
        if self.error is not None:
            raise self.error

    def receive(self) -> PeerError | None:
        """Receive the reason of a rank that has left, if any, and forward it."""
        status = MPI.Status()
        if not self.comm.Iprobe(status=status):
            return None
        message = bytearray(_MESSAGE_BYTES)
        self.comm.Recv([message, MPI.BYTE], status.Get_source(), status.Get_tag())
        text, place = bytes(message).rstrip(b"\0"), str(self.place)
        send_short(self.comm, text, list_neighbours(self.comm.rank, self.comm.size))
        return PeerError(text.decode(errors="replace") + f"; this rank was in {place}" * bool(place))


def send_short(comm: MPI.Comm, text: bytes, ranks: Iterable[int], tag: int = 0) -> None:
    """Send some ranks a short message, whether they wait for it or not."""
    # MPI may read this after Python has ended, so it is never freed.
    message = MPI.Alloc_mem(_MESSAGE_BYTES)
    message[:] = text[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    deadline = time.monotonic() + _SEND_SECONDS
    requests = [comm.Isend([message, MPI.BYTE], rank, tag) for rank in ranks]
    while not MPI.Request.Testall(requests) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def open_failures(comm: MPI.Comm) -> Iterator[FailureReports]:
    """Open the reports of ranks that leave a group. Collective over comm, both ends, but for an end by an exception.

    In the block every wait of this thread raises PeerError once another rank has left it by an exception.
    """
    barrier(comm)
    failures = FailureReports(comm.Dup())
    with call_at_pauses(lambda _: failures.check()):
        try:
            yield failures
            barrier(failures.comm)
        except BaseException as error:
            failures.report(error)
            raise
    failures.comm.Free()


def list_neighbours(rank: int, size: int) -> list[int]:
    """List the ranks 1, 2, 4, ... beyond a rank: what each of these forwards reaches all in a few steps."""
    return [(rank + 2**power) % size for power in range((size - 1).bit_length())]


def format_failure(rank: str, error: BaseException, place: str) -> bytes:
    """Format why a rank leaves, as one line that fits into a message."""
    first_line = next(iter(str(error).splitlines()), "")
    reason = type(error).__name__ + f": {first_line}" * bool(first_line)
    place = place or find_user_line(error.__traceback__)
    start, end = f"{rank} {printable(reason)}".encode(), f" ({printable(place)})".encode() if place else b""
    if len(start) + len(end) > _MESSAGE_BYTES:
        start = start[: _MESSAGE_BYTES - len(end[:200]) - 3] + b"..."
    return start + end[:200]


def find_user_line(trace: TracebackType | None) -> str:
    """Return file:line of the innermost frame that is neither this package's nor a library's; of all, if none is."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]
    of_user = [(file, line) for file, line in frames if not is_library(file)]
    return "".join(f"{pathlib.Path(file).name}:{line}" for file, line in (of_user or frames)[-1:])


def is_library(file: str) -> bool:
    """Return True if a file is part of this package, of Python or of an installed package."""
    folders = [str(PACKAGE), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    return file.startswith(("<frozen", *(f"{folder}/" for folder in folders)))
