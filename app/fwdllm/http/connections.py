"""Connections whose client does not send, or does not read.

uvicorn closes idle connections between requests; here those that are slow within one are closed.
The rates are those of Apache's mod_reqtimeout; nginx waits as long for a reader.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from fwdllm.http import limits


class Connection(H11Protocol):
    """uvicorn's connection, closed if a request or a reader is too slow.

    By h11, as httptools has no bound on the size of a head. Of too many connections, the one that
    has waited longest for its client's request is closed.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As of the base class."""
        super().connection_made(transport)
        self._slow: asyncio.TimerHandle | None = None  # to send
        self._unread: asyncio.TimerHandle | None = None
        self._since = self.loop.time()
        self._received = 0
        self._expect()
        if len(self.connections) > limits.MAX_CONNECTIONS:
            others = [c for c in self.connections if isinstance(c, Connection) and c.idle]
            # First of those that have never sent a request.
            oldest = min(others, key=lambda c: (c.cycle is not None, c._since))
            self.connections.discard(oldest)  # at once: more may be made before it is lost
            oldest.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request of this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """As of the base class."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a whole head
            self._since, self._received = self.loop.time(), 0
            self._settle()
        elif self.cycle is None or self.cycle.response_complete:
            self._expect()  # a part of a head, or a body nobody reads
            return
        self._received += len(data)
        if self.cycle.more_body:
            self._expect()
        else:
            self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """As of the base class."""
        self._settle()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """As of the base class."""
        super().pause_writing()
        self._unread = self.loop.call_later(limits.READER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """As of the base class."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        """As of the base class; what has not been read by now is dropped."""
        super().timeout_keep_alive_handler()
        self.transport.abort()

    def _expect(self) -> None:
        """Close the connection if the rest of the request does not come."""
        if self._slow is None:
            self._slow = self.loop.call_later(limits.REQUEST_SECONDS, self._look)

    def _settle(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _look(self) -> None:
        self._slow = None
        late = self._since + limits.REQUEST_SECONDS + self._received / limits.MIN_BYTES_PER_SECOND
        left = late - self.loop.time()
        if left <= 0 or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            self._slow = self.loop.call_later(left, self._look)
