"""An application on fastapi-users: its models, its user manager and its routes.

What it keeps of its own, a profile for each user, is written in the hooks of fastapi-users.
"""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, List, Optional  # noqa: UP035 - Beanie 1.26 evaluates these itself

from beanie import Document, PydanticObjectId
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import OAuth2PasswordRequestForm
from fastapi_users import BaseUserManager, FastAPIUsers, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.authentication.strategy.db import DatabaseStrategy
from fastapi_users.password import PasswordHelper
from fastapi_users_db_beanie import (
    BaseOAuthAccount,
    BeanieBaseUser,
    BeanieUserDatabase,
    ObjectIDIDMixin,
)
from fastapi_users_db_beanie.access_token import BeanieAccessTokenDatabase, BeanieBaseAccessToken
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from pwdlib.hashers.bcrypt import BcryptHasher
from pydantic import Field
from pymongo import IndexModel
from pymongo.errors import DuplicateKeyError, PyMongoError

from beanie_session_scope import SessionScopeMixin, on_commit, outside_session, transactional
from beanie_session_scope.asgi import SessionScopeMiddleware

SECRET = "a secret of the tests, of 32 bytes and more"
# The hashes of fastapi-users, the first one with the least work: tests hash a lot.
QUICK = PasswordHash([Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1), BcryptHasher()])


class User(SessionScopeMixin, BeanieBaseUser, Document):
    oauth_accounts: List[BaseOAuthAccount] = Field(default_factory=list)  # noqa: UP006

    class Settings(BeanieBaseUser.Settings):
        name = "application_user"
        indexes = BeanieBaseUser.Settings.indexes  # Beanie 1.26 does not inherit them


class AccessToken(SessionScopeMixin, BeanieBaseAccessToken, Document):
    class Settings(BeanieBaseAccessToken.Settings):
        name = "application_access_token"
        indexes = BeanieBaseAccessToken.Settings.indexes


class Profile(SessionScopeMixin, Document):
    handle: str
    user_id: Optional[PydanticObjectId] = None  # noqa: UP045

    class Settings:
        name = "application_profile"
        indexes = [IndexModel("handle", unique=True)]


class FailedLogin(SessionScopeMixin, Document):
    email: str

    class Settings:
        name = "application_failed_login"


MODELS: list[Any] = [User, AccessToken, Profile, FailedLogin]
COLLECTIONS = tuple(model.Settings.name for model in MODELS)


class UserRead(schemas.BaseUser[PydanticObjectId]):
    pass


class UserCreate(schemas.BaseUserCreate):
    pass


class UserUpdate(schemas.BaseUserUpdate):
    pass


class Services:
    """What the application calls that is no database: a mailer, and a service that may be down."""

    def __init__(self) -> None:
        self.mails: list[tuple[str, str]] = []
        self.down = False
        self.mailer_down = False

    async def mail(self, to: str, text: str) -> None:
        if self.mailer_down:
            raise ConnectionError("the mailer does not answer")
        self.mails.append((to, text))

    async def announce(self) -> None:
        if self.down:
            raise ConnectionError("secret-host.internal does not answer")


class UserManager(ObjectIDIDMixin, BaseUserManager[User, PydanticObjectId]):
    reset_password_token_secret = SECRET
    verification_token_secret = SECRET

    def __init__(self, users: "BeanieUserDatabase[Any]", services: Services) -> None:
        super().__init__(users, PasswordHelper(QUICK))
        self.services = services

    async def on_after_register(self, user: User, request: Request | None = None) -> None:
        handle, _, _ = user.email.partition("@")
        await Profile(handle=handle, user_id=user.id).insert()
        on_commit(partial(self.services.mail, user.email, "welcome"))
        await self.services.announce()

    async def authenticate(self, credentials: OAuth2PasswordRequestForm) -> User | None:
        """Count failed logins: their requests are answered with 400, and rolled back."""
        user = await super().authenticate(credentials)
        if user is None:
            with outside_session(FailedLogin):
                await FailedLogin(email=credentials.username).insert()
        return user

    async def on_after_login(
        self,
        user: User,
        request: Request | None = None,
        response: Response | None = None,
    ) -> None:
        await self.services.announce()

    async def on_after_forgot_password(
        self,
        user: User,
        token: str,
        request: Request | None = None,
    ) -> None:
        on_commit(partial(self.services.mail, user.email, token))

    async def on_after_reset_password(self, user: User, request: Request | None = None) -> None:
        await AccessToken.find({"user_id": user.id}).delete()
        await self.services.announce()

    async def on_after_request_verify(
        self,
        user: User,
        token: str,
        request: Request | None = None,
    ) -> None:
        on_commit(partial(self.services.mail, user.email, token))

    async def on_after_verify(self, user: User, request: Request | None = None) -> None:
        await self.services.announce()


class RetryingUserManager(UserManager):
    """Registers again where another registration came first: then the user exists."""

    @transactional(collections=[User, Profile])
    async def create(
        self,
        user_create: schemas.UC,
        safe: bool = False,
        request: Request | None = None,
    ) -> User:
        return await super().create(user_create, safe, request)


async def answer_conflict(request: Request, error: Exception) -> JSONResponse:
    """Tell the client of a conflict with another request; any other error is a server error."""
    if isinstance(error, DuplicateKeyError):
        return JSONResponse({"detail": "It exists already."}, 409)
    if isinstance(error, PyMongoError) and error.has_error_label("TransientTransactionError"):
        return JSONResponse({"detail": "Try again."}, 503, {"Retry-After": "1"})
    raise error


def create_app(
    services: Services,
    client: Callable[[], Any] | None = None,
    manager: type[UserManager] = UserManager,
    **options: Any,
) -> FastAPI:
    """Create the application; with a client, its requests run in a scope."""

    async def get_user_db() -> AsyncIterator[BeanieUserDatabase[Any]]:
        yield BeanieUserDatabase(User, BaseOAuthAccount)

    async def get_user_manager(users: Any = Depends(get_user_db)) -> AsyncIterator[UserManager]:  # noqa: B008
        yield manager(users, services)

    def get_jwt_strategy() -> JWTStrategy[User, PydanticObjectId]:
        return JWTStrategy(SECRET, lifetime_seconds=3600)

    def get_database_strategy() -> DatabaseStrategy[User, PydanticObjectId, AccessToken]:
        return DatabaseStrategy(BeanieAccessTokenDatabase(AccessToken), lifetime_seconds=3600)

    by_jwt = backend("jwt", get_jwt_strategy)
    by_token = backend("token", get_database_strategy)
    users = FastAPIUsers[User, PydanticObjectId](get_user_manager, [by_jwt, by_token])

    app = FastAPI()
    app.add_exception_handler(PyMongoError, answer_conflict)
    if client is not None:
        app.add_middleware(SessionScopeMiddleware, client=client, collections=MODELS, **options)
    app.include_router(users.get_auth_router(by_jwt), prefix="/jwt")
    app.include_router(users.get_auth_router(by_token), prefix="/token")
    app.include_router(users.get_register_router(UserRead, UserCreate))
    app.include_router(users.get_reset_password_router())
    app.include_router(users.get_verify_router(UserRead))
    app.include_router(users.get_users_router(UserRead, UserUpdate), prefix="/users")
    return app


def backend(
    name: str, get_strategy: Callable[[], Any]
) -> AuthenticationBackend[User, PydanticObjectId]:
    transport = BearerTransport(tokenUrl=f"{name}/login")
    return AuthenticationBackend(name=name, transport=transport, get_strategy=get_strategy)
