"""The errors that `beanie_session_scope.testing` raises."""

from __future__ import annotations


class ReplicaSetError(RuntimeError):
    """Report that a test server or replica set could not do what was asked."""


class MongodNotFoundError(ReplicaSetError):
    """Report that no `mongod` program to run was found."""


class ServerStartError(ReplicaSetError):
    """Report that a server did not start; the message ends with the server's log."""


class PortTakenError(ServerStartError):
    """Report that a server did not start because another process has its port."""


class ServerCommandError(ReplicaSetError):
    """Report that a server answered an administrative command with an error.

    Attributes:
        code: The server's error code (int), or 0 if it gave none.
    """

    def __init__(self, message: str, code: int) -> None:
        """Keep the server's error code beside the message.

        Args:
            message: What failed and why (str).
            code: The server's error code (int).
        """
        super().__init__(message)
        self.code = code
