"""The examples, run as the README says: ``python examples/quickstart.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from beanie import Document

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).parents[1]
# Warnings are errors, but for one that Beanie 2.0 runs into itself. Beanie 1 has many.
STRICT = ["-W", "error", "-W", "ignore:Accessing the 'model_fields':DeprecationWarning"]
FLAGS = STRICT if hasattr(Document, "get_pymongo_collection") else []


def run(example: str, **environment: str) -> str:
    """Run an example from the root of the repository and return what it prints."""
    done = subprocess.run(
        [sys.executable, *FLAGS, f"examples/{example}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def steps(output: str) -> dict[str, str]:
    """Return what an example printed, by its headings."""
    blocks = [block.partition("\n") for block in output.split("\n\n")]
    return {heading: text for heading, _, text in blocks}


class TestQuickstart:
    def test_tells_the_story_of_a_scope(self) -> None:
        output = run("quickstart.py")

        told = steps(output)
        assert list(told)[1:-1] == [
            "1. Leaving the block commits",
            "2. An exception rolls back, and propagates",
            "3. Rollback rolls back, and goes on after the block",
            "4. asyncio.gather inside one transaction",
            "5. Linked documents come along",
            "6. outside_session keeps a write whatever becomes of the transaction",
        ]
        assert output.endswith("\nAll as it should be.\n")

    def test_shows_what_the_database_holds_after_each_step(self) -> None:
        commit, error, rollback, gather, cascade, outside = [*steps(run("quickstart.py")).values()][
            1:-1
        ]

        assert "meanwhile:    nothing\n" in commit
        assert "afterwards:   Racer, Tourer" in commit
        assert "the scope sees:                   Cruiser, Tourer\n" in error
        assert "afterwards:   Racer, Tourer" in error
        assert "the scope sees:                   nothing\n" in rollback
        assert "afterwards:   Racer, Tourer" in rollback
        assert "rolled back:  Racer, Tourer\n" in gather
        assert "committed:    102 bikes" in gather
        assert "rolled back:  nothing\n" in cascade
        assert "committed:    front, rear" in cascade
        assert "rolled back:  front, rear\n" in outside
        assert "kept:         tried to delete the wheels" in outside

    @pytest.mark.starts_servers
    def test_starts_a_replica_set_where_no_server_is_named(self) -> None:
        output = run("quickstart.py", MONGODB_URI="")

        assert "on a MongoDB replica set started for this example" in output
        assert output.endswith("\nAll as it should be.\n")

    def test_fails_where_the_story_is_not_right(self) -> None:
        # The same steps without what makes them work: a scope that binds nothing.
        broken = """
import contextlib, runpy, sys
import beanie_session_scope
from beanie_session_scope import Rollback

@contextlib.asynccontextmanager
async def unbound(**_):
    with contextlib.suppress(Rollback):
        yield

beanie_session_scope.with_session = unbound
sys.path.insert(0, "examples")
runpy.run_path("examples/quickstart.py", run_name="__main__")
"""
        done = subprocess.run(
            [sys.executable, "-c", broken],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

        assert done.returncode == 1
        assert "AssertionError: the database holds, meanwhile" in done.stderr


class TestMoneyTransfer:
    def test_a_refused_transfer_changes_nothing(self) -> None:
        told = steps(run("money_transfer.py"))

        before = "  balances: {'Ann': 70, 'Bob': 80}, sum 150; ledger entries: 1"
        assert told["Ann sends Bob 30"] == before
        assert told["Bob sends Ann 500, which he does not have"].splitlines() == [
            "  refused: InsufficientFundsError('Bob')",
            before,
        ]
        assert told["Ann sends 10 to Zoe, who has no account"].splitlines() == [
            "  refused: UnknownAccountError('Zoe')",
            before,
        ]

    def test_transfers_that_compete_keep_the_sum(self) -> None:
        output = run("money_transfer.py")

        assert "  balances: {'Ann': 80, 'Bob': 70}, sum 150; ledger entries: 21\n" in output
        assert output.endswith("every transfer that succeeded is in the ledger.\n")


class TestServiceLayer:
    def test_a_refused_order_leaves_no_trace(self) -> None:
        told = steps(run("service_layer.py"))

        assert told["Ann orders a lamp"].splitlines() == [
            "  refused: Ann can't pay 30",
            "  stock: 1, Ann's credit: 13, orders: ['paid']",
        ]
        assert told["Zoe orders a bell"].splitlines() == [
            "  refused: no such wallet: Zoe",
            "  stock: 1, Ann's credit: 13, orders: ['paid']",
        ]

    def test_the_services_never_name_a_session(self) -> None:
        source = (ROOT / "examples" / "service_layer.py").read_text(encoding="utf-8")
        services = source.partition("# Repositories:")[2].partition("# Where requests come in")[0]

        assert "class OrderService" in services
        assert "session" not in services
