"""Programs made up at random: what each comes to on a real server is what its model says.

``HYPOTHESIS_PROFILE=thorough`` runs many more of them.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from nesting_models import two_clients
from program_model import Model
from program_runner import Runner, World
from programs import Program, describe, programs, statements
from wire import open_transactions

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
PROGRAMS = 2_000 if THOROUGH else 150

LIMIT = 10.0
"""How long one program may take, in seconds: past it, something waits for ever."""

SETTINGS = settings(
    deadline=None,
    # The same programs on every machine; other ones each time where many are asked for.
    derandomize=not THOROUGH,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

INTERESTING = (
    *("joined", "owner", "retry", "closed", "cancelled", "left out"),
    *("commit", "abort", "set_rollback_only", "before_commit", "on_commit", "on_abort"),
    *("UnexpectedRollbackError", "TransactionAbortedError", "PropagationError"),
    *("ScopeClosedError", "HookError", "OperationFailure", "DuplicateKeyError"),
    *("Gather", "Spawn", "Cancel", "Hang", "Outside", "Together", "CancelInFlight"),
)


class Loop:
    """An event loop that lives as long as the test, and a world in it."""

    def __init__(self, uri: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._clients = two_clients(uri)
        self.world = World(*self.run(self._clients.__aenter__()))
        self.run(self.world.prepare())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, LIMIT))

    def close(self) -> None:
        """Close the clients, then the loop."""
        self.run(self._clients.__aexit__(None, None, None))
        self.run(self._loop.shutdown_asyncgens())
        self._loop.close()


@pytest.fixture
def loop(server_uri: str) -> Iterator[Loop]:
    loop = Loop(server_uri)
    yield loop
    loop.close()


def kinds(program: Program, model: Model) -> set[str]:
    """Return the kinds of statements that a program has, and of what occurred in it."""
    return {type(each).__name__ for each in statements(program.body)} | set(model.seen)


def check(loop: Loop, program: Program) -> Model:
    """Run a program by the model and by the library, and compare."""
    model = Model(program).run()
    runner = Runner(loop.world, program, model.left_out)
    try:
        loop.run(runner.run(model.at_last))
        compare(model, runner)
        assert loop.run(loop.world.final()) == model.final()
    except BaseException:
        print("\n".join(describe(program.body)))
        loop.run(runner.clean_up())
        raise
    return model


def compare(model: Model, runner: Runner) -> None:
    """Compare what happened, statement by statement."""
    for number, (ours, theirs) in enumerate(zip(model.trace, runner.trace, strict=False)):
        before = "\n".join(map(str, model.trace[max(0, number - 5) : number]))
        assert theirs == ours, f"after\n{before}\nthe model says\n{ours}"
    assert runner.trace == model.trace
    assert all(session.has_ended for session in runner.sessions)


@pytest.mark.slow
class TestPrograms:
    @pytest.mark.timeout(1_200 if THOROUGH else 120)
    def test_come_to_what_the_model_says(self, loop: Loop, server_uri: str) -> None:
        ran: Counter[str] = Counter()

        @settings(SETTINGS, max_examples=PROGRAMS)
        @given(programs())
        def run(program: Program) -> None:
            occurred = kinds(program, check(loop, program))
            ran.update(["programs", *occurred])
            for kind in occurred.intersection(INTERESTING):
                event(kind)

        run()
        assert open_transactions(server_uri) == 0
        print(f"{ran['programs']} programs; of these had", dict(ran.most_common()))

    def test_are_of_all_kinds(self) -> None:
        """Else they would show nothing; decided without a server, always in the same way."""
        ran: Counter[str] = Counter()

        @settings(SETTINGS, max_examples=1_000, derandomize=True, phases=[Phase.generate])
        @given(programs())
        def run(program: Program) -> None:
            ran.update(kinds(program, Model(program).run()))

        run()
        assert [kind for kind in INTERESTING if ran[kind] < 3] == []
