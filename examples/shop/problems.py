"""What can go wrong, and how HTTP says so: "problem details", RFC 9457."""

import logging
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pymongo.errors import ConnectionFailure, PyMongoError
from starlette.exceptions import HTTPException

from beanie_session_scope import (
    CommitUnknownError,
    HookError,
    SessionScopeError,
    TransactionTimeoutError,
)

logger = logging.getLogger("shop")


class ShopError(Exception):
    """A request that the shop refuses; the message is for the customer."""

    status: ClassVar[int] = 409
    title: ClassVar[str]


class NotFoundError(ShopError):
    status = 404
    title = "Not found"


class CustomerExistsError(ShopError):
    title = "Customer exists"


class EmptyCartError(ShopError):
    title = "Empty cart"


class TotalChangedError(ShopError):
    title = "Total changed"


class OutOfStockError(ShopError):
    title = "Out of stock"


class InsufficientFundsError(ShopError):
    status = 402
    title = "Insufficient funds"


class KeyReusedError(ShopError):
    status = 422
    title = "Idempotency key reused"


def problem(
    status: int, detail: str, title: str = "", headers: Any = None, **members: Any
) -> JSONResponse:
    """Return an answer in the problem format; without a title it is that of the status."""
    kind = f"/problems/{title.lower().replace(' ', '-')}" if title else "about:blank"
    title = title or HTTPStatus(status).phrase
    body = {"type": kind, "title": title, "status": status, "detail": detail, **members}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every error with a problem."""
    app.add_exception_handler(ShopError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(SessionScopeError, database_failed)
    app.add_exception_handler(PyMongoError, database_failed)


async def refused(_: Request, error: Any) -> JSONResponse:
    return problem(error.status, str(error), error.title)


async def invalid(_: Request, error: Any) -> JSONResponse:
    errors = [{"where": each["loc"], "what": each["msg"]} for each in error.errors()]
    detail = "The request is not as the documentation says: see errors."
    return problem(422, detail, "Invalid request", errors=jsonable_encoder(errors))


async def failed(_: Request, error: Any) -> JSONResponse:
    return problem(error.status_code, error.detail, headers=error.headers)


async def database_failed(_: Request, error: Any) -> JSONResponse:
    """Ask for the request again where that may help; it is safe, also after a checkout."""
    if not may_help_to_repeat(error):
        raise error
    logger.warning("asked a client to repeat its request after %s", type(error).__name__)
    detail = "The shop could not finish this now. Send the same request again."
    return problem(503, detail, headers={"Retry-After": "1"})


def may_help_to_repeat(error: Any) -> bool:
    """Tell whether the same request may succeed later, and does no harm if it has already."""
    return isinstance(
        error, (CommitUnknownError, HookError, TransactionTimeoutError, ConnectionFailure)
    ) or error.has_error_label("TransientTransactionError")
