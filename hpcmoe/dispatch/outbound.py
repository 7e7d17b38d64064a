"""Messages to other nodes: a header to each receiver, and behind it the tokens that its node's experts are to have."""

import numpy as np

from hpcmoe.comm.device import HostDevice
from hpcmoe.comm.transport import MessageKind, Request, Transport
from hpcmoe.comm.window import Window
from hpcmoe.dispatch.inbound import TagOf, view_trailer
from hpcmoe.dispatch.plan import Message, Plan
from hpcmoe.dispatch.routes import Routes
from hpcmoe.dispatch.sizes import HostSizes


class InFlightBuffers:
    """Where one micro-batch in flight has its tokens, results and messages."""

    def __init__(self, index: int, sizes: HostSizes, first_row: int, device: HostDevice) -> None:
        self.index = index
        self.tokens = first_row + index * sizes.home_window_rows  # first row in the window
        self.results = self.tokens + sizes.tokens
        self.zero = self.tokens + sizes.home_window_rows - 1  # a row that nobody writes
        self.send = device.make_buffer(sizes.sent_message_rows, sizes.row_bytes).tensor
        self.num_exchanges = 0
        self.requests: list[Request] = []  # of messages from here


class MessageSender:
    """Sends what leaves this rank for other nodes, and receives what comes back."""

    def __init__(self, transport: Transport, window: Window, routes: Routes, row_bytes: int) -> None:
        self.transport, self.window, self.routes, self.row_bytes = transport, window, routes, row_bytes

    def send(self, plan: Plan, buffers: InFlightBuffers, gates: np.ndarray, tag_of: TagOf, word: int) -> list[Request]:
        """Send the headers of all messages to their receivers, and the messages -> requests of what comes back."""
        transport, window, row_bytes = self.transport, self.window, self.row_bytes
        of_receiver: list[list[Message]] = [[] for _ in self.routes.receivers]
        for message in plan.messages:
            of_receiver[message.receiver].append(message)
        buffers.requests, returns = [], list[Request]()
        for peer, messages in zip(self.routes.receivers.tolist(), of_receiver, strict=True):
            # Send how many messages there are, this rank's word, and of each its tokens and its assignments by slot.
            header = [[len(messages), word], *([message.num_tokens, *message.counts.ravel()] for message in messages)]
            buffers.requests.append(transport.send_words(np.concatenate(header), peer, tag_of(MessageKind.HEADER)))

            # Receive each message's sums where its results belong, and send its tokens.
            for number, message in enumerate(messages):
                num_rows, home = message.num_rows(row_bytes), buffers.results + message.first
                rows = window.rows[home : home + num_rows]
                returns.append(transport.recv_rows(rows, peer, tag_of(MessageKind.RETURN, number)))
                first = message.first - len(plan.assignments)
                rows = buffers.send[first : first + num_rows].numpy()
                self.pack(rows, buffers.tokens, message, gates)
                buffers.requests.append(transport.send_rows(rows, peer, tag_of(MessageKind.ROWS, number)))
        return returns

    def pack(self, rows: np.ndarray, first: int, message: Message, gates: np.ndarray) -> None:
        """Write a message's tokens, of those from window row `first` on, and its assignments' gates into its rows."""
        self.window.rows.take(first + message.tokens, axis=0, out=rows[: message.num_tokens], mode="clip")
        tokens, gate_values = view_trailer(rows[message.num_tokens :], message.num_assignments)
        tokens[:], gate_values[:] = message.token_of_assignment, gates[message.assignments]
