"""Open the shop: ``python -m examples.shop``, from the root of the repository.

The server is that of the environment variable ``MONGODB_URI``, in a database that is dropped
afterwards; where it is not set, a replica set of one node is started. Ctrl-C closes the shop.
"""

import argparse
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from pymongo import MongoClient

from beanie_session_scope.testing import ReplicaSet

from .app import create_app

DATABASE = f"beanie_session_scope_shop_{secrets.token_hex(4)}"

JSON = "-H 'Content-Type: application/json'"


def main() -> None:
    parser = argparse.ArgumentParser("python -m examples.shop", description="Open the shop.")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    port = parser.parse_args().port
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Both signals unwind the blocks below; uvicorn, while it serves, finishes requests before.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), listening(port) as listener, mongodb() as uri:
        explain(listener.getsockname()[1])
        config = uvicorn.Config(create_app(uri, DATABASE), log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])
    print("The shop is closed.")


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Take the port, before anything is started in vain."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise SystemExit(
            f"Can't use port {port} ({error}): name another one with --port."
        ) from None
    with listener:
        yield listener


@contextmanager
def mongodb() -> Iterator[str]:
    """Start MongoDB, or leave no trace in the one that is named."""
    if uri := os.environ.get("MONGODB_URI"):
        try:
            yield uri
        finally:
            with MongoClient[Any](uri) as client:
                client.drop_database(DATABASE)
    else:
        with ReplicaSet() as replica_set:
            yield replica_set.uri


def explain(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    print(
        f"The shop is open: {url}\n\nIts documentation is at {url}/docs, Ctrl-C closes it. Try:\n"
    )
    print(f"  curl {url}/products")
    print(f"""  curl -X PUT {url}/carts/ann/teapot {JSON} -d '{{"quantity": 1}}'""")
    key = "-H 'Idempotency-Key: first'"
    print(f"""  curl {url}/checkout/ann {JSON} {key} -d '{{"total": 3900}}'\n""", flush=True)


if __name__ == "__main__":
    main()
