"""The page of a run that goes on, on this machine alone: made anew whenever the record has changed."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_ADDRESS = "127.0.0.1"


class LivePage(ThreadingHTTPServer):
    """A server of one page, which asks for its state and takes the page anew where that has changed."""

    daemon_threads = True

    def __init__(self, find_state: Callable[[], str], make: Callable[[], str], port: int = 0):
        """find_state: what changes with the record; make: the page; port: 0 takes a free one. Raises OSError."""
        super().__init__((_ADDRESS, port), PageRequest)
        self.find_state, self.make = find_state, make
        self.lock, self.state, self.text = threading.Lock(), "", ""

    @property
    def url(self) -> str:
        """Return where the page is."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    def read_page(self) -> str:
        """Return the page, made anew where the record has changed."""
        with self.lock:  # one request makes it, the others wait
            state = self.find_state()
            if state != self.state or not self.text:
                self.text, self.state = self.make(), state
            return self.text

    def handle_error(self, *_: object) -> None:
        """Ignore a browser that leaves while it is answered."""


class PageRequest(BaseHTTPRequestHandler):
    """A request for the page or its state; nothing else is served, and nothing under another host's name."""

    server: LivePage

    def do_GET(self) -> None:  # noqa: N802 (http.server looks for the name)
        """Send the page or its state."""
        host = self.headers.get("Host", "")
        if host not in (f"{_ADDRESS}:{self.server.server_port}", f"localhost:{self.server.server_port}"):
            self.send_error(403)
        elif self.path == "/":
            self.answer(self.server.read_page(), "text/html")
        elif self.path == "/state":
            self.answer(self.server.find_state(), "text/plain")
        else:
            self.send_error(404)

    def answer(self, text: str, kind: str) -> None:
        """Send a text."""
        data = text.encode("utf-8", "replace")
        self.send_response(200)
        for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", f"{len(data)}"),
                            ("Cache-Control", "no-store")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
