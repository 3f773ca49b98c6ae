"""A little language of scopes: its statements, how they take turns, and what makes them up.

A program is a tree of blocks. Its tasks run one at a time, and ``Schedule`` says which is next
whenever one of them comes to a statement, so that a program has one outcome. (What
``Together`` and ``CancelInFlight`` run is left to the event loop: its outcome does not depend on
the order.)

Each statement is known by its path, the numbers of the blocks that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from hypothesis import strategies as st

CLIENT_OF = {"here": "one", "beside": "one", "there": "two"}
"""The classes, and the client that each was initialised on."""

STORED = ("here-old", "beside-old", "there-old")
NEW = ("here-new", "there-new")
DOCUMENTS = STORED + NEW
"""The documents that the statements share: stored before the program begins, or not."""

Propagation = Literal["required", "requires_new", "mandatory", "never"]
Body: TypeAlias = "tuple[Statement, ...]"


def class_of(document: str) -> str:
    """Return the class of a document."""
    return document.partition("-")[0]


@dataclass(frozen=True)
class Statement:
    """Something that a program does."""


@dataclass(frozen=True)
class Put(Statement):
    """Insert a document that nothing else knows."""

    model: str


@dataclass(frozen=True)
class Write(Statement):
    """Insert a document that is not stored, or change one that is.

    Left out where it would wait for a lock, or conflict, or the document is out of date.
    """

    document: str
    how: Literal["inc", "save", "save_changes", "replace"]


@dataclass(frozen=True)
class Touch(Statement):
    """Change a document in memory alone."""

    document: str


@dataclass(frozen=True)
class Track(Statement):
    """Let the scope in force track a document."""

    document: str


@dataclass(frozen=True)
class Read(Statement):
    """Read all documents of a class."""

    model: str


@dataclass(frozen=True)
class Clash(Statement):
    """Insert an id that is taken: an error of the server that ends a transaction."""

    model: str


@dataclass(frozen=True)
class Conflict(Statement):
    """Write what another transaction holds, in the first few executions; not without one."""

    model: str
    times: int = 1


@dataclass(frozen=True)
class Raise(Statement):
    """Raise an error; one that is transient only in the first few executions."""

    what: Literal["error", "rollback", "transient"]
    times: int = 1


@dataclass(frozen=True)
class Control(Statement):
    """Use a control of a scope: the one of the block around, or the one in force."""

    what: Literal["commit", "abort", "set_rollback_only"]
    of: Literal["block", "current"]


@dataclass(frozen=True)
class Hook(Statement):
    """Register a hook, which runs statements in its turn."""

    when: Literal["before_commit", "on_commit", "on_abort"]
    body: Body = ()


@dataclass(frozen=True)
class Hang(Statement):
    """Wait until the task is cancelled."""


@dataclass(frozen=True)
class Together(Statement):
    """Insert documents in tasks that overlap, perhaps each in a joined block; one may fail."""

    model: str
    joined: bool = False
    fails: bool = False


@dataclass(frozen=True)
class CancelInFlight(Statement):
    """Cancel a task that writes in a scope of its own, after so many turns of the loop."""

    model: str
    turns: int = 1


@dataclass(frozen=True)
class Scope(Statement):
    """Run a block in a scope."""

    body: Body
    models: tuple[str, ...] = ("here",)
    client: str = "one"
    propagation: Propagation = "required"
    form: Literal["block", "attempts", "function"] = "block"
    transaction: bool = True
    passes: tuple[str, ...] = ()  # documents that are arguments of the function


@dataclass(frozen=True)
class Outside(Statement):
    """Run a block where classes are outside any scope; ``None`` means all, and no scope."""

    body: Body
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Catch(Statement):
    """Run a block, and catch what leaves it (an ``Exception``)."""

    body: Body


@dataclass(frozen=True)
class Gather(Statement):
    """Run blocks in tasks of their own; the first error, in this order, leaves it."""

    bodies: tuple[Body, ...]


@dataclass(frozen=True)
class Spawn(Statement):
    """Run a block in a task that nobody waits for."""

    body: Body


@dataclass(frozen=True)
class Cancel(Statement):
    """Run a block in a task, and cancel it when it hangs."""

    body: Body
    at_once: bool = False  # before it has begun


@dataclass(frozen=True)
class Program:
    """What to run, and whose turn it is."""

    body: Body
    turns: tuple[int, ...] = (0,)


def statements(body: Body) -> Iterator[Statement]:
    """Yield all statements of a block, those of the blocks in it included."""
    for statement in body:
        yield statement
        bodies = getattr(statement, "bodies", ()) or (getattr(statement, "body", ()),)
        for inner in bodies:
            yield from statements(inner)


def describe(body: Body, indent: str = "") -> Iterator[str]:
    """Yield the lines of a program, for a reader."""
    for statement in body:
        given = (
            f"{each.name}={getattr(statement, each.name)!r}"
            for each in fields(statement)
            if each.name not in ("body", "bodies")
        )
        yield f"{indent}{type(statement).__name__}({', '.join(given)})"
        for inner in getattr(statement, "bodies", ()) or (getattr(statement, "body", ()),):
            yield from describe(inner, indent + "    ")


# -- whose turn it is ----------------------------------------------------------------------


@dataclass(eq=False)
class Thread:
    """A task of a program; the parent waits for it."""

    name: str
    parent: Thread | None = None
    ended: bool = False
    hangs: bool = False
    cancelled: bool = False
    outcome: Any = None  # the error with which it ended
    more: Any = field(default=None, repr=False)  # what runs it

    def within(self, other: Thread) -> bool:
        """Tell whether it is the other one, or one that this waits for."""
        return self is other or (self.parent is not None and self.parent.within(other))


class Schedule:
    """Decides which task runs next; the same for a program and for its model.

    Args:
        turns: The decisions, taken one after the other, round and round.
    """

    def __init__(self, turns: tuple[int, ...]) -> None:
        self._turns = turns
        self._taken = 0
        self._runnable: list[Thread] = []
        self._waiting: dict[Thread, Callable[[], bool]] = {}
        self._hanging: list[Thread] = []
        self.running: Thread | None = None

    def add(self, thread: Thread) -> None:
        """Let a task take its turns."""
        self._runnable.append(thread)

    def wait(self, thread: Thread, until: Callable[[], bool]) -> None:
        """Let a task take no turn until something is the case."""
        self._runnable.remove(thread)
        self._waiting[thread] = until

    def hang(self, thread: Thread) -> None:
        """Let a task take no turn until it is cancelled."""
        self._runnable.remove(thread)
        self._hanging.append(thread)
        thread.hangs = True

    def end(self, thread: Thread) -> None:
        """Let a task take no turn any more."""
        self._runnable.remove(thread)
        thread.ended = True

    def cancel(self, thread: Thread) -> None:
        """Let those that hang, of a task and those that it waits for, go on."""
        for each in [each for each in self._hanging if each.within(thread)]:
            self._hanging.remove(each)
            self._runnable.append(each)
        for each in [*self._runnable, *self._waiting]:
            each.cancelled = each.cancelled or each.within(thread)

    def is_quiet(self, thread: Thread) -> bool:
        """Tell whether a task, and those that it waits for, have ended or hang."""
        return not any(each.within(thread) for each in self._runnable)

    def next(self) -> Thread | None:
        """Decide who runs next; ``None`` where nobody can."""
        for thread in reversed(list(self._waiting)):  # the inner ones first
            if self._waiting[thread]():
                del self._waiting[thread]
                self._runnable.append(thread)
        self.running = None
        if self._runnable:
            self.running = self._runnable[self._turn() % len(self._runnable)]
        return self.running

    def _turn(self) -> int:
        if len(self._runnable) < 2:
            return 0
        self._taken += 1
        return self._turns[self._taken % len(self._turns)]


# -- making programs -----------------------------------------------------------------------

Make: TypeAlias = "Callable[[], Any]"


class Maker:
    """Makes up programs; what comes first in a choice is what a failing one is reduced to.

    Args:
        draw: Hypothesis' own.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def program(self, depth: int) -> Program:
        """Make a program: most of what it does is in a scope, and about one document."""
        self._favourite = self._one(*DOCUMENTS)
        first = Catch((self._first(depth),))
        after = self._some(lambda: self._statement(1), 0, 2)
        mixed = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(tuple)
        turns = self._draw(st.one_of(st.just((0,)), st.just((-1,)), mixed, mixed))
        return Program((first, *after), turns)

    def _first(self, depth: int) -> Scope:
        models = self._one(("here",), ("here", "beside"))
        form = self._one("block", "attempts", "function", "function")
        passes = self._one((), (self._favourite,))
        body = self._some(lambda: self._statement(depth - 1), 2, 6)
        return Scope(body + self._maybe(4, self._transient), models, form=form, passes=passes)

    # -- choosing --------------------------------------------------------------------------

    def _one(self, *values: Any) -> Any:
        return self._draw(st.sampled_from(values))

    def _any(self, *choices: tuple[int, Make]) -> Any:
        """Make one of several things, by weight."""
        return self._one(*(make for weight, make in choices for _ in range(weight)))()

    def _some(self, make: Make, least: int, most: int) -> Body:
        more = self._draw(st.integers(least, most))
        return tuple(make() for _ in range(more))

    def _maybe(self, out_of: int, make: Make) -> Body:
        return (make(),) if self._draw(st.integers(1, out_of)) == out_of else ()

    # -- statements ------------------------------------------------------------------------

    def _model(self) -> str:
        return str(self._one("here", "here", "beside", "there"))

    def _document(self) -> str:
        return str(self._one(*[self._favourite] * 4, *DOCUMENTS))

    def _statement(self, depth: int) -> Statement:
        """Make a statement, blocks in blocks up to a depth."""
        if depth == 0:
            return self._leaf()
        body = lambda: self._body(depth - 1)  # noqa: E731
        made: Statement = self._any(
            (8, self._leaf),
            (3, lambda: self._scope(body())),
            (6, lambda: Catch((self._scope(body()),))),
            (2, lambda: Outside(body(), self._one(None, None, ("here",), ("there", "here")))),
            (2, lambda: Gather(self._some(body, 2, 3))),
            (2, lambda: Spawn(body())),
            (2, lambda: self._cancel(depth - 1)),
        )
        return made

    def _body(self, depth: int) -> Body:
        """Make a block; a few end with a failure."""
        body = self._some(lambda: self._statement(depth), 1, 3)
        return body + self._maybe(5, lambda: self._any((4, self._failure), (1, Hang)))

    def _cancel(self, depth: int) -> Cancel:
        body = self._some(lambda: self._statement(depth), 1, 3)
        hanging = (*body, Hang())
        in_scope = lambda: (self._scope(hanging),)  # noqa: E731
        body = self._any((3, in_scope), (1, lambda: hanging), (1, lambda: body))
        return Cancel(body, at_once=self._one(*[False] * 5, True))

    def _leaf(self) -> Statement:
        made: Statement = self._any((9, self._simple), (3, self._hook))
        return made

    def _simple(self) -> Statement:
        made: Statement = self._any(
            (6, lambda: Put(self._model())),
            (8, self._write),
            (2, lambda: Touch(self._document())),
            (3, lambda: Track(self._document())),
            (4, lambda: Read(self._model())),
            (3, lambda: Catch((self._control(),))),
            (1, self._control),
            (1, lambda: Catch((self._failure(),))),
            (2, lambda: Together(self._model(), self._one(False, True), self._one(*"ffT") == "T")),
            (1, lambda: CancelInFlight(self._model(), self._draw(st.integers(0, 12)))),
        )
        return made

    def _write(self) -> Write:
        return Write(self._document(), self._one("inc", "save", "save_changes", "replace"))

    def _control(self) -> Control:
        what = self._one("commit", "abort", "set_rollback_only")
        return Control(what, self._one("block", "current"))

    def _transient(self) -> Raise:
        return Raise("transient", self._one(1, 2))

    def _failure(self) -> Statement:
        made: Statement = self._any(
            (4, lambda: Raise(self._one("error", "rollback"))),
            (3, self._transient),
            (1, lambda: Clash(self._model())),
            (2, lambda: Conflict(self._model(), self._one(1, 2))),
        )
        return made

    def _hook(self) -> Hook:
        """Make a hook: nothing in it hangs, and it waits for no other task."""
        when = self._one("before_commit", "on_commit", "on_abort")
        return Hook(when, self._some(self._in_hook, 0, 2) + self._maybe(6, self._failure))

    def _in_hook(self) -> Statement:
        scope = lambda: self._scope(self._some(self._simple, 1, 2))  # noqa: E731
        made: Statement = self._any((3, self._simple), (1, scope))
        return made

    def _scope(self, body: Body) -> Scope:
        """Make a scope on one client or the other; few are plain sessions."""
        propagation = self._one(
            *["required"] * 12, *["requires_new"] * 8, *["mandatory", "never"] * 2
        )
        form = self._one("block", "block", "attempts", "function")
        here = self._one(("here",), ("here",), ("here", "beside"), ("beside",), ())
        passes = self._one((), (self._favourite,), (self._document(), self._favourite))
        made: Scope = self._any(
            (8, lambda: Scope(body, here, "one", propagation, form, passes=passes)),
            (3, lambda: Scope(body, ("there",), "two", propagation, form)),
            (1, lambda: Scope(body, ("here",), "one", propagation, transaction=False)),
        )
        return made


@st.composite
def programs(draw: Any, depth: int = 3) -> Program:
    """Return programs."""
    return Maker(draw).program(depth)
