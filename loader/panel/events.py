"""Telling the panel through the websocket that something has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from server import PromptServer

EVENT = "hswq.status"
PROGRESS = "hswq.progress"
_SECONDS = 0.25  # at least, from one message to the next


class StatusEvents:
    """Sends an answer after a change. Changes that come close together share one message."""

    def __init__(
        self, server: PromptServer, answer: Callable[[], Awaitable[dict]], event: str = EVENT
    ) -> None:
        """Take the server to send with, a function that returns the answer, and an event name."""
        self._server, self._loop = server, server.loop
        self._answer, self._event = answer, event
        self._next = 0.0
        self._waiting: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task] = set()  # asyncio alone would not keep a task alive

    def changed(self) -> None:
        """Note a change. Any thread may call this, even after the server's loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._soon)

    def _soon(self) -> None:
        if self._waiting is None:
            self._waiting = self._loop.call_at(max(self._next, self._loop.time()), self._send)

    def _send(self) -> None:
        self._waiting = None
        self._next = self._loop.time() + _SECONDS
        if self._server.sockets:
            task = self._loop.create_task(self._tell())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _tell(self) -> None:
        try:
            answer = await self._answer()
        except OSError as error:  # the folder cannot be listed; the panel sees it when it asks
            logging.info("HSWQ: the panel is not told of a change: %s", error)
        else:
            self._server.send_sync(self._event, answer)
