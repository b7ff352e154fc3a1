"""Runs the application in uvicorn until SIGTERM or Ctrl-C, and ends running texts then."""

import asyncio
import contextlib
import signal
import socket
import sys

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from src.errors import UserError
from src.page.service import Service

MORE_CONNECTIONS = 256  # connections that may be open besides those of texts
MOST_AHEAD = 65536  # bytes of later requests that are kept while one is answered
LAST_S = 5  # seconds that answers may take to be sent once all texts have ended


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises UserError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
        return found
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one, such as a..b
        problem = f"cannot listen on {host}, port {port} ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{problem}: choose another --port or --host") from None


class _Protocol(H11Protocol):
    """HTTP/1.1 that ends connections of slow clients, which uvicorn alone does not.

    A connection is closed if its headers are not complete in time. If it is to be closed, but its client does not read
    what was sent, it is aborted."""

    head_seconds = 20.0
    _timer: asyncio.TimerHandle | None = None
    _end: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()
        self._look(False)

    def _look(self, was_closing):
        """Every LAST_S seconds, aborts the connection if it was already being closed the last time."""
        closing = self.transport.is_closing()
        if closing and was_closing:
            self.transport.abort()
        else:
            self._end = asyncio.get_running_loop().call_later(LAST_S, self._look, closing)

    def data_received(self, data):
        super().data_received(data)
        self._watch()
        # uvicorn stops reading when more arrives before its answer is complete, and would not see the client leave
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < MOST_AHEAD:
            self.flow.resume_reading()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._stop()
        self._end.cancel()

    def _watch(self):
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._stop()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(self.head_seconds, self.transport.close)

    def _stop(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    def __init__(self, config, service: Service):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets=None):
        self.service.engine.close(self.service.config.grace_seconds)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self):
        """Handles SIGINT and SIGTERM; unlike uvicorn, does not raise them again at the end, so the exit code is 0."""
        old = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def serve(app, service: Service, listening: socket.socket):
    """Serves until a signal ends the process."""
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{service.name}: {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=type("Protocol", (_Protocol,), {"head_seconds": service.config.body_seconds}),
        ws="none",
        log_level="error",
        limit_concurrency=service.config.max_rows + service.config.max_queue + MORE_CONNECTIONS,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(service.config.grace_seconds) + LAST_S,
    )
    _Server(config, service).run(sockets=[listening])
