"""A daemon thread that runs functions in order. Unlike an executor's threads, it does not delay the process's exit."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


class DaemonThread:
    """Owns a daemon thread. A function that hangs is abandoned when the process exits."""

    def __init__(self, name: str) -> None:
        self._functions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Runs ``function`` after all functions submitted before it. After `close` the future is cancelled at once."""
        future: Future[_Result] = Future()

        def run() -> None:
            if self._closed:
                future.cancel()
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
        """Cancels the functions that have not started, and ends the thread after the one that runs. Does not wait."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._functions.get_nowait()()
        self._functions.put(lambda: None)

    def _run(self) -> None:
        while not self._closed:
            self._functions.get()()
