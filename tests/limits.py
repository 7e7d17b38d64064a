"""Limits of this process, for as long as a test needs them."""

import contextlib
import resource


@contextlib.contextmanager
def limit_file_size(num_bytes):
    """Let no file of this process grow beyond so many bytes, as on a full disk; -1: no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
