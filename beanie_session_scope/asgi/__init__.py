"""One transaction for each request of a web application: Starlette, FastAPI, Litestar, any ASGI.

::

    app = FastAPI(middleware=[Middleware(SessionScopeMiddleware, collections=[Bike])])

The transaction is committed when the response starts, and before the client sees anything of it.
"""

from ._exchange import ClientDisconnectedError
from ._middleware import MiddlewareOptions, SessionScopeMiddleware

__all__ = ["ClientDisconnectedError", "MiddlewareOptions", "SessionScopeMiddleware"]
