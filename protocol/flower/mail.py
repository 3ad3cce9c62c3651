"""Requests to nodes and their replies, those included that come when nobody waits any more."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from logging import INFO

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from fwdllm.protocol.flower.polling import pause

# Messages sent at once. Flower tells nodes of all of them and then brings their parts, by three
# requests each; a node that is told asks for them again and again until they are there.
_TOGETHER = 8
# Seconds for which a late reply is looked for. Each look names all messages that it is for, and a
# node that has vanished leaves one with every request that it was sent.
_LATE = 3600.0


class Mail:
    """A grid for a ``Strategy``, which looks often, and from request to request for late replies.

    Flower's own looks every three seconds, and forgets what has not come by the end of a request.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, float] = {}  # when they were sent, by the message's id

    def get_node_ids(self) -> Iterable[int]:
        """The connected nodes."""
        return self._grid.get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """As Flower's, and with the replies to earlier messages that have come meanwhile."""
        began, left, sent = time.monotonic(), iter(messages), set()
        while some := list(itertools.islice(left, _TOGETHER)):
            sent |= {id for id in self._grid.push_messages(some) if id}
        self._open |= dict.fromkeys(sent, began)
        replies: list[Message] = []
        while sent:
            replies += self.pull()
            sent &= self._open.keys()
            waited = time.monotonic() - began
            if not sent or (timeout is not None and waited >= timeout):
                break
            pause(waited)
        return replies

    def pull(self) -> list[Message]:
        """The replies that have come since the last look, late ones included."""
        oldest = time.monotonic() - _LATE
        self._open = {id: sent for id, sent in self._open.items() if sent > oldest}
        if not self._open:
            return []
        replies = list(self._grid.pull_messages(list(self._open)))
        for reply in replies:
            self._open.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def close(self) -> None:
        """Say how many replies have not come."""
        if self._open:
            log(INFO, "%d messages were not answered", len(self._open))
