"""What the client sends, read ahead: how a request learns that its client has gone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context

from ._types import DISCONNECT, Message, Receive


class Receiver:
    """Stands in for ``receive`` of a request, and notices ``http.disconnect`` meanwhile.

    Of an upload one message is read ahead, so that a slow handler still slows its client down.
    When the body is complete, only the disconnect can come. Once ``release`` was called, no
    more is read ahead: the message that is being waited for is handed on, and after that
    ``receive`` is the server's own.

    Args:
        receive: The server's.
        gone: Called when ``http.disconnect`` was read ahead.
    """

    def __init__(self, receive: Receive, gone: Callable[[], None]) -> None:
        self._receive = receive
        self._gone = gone
        self._read: deque[Message | Exception] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._released = False
        self._task: asyncio.Task[None] | None = None

    def start(self, context: Context, *, at_once: bool = True) -> None:
        """Begin to read.

        Args:
            context: What to read in. The middleware around this one must not find themselves in
                the scope of the request, because they receive for it.
            at_once: ``False`` waits for the first ``receive`` of the application, where reading
                asks the client for its upload (``Expect: 100-continue``).
        """
        self._context = context
        if at_once:
            self._start()

    def _start(self) -> asyncio.Task[None]:
        if self._task is None:
            self._task = self._context.run(asyncio.create_task, self._read_ahead())
            self._task.add_done_callback(lambda task: self._news.set())
        return self._task

    async def _read_ahead(self) -> None:
        more = True
        while not self._released:
            if more and self._read:
                self._room.clear()
                await self._room.wait()
                continue
            try:
                message = await self._receive()
            except Exception as error:
                # Such as "the body is too large", of a middleware around this one.
                self._read.append(error)
                return
            self._read.append(message)
            self._news.set()
            if message["type"] == DISCONNECT:
                self._gone()
                return
            more = message.get("more_body", False)

    async def receive(self) -> Message:
        """Return the next message, as the ``receive`` of ASGI does."""
        task = self._start()
        while not self._read and not task.done():
            self._news.clear()
            await self._news.wait()
        if not self._read:
            return await self._receive()
        message = self._read.popleft()
        self._room.set()
        if isinstance(message, Exception):
            raise message
        return message

    def release(self) -> None:
        """Read no further ahead."""
        self._released = True
        self._room.set()

    async def stop(self) -> None:
        """End the reading, whatever it waits for."""
        self.release()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
