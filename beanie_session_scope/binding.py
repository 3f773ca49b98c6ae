"""Which session is a class bound to, here and now?

Every class with the mixin has one ``ContextVar``. Its value is a ``Binding``, and a class
is resolved by walking its MRO to the nearest class that has one. A new asyncio task
starts with a copy of its creator's context, so it inherits every binding.

Bindings made by a block (``with_session``, ``bind_session``, ``outside_session``) know
that block. When the block is over, they are restored in the context that leaves it. That
need not be the context that entered it: a generator that was abandoned is closed by the
event loop in a task of its own. So a binding whose block is over is not trusted either:
the task that entered the block sees what was bound before it, and any other task, which
can only have inherited the binding, gets ``ScopeClosedError``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TypeAlias
from weakref import ref

from .channel import SessionChannel
from .drivers import Client
from .errors import ScopeClosedError

Variable: TypeAlias = "ContextVar[Binding | None]"

SCOPE: Variable = ContextVar("beanie_session_scope", default=None)
"""The innermost scope of all, whatever classes it binds."""


class Binding:
    """One class bound to a session, or (with no channel) put outside any scope.

    Args:
        variable: The variable of the class.
        channel: Where the operations of the class go; ``None`` means outside any scope.
        block: The block that made the binding; ``None`` for one made by ``set_session``.
    """

    __slots__ = ("block", "channel", "cleared", "previous", "variable")

    def __init__(
        self, variable: Variable, channel: SessionChannel | None, block: Block | None = None
    ) -> None:
        self.variable = variable
        self.channel = channel
        self.block = block
        self.cleared = False
        self.previous = variable.get()
        variable.set(self)

    @property
    def over(self) -> bool:
        """Whether the binding was cleared by hand, or its block was left."""
        return self.cleared or (self.block is not None and self.block.over)

    def restore(self) -> None:
        """Undo this binding in the current context, and what was bound by hand above it.

        A block that was entered later and is still open stays in force: it skips this
        binding when it is left in its turn.
        """
        current = self.variable.get()
        while current is not None and current is not self and current.block is None:
            current = current.previous
        if current is self:
            self.variable.set(in_force(self.previous))


class Token:
    """What ``set_session`` returns: hand it to ``clear_session`` to undo just that call."""

    __slots__ = ("_before", "_binding")

    def __init__(self, variable: Variable, channel: SessionChannel | None) -> None:
        self._before = variable.get()
        self._binding = bind_by_hand(variable, channel)

    def __repr__(self) -> str:
        """Name the class; the session says nothing to a reader."""
        return f"<Token of {self._binding.variable.name}>"

    def clear(self, variable: Variable) -> None:
        """Restore what was bound before, in the current context.

        Raises:
            ValueError: If the token came from another class.
            RuntimeError: If it was used already.
        """
        if self._binding.variable is not variable:
            raise ValueError(
                f"{self!r} can't clear {variable.name}: pass it to the class that returned it."
            )
        if self._binding.cleared:
            raise RuntimeError(f"{self!r} was used already: each token clears once.")
        self._binding.cleared = True
        if variable.get() is self._binding:
            variable.set(in_force(self._before))


def bind_by_hand(variable: Variable, channel: SessionChannel | None) -> Binding:
    """Bind a variable in the current context, until it is cleared or a block restores it."""
    binding = Binding(variable, channel)
    # Code that binds again and again, and never clears, must not keep every session it had.
    binding.previous = _made_by_block(binding.previous)
    return binding


def unbind(variables: tuple[Variable, ...]) -> None:
    """Leave a class without a session in the current context.

    Args:
        variables: The variables of the class and its parents, nearest first.
    """
    variable, *parents = variables
    if _made_by_block(variable.get()) is None and resolve(tuple(parents)) is None:
        variable.set(None)
    else:
        # A block restores through what it bound itself, and a parent's binding would count.
        bind_by_hand(variable, None)


def _made_by_block(binding: Binding | None) -> Binding | None:
    while binding is not None and binding.block is None:
        binding = binding.previous
    return binding


class Block:
    """The extent of one ``with`` block that binds classes."""

    __slots__ = ("_bindings", "_task", "over")

    def __init__(self) -> None:
        self.over = False
        self._bindings: list[Binding] = []
        # Weak: a context that outlives the task must not keep it, and its result.
        self._task: ref[asyncio.Task[object]] | None = None

    def enter(self, variables: Iterable[Variable], channel: SessionChannel | None) -> None:
        """Bind variables to a channel, or put them outside with ``None``."""
        task = current_task()
        self._task = None if task is None else ref(task)
        self._bindings = [Binding(variable, channel, self) for variable in variables]

    def leave(self) -> None:
        """End the block: what it bound is what it was before, in whichever context."""
        self.over = True
        self.restore()
        self._bindings = []

    def restore(self) -> None:
        """Let what the block bound be what it was before, in the current context alone."""
        for binding in self._bindings:
            binding.restore()

    def outlived_its_context(self) -> bool:
        """Tell whether the task that entered the block is over, and this is no context after it."""
        if self._task is None or ((task := self._task()) is not None and not task.done()):
            return False
        binding = SCOPE.get()
        while binding is not None and binding.block is not self:
            binding = binding.previous
        return binding is None

    def entered_here(self) -> bool:
        """Tell whether the running task is the one that entered the block."""
        here = current_task()
        # The task that entered may be gone: then this is another one, or none (a callback).
        return here is None if self._task is None else here is not None and self._task() is here


def put_outside(variables: tuple[Variable, ...]) -> bool:
    """Tell whether a class was put outside any scope on purpose."""
    for variable in variables:
        binding = variable.get()
        # One made by hand holds, as for resolve(), also where another task has cleared it.
        if binding is not None and binding.block is not None:
            binding = in_force(binding)
        if binding is not None:
            return binding.channel is None
    return False


def current_task() -> asyncio.Task[object] | None:
    """Return the running task; ``None`` outside any event loop too."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def innermost(client: Client | None = None) -> SessionChannel | None:
    """Return the innermost open channel in this context, or ``None``.

    Args:
        client: Look only for channels of this client; ``None`` means any.
    """
    return next((c for c in enclosing() if client is None or c.session.client is client), None)


def enclosing(*, past_outside: bool = False) -> Iterator[SessionChannel]:
    """Yield the open channels of this context, from the innermost outwards.

    Args:
        past_outside: Whether those count that an ``outside_session()`` stands in front of.
    """
    binding = in_force(SCOPE.get())
    while binding is not None and (binding.channel is not None or past_outside):
        # Of a block that is over, the one that it had joined may go on: it comes next.
        if binding.channel is not None and not binding.over and not binding.channel.closed:
            yield binding.channel
        binding = in_force(binding.previous)


def in_force(binding: Binding | None) -> Binding | None:
    """Return the nearest binding, going back in time, that says something to this task.

    One that was cleared by hand says nothing any more, nor does one of a block that this
    task entered and that is over. One of a block that another task entered was inherited:
    it goes on saying that the block is over.
    """
    while binding is not None and (
        binding.cleared
        or (binding.block is not None and binding.block.over and binding.block.entered_here())
    ):
        binding = binding.previous
    return binding


def forget(variables: Iterable[Variable]) -> None:
    """Let the current context say no more of blocks that this task entered and that are over."""
    for variable in variables:
        binding = variable.get()
        if binding is not None and binding.over:
            variable.set(in_force(binding))


def still_open(binding: Binding | None) -> Binding | None:
    """Return the nearest binding, going back in time, that is neither cleared nor over."""
    while binding is not None and binding.over:
        binding = binding.previous
    return binding


def resolve(variables: tuple[Variable, ...]) -> SessionChannel | None:
    """Return the channel that a class is bound to, or ``None`` where it runs outside.

    Args:
        variables: The variables of the class and its parents, nearest first.

    Returns:
        The channel of the nearest binding.

    Raises:
        ScopeClosedError: If the running task inherited a binding whose block is over.
    """
    for variable in variables:
        binding = variable.get()
        if binding is not None:
            block = binding.block
            if block is not None and block.over:
                binding = _after_its_block(binding)
                if binding is None:
                    continue
            return binding.channel
    return None


def _after_its_block(binding: Binding) -> Binding | None:
    """Say what a binding whose block is over means to the running task."""
    remaining = in_force(binding)
    if remaining is not binding:
        binding.variable.set(remaining)
    if remaining is None or remaining.channel is None or not remaining.over:
        # Put outside on purpose, "also in tasks created there": those stay outside.
        return remaining
    outer = still_open(remaining.previous)
    if outer is not None and outer.channel is remaining.channel:
        # Only a block that had joined is over; the scope that it joined goes on.
        return outer
    if remaining.channel.closed:
        remaining.channel.check_open()
    raise ScopeClosedError(
        "This task was started inside a block that bound its classes to a session, and that "
        "block is over. Await the task before the block ends, or start it under "
        "outside_session()."
    )
