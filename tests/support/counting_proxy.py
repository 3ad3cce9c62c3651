"""A TCP proxy on loopback that counts the bytes that go through it; TLS goes through untouched."""

from __future__ import annotations

import asyncio
import threading


class CountingProxy:
    """Hands connections on to a port, from a port of its own, as a daemon thread.

    up, down: bytes so far to that port and from it.  connections: opened so far.
    """

    def __init__(self, host: str, target: int) -> None:
        self.up = self.down = self.connections = 0
        self._host, self._target = host, target
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, host, 0))
        self.port = int(server.sockets[0].getsockname()[1])
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection(self._host, self._target)
        await asyncio.gather(self._copy(reader, back, "up"), self._copy(there, writer, "down"))

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: str
    ) -> None:
        try:
            while data := await reader.read(65536):
                setattr(self, counted, getattr(self, counted) + len(data))
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
