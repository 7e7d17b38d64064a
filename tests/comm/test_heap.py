"""A heap that keeps what it has gives freed memory out again without a page being mapped anew."""

import sys

import pytest
from launch import run

TOUCH = """
import resource, sys, torch
from hpcmoe.comm.heap import keep_heap
kept = sys.argv[1] == "kept" and keep_heap()
def faults():
    for _ in range(15):
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_freed_block_of_64_mb_costs_no_page_at_its_next_use():
    said = {how: run(sys.executable, "-c", TOUCH, how).output.split() for how in ("kept", "as it is")}
    if said["kept"][0] == "False":
        pytest.skip("this libc has no mallopt")
    assert float(said["kept"][1]) < 20
    assert float(said["as it is"][1]) > 10 * float(said["kept"][1]) + 10
