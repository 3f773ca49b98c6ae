"""fastapi-users on Beanie, with the mixin in its classes and a scope around each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from application_users import (
    COLLECTIONS,
    MODELS,
    Profile,
    RetryingUserManager,
    Services,
    User,
    UserManager,
    create_app,
)
from beanie import Document, init_beanie
from fastapi import FastAPI
from fastapi_users_db_beanie import (
    BaseOAuthAccount,
    BeanieBaseUser,
    BeanieBaseUserDocument,
    BeanieUserDatabase,
)
from pwdlib import PasswordHash
from pwdlib.hashers.bcrypt import BcryptHasher
from wire import DATABASE, FailPoint, Wire, names, open_transactions

from beanie_session_scope import Rollback, SessionScopeMixin, with_session

EMAIL, PASSWORD = "Ann@example.com", "correct horse"
Http = httpx.AsyncClient


@pytest_asyncio.fixture(autouse=True)
async def collections(client: Any) -> Any:
    """The application's collections, empty."""
    await init_beanie(database=client[DATABASE], document_models=MODELS)
    for name in COLLECTIONS:
        await client[DATABASE][name].delete_many({})


@pytest.fixture
def services() -> Services:
    return Services()


@asynccontextmanager
async def serve(app: FastAPI) -> AsyncIterator[Http]:
    """Answer what a server would answer, a 500 included."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://tests") as http:
        yield http


@pytest_asyncio.fixture
async def http(client: Any, services: Services) -> AsyncIterator[Http]:
    """The application, each request of which runs in a scope."""
    async with serve(create_app(services, lambda: client)) as http:
        yield http


@pytest_asyncio.fixture
async def plain_http(services: Services) -> AsyncIterator[Http]:
    """The same application without scopes."""
    async with serve(create_app(services)) as http:
        yield http


async def register(http: Http, email: str = EMAIL) -> httpx.Response:
    return await http.post("/register", json={"email": email, "password": PASSWORD})


async def log_in(http: Http, password: str = PASSWORD, backend: str = "token") -> httpx.Response:
    form = {"username": EMAIL, "password": password}
    return await http.post(f"/{backend}/login", data=form)


def bearer(response: httpx.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {response.json()['access_token']}"}


async def stored(database: Any) -> dict[str, int]:
    """Say how many documents of each kind the server holds."""
    return {
        name.removeprefix("application_"): await database[name].count_documents({})
        for name in COLLECTIONS
    }


NOTHING = {"user": 0, "access_token": 0, "profile": 0, "failed_login": 0}


def transactions(events: list[Any]) -> list[Any]:
    """Return the transaction of each command on the collections, ``None`` for none."""
    return [
        (bytes(event.command["lsid"]["id"]), event.command["txnNumber"])
        if event.command.get("autocommit") is False
        else None
        for event in events
        if event.command.get(event.command_name) in COLLECTIONS
    ]


def commands(events: list[Any]) -> list[str]:
    """Return their names; a transaction of half a second also asks for the server's limit."""
    return [name for name in names(events) if name != "getParameter"]


class TestBases:
    async def test_the_mixin_stands_before_the_classes_of_the_package(self) -> None:
        class Account(SessionScopeMixin, BeanieBaseUser, Document):
            pass

        class Member(SessionScopeMixin, BeanieBaseUserDocument):
            pass

        assert (Account.get_session(), Member.get_session()) == (None, None)

    async def test_after_document_it_is_refused(self) -> None:
        with pytest.raises(TypeError, match="mixin comes after Document"):

            class Account(BeanieBaseUser, Document, SessionScopeMixin):
                pass


class TestNoEscape:
    """Every command of every route is in the one transaction of its request."""

    @pytest.fixture
    def sent(self, wire: Wire) -> Callable[[Awaitable[httpx.Response]], Awaitable[list[str]]]:
        async def sent(request: Awaitable[httpx.Response]) -> list[str]:
            with wire.record() as events:
                response = await request
            assert response.is_success, response.text
            assert None not in transactions(events)
            assert len(set(transactions(events))) == 1
            return commands(events)

        return sent

    async def test_registration(self, http: Http, sent: Any) -> None:
        assert await sent(register(http)) == ["find", "insert", "insert", "commitTransaction"]

    async def test_login_with_a_token_in_the_database(self, http: Http, sent: Any) -> None:
        await register(http)

        assert await sent(log_in(http)) == ["find", "insert", "commitTransaction"]

    async def test_login_with_a_jwt(self, http: Http, sent: Any) -> None:
        await register(http)

        assert await sent(log_in(http, backend="jwt")) == ["find", "commitTransaction"]

    @pytest.mark.parametrize("backend", ["jwt", "token"])
    async def test_the_current_user(self, http: Http, sent: Any, backend: str) -> None:
        await register(http)
        headers = bearer(await log_in(http, backend=backend))

        seen = await sent(http.get("/users/me", headers=headers))

        assert set(seen) == {"find", "commitTransaction"}

    async def test_logout(self, http: Http, sent: Any) -> None:
        await register(http)
        headers = bearer(await log_in(http))

        seen = await sent(http.post("/token/logout", headers=headers))

        assert seen[-2:] == ["delete", "commitTransaction"]

    async def test_another_email(self, http: Http, sent: Any) -> None:
        await register(http)
        headers = bearer(await log_in(http))

        change = http.patch("/users/me", headers=headers, json={"email": "other@example.com"})

        assert (await sent(change))[-1] == "commitTransaction"
        assert await User.find(User.email == "other@example.com").count() == 1

    async def test_password_reset(self, http: Http, sent: Any, services: Services) -> None:
        await register(http)

        await sent(http.post("/forgot-password", json={"email": EMAIL}))
        body = {"token": services.mails[-1][1], "password": "battery staple"}
        seen = await sent(http.post("/reset-password", json=body))

        assert seen[-2:] == ["delete", "commitTransaction"]

    async def test_verification(self, http: Http, sent: Any, services: Services) -> None:
        await register(http)

        await sent(http.post("/request-verify-token", json={"email": EMAIL}))
        await sent(http.post("/verify", json={"token": services.mails[-1][1]}))

        assert await User.find(User.is_verified == True).count() == 1  # noqa: E712

    async def test_an_administrator_deletes_a_user(self, http: Http, sent: Any) -> None:
        await register(http)
        await User.find_one().update({"$set": {"is_superuser": True}})
        other = (await register(http, "bob@example.com")).json()
        headers = bearer(await log_in(http))

        seen = await sent(http.delete(f"/users/{other['id']}", headers=headers))

        assert seen[-2:] == ["delete", "commitTransaction"]

    async def test_accounts_of_another_service(self, client: Any, wire: Wire) -> None:
        manager = UserManager(BeanieUserDatabase(User, BaseOAuthAccount), Services())

        with wire.record() as events:
            for access_token in ("first", "second"):
                async with with_session(collections=MODELS):
                    user = await manager.oauth_callback("idp", access_token, "7", EMAIL)

        assert [account.access_token for account in user.oauth_accounts] == ["second"]
        assert None not in transactions(events)
        assert len(set(transactions(events))) == 2


class TestRegistration:
    async def test_an_error_after_the_user_was_created_leaves_no_user(
        self, http: Http, services: Services, database: Any
    ) -> None:
        services.down = True

        response = await register(http)

        assert (response.status_code, response.text) == (500, "Internal Server Error")
        assert await stored(database) == NOTHING
        assert services.mails == []

    async def test_without_a_scope_the_user_stays(
        self, plain_http: Http, services: Services, database: Any
    ) -> None:
        services.down = True

        response = await register(plain_http)

        assert response.status_code == 500
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1}
        assert services.mails == [(EMAIL, "welcome")]

    async def test_a_write_of_the_application_that_fails_leaves_no_user(
        self, http: Http, database: Any
    ) -> None:
        await Profile(handle="Ann").insert()

        response = await register(http)

        assert response.status_code == 409
        assert await stored(database) == {**NOTHING, "profile": 1}

    async def test_without_a_scope_such_a_user_can_never_register_again(
        self, plain_http: Http, database: Any
    ) -> None:
        profile = await Profile(handle="Ann").insert()
        assert (await register(plain_http)).status_code == 409
        await profile.delete()

        response = await register(plain_http)

        assert response.json() == {"detail": "REGISTER_USER_ALREADY_EXISTS"}
        assert await stored(database) == {**NOTHING, "user": 1}

    async def test_in_a_scope_it_can(self, http: Http, database: Any) -> None:
        profile = await Profile(handle="Ann").insert()
        assert (await register(http)).status_code == 409
        await profile.delete()

        response = await register(http)

        assert response.status_code == 201
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1}

    async def test_a_mail_is_sent_once_it_is_stored(
        self, http: Http, services: Services, wire: Wire
    ) -> None:
        with wire.record() as events:
            await register(http)

        assert commands(events)[-1] == "commitTransaction"
        assert services.mails == [(EMAIL, "welcome")]

    async def test_a_mail_that_fails_takes_no_user_back(
        self, http: Http, services: Services, database: Any
    ) -> None:
        services.mailer_down = True

        response = await register(http)

        assert response.status_code == 201
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1}

    async def test_a_commit_that_is_refused_is_no_success_and_sends_no_mail(
        self, http: Http, services: Services, database: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", times=1, error_code=251):
            response = await register(http)

        assert response.status_code >= 500
        assert EMAIL not in response.text
        assert await stored(database) == NOTHING
        assert services.mails == []

    async def test_the_email_is_taken_whatever_its_case(self, http: Http) -> None:
        await register(http)

        response = await register(http, EMAIL.upper())

        assert (response.status_code, response.json()["detail"]) == (
            400,
            "REGISTER_USER_ALREADY_EXISTS",
        )

    async def test_a_user_who_is_not_committed_yet_is_found_in_the_scope_alone(
        self, client: Any
    ) -> None:
        users: Any = BeanieUserDatabase(User)

        async with with_session(collections=[User]):
            created = await users.create({"email": EMAIL, "hashed_password": ""})
            found = await users.get_by_email(EMAIL.lower())
            assert found.id == created.id
            raise Rollback

        assert await users.get_by_email(EMAIL) is None
        assert created.id is None


class TestTheSameEmailTwiceAtOnce:
    """Their profiles differ, so that only the index on the e-mail can tell."""

    @pytest.fixture(autouse=True)
    def together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let both see that the e-mail is free before either is stored."""
        arrived: list[object] = []
        both = asyncio.Event()
        create = BeanieUserDatabase.create

        async def create_together(self: Any, values: dict[str, Any]) -> Any:
            arrived.append(values)
            if len(arrived) == 2:
                both.set()
            await both.wait()
            return await create(self, values)

        monkeypatch.setattr(BeanieUserDatabase, "create", create_together)

    async def test_one_is_registered_and_the_other_is_asked_to_try_again(
        self, http: Http, services: Services, database: Any, server_uri: str
    ) -> None:
        responses = await asyncio.gather(register(http), register(http, EMAIL.upper()))

        taken, refused = sorted(responses, key=lambda response: response.status_code)
        assert (taken.status_code, refused.status_code) == (201, 503)
        assert refused.json() == {"detail": "Try again."}
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1}
        assert len(services.mails) == 1
        assert open_transactions(server_uri) == 0

    async def test_where_it_is_run_again_the_other_learns_that_the_email_is_taken(
        self, client: Any, services: Services, database: Any, server_uri: str
    ) -> None:
        app = create_app(services, lambda: client, RetryingUserManager, exclude_paths=["/register"])

        async with serve(app) as http:
            responses = await asyncio.gather(register(http), register(http, EMAIL.upper()))

        taken, refused = sorted(responses, key=lambda response: response.status_code)
        assert (taken.status_code, refused.status_code) == (201, 400)
        assert refused.json() == {"detail": "REGISTER_USER_ALREADY_EXISTS"}
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1}
        assert len(services.mails) == 1
        assert open_transactions(server_uri) == 0


class TestLogin:
    @pytest.mark.parametrize("backend", ["jwt", "token"])
    async def test_it_works_in_a_scope(self, http: Http, backend: str) -> None:
        await register(http)

        headers = bearer(await log_in(http, backend=backend))
        response = await http.get("/users/me", headers=headers)

        assert response.json()["email"] == EMAIL

    async def test_a_wrong_password_is_refused_and_counted_outside_the_scope(
        self, http: Http, database: Any, wire: Wire
    ) -> None:
        await register(http)

        with wire.record() as events:
            response = await log_in(http, "wrong")

        assert response.json() == {"detail": "LOGIN_BAD_CREDENTIALS"}
        assert commands(events) == ["find", "insert", "abortTransaction"]
        assert await stored(database) == {**NOTHING, "user": 1, "profile": 1, "failed_login": 1}

    async def test_a_hash_that_is_renewed_is_in_the_transaction_too(
        self, http: Http, services: Services, database: Any
    ) -> None:
        await register(http)
        old = PasswordHash([BcryptHasher(rounds=4)]).hash(PASSWORD)
        await User.find_one().update({"$set": {"hashed_password": old}})
        services.down = True
        assert (await log_in(http)).status_code == 500
        assert (await database["application_user"].find_one())["hashed_password"] == old
        services.down = False

        assert (await log_in(http)).status_code == 200

        assert (await database["application_user"].find_one())["hashed_password"] != old

    async def test_one_that_fails_leaves_no_token(
        self, http: Http, services: Services, database: Any
    ) -> None:
        await register(http)
        services.down = True

        response = await log_in(http)

        assert response.status_code == 500
        assert await database["application_access_token"].count_documents({}) == 0

    async def test_without_a_scope_the_token_stays_valid(
        self, plain_http: Http, services: Services, database: Any
    ) -> None:
        await register(plain_http)
        services.down = True

        response = await log_in(plain_http)

        assert response.status_code == 500
        assert await database["application_access_token"].count_documents({}) == 1

    async def test_after_logout_the_token_is_worth_nothing(self, http: Http) -> None:
        await register(http)
        headers = bearer(await log_in(http))

        await http.post("/token/logout", headers=headers)
        response = await http.get("/users/me", headers=headers)

        assert response.status_code == 401


class TestPasswordReset:
    NEW = "battery staple"

    @pytest_asyncio.fixture
    async def token(self, http: Http, services: Services) -> str:
        """The token of a registered user who forgot the password."""
        await register(http)
        await http.post("/forgot-password", json={"email": EMAIL})
        (address, token) = services.mails[-1]
        assert address == EMAIL
        return token

    async def reset(self, http: Http, token: str) -> httpx.Response:
        return await http.post("/reset-password", json={"token": token, "password": self.NEW})

    async def test_the_new_password_works_and_the_old_one_does_not(
        self, http: Http, token: str
    ) -> None:
        response = await self.reset(http, token)

        assert response.status_code == 200
        assert (await log_in(http, self.NEW)).status_code == 200
        assert (await log_in(http)).status_code == 400

    async def test_it_works_once(self, http: Http, token: str) -> None:
        await self.reset(http, token)

        response = await self.reset(http, token)

        assert response.json() == {"detail": "RESET_PASSWORD_BAD_TOKEN"}

    async def test_an_error_afterwards_takes_the_password_and_the_logins_back(
        self, http: Http, token: str, services: Services
    ) -> None:
        headers = bearer(await log_in(http))
        services.down = True

        failed = await self.reset(http, token)

        services.down = False
        assert failed.status_code == 500
        assert (await http.get("/users/me", headers=headers)).status_code == 200
        assert (await log_in(http, self.NEW)).status_code == 400
        assert (await log_in(http)).status_code == 200
        assert (await self.reset(http, token)).status_code == 200

    async def test_without_a_scope_the_password_is_changed_by_a_request_that_failed(
        self, plain_http: Http, http: Http, token: str, services: Services
    ) -> None:
        services.down = True

        failed = await self.reset(plain_http, token)

        services.down = False
        assert failed.status_code == 500
        assert (await log_in(http, self.NEW)).status_code == 200

    async def test_nobody_is_told_whether_an_email_is_registered(
        self, http: Http, services: Services
    ) -> None:
        response = await http.post("/forgot-password", json={"email": "nobody@example.com"})

        assert response.status_code == 202
        assert services.mails == []


class TestVerification:
    async def test_an_error_afterwards_leaves_the_user_unverified(
        self, http: Http, services: Services
    ) -> None:
        await register(http)
        await http.post("/request-verify-token", json={"email": EMAIL})
        body = {"token": services.mails[-1][1]}
        services.down = True
        failed = await http.post("/verify", json=body)
        services.down = False

        again = await http.post("/verify", json=body)

        assert (failed.status_code, again.status_code) == (500, 200)
        assert again.json()["is_verified"] is True
