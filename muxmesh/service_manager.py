"""Reports the state of this process to the service manager: sd_notify(3) and sd_watchdog_enabled(3) of systemd.

For units of Type=notify, and those with WatchdogSec, whose process is killed when it sends nothing for so long.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)

_PARTS_OF_WATCHDOG = 3
"""Messages in the time after which a silent process is killed."""


class ServiceManager:
    """Sends messages to the socket that the environment names, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Removes the variables, so that no child of this process sends messages in its name."""
        self._address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", str(os.getpid()))
        is_watched = watchdog_us.isdigit() and pid == str(os.getpid())
        self._alive_every_s = int(watchdog_us) / 1e6 / _PARTS_OF_WATCHDOG if is_watched else None

    async def keep_alive(self) -> None:
        """Reports until it is cancelled that the event loop runs. Returns at once if the watchdog is off."""
        while self._alive_every_s is not None:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._alive_every_s)

    def report(self, not_ready: str) -> None:
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
            _log.warning("the service manager did not get %r: %s", message.partition("\n")[0], error)
