"""Tells the service manager that started this process how it is: sd_notify(3) of systemd, for units of Type=notify."""

from __future__ import annotations

import logging
import socket
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)

_VARIABLE = "NOTIFY_SOCKET"


class ServiceManager:
    """Sends messages to the socket that the environment names, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Removes the variable, so that no child of this process sends messages in its name."""
        self._address = environment.pop(_VARIABLE, "")

    def tell(self, not_ready: str) -> None:
        """Reports this process as ready or, with a reason, as not ready. An error is logged."""
        self._send(f"STATUS=not ready: {not_ready}" if not_ready else "READY=1\nSTATUS=ready")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # "@" stands for the zero byte at the beginning of a name that is in no file system.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.sendto(message.encode(), address)
        except OSError as error:
            _log.warning("the service manager cannot be told %r: %s", message.partition("\n")[0], error)
