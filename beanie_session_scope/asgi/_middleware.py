"""``SessionScopeMiddleware``: what it takes, and which requests are its business."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from typing import Any, TypeAlias, TypedDict

from typing_extensions import Unpack

from beanie_session_scope import (
    PropagationError,
    ScopeClosedError,
    SessionScope,
    SessionScopeMixin,
    current_scope,
    transactional,
    with_session,
)

from ._exchange import Exchange
from ._models import scoped_models
from ._types import ASGIApp, HTTPScope, Receive, Send, ShouldCommit

Client: TypeAlias = Any
Models: TypeAlias = "Iterable[type[SessionScopeMixin]]"

logger = logging.getLogger("beanie_session_scope")


class MiddlewareOptions(TypedDict, total=False):
    """The options of each request's transaction, all as for ``with_session``."""

    read_concern: Any
    write_concern: Any
    read_preference: Any
    max_commit_time_ms: int | None
    causal_consistency: bool | None
    timeout: float
    cleanup_timeout: float


def below_400(status: int, scope: Mapping[str, Any]) -> bool:
    """Commit what is no error: the ``should_commit`` where none is given."""
    return status < 400


class SessionScopeMiddleware:
    """Run each HTTP request in a scope: bound classes work in one transaction.

    The transaction is committed when the application starts a response with a status below
    400, and *before* that start is sent on. It is aborted on any other status, on an exception
    (which goes on to the application's own handlers), and when the client disconnects. If the
    commit fails, the response is dropped whole, and the answer is a 500 or a 503.

    A request that uses no bound class sends nothing to the server. WebSockets and the lifespan
    pass straight through, and so does a request that runs in a scope already, as in tests.

    Args:
        app: The ASGI application inside.
        client: The client as for ``with_session``, or a function that returns it, called for each
            request.
        collections: The classes to bind as for ``with_session``, or a function that returns
            them. One of ``client`` and ``collections`` must be given.
        methods: The HTTP methods to handle; ``None`` means all.
        paths: Handle only these paths, and what is below them: ``"/orders"`` stands for
            ``/orders`` and ``/orders/1``, not for ``/orders-old``. ``None`` means all.
        exclude_paths: Paths not to handle, also where ``paths`` names them.
        should_commit: Called with the status of the response and the scope of ASGI; returns
            whether to commit.
        options: As for ``with_session``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If neither client nor classes are given, a path does not begin with ``/``,
            or options exclude each other.
        SessionScopeError: As ``with_session`` raises for ``client`` and ``collections``.
    """

    def __init__(
        self,
        app: ASGIApp,
        client: Client | Callable[[], Client] | None = None,
        collections: Models | Callable[[], Models] | None = None,
        *,
        methods: Iterable[str] | None = None,
        paths: Iterable[str] | None = None,
        exclude_paths: Iterable[str] = (),
        should_commit: ShouldCommit | None = None,
        **options: Unpack[MiddlewareOptions],
    ) -> None:
        if client is None and collections is None:
            raise ValueError(
                "SessionScopeMiddleware needs client=, collections=, or both: without them it "
                "can't tell where to open a transaction."
            )
        self.app = app
        self._methods = None if methods is None else _methods(methods)
        self._paths = None if paths is None else _prefixes("paths", paths)
        self._exclude_paths = _prefixes("exclude_paths", exclude_paths)
        self._should_commit = _function("should_commit", should_commit or below_400)
        self._options = options
        _check_names(options)
        if callable(client):
            client = _function("client", client)
        if callable(collections) and not isinstance(collections, type):
            collections = _function("collections", collections)
        elif collections is not None:
            with_session(None, collections := _list(collections))  # refuses what is no class
        _check(client, collections, options)
        self._client: Client = client
        self._collections: Any = collections
        _warn_of_order(app)

    async def __call__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI asks for it."""
        if not self._handles(scope):
            return await self.app(scope, receive, send)
        outside = copy_context()
        opened = await self._open()
        if opened is None:
            return await self.app(scope, receive, send)
        exchange = Exchange(opened, scope, receive, send, self._should_commit)
        return await exchange.run(self.app, outside)

    def _handles(self, scope: HTTPScope) -> bool:
        if scope["type"] != "http":
            return False
        if self._methods is not None and scope["method"].upper() not in self._methods:
            return False
        path = _path(scope)
        return (self._paths is None or _below(path, self._paths)) and not _below(
            path, self._exclude_paths
        )

    async def _open(self) -> SessionScope | None:
        """Open a scope, or return ``None`` where a session is bound already."""
        client = self._client() if callable(self._client) else self._client
        models = self._collections
        if callable(models):
            models = _list(models())
        scope = with_session(client, models, propagation="never", **self._options)
        if _bound_by_hand(client, models):
            return None
        try:
            await scope.__aenter__()
        except PropagationError:
            if current_scope() is None and not _bound_by_hand(scope.client, None):
                raise  # no scope is open here: an observer refuses this one
            return None
        return scope


def _check(client: Any, collections: Any, options: MiddlewareOptions) -> None:
    """Refuse what can't work, with the words of the library."""
    models = None if callable(collections) else collections
    if client is None and models is not None and not models:
        raise ValueError(
            "SessionScopeMiddleware was given no client and an empty collections=, so it can't "
            "tell where to open a transaction: pass client=, or name the classes."
        )
    transactional(client, models, **options)  # checks these, and opens nothing


def _check_names(options: MiddlewareOptions) -> None:
    unknown = sorted(set(options) - set(MiddlewareOptions.__annotations__))
    if unknown:
        raise TypeError(
            f"SessionScopeMiddleware takes no {', '.join(unknown)}: its options are "
            f"{', '.join(MiddlewareOptions.__annotations__)}."
        )


def _list(collections: Any) -> Any:
    # An iterator serves once, and there are many requests. What else can't be iterated over is
    # refused by with_session.
    if isinstance(collections, (str, type)) or not isinstance(collections, Iterable):
        return collections
    return list(collections)


def _function(name: str, value: Any) -> Any:
    if isinstance(value, type) or not callable(value):
        kind = "class" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a function, and is a {kind}.")
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(
        getattr(value, "__call__", None)  # noqa: B004 - whether that is one, not whether it is
    ):
        raise TypeError(
            f"{name} must be a plain function, and is a coroutine function: nothing would await it."
        )
    return value


def _strings(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be an iterable of strings, and is a {type(values).__name__}: write "
            f"{name}=[...]."
        )
    found = list(values)
    for value in found:
        if not isinstance(value, str):
            raise TypeError(f"{name} must hold strings, and holds a {type(value).__name__}.")
    return found


def _methods(values: Iterable[str]) -> frozenset[str]:
    methods = frozenset(value.upper() for value in _strings("methods", values))
    if not methods:
        raise ValueError(_handles_nothing("methods"))
    return methods


def _prefixes(name: str, values: Iterable[str]) -> tuple[str, ...]:
    prefixes = _strings(name, values)
    for prefix in prefixes:
        if not prefix.startswith("/"):
            raise ValueError(f"{name} must hold paths that begin with '/', and holds {prefix!r}.")
    if name == "paths" and not prefixes:
        raise ValueError(_handles_nothing(name))
    return tuple(prefix.rstrip("/") for prefix in prefixes)


def _handles_nothing(name: str) -> str:
    return f"{name}=[] would leave no request to handle: leave {name} out to handle all."


def _path(scope: HTTPScope) -> str:
    """Return the path as the application's routes name it, without what it is mounted at."""
    path: str = scope["path"]
    mount = scope.get("root_path", "").rstrip("/")
    return path[len(mount) :] if mount and _below(path, (mount,)) else path


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def _bound_by_hand(client: Any, models: list[type[SessionScopeMixin]] | None) -> bool:
    """Tell whether ``set_session`` has bound one of the classes here."""
    for model in scoped_models() if models is None else models:
        try:
            session = model.get_session()
        except ScopeClosedError:
            continue  # inherited from a block that is over: the request has its own
        if session is not None and (client is None or session.client is client):
            return True
    return False


def _warn_of_order(app: Any) -> None:
    """Say where the middleware inside keeps background tasks and streams in the scope."""
    seen: set[int] = set()
    while app is not None and id(app) not in seen:
        seen.add(id(app))
        inside = [type(app), *(getattr(each, "cls", None) for each in _user_middleware(app))]
        for cls in inside:
            if any(base.__name__ == "BaseHTTPMiddleware" for base in getattr(cls, "__mro__", ())):
                logger.warning(
                    "SessionScopeMiddleware stands around %s, a BaseHTTPMiddleware, which runs "
                    "the application in a task of its own: background tasks and streams that use "
                    "bound classes get ScopeClosedError there. Let SessionScopeMiddleware be the "
                    "innermost: the last in middleware=[...], or the first add_middleware().",
                    getattr(cls, "__name__", "?"),
                    extra={"event": "asgi.order"},
                )
                return
        app = getattr(app, "app", None)


def _user_middleware(app: Any) -> Iterable[Any]:
    found = getattr(app, "user_middleware", ())
    return found if isinstance(found, list) else ()
