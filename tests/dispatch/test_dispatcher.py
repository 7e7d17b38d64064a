"""Both dispatchers have the one face, name for name, and wait as long as nothing changes."""

import inspect

import pytest
from small import make_dispatcher

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.device import DeviceDispatcher
from hpcmoe.dispatch.dispatcher import PAUSES, ExchangeId, TokenDispatcher
from hpcmoe.dispatch.host import HostDispatcher

FACE = {name: member for name, member in vars(TokenDispatcher).items() if not name.startswith("_")}


class CountedPauses:
    """A backoff that counts, and does something at a pause."""

    def __init__(self, at, do):
        self.at, self.do, self.pauses = at, do, 0

    def pause(self):
        self.pauses += 1
        if self.pauses == self.at:
            self.do()


@pytest.mark.parametrize("kind", [HostDispatcher, DeviceDispatcher])
def test_both_dispatchers_have_the_face(kind):
    for name, member in FACE.items():
        if isinstance(member, property):
            assert isinstance(getattr(kind, name), property), name
        else:
            names = [list(inspect.signature(method).parameters) for method in (member, getattr(kind, name))]
            assert names[0] == names[1], name


def test_an_exchange_says_which_it_is():
    exchange = ExchangeId(3, 1, Direction.COMBINE_BACKWARD)
    assert str(exchange) == "combine_backward of layer 3, micro-batch 1"
    assert exchange.back() == ExchangeId(3, 1, Direction.DISPATCH_BACKWARD)


@pytest.mark.parametrize("at", [1, 3, PAUSES + 1])
def test_a_wait_ends_when_a_local_peer_has_written(at):
    dispatcher = make_dispatcher(4)
    assert all(hasattr(dispatcher, name) for name in TokenDispatcher.__annotations__)
    dispatcher.poke()
    backoff = CountedPauses(at, lambda: dispatcher.window.mark_consumed(0, 1))
    dispatcher.wait_for_change(backoff)
    assert backoff.pauses == min(at, PAUSES)
