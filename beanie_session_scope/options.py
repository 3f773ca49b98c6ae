"""The options of a scope: what goes with what, and what may join what."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from .errors import PropagationError
from .waiting import BOUND

Propagation = Literal["required", "requires_new", "mandatory", "never"]
PROPAGATIONS: tuple[Propagation, ...] = ("required", "requires_new", "mandatory", "never")


@dataclass(slots=True)
class ScopeOptions:
    """The options of ``with_session``; ``None`` leaves the choice to the driver."""

    propagation: Propagation = field(default="required", compare=False)
    transaction: bool = True
    read_concern: ReadConcern | None = None
    write_concern: WriteConcern | None = None
    read_preference: Any = None
    max_commit_time_ms: int | None = None
    causal_consistency: bool | None = None
    snapshot: bool = False
    timeout: float = field(default=120.0, compare=False)
    cleanup_timeout: float = field(default=BOUND, compare=False)

    def __post_init__(self) -> None:
        """Refuse what can't work, before anything is sent or bound."""
        if self.propagation not in PROPAGATIONS:
            raise ValueError(
                f"propagation={self.propagation!r} is not known: use one of "
                f"{', '.join(map(repr, PROPAGATIONS))}."
            )
        if self.transaction and self.snapshot:
            raise ValueError(
                "snapshot=True is for reads without a transaction (MongoDB snapshot sessions): "
                "add transaction=False, or ask for read_concern=ReadConcern('snapshot')."
            )
        if self.snapshot and self.causal_consistency:
            raise ValueError(
                "snapshot=True and causal_consistency=True exclude each other in MongoDB: "
                "choose one."
            )
        if self.transaction and self.read_preference not in (None, ReadPreference.PRIMARY):
            raise ValueError(
                "A MongoDB transaction reads from the primary: leave read_preference out. To read "
                "elsewhere, use transaction=False, and set it on the client or the collection."
            )
        if not self.transaction:
            self._refuse_transaction_options()
        # What is the default anyway is not asked for, and never in the way of a join.
        if self.read_preference == ReadPreference.PRIMARY:
            self.read_preference = None
        if self.causal_consistency and not self.snapshot:
            self.causal_consistency = None
        check_seconds("timeout", self.timeout)
        check_seconds("cleanup_timeout", self.cleanup_timeout)

    def _refuse_transaction_options(self) -> None:
        names = ("read_concern", "write_concern", "read_preference", "max_commit_time_ms")
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} say how a transaction runs, and transaction=False opens "
                "none: set them on the client, the database or the collection."
            )

    def session_options(self) -> dict[str, Any]:
        """Return the arguments of the driver's ``start_session``."""
        return {"causal_consistency": self.causal_consistency, "snapshot": self.snapshot}

    def transaction_options(self) -> dict[str, Any]:
        """Return the arguments of the driver's ``start_transaction``."""
        return {
            "read_concern": self.read_concern,
            "write_concern": self.write_concern,
            # The client may prefer secondaries, on which a transaction can't read.
            "read_preference": self.read_preference or ReadPreference.PRIMARY,
            "max_commit_time_ms": self.max_commit_time_ms,
        }

    def check_joinable(self, owner: ScopeOptions) -> None:
        """Refuse to join a scope that runs otherwise than these options ask for.

        Raises:
            PropagationError: If an option was given that differs from the owner's.
        """
        for option in fields(self):
            name = option.name
            mine, theirs = getattr(self, name), getattr(owner, name)
            # Whether there is a transaction is no detail: it must always agree.
            silent = name != "transaction" and mine == option.default
            if option.compare and mine != theirs and not silent:
                raise PropagationError(
                    f"This scope would join one that is open already, but asks for {name}="
                    f"{mine!r} where that one runs with {theirs!r}. Give the option to the "
                    'outer scope, or use propagation="requires_new".'
                )


def check_seconds(name: str, seconds: object) -> None:
    """Refuse what is no length of time."""
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{name}={seconds!r} must be a number of seconds above 0.")
