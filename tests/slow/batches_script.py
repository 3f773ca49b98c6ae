"""A migration as a script, to be killed: it counts every document, and adds one to each.

Run it with the server's URI, the database, the size of its batches, and the command at which it is
to kill itself, if any: ``started:commitTransaction`` before it is sent, ``succeeded:...`` when it
was answered. It writes a dot for every 50 documents, and a ``c`` for every commit that it sends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from beanie import Document, init_beanie
from pymongo.monitoring import CommandListener

from beanie_session_scope import SessionScopeMixin
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.migration import migrate_in_batches

NAME = "add one"
DOT = 50


class Counted(SessionScopeMixin, Document):
    id: int
    n: int = 0
    text: str = ""

    class Settings:
        name = "counted"


class Killer(CommandListener):
    """Ends the process, as nothing else does, at the second commit."""

    def __init__(self, moment: str) -> None:
        self._moment = moment
        self._seen = 0

    def _look(self, kind: str, event: Any) -> None:
        if f"{kind}:{event.command_name}" == self._moment:
            self._seen += 1
            if self._seen == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def started(self, event: Any) -> None:
        if event.command_name == "commitTransaction":
            os.write(1, b"c")
        self._look("started", event)

    def succeeded(self, event: Any) -> None:
        self._look("succeeded", event)

    def failed(self, event: Any) -> None:
        """Not of interest."""


class Adder:
    """Changes documents, and says how many."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, counted: Counted) -> None:
        counted.n += 1
        self._count += 1
        if self._count % DOT == 0:
            os.write(1, b".")


async def main(uri: str, database: str, batch_size: str, moment: str = "") -> None:
    client = DRIVER.client_class(uri, event_listeners=[Killer(moment)], appname="batches_script")
    await init_beanie(database=client[database], document_models=[Counted])
    await migrate_in_batches(
        Counted, Adder(), name=NAME, batch_size=int(batch_size), progress="off"
    )
    closing = client.close()
    if closing is not None:
        await closing


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
