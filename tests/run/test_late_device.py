"""A stand-in for a GPU: its copies happen as late as events allow, so whoever does not wait sends stale bytes."""

import pytest
from against_oracle import check_against_oracle
from covering import table

from hpcmoe.comm.device import HostDevice


class LateEvent:
    """An event whose work is done when somebody waits for it, and not before."""

    def __init__(self, device):
        self.device = device

    def synchronize(self):
        """Do all the work given to the device so far."""
        for work in self.device.queue:
            work()
        self.device.queue.clear()


class LateDevice(HostDevice):
    """A device that queues its copies into message buffers."""

    def __init__(self):
        self.queue = []

    def put(self, rows, target):
        """Queue the copy."""
        self.queue.append(lambda: HostDevice.put(self, rows, target))
        return LateEvent(self)


@pytest.mark.mpi
@pytest.mark.parametrize(("schedule", "shared_memory"), table(["serial", "overlap"], [True, False]))
def test_nothing_is_sent_before_its_event(comm, shared, monkeypatch, schedule, shared_memory):
    monkeypatch.setattr("hpcmoe.run.job.open_device", lambda kind, rank: LateDevice())
    check_against_oracle(comm, shared, pipeline__schedule=schedule, comm__shared_memory=shared_memory)
