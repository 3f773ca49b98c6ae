"""Who is told what happens to scopes: the seam for telemetry and test tools.

An observer hears of every scope of the process, while it happens, and changes nothing. Without
one the package only looks, here and there, whether there is any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from .log import log, nameof

if TYPE_CHECKING:
    from .scope import SessionScope
    from .state import ScopeState


class ScopeObserver:
    """Is told about scopes that own their session; to be subclassed, and overridden in part.

    The methods are called synchronously, some of them between two commands of a transaction, so
    they should be quick. What they raise is logged, and goes no further; but for
    ``scope_entering``, which may refuse. A scope that joins another one is not told about: its
    transaction is that of its owner.
    """

    def scope_entering(self, scope: SessionScope) -> None:
        """Hear that a block is about to be entered: nothing is started, and nothing bound.

        What this method alone raises is raised by the block, which is not entered then.

        Args:
            scope: The scope; its client is known.
        """

    def scope_entered(self, scope: SessionScope) -> None:
        """Hear that a block was entered.

        Runs in the context of the block: what is set here in a ``ContextVar`` holds there.

        Args:
            scope: The scope; of a retrying form, a ``TransactionAttempt``.
        """

    def transaction_started(self, scope: SessionScope) -> None:
        """Hear that a transaction began: on entry, and after a ``commit()`` or ``abort()``.

        Args:
            scope: The scope.
        """

    def lock_waited(self, scope: SessionScope | None, seconds: float) -> None:
        """Hear that an operation had to wait for another one on the same session.

        Args:
            scope: The scope; ``None`` where somebody else owns the session.
            seconds: For how long.
        """

    def commit_retried(
        self, scope: SessionScope, error: BaseException, attempt: int, wait: float
    ) -> None:
        """Hear that the outcome of a commit is unknown, and that it is sent again.

        Args:
            scope: The scope.
            error: The answer, or why there was none.
            attempt: Which try of this package it was, from 1; the driver itself tries twice.
            wait: When it is sent again, in seconds.
        """

    def transaction_ended(
        self,
        scope: SessionScope,
        outcome: ScopeState,
        seconds: float,
        operations: int,
        error: BaseException | None,
    ) -> None:
        """Hear the outcome of a transaction, before its hooks run, and in their context.

        It may come after ``scope_left``, where the clean-up went on in the background.

        Args:
            scope: The scope.
            outcome: ``COMMITTED``, ``ABORTED``, ``UNKNOWN``, or ``ENDED`` where it was ended by
                hand on the driver's session.
            seconds: How long it took.
            operations: How many operations ran in it.
            error: Why it was not committed; ``None`` where it was, or ``abort()`` was called.
        """

    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        """Hear that a block was left; runs in the context that leaves it.

        Args:
            scope: The scope.
            error: What ended it; ``None`` where it was left normally.
            retry_in: When the block is run again, in seconds; ``None`` where it is not. Where
                the wait for that is cancelled, this is told once more, with ``None``.
        """


OBSERVERS: list[ScopeObserver] = []


def observe(observer: ScopeObserver) -> Callable[[], None]:
    """Let an observer be told about every scope of the process from now on.

    Args:
        observer: The observer.

    Returns:
        A function that ends this.

    Raises:
        TypeError: If it is no ``ScopeObserver``.
        ValueError: If it is told already.
    """
    if not isinstance(observer, ScopeObserver):
        raise TypeError(
            f"observe() takes a ScopeObserver, and got a {type(observer).__name__}: derive the "
            "class from ScopeObserver, and pass an instance."
        )
    if any(each is observer for each in OBSERVERS):
        raise ValueError(
            f"This {type(observer).__name__} is told already: stop it first, or pass another one."
        )
    OBSERVERS.append(observer)

    def stop() -> None:
        OBSERVERS[:] = [each for each in OBSERVERS if each is not observer]

    return stop


def tell(what: Callable[[ScopeObserver], None]) -> None:
    """Tell every observer something, whatever the others make of it."""
    for observer in tuple(OBSERVERS):
        try:
            what(observer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # such as what test tools raise to fail a test
            log(
                logging.ERROR,
                "observer.failed",
                "A %s failed: %s",
                type(observer).__name__,
                nameof(error),
                error=nameof(error),
            )
