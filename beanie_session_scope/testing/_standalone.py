"""A single server that is not part of a replica set."""

from __future__ import annotations

from collections.abc import Mapping

from ._group import ServerGroup


class StandaloneServer(ServerGroup):
    """Run one temporary `mongod` without a replica set, so without transactions.

    It is a context manager (`with` and `async with`), and has `start()` and `stop()`.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        set_parameters: Mapping[str, object] | None = None,
        start_timeout: float = 30.0,
    ) -> None:
        """Describe the server without starting it.

        Args:
            port: The port to listen on (int | None); None has a free one chosen.
            set_parameters: Further server parameters by name (Mapping[str, object] | None).
            start_timeout: How long starting may take, in seconds (float).

        Raises:
            ValueError: If an argument makes no sense.
        """
        super().__init__([port], [], set_parameters, start_timeout)

    def __repr__(self) -> str:
        """Show where the server listens.

        Returns:
            A short description (str).
        """
        return f"<StandaloneServer {self.address if self._run else 'not running'}>"

    @property
    def uri(self) -> str:
        """Return the connection string.

        Returns:
            A ``mongodb://`` URI (str).

        Raises:
            ReplicaSetError: If the server is not running.
        """
        return f"mongodb://{self.address}/"

    @property
    def address(self) -> str:
        """Return host and port.

        Returns:
            For example ``127.0.0.1:27017`` (str).

        Raises:
            ReplicaSetError: If the server is not running.
        """
        return self._members()[0].address

    @property
    def pid(self) -> int:
        """Return the process id of the server.

        Returns:
            A process id (int).

        Raises:
            ReplicaSetError: If the server is not running.
        """
        return self._members()[0].pid
