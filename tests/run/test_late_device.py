"""A stand-in for a GPU: its copies happen as late as events allow, so whoever does not wait sends stale bytes."""

import pytest
from against_oracle import check_against_oracle

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

    def pack(self, rows, order, buffer):
        """Queue the copy."""
        self.queue.append(lambda: HostDevice.pack(self, rows, order, buffer))
        return LateEvent(self)

    def scatter(self, rows, order, buffer):
        """Queue the copy."""
        self.queue.append(lambda: HostDevice.scatter(self, rows, order, buffer))

    def record(self):
        """Mark the work given so far."""
        return LateEvent(self)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["serial", "overlap"])
def test_nothing_is_sent_before_its_event(comm, shared, monkeypatch, schedule):
    monkeypatch.setattr("hpcmoe.run.job.open_device", lambda kind, rank: LateDevice())
    check_against_oracle(comm, shared, pipeline__schedule=schedule)
