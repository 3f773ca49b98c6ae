"""Takes the mechanisms out one at a time, and looks whether a test notices.

    python tests/mutants.py [name ...]

A mutant is a copy of the package in which one mechanism does not work. It is killed when one
of the tests about that mechanism fails. A mutant that survives, or whose text is no longer to
be found in the package, fails the run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from beanie_session_scope.testing import ReplicaSet

ROOT = Path(__file__).parents[1]
PACKAGE = "beanie_session_scope"
AT_A_TIME = 2


@dataclass
class Mutant:
    """A mechanism that does not work.

    Attributes:
        name: What is taken out.
        module: Where it stands.
        text: The code of the mechanism.
        instead: What stands there in the mutant.
        tests: The tests about it, as arguments of pytest.
    """

    name: str
    module: str
    text: str
    instead: str
    tests: str


MUTANTS = [
    Mutant(
        "the lock of the session",
        "channel.py",
        "        else:\n            await self.lock.acquire()\n",
        "        elif not self.lock.locked():\n            await self.lock.acquire()\n",
        "tests/test_concurrency.py",
    ),
    Mutant(
        "the protection of the first operation in flight",
        "channel.py",
        "self._guarded = self.transaction or DRIVER.outlives_cancellation",
        "self._guarded = False",
        "tests/test_outcomes.py tests/test_concurrency.py",
    ),
    Mutant(
        "the protection of operations on a borrowed session",
        "channel.py",
        "await (settle(in_flight) if self.scope is None else Uncancelled(in_flight))",
        "await Uncancelled(in_flight)",
        "tests/test_outcomes.py -k borrowed",
    ),
    Mutant(
        "the closed flag",
        "channel.py",
        "        self.closed_because = because\n        self.epoch += 1",
        "        pass",
        "tests/test_concurrency.py",
    ),
    Mutant(
        "the epoch of cursors",
        "channel.py",
        "        self.epoch += 1\n        # The first",
        "        # The first",
        "tests/test_controls.py",
    ),
    Mutant(
        "the restore of bindings",
        "binding.py",
        "        self.restore()\n        self._bindings = []",
        "        self._bindings = []",
        "tests/test_bindings.py",
    ),
    Mutant(
        "the restore through a token",
        "binding.py",
        "            variable.set(in_force(self._before))",
        "            variable.set(None)",
        "tests/test_bindings.py",
    ),
    Mutant(
        "the mark of a block that is over",
        "binding.py",
        "        self.over = True\n",
        "",
        "tests/test_bindings.py",
    ),
    Mutant(
        "the restore of documents",
        "memory.py",
        "                self._before[id(document)].restore()",
        "                pass",
        "tests/test_memory.py tests/test_cancellation.py",
    ),
    Mutant(
        "the tracking of arguments",
        "retry.py",
        "                attempt.track(*documents)",
        "                pass",
        "tests/test_retry.py tests/test_memory.py",
    ),
    Mutant(
        "the cache bypass",
        "mixin.py",
        "if settings.use_cache and resolve(cls._scope_variables) is not None:",
        "if False:",
        "tests/test_cache.py",
    ),
    Mutant(
        "the rollback-only mark",
        "scope.py",
        'transaction.rollback_only = (\n                    f"a block',
        '_ = (\n                    f"a block',
        "tests/test_propagation.py",
    ),
    Mutant(
        "set_rollback_only",
        "scope.py",
        "transaction.rollback_only = transaction.rollback_only or reason",
        "pass",
        "tests/test_outcomes.py",
    ),
    Mutant(
        "the detection of a transaction that the server aborted",
        "channel.py",
        "            self.failure = error",
        "            pass",
        "tests/test_outcomes.py",
    ),
    Mutant(
        "the detection of a transaction that was ended by hand",
        "channel.py",
        "alive = not self.transaction or bool(self.session.in_transaction)",
        "alive = True",
        "tests/test_outcomes.py",
    ),
    Mutant(
        "the wait for the end",
        "scope.py",
        "            await settle(work, self.options.cleanup_timeout, bounded=cause is not None)\n",
        "            await work\n",
        "tests/test_cancellation.py tests/test_outcomes.py",
    ),
    Mutant(
        "the bound of that wait",
        "waiting.py",
        "            elif (remaining := end - loop.time()) > 0:",
        "            elif remaining := 60.0:",
        "tests/test_cancellation.py -k background",
    ),
    Mutant(
        "the end of a transaction whose abort was lost",
        "outcome.py",
        "if channel.interrupted or lost:",
        "if channel.interrupted:",
        "tests/test_lost_connections.py",
    ),
    Mutant(
        "what outlives the shutdown of the loop",
        "waiting.py",
        "    except asyncio.CancelledError:\n        end = asyncio",
        "    except ZeroDivisionError:\n        end = asyncio",
        "tests/test_cancellation.py -m slow -k Shutdown",
    ),
    Mutant(
        "errors of other transactions that are no reason to retry",
        "scope.py",
        "            channel.scope._transaction.foreign.append(error)",
        "            pass",
        "tests/test_retry_outcomes.py",
    ),
    Mutant(
        "the end of retrying a transaction that expired",
        "outcome.py",
        "isinstance(each, (CommitUnknownError, TransactionExpiredError))",
        "isinstance(each, CommitUnknownError)",
        "tests/test_retry_outcomes.py",
    ),
    Mutant(
        "the retry of a commit of unknown outcome",
        "outcome.py",
        "            if not again or spent or deadline.has_passed():",
        "            if True:",
        "tests/test_outcomes.py",
    ),
    Mutant(
        "the primary as read preference",
        "options.py",
        "self.read_preference or ReadPreference.PRIMARY",
        "self.read_preference",
        "tests/test_outcomes.py",
    ),
    Mutant(
        "linked classes in a scope",
        "plan.py",
        "            waiting += [m for m in linked_classes(model) if m in here]\n",
        "",
        "tests/test_no_escape.py",
    ),
    Mutant(
        "classes stored in the same collection",
        "plan.py",
        "            waiting += stored_in[here[model]]\n",
        "",
        "tests/test_no_escape.py",
    ),
    Mutant(
        "cascades",
        "mixin.py",
        "            carry_scope(cls, first=not any(_is_model(base) for base in cls.__bases__))",
        "            pass",
        "tests/test_no_escape.py",
    ),
    Mutant(
        "the overrides of subclasses",
        "cascade.py",
        "iscoroutinefunction(cls.__dict__.get(name))",
        "False",
        "tests/test_memory.py",
    ),
    Mutant(
        "links that Beanie does not list",
        "cascade.py",
        "*(each for field in fields for",
        "*(each for field in () for",
        "tests/test_no_escape.py",
    ),
    Mutant(
        "the check of the context in which a block is left",
        "scope.py",
        "            self._check_context()",
        "            pass",
        "tests/test_bindings.py",
    ),
    Mutant(
        "the refusal of unknown methods",
        "collection.py",
        "kind = OPERATIONS.get(name, Kind.REFUSED)",
        "kind = OPERATIONS.get(name, Kind.METADATA)",
        "tests/test_no_escape.py",
    ),
    Mutant(
        "the commit before the response",
        "asgi/_exchange.py",
        "await self._conclude(status)\n                await self._pass_on(message)\n",
        "await self._pass_on(message)\n                await self._conclude(status)\n",
        "tests/test_asgi.py",
    ),
    Mutant(
        "the end of a request whose client has gone",
        "asgi/_exchange.py",
        "                self._task.cancel()\n",
        "                pass\n",
        "tests/test_asgi_disconnect.py",
    ),
    Mutant(
        "the context of background tasks",
        "asgi/_exchange.py",
        "responses.\n            self._scope.forget()\n",
        "responses.\n            pass\n",
        "tests/test_asgi_frameworks.py",
    ),
    Mutant(
        "the rollback after a test",
        "testing/_rollback.py",
        "            raise Rollback\n    except",
        "            pass\n    except",
        "tests/test_plugin_rollback.py",
    ),
    Mutant(
        "the refusal of commits in a test that is rolled back",
        "testing/_rollback.py",
        "if scope.client is self._scope.client and not self._allow:",
        "if False:",
        "tests/test_plugin_rollback.py",
    ),
    Mutant(
        "the claim of a migration's checkpoint",
        "migration/_run.py",
        "return self._dry_run or (await self._checkpoint.claim()).step == self._state.step",
        "return True",
        "tests/test_migration_batches.py",
    ),
]


def mutated(mutant: Mutant) -> str:
    """Return the source of a module with the mechanism taken out."""
    source = (ROOT / PACKAGE / mutant.module).read_text(encoding="utf-8")
    if source.count(mutant.text) != 1:
        raise LookupError(f"{mutant.module} has not one place with the text of: {mutant.name}")
    return source.replace(mutant.text, mutant.instead)


def killed(mutant: Mutant, directory: Path, uri: str) -> str | None:
    """Run the tests about a mutant.

    Returns:
        The test that noticed it; ``None`` where none did.
    """
    package = directory / PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / PACKAGE, package)
    (package / mutant.module).write_text(mutated(mutant), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--timeout=60"),
            *("-p", "no:cacheprovider"),
            *(str(ROOT / word) if "/" in word else word for word in mutant.tests.split()),
        ],
        cwd=directory,  # python -m puts it first on the path
        env={**os.environ, "MONGODB_URI": uri},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode == 0:
        return None
    noticed_by = re.search(r"^(?:FAILED|ERROR) \S+?::(.*?)(?: - .*)?$", done.stdout, re.M)
    if done.returncode != 1 or noticed_by is None:
        raise RuntimeError(f"The tests of '{mutant.name}' did not run:\n{done.stdout[-3000:]}")
    return noticed_by[1]


class Bench:
    """A place to try mutants one after the other: a server, and a directory for the copy."""

    def __init__(self, stack: ExitStack) -> None:
        self._uri = stack.enter_context(ReplicaSet()).uri
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def killed(self, mutant: Mutant) -> str | None:
        return killed(mutant, self._directory, self._uri)


def main(names: list[str]) -> int:
    wanted = [each for each in MUTANTS if not names or each.name in names]
    survivors = 0
    for mutant in wanted:
        mutated(mutant)  # all can be made, before the first one is tried
    with ExitStack() as stack, ThreadPoolExecutor(AT_A_TIME) as pool:
        benches: SimpleQueue[Bench] = SimpleQueue()
        for _ in range(AT_A_TIME):
            benches.put(Bench(stack))

        def on_a_bench(mutant: Mutant) -> str | None:
            bench = benches.get()
            try:
                return bench.killed(mutant)
            finally:
                benches.put(bench)

        for mutant, noticed_by in zip(wanted, pool.map(on_a_bench, wanted), strict=True):
            survivors += noticed_by is None
            print(f"{mutant.name}: {noticed_by or 'SURVIVED'}", flush=True)
    print(f"{len(wanted) - survivors} of {len(wanted)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
