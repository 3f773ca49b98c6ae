"""Runs programs with the library, on a real server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import programs as p
from beanie import Document
from bson import ObjectId
from labels import TRANSIENT
from nesting_models import Beside, Here, There, database_of
from programs import CLIENT_OF, DOCUMENTS, STORED, Schedule, Thread, class_of
from pymongo.errors import PyMongoError

from beanie_session_scope import (
    Rollback,
    ScopeClosedError,
    SessionScopeError,
    current_scope,
    on_abort,
    on_commit,
    outside_session,
    run_in_transaction,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER

MODELS: dict[str, Any] = {"here": Here, "beside": Beside, "there": There}
TAKEN = ObjectId("0" * 24)
HELD = ObjectId("1" * 24)
ASIDE = ("taken", "held")  # the documents that are there in every program


class Boom(Exception):
    """An error of a program."""


class Transient(PyMongoError):
    """An error that asks for another attempt."""

    def __init__(self) -> None:
        super().__init__("run it again")
        self._add_error_label(TRANSIENT)


class World:
    """The clients, and what every program finds in the database."""

    def __init__(self, one: Any, two: Any) -> None:
        self.clients = {"one": one, "two": two}

    def collection(self, model: str) -> Any:
        client = self.clients[CLIENT_OF[model]]
        return database_of(client)[MODELS[model].Settings.name]

    async def prepare(self) -> None:
        """Store what statements fail on."""
        for model in CLIENT_OF:
            await self.collection(model).insert_many(
                [{"_id": TAKEN, "name": "taken", "n": 0}, {"_id": HELD, "name": "held", "n": 0}]
            )

    async def documents(self) -> dict[str, Any]:
        """Empty the collections, and return the documents of a new program."""
        for model in CLIENT_OF:
            await self.collection(model).delete_many({"_id": {"$nin": [TAKEN, HELD]}})
        documents = {name: MODELS[class_of(name)](name=name) for name in DOCUMENTS}
        for name in STORED:
            await documents[name].insert()
        return documents

    async def final(self) -> dict[str, list[tuple[str, int]]]:
        """Return what is stored, by class."""
        return {model: await self._rows(self.collection(model).find()) for model in CLIENT_OF}

    @staticmethod
    async def _rows(cursor: Any) -> list[tuple[str, int]]:
        found = await cursor.to_list(None)
        return sorted((each["name"], each["n"]) for each in found if each["name"] not in ASIDE)

    @asynccontextmanager
    async def held(self, program: p.Program) -> AsyncIterator[None]:
        """Let other transactions hold the documents that ``Conflict`` writes."""
        models = {s.model for s in p.statements(program.body) if isinstance(s, p.Conflict)}
        async with AsyncExitStack() as stack:
            for model in models:
                session = await DRIVER.start_session(self.clients[CLIENT_OF[model]])
                stack.push_async_callback(session.end_session)  # aborts
                await DRIVER.start_transaction(session)
                change = {"$inc": {"n": 1}}
                await self.collection(model).update_one({"_id": HELD}, change, session=session)
            yield


class Runner:
    """Runs one program.

    Args:
        world: Where.
        program: What to run.
        left_out: The writes that are left out.

    Attributes:
        trace: What happened: the task, the statement, what it came to, and what was bound.
        sessions: Every session that a scope opened.
    """

    def __init__(self, world: World, program: p.Program, left_out: set[str]) -> None:
        self.world = world
        self.program = program
        self.left_out = left_out
        self.trace: list[tuple[Any, ...]] = []
        self.sessions: list[Any] = []
        self._labels: dict[int, str] = {}
        self._scopes: dict[int, Any] = {}
        self._schedule = Schedule(program.turns)
        self._counts: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._threads: list[Thread] = []

    async def run(self, at_last: dict[str, str]) -> None:
        """Run the program to its end, then write each document once more."""
        self._documents = await self.world.documents()
        async with self.world.held(self.program):
            self._start("main", "0", self.program.body, None)
            while True:
                self._give_turn()
                await self._idle.wait()
                self._idle.clear()
                waiting = [each for each in self._threads if not (each.parent or each.ended)]
                if not waiting:
                    break
                self._cancel(waiting[0])
            await asyncio.gather(*(each.more[0] for each in self._threads), return_exceptions=True)
        for name, how in at_last.items():
            await self._write_at_last(self._documents[name], how)

    async def clean_up(self) -> None:
        """Leave nothing behind of a program that went wrong."""
        for thread in self._threads:
            thread.more[0].cancel()
        await asyncio.gather(*(each.more[0] for each in self._threads), return_exceptions=True)
        for session in self.sessions:
            if not session.has_ended:
                await session.end_session()  # aborts

    @staticmethod
    async def _write_at_last(document: Any, how: str) -> None:
        if how == "insert":
            await document.insert()
        elif how == "save":
            document.n += 1
            await (document.save if isinstance(document, Beside) else document.save_changes)()

    # -- tasks -----------------------------------------------------------------------------

    def _start(
        self, name: str, path: str, body: p.Body, block: Any, parent: Thread | None = None
    ) -> Thread:
        thread = Thread(name, parent)
        # The task, and whether it is its turn.
        thread.more = (
            asyncio.ensure_future(self._task(thread, path, body, block)),
            asyncio.Event(),
        )
        self._schedule.add(thread)
        self._threads.append(thread)
        return thread

    async def _task(self, thread: Thread, path: str, body: p.Body, block: Any) -> None:
        await self._turn_of(thread)
        outcome = "ended"
        try:
            await self._body(path, body, block)
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            try:
                self._log(path, outcome)
            finally:
                self._schedule.end(thread)
                self._give_turn()

    def _give_turn(self) -> None:
        thread = self._schedule.next()
        if thread is None:
            self._idle.set()
        else:
            thread.more[1].set()

    @staticmethod
    async def _turn_of(thread: Thread) -> None:
        await thread.more[1].wait()
        thread.more[1].clear()

    async def _pause(self) -> None:
        """Let somebody else have a turn, and wait for the next one."""
        thread = self._running
        self._give_turn()
        await self._turn_of(thread)

    @property
    def _running(self) -> Thread:
        assert self._schedule.running is not None
        return self._schedule.running

    def _cancel(self, thread: Thread) -> None:
        self._schedule.cancel(thread)
        thread.more[0].cancel()

    # -- statements ------------------------------------------------------------------------

    async def _body(self, path: str, body: p.Body, block: Any) -> None:
        for number, statement in enumerate(body):
            await self._pause()
            await self._statement(f"{path}.{number}", statement, block)

    async def _statement(self, path: str, statement: p.Statement, block: Any) -> None:
        self._counts[path] += 1
        label = f"{path}#{self._counts[path]}"
        run = getattr(self, f"_run_{type(statement).__name__.lower()}")
        try:
            outcome = await run(label, path, statement, block)
        except BaseException as error:
            self._log(label, type(error).__name__)
            raise
        self._log(label, "ok" if outcome is None else outcome)

    def _log(self, label: str, outcome: Any) -> None:
        bound = tuple(self._bound(model) for model in MODELS.values())
        scope = current_scope()
        current = None if scope is None else self._label(scope.session)
        self.trace.append((self._running.name, label, outcome, *bound, current))

    def _bound(self, model: Any) -> str | None:
        try:
            session = model.get_session()
        except SessionScopeError as error:
            return "closed" if isinstance(error, ScopeClosedError) else type(error).__name__
        return None if session is None else self._label(session)

    def _label(self, session: Any) -> str:
        return self._labels.get(id(session), "a session that no scope has opened")

    async def _run_put(self, label: str, path: str, put: p.Put, block: Any) -> None:
        await MODELS[put.model](name=label).insert()

    async def _run_write(self, label: str, path: str, write: p.Write, block: Any) -> str | None:
        document = self._documents[write.document]
        model, how = type(document), write.how
        if label in self.left_out:
            return "left out"
        if document.id is None:
            await document.insert()
        elif how == "inc":
            await document.inc({model.n: 1})
        else:
            document.n += 1
            # One of the classes has no state management.
            how = "save" if model is Beside and how == "save_changes" else how
            await getattr(document, how)()
        return None

    async def _run_touch(self, label: str, path: str, touch: p.Touch, block: Any) -> None:
        self._documents[touch.document].n += 100

    async def _run_track(self, label: str, path: str, track: p.Track, block: Any) -> str | None:
        scope = current_scope()
        if scope is None:
            return "no scope"
        scope.track(self._documents[track.document])
        return None

    async def _run_read(self, label: str, path: str, read: p.Read, block: Any) -> Any:
        found = await MODELS[read.model].find().to_list()
        return sorted((each.name, each.n) for each in found if each.name not in ASIDE)

    async def _run_clash(self, label: str, path: str, clash: p.Clash, block: Any) -> None:
        await MODELS[clash.model](id=TAKEN, name="clash").insert()

    async def _run_conflict(self, label: str, path: str, conflict: p.Conflict, block: Any) -> Any:
        model = MODELS[conflict.model]
        session = model.get_session()
        if session is None or not self._scopes[id(session)].options.transaction:
            return "no transaction"
        self._counts[f"{path}, sent"] += 1
        if self._counts[f"{path}, sent"] <= conflict.times:
            await model.find_one(model.id == HELD).update({"$inc": {"n": 1}})
        return None

    async def _run_raise(self, label: str, path: str, statement: p.Raise, block: Any) -> None:
        if statement.what == "transient":
            if self._counts[path] <= statement.times:
                raise Transient
        else:
            raise {"error": Boom, "rollback": Rollback}[statement.what]

    async def _run_control(self, label: str, path: str, control: p.Control, block: Any) -> Any:
        scope = block if control.of == "block" else current_scope()
        if label in self.left_out:
            return "left out"
        if scope is None:
            return "no scope"
        if control.what == "set_rollback_only":
            scope.set_rollback_only("the program says so")
        else:
            await getattr(scope, control.what)()
        return None

    async def _run_hook(self, label: str, path: str, hook: p.Hook, block: Any) -> Any:
        async def run() -> None:
            self._log(f"{path}.hook", "runs")
            await self._body(f"{path}.hook", hook.body, None)

        if hook.when == "on_commit":
            await on_commit(run)
        elif hook.when == "on_abort":
            on_abort(run)
        elif (scope := current_scope()) is None:
            return "no scope"
        else:
            scope.before_commit(run)
        return None

    async def _run_hang(self, label: str, path: str, hang: p.Hang, block: Any) -> None:
        thread = self._running
        self._schedule.hang(thread)
        self._give_turn()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            await self._turn_of(thread)
            raise

    async def _run_together(self, label: str, path: str, together: p.Together, block: Any) -> None:
        model = MODELS[together.model]

        async def write(number: int) -> None:
            await model(name=f"{label}.{number}").insert()
            if number == 2 and together.fails:
                raise Boom

        async def join(number: int) -> None:
            client = self.world.clients[CLIENT_OF[together.model]]
            async with with_session(client=client, collections=[model]):
                await write(number)

        run = join if together.joined else write
        raise_first(await asyncio.gather(*map(run, range(3)), return_exceptions=True))

    async def _run_cancelinflight(
        self, label: str, path: str, cancel: p.CancelInFlight, block: Any
    ) -> str:
        model = MODELS[cancel.model]

        async def write() -> None:
            client = self.world.clients[CLIENT_OF[cancel.model]]
            async with with_session(client=client, collections=[model], propagation="requires_new"):
                await model(name="cancelled").insert()
                await model(name="cancelled").insert()
                await asyncio.get_running_loop().create_future()

        task = asyncio.ensure_future(write())
        for _ in range(cancel.turns):
            await asyncio.sleep(0)
        return await cancelled(task) or ""

    async def _run_catch(self, label: str, path: str, catch: p.Catch, block: Any) -> str | None:
        try:
            await self._body(path, catch.body, block)
        except Exception as error:
            return f"caught {type(error).__name__}"
        return None

    async def _run_outside(self, label: str, path: str, outside: p.Outside, block: Any) -> None:
        with outside_session(*(MODELS[model] for model in outside.models or ())):
            await self._body(path, outside.body, block)

    async def _run_gather(self, label: str, path: str, gather: p.Gather, block: Any) -> None:
        parent = self._running
        children = [
            self._start(f"{label}.{i}", f"{path}.{i}", body, block, parent)
            for i, body in enumerate(gather.bodies)
        ]
        self._schedule.wait(parent, lambda: all(child.ended for child in children))
        self._give_turn()
        try:
            tasks = (child.more[0] for child in children)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._turn_of(parent)
        raise_first(outcomes)

    async def _run_spawn(self, label: str, path: str, spawn: p.Spawn, block: Any) -> None:
        self._start(label, path, spawn.body, block)

    async def _run_cancel(self, label: str, path: str, cancel: p.Cancel, block: Any) -> str | None:
        if cancel.at_once:
            return await cancelled(asyncio.ensure_future(self._body(path, cancel.body, block)))
        parent = self._running
        child = self._start(label, path, cancel.body, block, parent)
        self._schedule.wait(parent, lambda: self._schedule.is_quiet(child))
        await self._pause()
        if not child.ended:
            self._cancel(child)
            self._schedule.wait(parent, lambda: child.ended)
            await self._pause()
        return await cancelled(child.more[0], already=True)

    # -- scopes ----------------------------------------------------------------------------

    async def _run_scope(self, label: str, path: str, scope: p.Scope, block: Any) -> None:
        options = {
            "client": self.world.clients[scope.client],
            "collections": [MODELS[model] for model in scope.models],
            "propagation": scope.propagation,
        }
        if scope.form == "function":
            await self._function(label, path, scope, options, block)
        else:
            await getattr(self, f"_{scope.form}")(label, path, scope, options)

    async def _block(self, label: str, path: str, scope: p.Scope, options: dict[str, Any]) -> None:
        opened = with_session(transaction=scope.transaction, **options)
        await self._attempt(opened, f"{label}.1", path, scope)

    async def _attempts(
        self, label: str, path: str, scope: p.Scope, options: dict[str, Any]
    ) -> None:
        async for attempt in transaction_attempts(jitter=lambda: 0.0, **options):
            await self._attempt(attempt, f"{label}.{attempt.number}", path, scope)

    async def _attempt(self, opened: Any, label: str, path: str, scope: p.Scope) -> None:
        entered = False
        try:
            async with opened as session:
                entered = True
                self._know(session, label, opened)
                await self._body(path, scope.body, opened)
        finally:
            if entered:
                self._log_scope(label, opened)

    async def _function(
        self, label: str, path: str, scope: p.Scope, options: dict[str, Any], block: Any
    ) -> None:
        calls: list[Any] = []

        async def call(*documents: Document) -> None:
            calls.append(current_scope())
            self._know(calls[-1].session, f"{label}.{len(calls)}", calls[-1])
            await self._body(path, scope.body, block)

        documents = [self._documents[name] for name in scope.passes]
        try:
            await run_in_transaction(call, *documents, jitter=lambda: 0.0, **options)
        finally:
            if calls:
                self._log_scope(f"{label}.{len(calls)}", calls[-1])

    def _know(self, session: Any, label: str, scope: Any) -> None:
        """Remember a session by the scope that opened it."""
        if id(session) not in self._labels:
            self.sessions.append(session)  # which keeps its id from being used again
            self._labels[id(session)] = label
            self._scopes[id(session)] = scope

    def _log_scope(self, label: str, scope: Any) -> None:
        documents = ((each.id is not None, each.n) for each in self._documents.values())
        self._log(label, (scope.state.value, *documents))


async def cancelled(task: asyncio.Future[Any], *, already: bool = False) -> str | None:
    """Cancel a task, and wait for it; return whether that is how it ended."""
    if not already:
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return "cancelled"
    return None


def raise_first(outcomes: list[Any]) -> None:
    """Raise the first error among the outcomes of tasks."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
