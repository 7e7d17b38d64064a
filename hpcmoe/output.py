"""Text for the user, which never decides how a program ends: odd names, closed pipes and full disks do no harm."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import NoReturn, TextIO

EXIT_USER = 2  # the status of an error that the user can correct: bad input, a machine that does not fit
EXIT_AGAIN = 75  # of a run that has ended in order, and is to go on: EX_TEMPFAIL of sysexits.h
DRAIN_SECONDS = 0.2  # for a launcher to forward output: what it has not read when a rank aborts is lost


def print_to_stdout(text: str, end: str = "\n") -> None:
    """Write a text and a line's end to standard output."""
    write(sys.stdout, f"{text}{end}")


def read_stdout_encoding() -> str:
    """Return the encoding of standard output, ASCII where it is closed."""
    return getattr(sys.stdout, "encoding", None) or "ascii"


def print_to_stderr(lines: Iterable[str]) -> None:
    """Write lines to standard error in one call, so that those of several ranks do not mix."""
    write(sys.stderr, "".join(f"{line}\n" for line in lines))


def exit_with_line(line: str, is_first: bool) -> NoReturn:
    """End this process with EXIT_USER; the first of the ranks writes the line, the others wait until it is out."""
    if is_first:
        print_to_stderr([f"hpcmoe: {line}"])
    else:
        time.sleep(DRAIN_SECONDS)
    sys.exit(EXIT_USER)


def write(stream: TextIO | None, text: str) -> None:
    """Write to a stream and flush it; what it cannot encode is escaped, and once it fails the rest is dropped."""
    if stream is None:  # closed before Python began
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # a reader that left, a full disk; ValueError: closed
        discard_output(stream)


def discard_output(stream: TextIO) -> None:
    """Redirect a broken stream to nowhere, or Python would fail to flush it at its end, with status 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: there is none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class StderrHandler(logging.StreamHandler):
    """A handler that logs to standard error, or to nowhere once that is broken."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the record, and those that follow."""
        discard_output(self.stream)


def start_log(rank: int, size: int, host: str) -> None:
    """Start the log on standard error: of rank 0 from INFO on, of the others from WARNING, with their names."""
    who = f"[rank {rank} of {size}, {host}] " if rank > 0 else ""
    logging.basicConfig(
        handlers=[StderrHandler()],
        level=logging.INFO if rank == 0 else logging.WARNING,
        force=True,  # after a death with another rank
        format=f"%(asctime)s {who.replace('%', '%%')}%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )


def show_details(wanted: bool) -> None:
    """Log also what only --verbose asks for, where it is wanted."""
    if wanted:
        logging.getLogger("hpcmoe").setLevel(logging.DEBUG)
