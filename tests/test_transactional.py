"""``transactional``: the decorator on functions, on methods, and in the routes of FastAPI."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator
from typing import Annotated, Any, get_type_hints
from weakref import ref

import httpx
import pytest
import pytest_asyncio
import retry_models
from beanie import PydanticObjectId, init_beanie
from clients import empty
from fastapi import Depends, FastAPI, HTTPException, Request
from labels import TRANSIENT, labelled
from models import Item
from pydantic import BaseModel
from retry_models import Counter
from wire import Wire, names

from beanie_session_scope import (
    ModelNotScopedError,
    NotAClientError,
    current_scope,
    mixin,
    on_commit,
    outside_session,
    transactional,
    with_session,
)


@pytest_asyncio.fixture
async def counters(client: Any, database: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The collection of the counters, none of whose methods has been called.

    All classes are of one client, as in an application: those that other tests have initialised
    on clients of their own are put out of sight.
    """
    await init_beanie(database=database, document_models=[Counter])
    stored = [(each, mixin.plain_collection(each)) for each in mixin.models()]
    here = [ref(m) for m, found in stored if found is None or found.database.client is client]
    monkeypatch.setattr(mixin, "_models", here)
    await empty(database, "counter")
    retry_models.calls.clear()
    return database["counter"]


async def values(collection: Any) -> list[int]:
    return [each["n"] async for each in collection.find()]


class TestAFunction:
    def test_keeps_what_it_is(self) -> None:
        async def sell(item: Item, *, price: int = 3) -> str:
            """Sell an item."""
            return f"{item.name} for {price}"

        decorated = transactional(sell)
        assert decorated.__wrapped__ is sell  # type: ignore[attr-defined]
        assert inspect.signature(decorated) == inspect.signature(sell)
        assert inspect.iscoroutinefunction(decorated)
        assert asyncio.iscoroutinefunction(decorated)
        assert (decorated.__name__, decorated.__doc__) == ("sell", "Sell an item.")
        assert (decorated.__qualname__, decorated.__module__) == (sell.__qualname__, __name__)
        assert get_type_hints(decorated) == {"item": Item, "price": int, "return": str}

    def test_lets_a_framework_resolve_its_annotations(self) -> None:
        """They may be strings, for which not every framework looks behind ``__wrapped__``."""

        async def sell(item: Item) -> Change:
            raise AssertionError(item)

        decorated = transactional(sell)
        annotations = [p.annotation for p in inspect.signature(decorated).parameters.values()]
        assert annotations == ["Item"]
        assert eval("Item, Change", decorated.__globals__) == (Item, Change)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "decorator",
        [
            transactional,
            transactional(),
            transactional(None),
            transactional(collections=[Item]),
            transactional(collections=(each for each in [Item])),
            transactional(timeout=5, propagation="required"),
        ],
        ids=["bare", "called", "no client", "collections", "a generator", "options"],
    )
    @pytest.mark.usefixtures("counters")
    async def test_runs_in_a_transaction_at_each_call(
        self, client: Any, wire: Wire, database: Any, decorator: Any
    ) -> None:
        attempts = []

        async def add(name: str, *, n: int) -> tuple[str, int]:
            await Item(name=name, n=n).insert()
            attempts.append(name)
            if len(attempts) < 3:
                raise labelled(TRANSIENT)
            return name, n

        decorated = decorator(add)
        with wire.record() as seen:
            assert await decorated("a", n=1) == ("a", 1)
            assert await decorated("b", n=2) == ("b", 2)
        aborted, committed = ["insert", "abortTransaction"], ["insert", "commitTransaction"]
        assert names(seen) == [*aborted, *aborted, *committed, *committed]
        assert await database["item"].count_documents({}) == 2

    @pytest.mark.usefixtures("counters")
    async def test_may_be_a_partial_one(self, client: Any) -> None:
        async def add(first: int, second: int) -> tuple[int, Any]:
            return first + second, current_scope() and True

        assert await transactional(functools.partial(add, 1))(2) == (3, True)

    async def test_rewinds_documents_among_all_its_arguments(
        self, client: Any, database: Any
    ) -> None:
        attempts = []

        @transactional(collections=[Item])
        async def add(one: Item, *more: Item, by_name: dict[str, Item], **others: Item) -> None:
            for document in (one, *more, *by_name.values(), *others.values()):
                document.n += 1
                await document.save()
            attempts.append(1)
            if len(attempts) < 3:
                raise labelled(TRANSIENT)

        items = [await Item().insert() for _ in range(4)]
        await add(items[0], items[1], by_name={"x": items[2]}, other=items[3])
        assert [each.n for each in items] == [1] * 4
        assert await database["item"].distinct("n") == [1]
        assert len(attempts) == 3

    async def test_runs_side_by_side_with_itself(self, client: Any, database: Any) -> None:
        item = await Item().insert()

        @transactional(collections=[Item])
        async def add() -> None:
            mine = await Item.get(item.id)
            mine.n += 1  # type: ignore[union-attr]
            await mine.save()  # type: ignore[union-attr]

        await asyncio.gather(*(add() for _ in range(10)))
        assert (await database["item"].find_one())["n"] == 10


class TestAMethod:
    """Fails twice before it succeeds."""

    async def test_rewinds_its_document(self, counters: Any) -> None:
        counter = await Counter().insert()
        assert await counter.add(5) == 5
        assert (counter.n, await values(counters)) == (5, [5])
        assert retry_models.calls == ["add"] * 3

    async def test_joins_a_decorated_function_that_calls_it(
        self, counters: Any, wire: Wire
    ) -> None:
        calls = []

        @transactional
        async def add_twice(counter: Counter) -> int:
            calls.append(counter.n)
            await counter.add()
            return await counter.add()

        counter = await Counter().insert()
        with wire.record() as seen:
            assert await add_twice(counter) == 2
        assert calls == [0, 0, 0]
        assert names(seen).count("commitTransaction") == 1
        assert (counter.n, await values(counters)) == (2, [2])

    async def test_rewinds_the_saved_state_of_its_document(self, counters: Any) -> None:
        counter = await Counter().insert()
        await counter.add_change()
        assert (counter.n, await values(counters)) == (1, [1])
        assert not counter.is_changed

    async def test_may_be_called_on_the_class(self, counters: Any) -> None:
        counter = await Counter().insert()
        await Counter.add(counter, step=2)
        assert (counter.n, await values(counters)) == (2, [2])

    async def test_of_the_class_works(self, counters: Any) -> None:
        counter = await Counter.create(n=4)
        assert isinstance(counter, Counter)
        assert await values(counters) == [4]
        assert retry_models.calls == ["create"] * 3

    async def test_that_is_static_works(self, counters: Any) -> None:
        counter = await Counter(n=4).insert()
        await Counter.double(counter)
        assert (counter.n, await values(counters)) == (8, [8])

    def test_keeps_what_it_is(self) -> None:
        assert list(inspect.signature(Counter.add).parameters) == ["self", "step"]
        assert Counter.add.__doc__ == "Add to the counter."
        assert inspect.iscoroutinefunction(Counter.create)
        assert "add" not in (getattr(Counter, "model_fields", {}))


class TestTheClient:
    async def test_may_be_given_itself(self, client: Any) -> None:
        assert await transactional(client)(self._client)() is client
        assert await transactional(client=client, collections=[])(self._client)() is client

    async def test_may_be_asked_for_at_each_call(self, client: Any) -> None:
        asked = []

        def find() -> Any:
            asked.append(1)
            return client

        decorated = transactional(client=find)(self._client)
        assert asked == []
        assert await decorated() is client
        assert await decorated() is client
        assert len(asked) == 2

    async def test_that_is_asked_for_goes_with_other_options(self, client: Any) -> None:
        decorated = transactional(lambda: client, [Item], timeout=5)(self._client)
        assert await decorated() is client

    @pytest.mark.parametrize("others", [{"collections": [Item]}, {"propagation": "required"}])
    def test_may_not_be_asked_of_a_coroutine_function(self, others: dict[str, Any]) -> None:
        """Nor is that one taken for the function to decorate."""

        async def find() -> None:
            pytest.fail("it was called")

        with pytest.raises(TypeError, match=r"client=.*find"):
            transactional(client=find, **others)

    @pytest.mark.parametrize("wrong", [1, "client", object()])
    def test_of_another_type_is_refused_at_once(self, wrong: Any) -> None:
        with pytest.raises(NotAClientError):
            transactional(client=wrong)

    async def test_of_another_type_is_refused_when_it_was_asked_for(
        self, client: Any, wire: Wire
    ) -> None:
        decorated = transactional(client=lambda: "client")(self._fail)
        with wire.record() as seen, pytest.raises(NotAClientError):
            await decorated()
        assert seen == []

    async def _client(self) -> Any:
        scope = current_scope()
        assert scope is not None
        return scope.client

    async def _fail(self) -> None:
        pytest.fail("the body ran")


class TestWhatCanNotBeDecorated:
    """Is refused when it is decorated."""

    def test_a_function_that_is_no_coroutine_function(self) -> None:
        with pytest.raises(TypeError, match="async def"):

            @transactional()
            def work() -> None:
                pytest.fail("the body ran")

    def test_a_generator(self) -> None:
        with pytest.raises(TypeError, match="async def"):

            @transactional()
            async def work() -> AsyncIterator[int]:
                yield 1

    @pytest.mark.parametrize("kind", [classmethod, staticmethod])
    @pytest.mark.parametrize("called", [False, True])
    def test_what_should_be_decorated_below_it(self, kind: Any, called: bool) -> None:
        async def work(*args: Any) -> None:
            pytest.fail("the body ran")

        with pytest.raises(TypeError, match="staticmethod"):
            transactional()(kind(work)) if called else transactional(kind(work))

    @pytest.mark.parametrize(
        ("error", "options"),
        [
            (ValueError, {"transaction": False}),
            (ValueError, {"timeout": 0}),
            (ValueError, {"propagation": "nested"}),
            (ModelNotScopedError, {"collections": [int]}),
            (TypeError, {"no_such_option": 1}),
        ],
        ids=str,
    )
    def test_with_options_that_can_not_work(
        self, error: type[Exception], options: dict[str, Any]
    ) -> None:
        with pytest.raises(error):
            transactional(**options)


class Change(BaseModel):
    step: int


def double_of(step: int = 1) -> int:
    return 2 * step


class Conflict:
    """Tells a test how often a route was called."""

    def __init__(self) -> None:
        self.calls = 0
        self.second = asyncio.Event()

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            self.second.set()


app = FastAPI()


@app.post("/items/{item_id}")
@transactional(collections=[Item])
async def change_item(
    item_id: PydanticObjectId,
    change: Change,
    double: Annotated[int, Depends(double_of)],
    request: Request,
) -> dict[str, int]:
    """Change an item."""
    request.app.state.conflict()
    item = await Item.get(item_id)
    if item is None:
        raise HTTPException(404)
    item.n += change.step + double
    await item.save()
    on_commit(lambda: request.app.state.committed.append(item.n))
    return {"n": item.n}


@app.get("/items/{item_id}")
@transactional
async def read_item(item_id: PydanticObjectId) -> dict[str, bool]:
    return {"found": await Item.get(item_id) is not None, "scope": current_scope() is not None}


@app.delete("/items/{item_id}")
@transactional(collections=[Item])
async def delete_item(item_id: PydanticObjectId) -> None:
    await Item.find_one(Item.id == item_id).delete()
    raise HTTPException(409)


class TestInARoute:
    @pytest_asyncio.fixture
    async def browser(self, counters: Any) -> AsyncIterator[httpx.AsyncClient]:
        app.state.conflict, app.state.committed = Conflict(), []
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as browser:
            yield browser

    async def test_parameters_bodies_and_dependencies_arrive(
        self, browser: httpx.AsyncClient, database: Any
    ) -> None:
        item = await Item().insert()
        answer = await browser.post(f"/items/{item.id}?step=3", json={"step": 1})
        assert (answer.status_code, answer.json()) == (200, {"n": 7})
        assert (await database["item"].find_one())["n"] == 7
        assert app.state.committed == [7]
        assert (await browser.get(f"/items/{item.id}")).json() == {"found": True, "scope": True}

    async def test_what_is_wrong_with_a_request_is_said_as_ever(
        self, browser: httpx.AsyncClient, wire: Wire
    ) -> None:
        with wire.record() as seen:
            answer = await browser.post("/items/1", json={})
        wrong = {each["loc"][0] for each in answer.json()["detail"]}
        assert (answer.status_code, wrong) == (422, {"path", "body"})
        assert seen == []
        assert app.state.conflict.calls == 0

    def test_the_documentation_knows_all_of_it(self) -> None:
        described = app.openapi()["paths"]["/items/{item_id}"]["post"]
        assert described["description"] == "Change an item."
        assert {each["name"] for each in described["parameters"]} == {"item_id", "step"}
        assert "requestBody" in described

    async def test_an_error_of_http_rolls_back(
        self, browser: httpx.AsyncClient, database: Any
    ) -> None:
        item = await Item().insert()
        assert (await browser.delete(f"/items/{item.id}")).status_code == 409
        assert await database["item"].count_documents({}) == 1

    async def test_a_conflict_is_retried_before_the_answer(
        self, browser: httpx.AsyncClient, database: Any
    ) -> None:
        item = await Item().insert()
        async with with_session(collections=[Item]):
            await Item.find_one(Item.id == item.id).inc({Item.n: 100})
            request = asyncio.ensure_future(self._post_elsewhere(browser, item))
            await app.state.conflict.second.wait()
        answer = await request
        assert (answer.status_code, answer.json()) == (200, {"n": 103})
        assert (await database["item"].find_one())["n"] == 103
        assert app.state.conflict.calls >= 2
        assert app.state.committed == [103], "the hooks of the attempts that failed are dropped"

    async def test_requests_side_by_side_lose_no_update(
        self, browser: httpx.AsyncClient, database: Any
    ) -> None:
        item = await Item().insert()
        path, change = f"/items/{item.id}?step=0", {"step": 1}
        answers = await asyncio.gather(*(browser.post(path, json=change) for _ in range(10)))
        assert {each.status_code for each in answers} == {200}
        assert sorted(each.json()["n"] for each in answers) == list(range(1, 11))
        assert (await database["item"].find_one())["n"] == 10

    async def _post_elsewhere(self, browser: httpx.AsyncClient, item: Item) -> httpx.Response:
        with outside_session():  # the server of a browser is no task of the test's scope
            return await browser.post(f"/items/{item.id}", json={"step": 1})
