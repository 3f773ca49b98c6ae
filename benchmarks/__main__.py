"""All benchmarks, one after the other: ``python -m benchmarks [--quick] [NAME ...]``.

Each runs in a process of its own, so that what one leaves behind in memory is not in the way of the
next one. Afterwards their plots, and the tables of docs/benchmarks.md, are drawn from the records.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet

from .page import BENCHMARKS, update
from .record import RESULTS
from .suite import parser


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Yield an environment that names a server."""
    if "MONGODB_URI" in os.environ:
        yield dict(os.environ)
    else:
        with ReplicaSet() as replica_set:
            yield {**os.environ, "MONGODB_URI": replica_set.uri}


def main() -> None:
    arguments = parser(__doc__)
    known = list(BENCHMARKS)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    given = arguments.parse_args()
    if unknown := sorted(set(given.names) - set(known)):
        arguments.error(
            f"no benchmark is called {', '.join(unknown)}: there are {', '.join(known)}"
        )
    options = ["--size", given.size, "--note", given.note, "--results", str(given.results)]
    with server() as environment:
        for name in given.names or known:
            command = [sys.executable, "-m", f"{__package__}.{name}", *options, "--no-plot"]
            subprocess.run(command, env=environment, check=True)
    update(given.results, DRIVER.name, with_page=given.results == RESULTS)


if __name__ == "__main__":
    main()
