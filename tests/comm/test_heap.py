"""A heap that keeps what it has gives freed memory out again without a page being mapped anew."""

import sys

import pytest
from launch import run

TOUCH = """
import resource, torch
from hpcmoe.comm.heap import keep_heap
def faults():
    for _ in range(15):
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
as_it_is = faults()
print(keep_heap(), faults(), as_it_is)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_freed_block_of_64_mb_costs_no_page_at_its_next_use():
    can, kept, as_it_is = run(sys.executable, "-c", TOUCH).output.split()
    if can == "False":
        pytest.skip("this libc has no mallopt")
    assert float(kept) < 20
    assert float(as_it_is) > 10 * float(kept) + 10
