"""A running shop, and what its tests do with it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from pymongo import MongoClient

from ..database import APP_NAME

FailPoint = Callable[..., AbstractContextManager[None]]


@dataclass
class OpenShop:
    """A shop that serves, and what it held at first, by collection."""

    app: FastAPI
    url: str
    first_day: dict[str, list[Any]]

    @property
    def sent(self) -> list[str]:
        """The orders for which confirmations were sent."""
        return self.app.state.checkout.confirmations.sent


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port, in a thread with a loop of its own; give its URL.

    The port is listened on from the start: requests wait until the application has started.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def fail_point_of(uri: str) -> FailPoint:
    """Return what lets commands of the shop fail, on a server with ``enableTestCommands=1``."""

    @contextmanager
    def fail_point(*commands: str, times: int, **data: Any) -> Iterator[None]:
        data.update(failCommands=list(commands), appName=APP_NAME)
        with MongoClient[Any](uri) as admin:
            point = ("configureFailPoint", "failCommand")
            admin.admin.command(*point, mode={"times": times}, data=data)
            try:
                yield
            finally:
                admin.admin.command(*point, mode="off")

    return fail_point


def open_transactions(uri: str) -> int:
    """Return how many transactions the shop has open on the server."""
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"idleSessions": True, "localOps": True}},
        {"$match": {"transaction": {"$exists": True}, "appName": APP_NAME}},
    ]
    with MongoClient[Any](uri) as admin:
        return len(list(admin.admin.aggregate(pipeline)))


async def await_no_transactions(uri: str) -> None:
    """Wait for requests that nobody waits for; what they leave open lives for a minute."""
    for _ in range(200):
        if open_transactions(uri) == 0:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{open_transactions(uri)} transactions were left open")


class Customer:
    """Somebody who uses the shop over HTTP."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self.http = http
        self.name = name

    async def put(self, sku: str, quantity: int = 1, **options: Any) -> httpx.Response:
        url, body = f"/carts/{self.name}/{sku}", {"quantity": quantity}
        return await self.http.put(url, json=body, **options)

    async def check_out(self, total: int, key: str = "key", **options: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        url, body = f"/checkout/{self.name}", {"total": total}
        return await self.http.post(url, json=body, headers=headers, **options)

    async def balance(self) -> int:
        found = await self.http.get(f"/customers/{self.name}")
        return int(found.json()["balance"])

    async def cart(self) -> dict[str, int]:
        found = await self.http.get(f"/carts/{self.name}")
        return {item["sku"]: item["quantity"] for item in found.json()["items"]}

    async def orders(self) -> list[Any]:
        async with self.http.stream("GET", f"/orders/{self.name}") as answer:
            return [json.loads(line) async for line in answer.aiter_lines()]


def check_problem(answer: httpx.Response, status: int, title: str) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["title"]) == (status, title), answer.text
    assert answer.json()["status"] == status
