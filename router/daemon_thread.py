"""A thread that runs functions one after the other and, unlike an executor's, does not delay the end of the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


class DaemonThread:
    """Owns a daemon thread: a function that hangs is left behind at the end of the process."""

    def __init__(self, name: str) -> None:
        self._functions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Runs ``function`` after all submitted before it; after `close` the future is cancelled at once."""
        future: Future[_Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:  # the future's owner handles it
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._closed:
            future.cancel()
        else:
            self._functions.put(run)
        return future

    def close(self) -> None:
        """Starts no further function."""
        self._closed = True
        self._functions.put(lambda: None)

    def _run(self) -> None:
        while not self._closed:
            self._functions.get()()
