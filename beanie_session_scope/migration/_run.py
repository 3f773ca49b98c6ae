"""A whole migration: batch after batch, from the checkpoint to the end of the collection."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from beanie import Document, UnionDoc
from beanie.odm.queries.find import FindMany

from beanie_session_scope import (
    PropagationError,
    Rollback,
    ScopeState,
    TransactionTimeoutError,
    transaction_attempts,
    with_session,
)

from ._checkpoint import Checkpoint, Progress
from ._errors import MigrationError
from ._pace import Pace, lifetime_limit
from ._progress import ProgressKind, logger, progress_of
from ._query import Selection
from ._summary import MOST_LISTED, BatchSummary
from ._write import Change, Changer, OnInvalid, Redo, Skip, Tally, Write

D = TypeVar("D", bound=Document)

FIGURES = ("changed", "unchanged", "skipped", "invalid", "batches", "retries", "seconds")
"""What the log has of the summary."""

MOST_IDS = 50_000
"""How many documents a batch has at most: their ids go into one command."""

LONGEST_TRY = 120.0
"""How long a batch is tried again at least, in seconds; what MongoDB's specification says."""


async def migrate_in_batches(
    query: type[D] | type[UnionDoc] | FindMany[D],
    change: Callable[[D], Awaitable[Document | Skip | None] | Document | Skip | None],
    *,
    name: str,
    batch_size: int = 1000,
    write: Write = "save",
    on_invalid: OnInvalid = "stop",
    dry_run: bool = False,
    progress: ProgressKind = "auto",
) -> BatchSummary:
    """Change each document that a query finds exactly once, in one transaction per batch.

    The documents are taken in the order of their ``_id``. Each batch stores in its own
    transaction how far it has come. So the script may be killed and started again at any
    moment, also several times at once, and goes on where the last committed batch has ended.
    Documents that come to match the query while it runs are changed if their ``_id`` is still
    to come.

    Args:
        query: What a ``find`` of a class with the mixin returned, with nothing but a filter; or
            such a class, for all its documents. The filter must be the same at every start.
        change: A function or coroutine function that takes a document. It returns ``None``: the
            document is written as it is now; or a document with the same id: that one is
            written, which may be of another class on the same collection; or ``SKIP``: it is not
            written. It is called again where a transaction has to be run again, and must not
            commit or roll back. All classes with the mixin are bound, so that what else it
            writes is in the batch's transaction, too.
        name: A name for this migration, under which its checkpoint is stored in the collection
            ``beanie_session_scope_migrations`` of the model's database. It belongs to the model,
            its collection and the filter.
        batch_size: How many documents a transaction has at first, and at most. It gets fewer
            where a batch takes more than a tenth of the server's limit for transactions, or
            more than 5 seconds. A batch also ends at that time, and when it has read 16 MB.
        write: ``"save"``: Beanie's ``save()`` of each document, which leaves fields alone that
            the class does not know; ``"replace"``: its ``replace()``, which removes these.
        on_invalid: What to do about documents that fail validation, when they are read or
            changed: ``"stop"`` raises, ``"skip"`` leaves them as they are and lists them.
        dry_run: Whether to do everything, ``change`` included, and roll each batch back.
        progress: ``"bar"`` draws tqdm's bar, ``"log"`` writes lines to the logger
            ``beanie_session_scope.migration``; ``"auto"`` draws where the standard error is a
            terminal and tqdm is installed, and writes elsewhere; ``"off"`` does neither.

    Returns:
        What was done. A migration that was complete before is not run again.

    Raises:
        TypeError: If an argument is of a wrong type, or ``change`` returned what it must not.
        ValueError: If an argument can't work, such as a query with a limit.
        ModelNotScopedError: If the query's class has no mixin.
        ModelNotInitializedError: If ``init_beanie`` has not initialised it.
        PropagationError: If a scope is open: the batches would be one transaction.
        MigrationMismatchError: If the name was used for another query; nothing is changed.
        InvalidDocumentError: If a document fails validation, with ``on_invalid="stop"``.
        MigrationError: If ``change`` did what does not go with this.
        CommitUnknownError: If the outcome of a batch can't be known; started again, the
            migration finds it out.
        HookError: If an ``on_commit`` hook failed: its batch *is* committed, and not run again.
        Exception: What ``change`` raised. But for the two above, the batch that was under way
            is rolled back; those before stay.
    """
    _check_arguments(change, name, batch_size, write, on_invalid)
    migration = Migration(
        Selection(query), change, name, batch_size, write, on_invalid, dry_run, progress
    )
    return await migration.run()


def _check_arguments(change: Any, name: Any, batch_size: Any, write: Any, on_invalid: Any) -> None:
    if not callable(change):
        raise TypeError(
            f"change must be a function that takes a document, and is a {type(change).__name__}."
        )
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            "name must be a text that is not empty: the checkpoint is stored and found by it."
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number above 0.")
    for option, value, known in (
        ("write", write, ("save", "replace")),
        ("on_invalid", on_invalid, ("stop", "skip")),
    ):
        if value not in known:
            raise ValueError(
                f"{option}={value!r} is not known: use one of {', '.join(map(repr, known))}."
            )


class Migration:
    """One call of ``migrate_in_batches``, with its arguments."""

    def __init__(
        self,
        selection: Selection,
        change: Change,
        name: str,
        batch_size: int,
        write: Write,
        on_invalid: OnInvalid,
        dry_run: bool,
        progress: ProgressKind,
    ) -> None:
        self._selection = selection
        self._client = selection.collection.database.client
        self._changer = Changer(selection, change, write, on_invalid)
        self._checkpoint = Checkpoint(name, selection)
        self._batch_size = batch_size
        self._dry_run = dry_run
        self._progress = progress_of(progress)
        self._summary = BatchSummary(name, dry_run=dry_run)
        self._state = Progress()

    async def run(self) -> BatchSummary:
        """Run it to its end."""
        await self._refuse_open_scope()
        began, summary = time.monotonic(), self._summary
        try:
            found = await self._checkpoint.open(create=not self._dry_run)
            summary.resumed = found is not None
            self._go_to(found or Progress())
            if not self._state.complete:
                await self._run()
            summary.complete = True
        finally:
            self._progress.stop()
            summary.seconds = time.monotonic() - began
            self._log_summary()
        return summary

    def _log_summary(self) -> None:
        summary = self._summary
        level, event = logging.WARNING, "migration.stopped"
        if summary.complete:
            level, event = logging.INFO, "migration.complete"
        figures = {name: getattr(summary, name) for name in FIGURES}
        extra = {"event": event, "migration": summary.name, **figures}
        logger.log(level, "%s", summary, extra=extra)

    async def _refuse_open_scope(self) -> None:
        """Find out whether a batch would join a scope; sends nothing."""
        try:
            bound = self._selection.model.get_session() is not None
            probe = with_session(
                collections=[self._selection.model], propagation="never", transaction=False
            )
            async with probe:
                pass
        except PropagationError:
            bound = True
        if bound:
            raise PropagationError(
                "migrate_in_batches() commits batch by batch, and a session is bound here, whose "
                "transaction all batches would be a part of: call it outside any scope, and "
                "outside Beanie's own migrations."
            )

    async def _run(self) -> None:
        self._pace = Pace(self._batch_size, await lifetime_limit(self._client))
        total = None
        if self._progress.counts:
            total = await self._selection.count(self._state.position)
        self._progress.start(self._summary.name, total)
        while not await self._is_at_the_end():
            pass

    async def _is_at_the_end(self) -> bool:
        """Run the next batch; tell whether there was none."""
        most = min(self._pace.size, MOST_IDS)
        ids = await self._selection.ids(self._state.position, most)
        if ids:
            tally = await self._batch(ids)
            if tally is not None:
                self._add(tally)
                return False
        elif self._dry_run or await self._checkpoint.complete(self._state.step):
            return True
        self._go_to(await self._checkpoint.read())  # another runner was faster
        return False

    def _go_to(self, state: Progress) -> None:
        self._state = state
        self._summary.earlier = state.documents - (0 if self._dry_run else self._summary.documents)
        self._summary.invalid_documents = list(state.invalid)

    def _add(self, tally: Tally) -> None:
        summary = self._summary
        summary.batches += 1
        summary.changed += tally.changed
        summary.unchanged += tally.unchanged
        summary.skipped += tally.skipped
        summary.invalid += tally.invalid
        room = MOST_LISTED - len(summary.invalid_documents)
        summary.invalid_documents += tally.listed[:room]
        self._state = Progress(self._state.step + 1, tally.position)
        self._progress.advance(tally.documents)

    async def _batch(self, ids: list[Any]) -> Tally | None:
        """Run a batch until it is committed; ``None``: another runner was faster."""
        self._changer.forget()
        while True:
            try:
                return await self._try(ids[: self._pace.size])
            except Redo:
                continue
            except TransactionTimeoutError:
                if self._dry_run or (await self._checkpoint.read()).step == self._state.step:
                    raise
                return None
            except Exception as error:
                if not self._pace.shrink_after(error):
                    raise

    async def _try(self, ids: list[Any]) -> Tally | None:
        """Run the attempts at a batch."""
        timeout = max(LONGEST_TRY, 2 * self._pace.limit)
        tally: Tally | None = None
        began, stands, failed = 0.0, False, 0
        async for attempt in transaction_attempts(
            self._client, propagation="never", timeout=timeout
        ):
            self._summary.retries += attempt.number > 1
            began = time.monotonic()
            tally = None
            moved = False
            async with attempt:
                moved = not await self._is_next()
                if moved:
                    raise Rollback
                failed += 1
                # What is written by others meanwhile gets in the way of fewer documents less.
                tally = await self._run_batch(ids[: max(1, len(ids) >> (failed - 1))])
                if self._dry_run:
                    raise Rollback
            if moved:
                return None
            stands = self._dry_run or attempt.state is ScopeState.COMMITTED
        if tally is not None and stands:
            self._pace.took(time.monotonic() - began, tally.documents)
            return tally
        raise MigrationError(
            "change() raised Rollback, which would leave out the documents of the batch without a "
            "word: return SKIP for a document that is to stay as it is, or raise an error of your "
            "own to stop."
        )

    async def _is_next(self) -> bool:
        """Claim the checkpoint; tell whether it is still where this batch begins."""
        return self._dry_run or (await self._checkpoint.claim()).step == self._state.step

    async def _run_batch(self, ids: list[Any]) -> Tally:
        tally = Tally()
        # A scope that another block has joined can't be committed: change() might try to.
        async with with_session(self._client, propagation="mandatory"):
            tally = await self._changer.run(ids, self._pace.target)
        if not self._dry_run:
            await self._checkpoint.advance(tally.position, tally)
        return tally
