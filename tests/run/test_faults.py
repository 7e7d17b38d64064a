"""No allocation on a token's path: after the warm-up no page is new, however many tokens a step has.

What is still new after it are kernels: oneDNN makes one for each number of rows that it has not met. Steps on a batch
that it has met need none at all.
"""

import resource
import sys

import numpy as np
import psutil
import pytest
from small import open_small_job

from hpcmoe.model.text import draw_starts
from hpcmoe.wait import gather_to_all

WARM_UP_STEPS, STEPS, REPEATS = 50, 30, 30
MOST_FAULTS, MOST_FAULTS_REPEATED = 200.0, 20.0  # minor faults a step
MOST_GROWTH_BYTES, MOST_GROWTH_BYTES_REPEATED = 16e6, 1e6  # over all steps after the warm-up
WAYS = {"window": {}, "messages": {"comm__shared_memory": False}}


def count_faults():
    """Pages that this process has touched for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Meter:
    """Counts a process's new pages and bytes from here on."""

    def __init__(self):
        self.faults, self.resident = count_faults(), psutil.Process().memory_info().rss

    def read(self, num_steps):
        """-> (faults a step, bytes grown)."""
        return (count_faults() - self.faults) / num_steps, psutil.Process().memory_info().rss - self.resident


def measure(comm, folder, num_sequences, mode, **changes):
    """Run steps with so many sequences of 16 tokens -> [2, 2] (faults a step, bytes grown), the most of any rank:
    on batches that are always new, and on one that is always the same."""
    sizes = {
        "model__hidden": 32, "model__feed_forward": 64, "model__sequence_length": 16, "model__num_experts": 8,
        "data__batch_sequences": num_sequences, "pipeline__micro_batches": 2, "run__mode": mode,
    }  # fmt: skip
    with open_small_job(comm, folder, **sizes, **changes) as (job, optimizer, _):
        load, purpose = np.ones((2, 8)), "train" if mode == "train" else "infer"

        def do_step(number, learns=True):
            starts = draw_starts(len(job.training), num_sequences, 16, 1, number)
            if optimizer is not None:
                optimizer.zero_gradients()
            job.stepper.run(job.training, starts, load, purpose)
            if optimizer is not None and learns:
                optimizer.step(number)

        for step in range(1, WARM_UP_STEPS + 1):
            do_step(step)
        meter = Meter()
        for step in range(WARM_UP_STEPS + 1, WARM_UP_STEPS + STEPS + 1):
            do_step(step)
        fresh = meter.read(STEPS)
        for _ in range(3):
            do_step(1, learns=False)
        meter = Meter()
        for _ in range(REPEATS):
            do_step(1, learns=False)
        measured = fresh, meter.read(REPEATS)
    return np.max(gather_to_all(comm, measured), axis=0)


@pytest.mark.mpi
@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages of Linux")
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_touch_no_new_pages(comm, shared, way, mode):
    if comm.size != 2:
        pytest.skip("measured at 2 ranks")
    for num_sequences in (8, 64):
        (faults, growth), again = measure(comm, shared, num_sequences, mode, **WAYS[way])
        said = f"{faults:.0f} faults a step, {growth / 1e6:.1f} MB grown; repeated {again[0]:.0f}, {again[1] / 1e6:.2f}"
        print(num_sequences, "sequences:", said)
        assert faults <= MOST_FAULTS and growth <= MOST_GROWTH_BYTES, said
        assert again[0] <= MOST_FAULTS_REPEATED and again[1] <= MOST_GROWTH_BYTES_REPEATED, said
