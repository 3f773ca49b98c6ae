"""Hooks that note that they were called."""

from __future__ import annotations

import asyncio
from typing import Any


class Calls(list[str]):
    """What hooks were called, in order."""

    def hook(self, name: str, error: BaseException | None = None) -> Any:
        def hook() -> None:
            self.append(name)
            if error is not None:
                raise error

        return hook

    def async_hook(self, name: str, error: BaseException | None = None) -> Any:
        async def hook() -> None:
            await asyncio.sleep(0)
            self.append(name)
            if error is not None:
                raise error

        return hook
