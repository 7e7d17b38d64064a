"""Text for the user, which never decides how a program ends: odd names, closed pipes and full disks do no harm."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable
from typing import TextIO

EXIT_USER = 2  # a program's status where the user can mend what is wrong: bad input, a machine that does not fit
DRAIN_SECONDS = 0.2  # for a launcher to hand on what was said: what it has not read when a rank aborts is lost


def print_to_stdout(text: str) -> None:
    """Write a text and a line's end to standard output."""
    write(sys.stdout, f"{text}\n")


def print_to_stderr(lines: Iterable[str]) -> None:
    """Write lines to standard error at once, so that ranks do not cut into each other."""
    write(sys.stderr, "".join(f"{line}\n" for line in lines))


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


def discard_output(stream: TextIO | None) -> None:
    """Send what a broken stream still holds to nowhere, else Python complains of it at its end, by status 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: there is none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class StderrHandler(logging.StreamHandler):
    """Log to standard error, or to nowhere once that is broken."""

    def handleError(self, record):  # noqa: N802
        """Drop the record, and those that follow."""
        discard_output(self.stream)
