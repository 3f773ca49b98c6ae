"""What a program comes to, by the rules of the library alone: dicts, and no database.

A transaction sees what was committed when its first operation ran, and its own writes. A frame is
a block that binds classes, or puts them outside. A task starts with the frames of the task that
started it; those of blocks that are over since then refuse its operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import programs as p
from programs import CLIENT_OF, DOCUMENTS, STORED, Schedule, Thread, class_of

Steps: TypeAlias = "Generator[None, None, Any]"
Store: TypeAlias = "dict[tuple[str, str], Row]"  # by class and name


@dataclass(frozen=True)
class Row:
    """A stored document: its value, and a number that every write changes."""

    n: int
    revision: int = 0


@dataclass(frozen=True)
class Memory:
    """A document in memory."""

    stored: bool
    n: int = 0
    revision: int = 0


class Left(Exception):
    """An exception that leaves a statement.

    Attributes:
        name: The name of its class.
        transient: Whether it asks for another attempt.
    """

    def __init__(self, name: str, transient: bool = False, of: Transaction | None = None) -> None:
        super().__init__(name)
        self.name, self.transient = name, transient
        self.belong_to(of)

    def belong_to(self, of: Transaction | None) -> None:
        """Make it the error of a transaction."""
        self._of, self._number = of, 0 if of is None else of.number

    @property
    def of(self) -> Transaction | None:
        """The transaction whose error it is; ``None`` where it is nobody's, or that is over."""
        return None if self._of is None or self._of.number != self._number else self._of


@dataclass
class Planned:
    """A hook that was registered."""

    path: str
    hook: p.Hook


@dataclass(eq=False)
class Transaction:
    """The transaction of a scope, or its plain session."""

    label: str
    client: str
    plain: bool
    retried: bool
    state: str = "open"
    closed: bool = False
    snapshot: Store | None = None
    writes: Store = field(default_factory=dict)
    failure: Left | None = None
    rollback_only: bool = False
    joined_by: int = 0
    has_committed: bool = False
    number: int = 1  # commit() and abort() begin another one
    hooks: dict[str, list[Planned]] = field(default_factory=dict)
    journal: dict[str, Memory] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.forget_hooks()

    def forget_hooks(self) -> dict[str, list[Planned]]:
        before, self.hooks = self.hooks, {w: [] for w in ("before_commit", "on_commit", "on_abort")}
        return before

    def fail(self, error: Left) -> Left:
        """Let an error end the transaction."""
        error.belong_to(self)
        if self.failure is None:
            self.failure = Left(error.name, error.transient, self)
            self.writes, self.written = {}, set()
        return error

    def error(self, name: str) -> Left:
        """Return an error that stands for the one that ended the transaction."""
        return Left(name, self.failure is not None and self.failure.transient, self)

    def refusal(self) -> Left | None:
        """Return what leaving normally raises, where it can't mean committed."""
        if self.rollback_only:
            return self.error("UnexpectedRollbackError")
        return self.error("TransactionAbortedError") if self.failure else None


@dataclass(eq=False)
class Control:
    """The object that ``with_session`` returned."""

    transaction: Transaction
    joined: bool
    called: bool = False  # whether the block began


@dataclass(eq=False)
class Frame:
    """A block that binds classes to a transaction, or (with none) puts them outside."""

    models: tuple[str, ...]
    transaction: Transaction | None
    is_scope: bool  # or puts all classes outside: then no scope is in force
    over: bool = False


Frames: TypeAlias = "tuple[Frame, ...]"


@dataclass
class Place:
    """Where a statement runs."""

    thread: Thread
    frames: Frames
    block: Control | None = None

    def inside(self, frame: Frame, block: Control | None = None) -> Place:
        return Place(self.thread, (*self.frames, frame), block or self.block)


class Model:
    """Runs a program.

    Attributes:
        trace: What happened: the task, the statement, what it came to, and what was bound.
        left_out: The writes that would wait for a lock, or conflict, or are out of date.
        at_last: What is done with each document when the program is over.
    """

    def __init__(self, program: p.Program) -> None:
        self.program = program
        self.schedule = Schedule(program.turns)
        self.store: Store = {(class_of(d), d): Row(0) for d in STORED}
        self.memory = {d: Memory(d in STORED) for d in DOCUMENTS}
        self.trace: list[tuple[Any, ...]] = []
        self.left_out: set[str] = set()
        self.at_last: dict[str, str] = {}
        self.seen: Counter[str] = Counter()  # what occurred, for statistics
        self._counts: Counter[str] = Counter()
        self._revision = 0
        self._transactions: list[Transaction] = []
        self._threads: list[Thread] = []

    def run(self) -> Model:
        """Run the program to its end, then write each document once more."""
        self._start("main", "0", self.program.body, ())
        while True:
            while (thread := self.schedule.next()) is not None:
                next(thread.more, None)
            waiting = [each for each in self._threads if not (each.parent or each.ended)]
            if not waiting:
                break
            self.schedule.cancel(waiting[0])
        for document in DOCUMENTS:
            self._write_at_last(document)
        return self

    # -- tasks -----------------------------------------------------------------------------

    def _start(
        self,
        name: str,
        path: str,
        body: p.Body,
        frames: Frames,
        block: Control | None = None,
        parent: Thread | None = None,
    ) -> Thread:
        thread = Thread(name, parent)
        thread.more = self._task(path, body, Place(thread, frames, block))
        self.schedule.add(thread)
        self._threads.append(thread)
        return thread

    def _task(self, path: str, body: p.Body, place: Place) -> Steps:
        thread = place.thread
        try:
            yield from self._body(path, body, place)
        except Left as error:
            thread.outcome = error
        self._log(place, path, thread.outcome.name if thread.outcome else "ended")
        self.schedule.end(thread)

    # -- statements ------------------------------------------------------------------------

    def _body(self, path: str, body: p.Body, place: Place) -> Steps:
        for number, statement in enumerate(body):
            yield
            yield from self._statement(f"{path}.{number}", statement, place)

    def _statement(self, path: str, statement: p.Statement, place: Place) -> Steps:
        self._counts[path] += 1
        label = f"{path}#{self._counts[path]}"
        run = getattr(self, f"_run_{type(statement).__name__.lower()}")
        try:
            outcome = run(label, path, statement, place)
            if isinstance(outcome, Generator):
                outcome = yield from outcome
        except Left as error:
            self._log(place, label, error.name)
            raise
        self._log(place, label, "ok" if outcome is None else outcome)

    def _log(self, place: Place, label: str, outcome: Any) -> None:
        running = self.schedule.running
        assert running is not None
        bound = tuple(self._bound(place.frames, model) for model in CLIENT_OF)
        current = next((t.label for t in enclosing(place.frames)), None)
        self.trace.append((running.name, label, outcome, *bound, current))
        self.seen[outcome if isinstance(outcome, str) else "value"] += 1

    def _bound(self, frames: Frames, model: str) -> str | None:
        try:
            transaction = self._resolve(frames, model)
        except Left:
            self.seen["closed"] += 1
            return "closed"
        return transaction.label if transaction is not None else None

    def _run_put(self, label: str, path: str, put: p.Put, place: Place) -> str | None:
        return self._insert(place.frames, put.model, label)

    def _run_write(self, label: str, path: str, write: p.Write, place: Place) -> str | None:
        document, model = write.document, class_of(write.document)
        before = self.memory[document]
        if not self._can_be_written(document, place.frames):
            self.left_out.add(label)
            return "left out"
        if before.stored and write.how != "inc":
            before = self.memory[document] = replace(before, n=before.n + 1)
        transaction = self._resolve(place.frames, model)
        if transaction is not None and not transaction.plain:
            transaction.journal.setdefault(document, before)
        into = self._operate(place.frames, model)
        if write.how == "inc" and before.stored:
            n = self._view(into)[model, document].n + 1
        else:
            n = before.n
        self._keep(into, document, n)
        # For the scopes inside the one that it was written in, it is what was there before.
        around = [frame.transaction for frame in place.frames]
        inner = 0 if into is None else around.index(into) + 1
        self._renew(place.frames[inner:], [document], but=into)
        return None

    def _can_be_written(self, document: str, frames: Frames) -> bool:
        """Tell whether a write would succeed at once, or be refused at once."""
        try:
            transaction = self._resolve(frames, class_of(document))
        except Left:
            return True
        if transaction is not None and (transaction.closed or transaction.failure):
            return True
        return self._is_up_to_date(transaction, document)

    def _run_touch(self, label: str, path: str, touch: p.Touch, place: Place) -> None:
        before = self.memory[touch.document]
        self.memory[touch.document] = replace(before, n=before.n + 100)

    def _run_track(self, label: str, path: str, track: p.Track, place: Place) -> str | None:
        transaction = next(enclosing(place.frames), None)
        if transaction is None:
            return "no scope"
        self._track(transaction, [track.document])
        return None

    def _run_read(self, label: str, path: str, read: p.Read, place: Place) -> Any:
        transaction = self._operate(place.frames, read.model)
        return rows_of(self._view(transaction), read.model)

    def _run_clash(self, label: str, path: str, clash: p.Clash, place: Place) -> None:
        transaction = self._operate(place.frames, clash.model)
        error = Left("DuplicateKeyError")
        raise error if transaction is None else transaction.fail(error)

    def _run_conflict(self, label: str, path: str, conflict: p.Conflict, place: Place) -> Any:
        transaction = self._resolve(place.frames, conflict.model)
        if transaction is None or transaction.plain:
            return "no transaction"
        self._counts[f"{path}, sent"] += 1
        if self._counts[f"{path}, sent"] > conflict.times:
            return None
        self._operate(place.frames, conflict.model)
        raise transaction.fail(Left("OperationFailure", transient=True))

    def _run_raise(self, label: str, path: str, statement: p.Raise, place: Place) -> None:
        if statement.what == "transient":
            if self._counts[path] <= statement.times:
                raise Left("Transient", transient=True)
        else:
            raise Left({"error": "Boom", "rollback": "Rollback"}[statement.what])

    def _run_control(self, label: str, path: str, control: p.Control, place: Place) -> Any:
        of = place.block
        if control.of == "current":
            transaction = next(enclosing(place.frames), None)
            of = Control(transaction, joined=False) if transaction is not None else None
        if of is None:
            return "no scope"
        if control.what != "set_rollback_only" and has_hooks_below(of.transaction, place.frames):
            self.left_out.add(label)
            return "left out"
        self.seen[control.what] += 1
        if control.what == "set_rollback_only":
            check_open(of.transaction)
            of.transaction.rollback_only = True
            return None
        return self._end_and_go_on(control.what, of, place)

    def _end_and_go_on(self, how: str, of: Control, place: Place) -> Steps:
        transaction = of.transaction
        begins_anew = how == "abort" and transaction.state == "aborted" and not transaction.closed
        if not begins_anew:
            check_open(transaction)
        if of.joined or transaction.joined_by:
            raise Left("PropagationError")
        if how == "commit":
            veto = yield from self._before_commit(transaction, place)
            if veto is not None:
                transaction.rollback_only = True
                raise veto
        yield from self._next(how, transaction, place)

    def _next(self, how: str, transaction: Transaction, place: Place) -> Steps:
        if transaction.closed:
            raise Left("ScopeClosedError")
        if how == "commit" and transaction.failure is not None:
            raise transaction.error("TransactionAbortedError")
        outside = tuple(f for f in place.frames if f.transaction is not transaction)
        refusal = transaction.refusal() if how == "commit" else None
        if refusal is not None:  # the hooks wait for abort(), or the end of the block
            self._abort(transaction)
            raise transaction.fail(refusal)
        hooks = transaction.forget_hooks()
        if how == "commit":
            self._commit(transaction, outside)
        elif transaction.state == "open":
            self._abort(transaction)
        due = hooks["on_commit" if transaction.state == "committed" else "on_abort"]
        self._begin_anew(transaction)
        yield from self._after(transaction, due, None, outside, place)

    def _begin_anew(self, transaction: Transaction) -> None:
        transaction.number += 1
        transaction.state, transaction.snapshot, transaction.writes = "open", None, {}
        transaction.failure, transaction.rollback_only, transaction.written = None, False, set()
        transaction.journal = {d: self.memory[d] for d in transaction.tracked}

    def _run_hook(self, label: str, path: str, hook: p.Hook, place: Place) -> Any:
        if hook.when == "before_commit":
            transaction = next(enclosing(place.frames), None)
        else:
            transaction = nearest([frame for frame in place.frames if frame.is_scope])
            if transaction is not None and transaction.closed:
                raise Left("ScopeClosedError")
        if hook.when != "before_commit" and (transaction is None or transaction.plain):
            if hook.when == "on_commit":
                return self._call(Planned(path, hook), place.frames, place)
            return None
        if transaction is None:
            return "no scope"
        check_open(transaction)
        transaction.hooks[hook.when].append(Planned(path, hook))
        return None

    def _run_hang(self, label: str, path: str, hang: p.Hang, place: Place) -> Steps:
        thread = self.schedule.running
        assert thread is not None
        self.schedule.hang(thread)
        yield
        raise Left("CancelledError")

    def _run_together(self, label: str, path: str, together: p.Together, place: Place) -> None:
        errors = [self._one_of_many(f"{label}.{i}", i == 2, together, place) for i in range(3)]
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed

    def _one_of_many(
        self, name: str, last: bool, together: p.Together, place: Place
    ) -> Left | None:
        model, fails = together.model, last and together.fails
        try:
            if not together.joined:
                self._insert(place.frames, model, name)
                if fails:
                    raise Left("Boom")
                return None
            client = CLIENT_OF[model]
            found = self._joinable(p.Scope((), client=client), place.frames)
            transaction = found or Transaction(name, client, plain=False, retried=False)
            transaction.joined_by += found is not None
            frames = (*place.frames, Frame((model,), transaction, is_scope=True))
            try:
                self._insert(frames, model, name)
                if fails:
                    raise Left("Boom")
            except Left:
                self._leave_joined(transaction, failed=True)
                raise
            if found is None:
                self._commit(transaction, place.frames)
            else:
                self._leave_joined(transaction, failed=False)
        except Left as error:
            return error
        return None

    def _run_cancelinflight(self, label: str, path: str, statement: Any, place: Place) -> str:
        return "cancelled"

    def _run_catch(self, label: str, path: str, catch: p.Catch, place: Place) -> Steps:
        try:
            yield from self._body(path, catch.body, place)
        except Left as error:
            if error.name == "CancelledError":
                raise
            return f"caught {error.name}"
        return None

    def _run_outside(self, label: str, path: str, outside: p.Outside, place: Place) -> Steps:
        everything = outside.models is None
        models = tuple(CLIENT_OF) if outside.models is None else outside.models
        frame = Frame(models, None, is_scope=everything)
        try:
            yield from self._body(path, outside.body, place.inside(frame))
        finally:
            frame.over = True

    def _run_gather(self, label: str, path: str, gather: p.Gather, place: Place) -> Steps:
        parent = self.schedule.running
        assert parent is not None
        children = [
            self._start(f"{label}.{i}", f"{path}.{i}", body, place.frames, place.block, parent)
            for i, body in enumerate(gather.bodies)
        ]
        self.schedule.wait(parent, lambda: all(child.ended for child in children))
        yield
        if parent.cancelled:
            raise Left("CancelledError")
        failed = next((child.outcome for child in children if child.outcome), None)
        if failed is not None:
            raise failed

    def _run_spawn(self, label: str, path: str, spawn: p.Spawn, place: Place) -> None:
        self._start(label, path, spawn.body, place.frames, place.block)

    def _run_cancel(self, label: str, path: str, cancel: p.Cancel, place: Place) -> Steps:
        if cancel.at_once:
            return "cancelled"
        parent = self.schedule.running
        assert parent is not None
        child = self._start(label, path, cancel.body, place.frames, place.block, parent)
        self.schedule.wait(parent, lambda: self.schedule.is_quiet(child))
        yield
        if not child.ended:
            self.schedule.cancel(child)
            self.schedule.wait(parent, lambda: child.ended)
            yield
        outcome = child.outcome
        if outcome is not None and outcome.name != "CancelledError":
            raise outcome
        return None if outcome is None else "cancelled"

    # -- scopes ----------------------------------------------------------------------------

    def _run_scope(self, label: str, path: str, scope: p.Scope, place: Place) -> Steps:
        number = 0
        while True:
            number += 1
            found = self._joinable(scope, place.frames)
            retried = scope.form != "block"
            transaction = found or Transaction(
                f"{label}.{number}", scope.client, not scope.transaction, retried
            )
            if found is None:
                self._transactions.append(transaction)
            control = Control(transaction, joined=found is not None)
            error = yield from self._attempt(path, scope, control, place)
            again = found is None and retried and error and is_transient(error, transaction)
            if scope.form != "function" or (control.called and not again):
                self._log(place, f"{label}.{number}", (transaction.state, *self._documents()))
            if error is None:
                return
            if found is None and error.of in (None, transaction):
                error.transient = False  # to the scopes around it is another one's
            if not again:
                raise error
            self.seen["retry"] += 1

    def _joinable(self, scope: p.Scope, frames: Frames) -> Transaction | None:
        found = next((t for t in enclosing(frames) if t.client == scope.client), None)
        if (scope.propagation == "mandatory" and found is None) or (
            scope.propagation == "never" and found is not None
        ):
            raise Left("PropagationError")
        if scope.propagation == "requires_new" or found is None:
            return None
        if found.plain is scope.transaction:
            raise Left("PropagationError")
        return found

    def _attempt(self, path: str, scope: p.Scope, control: Control, place: Place) -> Steps:
        """Run the block; return what leaves it."""
        transaction, joined = control.transaction, control.joined
        self.seen["joined" if joined else "owner"] += 1
        frame = Frame(scope.models, transaction, is_scope=True)
        transaction.joined_by += joined
        error: Left | None = None
        try:
            if scope.form == "function" and scope.passes:
                self._track(transaction, scope.passes)
            control.called = True
            # A function is not handed its scope.
            inside = place.inside(frame, control if scope.form != "function" else None)
            yield from self._body(path, scope.body, inside)
        except Left as left:
            error = left
        if joined:
            self._leave_joined(transaction, failed=error is not None)
        else:
            error = yield from self._leave(transaction, error, place, frame)
        frame.over = True
        return error

    @staticmethod
    def _leave_joined(transaction: Transaction, *, failed: bool) -> None:
        transaction.joined_by -= 1
        if failed and not transaction.plain and not transaction.closed:
            transaction.rollback_only = True

    def _leave(
        self, transaction: Transaction, error: Left | None, place: Place, frame: Frame
    ) -> Steps:
        """End the transaction; return what leaves the scope."""
        veto = None
        if error is None:
            veto = yield from self._before_commit(transaction, place.inside(frame))
        cause = error or veto
        failure = self._conclude(transaction, cause, place.frames)
        due = transaction.hooks["on_commit" if transaction.state == "committed" else "on_abort"]
        if transaction.state not in ("committed", "aborted"):
            due = []
        try:
            yield from self._after(transaction, due, failure or cause, place.frames, place)
        except Left as failed_hook:
            return failed_hook
        if failure is not None:
            return failure
        if transaction.state == "aborted" and cause is not None and cause.name == "Rollback":
            return None
        return cause

    def _conclude(
        self, transaction: Transaction, cause: Left | None, around: Frames
    ) -> Left | None:
        transaction.closed = True
        if transaction.plain:
            transaction.state = "ended"
        elif transaction.state == "aborted":  # by a commit() that failed
            return transaction.refusal() if cause is None else None
        elif cause is not None:
            self._abort(transaction)
        elif (refusal := transaction.refusal()) is not None:
            self._abort(transaction)
            return refusal
        else:
            self._commit(transaction, around)
        return None

    def _commit(self, transaction: Transaction, around: Frames) -> None:
        transaction.state, transaction.has_committed = "committed", True
        self.store.update(transaction.writes)
        self._renew(around, transaction.written)

    def _abort(self, transaction: Transaction) -> None:
        transaction.state = "aborted"
        transaction.writes, transaction.written = {}, set()
        self.memory.update(transaction.journal)

    def _renew(
        self, frames: Frames, documents: Iterable[str], but: Transaction | None = None
    ) -> None:
        """Let transactions go back to what documents are now, not to what was before."""
        for transaction in {f.transaction for f in frames} - {but, None}:
            if not transaction.closed:
                journal = transaction.journal
                journal.update({d: self.memory[d] for d in documents if d in journal})

    def _track(self, transaction: Transaction, documents: Iterable[str]) -> None:
        check_open(transaction)
        for document in documents:
            transaction.journal.setdefault(document, self.memory[document])
            transaction.tracked.add(document)

    # -- hooks -----------------------------------------------------------------------------

    def _before_commit(self, transaction: Transaction, place: Place) -> Steps:
        due = transaction.state == "open" and not transaction.plain
        if due and transaction.refusal() is None:
            hooks = transaction.hooks["before_commit"]
            while hooks:
                try:
                    yield from self._call(hooks.pop(0), place.frames, place)
                except Left as veto:
                    return veto
        return None

    def _after(
        self,
        transaction: Transaction,
        due: list[Planned],
        error: Left | None,
        frames: Frames,
        place: Place,
    ) -> Steps:
        if error is not None and transaction.retried and is_transient(error, transaction):
            return
        failed = False
        for planned in due:
            try:
                yield from self._call(planned, frames, place)
            except Left:
                failed = True
        if failed and (error is None or error.name == "Rollback"):
            raise Left("HookError")

    def _call(self, planned: Planned, frames: Frames, place: Place) -> Steps:
        self.seen[planned.hook.when] += 1
        where = Place(place.thread, frames)
        self._log(where, f"{planned.path}.hook", "runs")
        yield from self._body(f"{planned.path}.hook", planned.hook.body, where)

    # -- the database ----------------------------------------------------------------------

    def _resolve(self, frames: Frames, model: str) -> Transaction | None:
        """Return what a class is bound to; ``None`` means that it runs outside."""
        return nearest([frame for frame in frames if model in frame.models])

    def _operate(self, frames: Frames, model: str) -> Transaction | None:
        """Run an operation; return the transaction that it is part of."""
        transaction = self._resolve(frames, model)
        if transaction is None:
            return None
        if transaction.closed:
            raise Left("ScopeClosedError")
        if transaction.failure is not None:
            raise transaction.error("TransactionAbortedError")
        if transaction.plain:
            return None
        if transaction.snapshot is None:
            transaction.snapshot = dict(self.store)
        return transaction

    def _view(self, transaction: Transaction | None) -> Store:
        if transaction is None or transaction.plain:
            return self.store
        seen = self.store if transaction.snapshot is None else transaction.snapshot
        return {**seen, **transaction.writes}

    def _insert(self, frames: Frames, model: str, name: str) -> None:
        transaction = self._operate(frames, model)
        rows = self.store if transaction is None else transaction.writes
        rows[model, name] = Row(0)

    def _keep(self, transaction: Transaction | None, document: str, n: int) -> None:
        self._revision += 1
        rows = self.store if transaction is None else transaction.writes
        rows[class_of(document), document] = Row(n, self._revision)
        self.memory[document] = Memory(stored=True, n=n, revision=self._revision)
        if transaction is not None:
            transaction.written.add(document)

    def _is_up_to_date(self, transaction: Transaction | None, document: str) -> bool:
        """Tell whether a document can be written at once, and is what the writer sees."""
        key = class_of(document), document
        if any(key in each.writes for each in self._transactions if each is not transaction):
            return False
        seen = self._view(transaction).get(key)
        if not self.memory[document].stored:
            return seen is None and key not in self.store
        if seen is None or seen.revision != self.memory[document].revision:
            return False
        mine = transaction is not None and key in transaction.writes
        return mine or self.store.get(key) == seen

    def _write_at_last(self, document: str) -> None:
        before = self.memory[document]
        self.at_last[document] = "left out"
        if self._is_up_to_date(None, document):
            self.at_last[document] = "save" if before.stored else "insert"
            self._keep(None, document, before.n + before.stored)

    def _documents(self) -> Iterator[tuple[bool, int]]:
        return ((each.stored, each.n) for each in self.memory.values())

    def final(self) -> dict[str, Any]:
        """Return what is stored, by class."""
        return {model: rows_of(self.store, model) for model in CLIENT_OF}


def rows_of(store: Store, model: str) -> list[tuple[str, int]]:
    """Return the names and values of a class."""
    return sorted((name, row.n) for (of, name), row in store.items() if of == model)


def nearest(binding: list[Frame]) -> Transaction | None:
    """Return what the last of some blocks binds to."""
    if not binding:
        return None
    last = binding[-1]
    if last.over and last.transaction is not None:
        # This task was started in a block that is over: it may have been a joined one.
        still_open = [frame for frame in binding if not frame.over]
        if not still_open or still_open[-1].transaction is not last.transaction:
            raise Left("ScopeClosedError")
    return last.transaction


def is_transient(error: Left, transaction: Transaction) -> bool:
    """Tell whether an error is a reason to run a transaction again."""
    again = not transaction.has_committed  # what is stored must not be done a second time
    return again and error.transient and error.of in (None, transaction)


def check_open(transaction: Transaction) -> None:
    """Refuse to tell a transaction something that it can't take any more."""
    if transaction.closed or transaction.state != "open":
        raise Left("ScopeClosedError")
    if transaction.plain:
        raise Left("PropagationError")


def has_hooks_below(transaction: Transaction, frames: Frames) -> bool:
    """Tell whether hooks would run in a task that has opened other scopes since.

    There they may find their own scope among those in force, if it goes on: that isn't said.
    """
    if not any(transaction.hooks.values()):
        return False
    of_scopes = [frame for frame in frames if frame.is_scope]
    innermost = of_scopes[-1] if of_scopes else None
    return innermost is None or innermost.over or innermost.transaction is not transaction


def enclosing(frames: Frames) -> Iterator[Transaction]:
    """Yield the open transactions of the scopes in force, the innermost first."""
    for frame in reversed(frames):
        if frame.is_scope:
            if frame.transaction is None:
                return  # outside, also in a task that was started there
            if not frame.over and not frame.transaction.closed:
                yield frame.transaction
