"""A heap that keeps what it has: tensors made and dropped at every step then come out of memory that is already there.

By itself glibc gives large blocks back to the system when they are freed, and each next one is mapped and zeroed page
by page: packing 32 MB costs eight times the copy. It also gives each thread a heap of its own, whatever is set for the
first: lanes, of which one works at a time, share one. See mallopt(3).
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1  # bytes at the heap's end above which it would shrink


def keep_heap() -> bool:
    """Make malloc take large blocks from one heap of all threads, and never shrink it. Return True if this libc can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: _NEVER}
    return mallopt is not None and all(mallopt(key, value) for key, value in wanted.items())
