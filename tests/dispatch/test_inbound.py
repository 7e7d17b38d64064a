"""Messages land where there is room, in order if need be, are summed by token, and leave all room free again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcmoe.comm.pool import RowPool
from hpcmoe.comm.transport import Direction, MessageKind, MessageRequest, make_message_tag
from hpcmoe.comm.window import WindowSizes, make_private_window
from hpcmoe.dispatch.arrivals import Arrivals
from hpcmoe.dispatch.inbound import InboundMessage, InboundReceiver, ReceivePool, view_trailer
from hpcmoe.dispatch.notice import Notices
from hpcmoe.dispatch.routes import make_routes

HIDDEN, ROW_BYTES, MAX_MESSAGES = 4, 16, 3


class Post:
    """A transport in which the test says when what comes."""

    def __init__(self):
        self.receives, self.sends = {}, {}

    def recv_words(self, words, peer, tag):
        return self.receives.setdefault((peer, tag), (words, MessageRequest(sends=False)))[1]

    def recv_rows(self, rows, peer, tag):
        return self.receives.setdefault((peer, tag), (rows, MessageRequest(sends=False)))[1]

    def send_rows(self, rows, peer, tag):
        return self.sends.setdefault((peer, tag), (rows, MessageRequest(sends=False)))[1]

    def bring(self, peer, tag, content):
        array, request = self.receives[peer, tag]
        array.reshape(-1)[: content.size] = content.ravel()
        request.complete()


def tag_of(part, message=0):
    return make_message_tag(0, part, message, MAX_MESSAGES)


@pytest.fixture
def receive_pool(request):
    """Rank 0 alone on its node with two slots, messages from ranks 1 and 2, room for `param` rows."""
    rows = getattr(request, "param", 30)
    routes = make_routes([0, 1, 2], 0, 2, np.zeros((3, 3), bool))
    sizes = WindowSizes(
        rows=rows, row_bytes=ROW_BYTES, num_in_flight=1, max_senders=2, max_messages=MAX_MESSAGES, num_slots=2
    )
    how = SimpleNamespace(dtype=torch.float32, in_order=True)
    return ReceivePool(Post(), make_private_window(sizes), routes, [RowPool(0, rows)], how, lambda *counted: None)


def make_receiver(receive_pool, exchange, direction, word=0):
    """What receives one exchange's messages, on a rank that gives the others a word."""
    arrivals = Arrivals(receive_pool.window, receive_pool.routes, 0, exchange, Notices(word, 3))
    return InboundReceiver(receive_pool, arrivals, direction, tag_of)


def make_message(tokens, token_of_assignment, numbers):
    """A message: tokens [U, H], and behind them each assignment's token and number."""
    num_assignments = len(token_of_assignment)
    rows = np.zeros((len(tokens) + -(-8 * num_assignments // ROW_BYTES), ROW_BYTES), np.uint8)
    rows[: len(tokens)] = np.asarray(tokens, np.float32).view(np.uint8)
    view_trailer(rows[len(tokens) :], num_assignments)[0][:] = token_of_assignment
    view_trailer(rows[len(tokens) :], num_assignments)[1][:] = numbers
    return rows


def header(*messages, word=0):
    """How many messages, their sender's word; tokens of each, and assignments for each of the two slots."""
    return np.array([len(messages), word, *(word for message in messages for word in message)])


@pytest.mark.parametrize("by_gates", [True, False])
def test_a_message_goes_all_its_way(receive_pool, by_gates):
    receiver, window, post = (
        make_receiver(receive_pool, 1, Direction.DISPATCH if by_gates else Direction.COMBINE_BACKWARD),
        receive_pool.window,
        receive_pool.transport,
    )
    assert not receiver.poke()
    post.bring(1, tag_of(MessageKind.HEADER), header((2, 2, 1), word=5 << 32))
    post.bring(2, tag_of(MessageKind.HEADER), header(word=3 << 32))
    assert receiver.poke()
    assert window.descriptors[0, 0, 1, 1 + MAX_MESSAGES, :4].tolist() == [1, 0, 0, 3 << 32]  # nothing from rank 2
    message = make_message([[1, 2, 3, 4], [5, 6, 7, 8]], [1, 0, 1], [0.5, 2.0, 3.0])
    post.bring(1, tag_of(MessageKind.ROWS), message)
    assert window.descriptors[0, 0, 1, 1, 0] == 0 and receiver.poke()

    # The descriptor names three result rows, each of which knows its token and number.
    dispatcher, first, num_descriptors, word, *counts = window.descriptors[0, 0, 1, 1].tolist()
    assert (dispatcher, first, num_descriptors, word, counts) == (1, 4, 1, 5 << 32, [2, 1])
    assert window.sources[4:7].tolist() == [1, 0, 1] and window.gate_values[4:7].tolist() == [0.5, 2, 3]
    assert not receiver.poke() and not receiver.done

    # Results are summed by token, weighted or not, and the assignments' numbers go home with them.
    window.table(torch.float32)[4:7] = torch.tensor([[1.0], [10.0], [100.0]])
    window.gate_values[4:7] = [7, 8, 9]
    window.mark_done(0, 1, 0, 1)
    assert receiver.poke()
    rows, request = post.sends[1, tag_of(MessageKind.RETURN)]
    sums = rows[:2].view(np.float32)
    assert sums[:, 0].tolist() == ([20, 300.5] if by_gates else [10, 101])
    assert [part.tolist() for part in view_trailer(rows[2:], 3)] == [[1, 0, 1], [7, 8, 9]]
    assert receive_pool.pools[0].runs == [(7, 23)] and not receiver.poke()
    request.complete()
    assert receiver.poke() and receiver.done and receive_pool.pools[0].runs == [(0, 30)]


@pytest.mark.parametrize("receive_pool", [16], indirect=True)
def test_messages_wait_for_room_in_order(receive_pool):
    """Ten rows of sixteen are taken: the next has no room, and the small one behind it waits its turn."""
    receiver, post = make_receiver(receive_pool, 1, Direction.DISPATCH), receive_pool.transport
    post.bring(1, tag_of(MessageKind.HEADER), header((4, 4, 0), (4, 2, 2), (1, 1, 0)))
    post.bring(2, tag_of(MessageKind.HEADER), header())
    receiver.poke()
    assert [message.number for message in receiver.receiving] == [0] and [g.number for g in receiver.waiting] == [1, 2]
    assert receive_pool.pools[0].runs == [(10, 6)]
    assert (1, tag_of(MessageKind.ROWS, 1)) not in post.receives
    for number in range(3):
        post.bring(1, tag_of(MessageKind.ROWS, number), make_message(np.ones((1, HIDDEN)), [0], [1.0]))
        receiver.poke()
        receive_pool.window.mark_done(0, 1, 0, 1 + number)
        receiver.poke()
        post.sends[1, tag_of(MessageKind.RETURN, number)][1].complete()
        receiver.poke()
        receiver.poke()
    assert receiver.done and receive_pool.pools[0].runs == [(0, 16)]


@pytest.mark.parametrize("in_order", [True, False])
def test_headers_are_read_in_the_senders_order_where_it_is_fixed(receive_pool, in_order):
    receive_pool.in_order = in_order
    receiver, post = make_receiver(receive_pool, 1, Direction.DISPATCH), receive_pool.transport
    assert receive_pool.routes.senders == (1, 2)
    post.bring(2, tag_of(MessageKind.HEADER), header((1, 1, 0)))
    receiver.poke()
    assert [message.sender for message in receiver.receiving] == ([] if in_order else [2])
    post.bring(1, tag_of(MessageKind.HEADER), header((1, 0, 1)))
    receiver.poke()
    assert [message.sender for message in receiver.receiving] == ([1, 2] if in_order else [2, 1])


def test_nothing_is_posted_over_what_a_local_peer_has_not_read(receive_pool):
    receiver, post = make_receiver(receive_pool, 3, Direction.DISPATCH), receive_pool.transport
    post.bring(1, tag_of(MessageKind.HEADER), header())
    post.bring(2, tag_of(MessageKind.HEADER), header())
    assert not receiver.poke() and not receive_pool.window.descriptors.any()
    receive_pool.window.mark_consumed(0, 1)
    assert receiver.poke() and receiver.done


def test_a_header_has_words_for_each_slot_that_the_sender_serves():
    once = np.zeros((3, 3), bool)
    once[1, 0] = True
    routes = make_routes([0, 0, 1, 2], 0, 2, once)
    receive_pool = SimpleNamespace(window=SimpleNamespace(sizes=SimpleNamespace(max_messages=3)), routes=routes)
    assert routes.senders == (2, 3)
    assert [ReceivePool.header_words(receive_pool, number) for number in range(2)] == [2 + 3 * (1 + 4), 2 + 3 * (1 + 2)]
    message = InboundMessage(
        sender=1, number=0, descriptor=1, num_descriptors=1, word=0, num_tokens=1, counts=np.array([[1, 2], [0, 4]])
    )
    assert message.num_assignments == 7
