"""The three retrying forms, each as a function that runs another one in a transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from models import Item

from beanie_session_scope import run_in_transaction, transaction_attempts, transactional

Form: TypeAlias = Callable[..., Awaitable[Any]]


async def by_function(fn: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    return await run_in_transaction(fn, *args, **{"collections": [Item], **options})


async def by_decorator(fn: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    return await transactional(**{"collections": [Item], **options})(fn)(*args)


async def by_loop(fn: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    result = None
    async for attempt in transaction_attempts(**{"collections": [Item], **options}):
        result = None
        async with attempt:
            result = await fn(*args)
    return result


FORMS: list[Form] = [by_function, by_decorator, by_loop]
