"""Takes the port of a server before anything is loaded."""

from __future__ import annotations

import socket


def listening(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A socket that listens at the port.

    Raises:
        SystemExit: The port is taken, or cannot be used.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"--port {port}: {reason}; expected a free port. Choose another with --port.") from None
